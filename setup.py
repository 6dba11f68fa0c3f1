"""Where the packages are: `kernels/` stands beside `urlvr_fast/` in the checkout and installs as `urlvr_fast.kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["urlvr_fast", "urlvr_fast.*"]), "urlvr_fast.kernels"],
    package_dir={"urlvr_fast": "urlvr_fast", "urlvr_fast.kernels": "kernels"},
    package_data={"urlvr_fast": ["py.typed", "bundled/*/*"]},
)
