"""What `pip wheel .` makes, installed where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, built from a copy of the tracked files and installed into an empty folder."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", target, wheel], check=True, capture_output=True)
    return target


def python(installed, code):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_imports_and_computes(installed):
    out = python(
        installed,
        "import torch, urlvr_fast, urlvr_fast.kernels\n"
        "stats = urlvr_fast.token_stats(torch.zeros(1, 4), torch.tensor([2]), outputs=('logp',))\n"
        "print(urlvr_fast.__file__, urlvr_fast.kernels.__file__, round(stats.logp.item(), 4), sep='\\n')",
    )
    package, kernels, logp = out.split()
    assert Path(package).is_relative_to(installed)
    assert Path(kernels) == installed / "urlvr_fast" / "kernels" / "__init__.py"
    assert float(logp) == -1.3863  # log 1/4


def test_the_wheel_carries_the_base_model_and_no_stray_packages(installed):
    assert {p.name for p in installed.iterdir() if p.is_dir() and not p.name.endswith(".dist-info")} == {"urlvr_fast", "bin"}
    out = python(
        installed,
        "from urlvr_fast.trainer.base_model import bundled_model_path\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "path = bundled_model_path()\n"
        "AutoModelForCausalLM.from_pretrained(path); AutoTokenizer.from_pretrained(path)\n"
        "print(path)",
    )
    assert Path(out.strip()).is_relative_to(installed)
    assert (installed / "urlvr_fast" / "py.typed").is_file()


def test_the_command_answers_without_loading_torch_models():
    """`urlvr --help` and a bad option must not cost a minute of imports."""
    urlvr = Path(sys.executable).parent / "urlvr"
    help_text = subprocess.run([urlvr, "--help"], capture_output=True, text=True, timeout=60)
    for command in ("train", "eval", "make-base", "report", "doctor"):
        assert command in help_text.stdout
    options = subprocess.run([urlvr, "train", "--options"], capture_output=True, text=True, timeout=60)
    assert "trainer.stop_after = None" in options.stdout
    bad = subprocess.run([urlvr, "train", "trainer.stepz=3"], capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert "trainer.steps" in bad.stderr
    unknown = subprocess.run([urlvr, "eval", "bundled", "trainer.steps=3"], capture_output=True, text=True, timeout=60)
    assert unknown.returncode == 2
