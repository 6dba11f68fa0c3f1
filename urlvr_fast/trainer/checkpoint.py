"""Checkpoints: a directory that `from_pretrained` and vLLM load, plus what training needs to go on.

Everything is safetensors and JSON. A checkpoint is written to a temporary directory, flushed to the disk and renamed, so that a
directory called `step-000150` is complete whatever happened while it was written. Sampling seeds and the order of prompts follow
from the run's seed and the step number, so the step number is all the state there is besides weights and optimiser.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from urlvr_fast.errors import ExplainedError

# In a folder of their own: vLLM takes every .safetensors file beside the model's for a part of it.
STATE_FILE = "trainer/state.json"
OPTIMIZER_FILE = "trainer/optimizer.safetensors"


class CheckpointError(ExplainedError, RuntimeError):
    """A checkpoint that could not be written or read. The message says what is left and what to do."""


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and (p / STATE_FILE).is_file()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(run_dir: Path, step: int, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, *, keep: int = 0) -> Path:
    """Write `checkpoints/step-<step>` and remove all but the newest `keep` (0 keeps all). Raises CheckpointError when it cannot."""
    parent = run_dir / "checkpoints"
    target = parent / f"step-{step:06d}"
    temporary = parent / f".writing-step-{step:06d}"
    try:
        for leftover in parent.glob(".writing-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        (temporary / "trainer").mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file(_optimizer_tensors(model, optimizer), str(temporary / OPTIMIZER_FILE))
        (temporary / STATE_FILE).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if target.exists():  # a resumed run that repeats a step
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _disk_is_full(error):
            raise
        newest = next(reversed(checkpoints(run_dir)), None)
        kept = f"the newest complete checkpoint is {newest}" if newest else "there is no complete checkpoint"
        raise CheckpointError(
            f"no space left for the checkpoint of step {step} in {parent}; {kept}. Free some space and use --resume"
        ) from error
    for old in checkpoints(run_dir)[:-keep] if keep else []:
        shutil.rmtree(old)
    return target


def load_optimizer(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Restore the optimiser's state in place and return the step it belongs to."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    tensors = load_file(str(checkpoint / OPTIMIZER_FILE))
    for name, parameter in model.named_parameters():
        saved = {key: tensors[f"{name}|{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}|{key}" in tensors}
        if saved:
            if saved["exp_avg"].shape != parameter.shape:
                raise CheckpointError(f"{checkpoint}: the optimiser state of {name} belongs to another model")
            optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in saved.items()}
    return int(state["step"])


def _optimizer_tensors(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _disk_is_full(error: Exception) -> bool:
    """safetensors reports the operating system's error as text, so that the errno is not always there to read."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or "os error 28" in str(error)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
