"""Which implementation runs an op: the `backend=` argument first, then URLVR_FAST_BACKEND, then the best one this build has.

A backend that was named and cannot be had is an error, never a quiet switch to another one. `torch` is plain PyTorch and always there.
"""

from __future__ import annotations

import os

BACKENDS = ("torch", "cpp", "triton", "cuda")
_MISSING = {
    "cpp": "not in this build: it has no compiled CPU kernels",
    "triton": "not in this build: it has no Triton kernels",
    "cuda": "not in this build: it has no compiled CUDA kernels",
}


def available_backends() -> dict[str, str]:
    """Name -> "available", or the reason why that backend cannot be used. In order of declaration."""
    return {name: _MISSING.get(name, "available") for name in BACKENDS}


def choose_backend(backend: str | None = None) -> str:
    """The backend that runs a call.

    Args:
        backend: a name out of `BACKENDS`; None asks URLVR_FAST_BACKEND, and where that is unset or empty the build's best.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: the backend exists, but not in this build.
    """
    source = "backend="
    if backend is None:
        backend, source = os.environ.get("URLVR_FAST_BACKEND") or "torch", "URLVR_FAST_BACKEND="
    state = available_backends()
    if backend not in state:
        raise ValueError(f"{source}{backend!r} is not a backend; the names are {', '.join(BACKENDS)}")
    if state[backend] != "available":
        usable = ", ".join(name for name, reason in state.items() if reason == "available")
        raise RuntimeError(f"{source}{backend!r} is {state[backend]}. This build has: {usable}")
    return backend
