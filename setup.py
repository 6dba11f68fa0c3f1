"""Where the packages are, and the compiled kernels.

`kernels/` stands beside `urlvr_fast/` in the checkout and installs as `urlvr_fast.kernels`. `csrc/` becomes one plain shared library,
`urlvr_fast/_C.abi3.so`, which knows nothing of Python and uses torch's stable ABI: one build serves torch 2.11 and newer. It is made
where there is a C++ compiler, with its CUDA part where there are a CUDA torch and the nvcc of its CUDA as well. Without them the
installation goes on without it, and `urlvr doctor` says what is missing. URLVR_FAST_BUILD=0 leaves it out; TORCH_CUDA_ARCH_LIST, torch's
own variable, says for which GPUs the CUDA part is compiled (as "9.0a" for a Hopper alone: half of the time).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

CXX = ["-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Not fused by the compiler either: what rows.h says is rounded alike in every kernel, so that a row's bits do not depend on which one ran.
NVCC = [
    "-O3",
    "-std=c++20",
    "-fmad=false",
    "--expt-relaxed-constexpr",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    "-DUSE_CUDA",
]
ARCHITECTURES = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]


def compiled_kernels() -> dict:
    """Arguments of setup() that build csrc."""
    if os.environ.get("URLVR_FAST_BUILD") == "0":
        return {}
    compiler = os.environ.get("CXX", "c++")
    try:
        from torch.utils import cpp_extension
    except ImportError:
        return skip("torch is not installed in the environment that builds; use pip install --no-build-isolation")
    if shutil.which(compiler.split()[0]) is None:
        return skip(f"there is no C++ compiler ({compiler})")
    root = Path(__file__).parent
    folders, endings = ["csrc", "csrc/cpu"], [".cpp"]
    make, flags = cpp_extension.CppExtension, {"cxx": CXX}
    if cuda_compiler(cpp_extension.CUDA_HOME):
        folders, endings = [*folders, "csrc/cuda"], [".cpp", ".cu"]
        architectures = [] if chosen_architectures() else ARCHITECTURES
        make, flags = cpp_extension.CUDAExtension, {"cxx": CXX, "nvcc": NVCC + architectures}
    sources = [str(path.relative_to(root)) for folder in folders for path in sorted((root / folder).iterdir()) if path.suffix in endings]
    extension = make("urlvr_fast._C", sources, extra_compile_args=flags, py_limited_api=True)
    if "cudart" in extension.libraries:
        link_cuda_runtime(extension)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def chosen_architectures() -> bool:
    """Whether TORCH_CUDA_ARCH_LIST chooses; those before sm_80, which images often list, lack instructions of the kernels."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").split(";")
    too_old = [name for name in listed if name[:1].isdigit() and float(name.split("+")[0].rstrip("af")) < 8]
    kept = [name for name in listed if name and name not in too_old]
    if too_old:
        print(f"urlvr_fast: the CUDA kernels need sm_80 or newer: not compiled for {', '.join(too_old)}", file=sys.stderr)
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(kept)
    return bool(kept)


def cuda_compiler(home: str | None) -> bool:
    """Whether the nvcc under `home` can build for this torch: it must be there, and of the CUDA that torch was built with."""
    import torch

    if home is None or torch.version.cuda is None:
        return False
    nvcc = Path(home) / "bin" / "nvcc"
    if not nvcc.exists():
        skip(f"there is no {nvcc}", "the CUDA kernels")
        return False
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    fits = release is not None and release[1] == torch.version.cuda.split(".")[0]
    if not fits:
        skip(f"{nvcc} is of another CUDA than torch's {torch.version.cuda}", "the CUDA kernels")
    return fits


def link_cuda_runtime(extension) -> None:
    """By its file: the one that torch itself loads, where pip brought it, has no name that `-lcudart` finds, and torch looks for a toolkit
    where the `nvcc` on the PATH lies, which may be a link or a script."""
    import torch

    major = torch.version.cuda.split(".")[0]
    folders = [*Path(torch.__file__).parents[1].glob("nvidia/cu*/lib"), *Path(torch.__file__).parents[1].glob("nvidia/cuda_runtime/lib")]
    found = [path for folder in [*folders, *map(Path, extension.library_dirs)] for path in folder.glob(f"libcudart.so.{major}")]
    if found:
        extension.libraries.remove("cudart")
        extension.extra_link_args = [*extension.extra_link_args, str(found[0])]


def skip(reason: str, what: str = "the compiled kernels") -> dict:
    print(f"urlvr_fast: building without {what}: {reason}", file=sys.stderr)
    return {}


setup(
    packages=[*find_packages(include=["urlvr_fast", "urlvr_fast.*"]), "urlvr_fast.kernels"],
    package_dir={"urlvr_fast": "urlvr_fast", "urlvr_fast.kernels": "kernels"},
    package_data={"urlvr_fast": ["py.typed", "mcs.yaml", "bundled/*/*"]},
    **compiled_kernels(),
)
