"""What is measured on: scenarios, and the tensors that one of them stands for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATISTICS = ("logp", "entropy", "self_certainty")
CHECKED_ROWS = 16
BLOCK = 1 << 24  # logits drawn at a time: the fp32 numbers behind 16-bit logits never exist together


@dataclass(frozen=True)
class Scenario:
    rows: int
    columns: int
    dtype: str = "bf16"
    data: str = "random"  # random: Gaussian with sigma 3; peaked: on 80 % of the rows one column has p = 0.9
    masked: float = 0.0  # share of the rows that do not count

    def __str__(self) -> str:
        return f"{self.rows} × {self.columns} {self.dtype}, {self.data}, {self.masked:.0%} masked"

    @property
    def logit_bytes(self) -> int:
        return self.rows * self.columns * DTYPES[self.dtype].itemsize


class _Produced(Function):
    """Logits as a model hands them over: the output of an operation, which may be overwritten."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, make: Callable[[], Tensor]) -> Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class Rows:
    """The tensors of a scenario. The rows are those of `sequences` sequences of equal length, end to end."""

    def __init__(self, scenario: Scenario, device: torch.device) -> None:
        n, v = scenario.rows, scenario.columns
        generator = torch.Generator(device).manual_seed(1000 * n + v)
        here = {"generator": generator, "device": device}
        self.scenario, self.device = scenario, device
        self.ids = torch.randint(v, (n,), **here)
        self.logits = _draw_logits(scenario, self.ids, here)
        counts = torch.rand(n, **here) >= scenario.masked
        counts[0] = True
        self.mask = counts if scenario.masked else None
        self.live = int(counts.sum())
        self.sequences = 8 if n % 8 == 0 and n > 8 else 1
        self.length = n // self.sequences
        self.advantages_of_sequences = torch.randn(self.sequences, **here)
        self.advantages = self.advantages_of_sequences.repeat_interleave(self.length)
        self.upstream = {name: torch.randn(n, **here) for name in STATISTICS}
        # Some peers give the last row of a sequence no loss, so the last row of all is not among those compared.
        comparable = max(n - 1, 1)
        self.checked = torch.arange(0, comparable, max(1, comparable // CHECKED_ROWS))[:CHECKED_ROWS]
        self.checked = self.checked[(self.checked + 1) % self.length != 0] if self.length > 1 else self.checked
        self.checked = self.checked.to(device)

    @cached_property
    def _memory(self) -> Tensor:
        return torch.empty_like(self.logits)

    def leaf(self) -> Tensor:
        """The logits as something to differentiate by. No copy."""
        return self.logits.detach().requires_grad_()

    def overwritable(self) -> Tensor:
        """A copy of the logits that a backward may write over; the same memory at every call."""
        self._memory.copy_(self.logits)
        return produced(self._memory)

    def destination(self) -> Tensor:
        return self._memory


def produced(memory: Tensor) -> Tensor:
    """`memory` itself, as the output of an operation."""
    seed = torch.zeros((), device=memory.device, requires_grad=True)
    return _Produced.apply(seed, memory.detach)


def _draw_logits(scenario: Scenario, ids: Tensor, here: dict[str, Any]) -> Tensor:
    n, v = scenario.rows, scenario.columns
    logits = torch.empty(n, v, dtype=DTYPES[scenario.dtype], device=ids.device)
    step = max(1, BLOCK // v)
    for start in range(0, n, step):
        part = ids[start : start + step]
        x = torch.randn(len(part), v, **here).mul_(3)
        if scenario.data == "peaked":
            sharp = torch.nonzero(torch.rand(len(part), **here) < 0.8)[:, 0]
            x[sharp, part[sharp]] = -math.inf
            x[sharp, part[sharp]] = torch.logsumexp(x[sharp], -1) + math.log(0.9 / 0.1)
        logits[start : start + step] = x
    return logits


def available_memory(device: torch.device) -> int:
    """Bytes that a scenario may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_needed(scenario: Scenario, per_logit: int = 0) -> int:
    """Bytes of the logits, of a second tensor like them, and of `per_logit` bytes of intermediates for each logit."""
    return 2 * scenario.logit_bytes + per_logit * scenario.rows * scenario.columns + (BLOCK * 8)
