"""The base models of the experiments: six arithmetic models of graded quality and one for Countdown, all bundled with the package.

The arithmetic ones are the quick start's recipe (`trainer/base_model.py`) laid out over fewer steps: the same data in the same order of
lessons, learnt less well. `urlvr make-base --steps N` makes them again.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

GRADED = ("arithmetic-800", "arithmetic-1300", "arithmetic-1600", "arithmetic-2000", "arithmetic-3000", "arithmetic")  # weak to strong
BASES = (*GRADED, "countdown")


def path_of(base: str) -> Path:
    from urlvr_fast.trainer.base_model import bundled_model_path

    return bundled_model_path(base)


@cache
def fingerprint(base: str) -> str:
    """Hash of the weights: a result belongs to them, not to a name."""
    return hashlib.sha256((path_of(base) / "model.safetensors").read_bytes()).hexdigest()[:16]
