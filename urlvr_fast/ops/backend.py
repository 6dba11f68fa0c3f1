"""Which kernels run an op: the `backend=` argument first, then URLVR_FAST_BACKEND, then the best that this machine has for the device.

A backend that was named and cannot be had is an error, never a quiet switch to another one. `torch` is plain PyTorch and always there.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

BACKENDS = ("torch", "cpp", "triton", "cuda")
# The choice where nobody makes one, by device, best first. CUDA C++ would stand before Triton for the ops and architectures where it was
# measured to be faster; nothing was measured yet.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "torch")}
# What an op computes in. fp64 exists for tests of gradients: GPU kernels do not have it.
DTYPES = {
    "torch": (torch.float32, torch.float64),
    "cpp": (torch.float32, torch.float64),
    "triton": (torch.float32,),
    "cuda": (torch.float32,),
}


def _load_library() -> str:
    """Load the compiled library; "" or why it cannot be used."""
    path = next(iter(sorted(Path(__file__).parents[1].glob("_C*.so"))), None)
    if path is None:
        return "not in this build: there was no C++ compiler or no torch; install both, then urlvr_fast with --no-build-isolation"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"broken: {path.name} does not load ({error}); install urlvr_fast again"
    return ""


# Found out once, at import: torch.compile then sees constants.
_COMPILED = _load_library()
_TRITON = "" if importlib.util.find_spec("triton") is not None else "not installed: pip install triton"
_HAS_CUDA = hasattr(torch.ops.urlvr_fast, "cuda_statistics")
_CUDA_CPP = _COMPILED or ("" if _HAS_CUDA else "not in this build: there was no nvcc or no CUDA torch")
_MISSING = {"torch": "", "cpp": _COMPILED, "triton": _TRITON, "cuda": _CUDA_CPP}


def _interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device_of(name: str) -> str:
    """The type of device whose tensors a backend takes; "" for any."""
    return {"torch": "", "cpp": "cpu", "triton": "cpu" if _interpreting() else "cuda", "cuda": "cuda"}[name]


def available_backends() -> dict[str, str]:
    """Name -> "available", or the reason why that backend cannot be used. In order of declaration."""
    no_gpu = "not usable: there is no CUDA GPU"
    gpu = torch.cuda.is_available()
    return {name: _MISSING[name] or ("available" if gpu or _device_of(name) != "cuda" else no_gpu) for name in BACKENDS}


def instruction_set() -> str:
    """The one that the C++ kernels chose on this processor: avx512, avx2 or portable."""
    return torch.ops.urlvr_fast.cpp_instruction_set("")


def choose_backend(
    backend: str | None = None, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, off_model: bool = False
) -> str:
    """The backend that runs a call on tensors of that device and dtype.

    Args:
        backend: a name out of `BACKENDS`; None asks URLVR_FAST_BACKEND, and where that is unset or empty `PREFERENCE`.
        off_model: the tensors may be on the host while the model is on a GPU, as rewards are: there URLVR_FAST_BACKEND does not speak of
            them if it names a backend that takes tensors of another device.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the one that was named is not in this build, or does not take tensors of that device or dtype; or nobody named one
            and the compiled library is there and does not load.
    """
    device = torch.device(device).type
    source = "backend="
    if backend is None:
        backend, source = os.environ.get("URLVR_FAST_BACKEND") or None, "URLVR_FAST_BACKEND="
        if off_model and backend in BACKENDS and _device_of(backend) not in ("", device):
            backend = None
    if backend is None:
        return _best(device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"{source}{backend!r} is not a backend; the names are {', '.join(BACKENDS)}")
    if _MISSING[backend]:
        usable = ", ".join(name for name, reason in _MISSING.items() if not reason)
        raise RuntimeError(f"{source}{backend!r} is {_MISSING[backend]}. This build has: {usable}")
    if _device_of(backend) not in ("", device):
        raise RuntimeError(f"{source}{backend!r} takes {_device_of(backend)} tensors; these are on {device}")
    if dtype not in DTYPES[backend]:
        raise RuntimeError(f"{source}{backend!r} does not compute in {dtype}; use backend='torch'")
    return backend


def _best(device: str, dtype: torch.dtype) -> str:
    for name in PREFERENCE.get(device, ("torch",)):
        if _MISSING[name].startswith("broken"):
            raise RuntimeError(f"backend {name!r} is {_MISSING[name]}, or set URLVR_FAST_BACKEND=torch to go on without it")
        if not _MISSING[name] and dtype in DTYPES[name]:
            return name
    return "torch"


@cache
def kernels(name: str) -> Any:
    """The functions of a kernel package (see `layout.py`)."""
    from urlvr_fast.ops import rows

    if name == "torch":
        return rows
    if name == "triton":
        from urlvr_fast import kernels as triton

        return triton
    ops = torch.ops.urlvr_fast
    compiled = {f: getattr(ops, f"{name}_{f}").default for f in ("statistics", "gradient", "loss_rows", "policy", "join", "objective")}
    if name == "cuda":
        return SimpleNamespace(**compiled, scale=ops.cuda_scale.default)
    return SimpleNamespace(**compiled, scale=rows.scale, advantages=ops.cpp_advantages.default)
