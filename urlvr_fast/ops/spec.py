"""How rows of logits are read: everything about a call except the logits and the bias, and how it is handed to a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from urlvr_fast.ops.layout import ENTROPY_ON_KEEP, Stat
from urlvr_fast.ops.reference import TokenStats
from urlvr_fast.ops.shards import Shard

Keep = tuple[Tensor, Tensor]
STATISTICS = tuple(stat.name.lower() for stat in list(Stat)[: len(TokenStats._fields)])
LINES = {name: line for line, name in enumerate(STATISTICS)}
assert TokenStats._fields == STATISTICS, "the packed lines begin with the fields of TokenStats"


@dataclass(frozen=True)
class RowSpec:
    """All tensors are flattened, contiguous and on the logits' device."""

    wanted: frozenset[str]
    ids: Tensor | None = None  # (N,) int64, global
    temperature: float | Tensor = 1.0  # (N,) in the accumulation dtype
    softcap: float | None = None
    scale: float = 1.0
    mask: Tensor | None = None  # (N,)
    keep: Keep | None = None  # int64
    entropy_on_keep: bool = False
    shard: Shard | None = None
    backend: str = "torch"

    def select(self, rows: Tensor | slice) -> RowSpec:
        """These rows alone. A slice costs nothing; indices pick the keep set apart, which on CUDA reads its size."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        keep = None if self.keep is None else select_keep(self.keep, rows)
        return replace(self, ids=pick(self.ids), temperature=temperature, mask=pick(self.mask), keep=keep)

    @property
    def flags(self) -> int:
        bits = ENTROPY_ON_KEEP if self.entropy_on_keep else 0
        for name in self.wanted:
            bits |= 1 << LINES[name]
        return bits

    def arguments(self, columns: int) -> tuple:
        """What the registered ops take between the bias and `columns` (see row_ops)."""
        per_row = isinstance(self.temperature, Tensor)
        crow, col = (None, None) if self.keep is None else self.keep
        offset, total = (0, columns) if self.shard is None else (self.shard.offset, self.shard.total)
        temperatures, temperature = (self.temperature, 1.0) if per_row else (None, self.temperature)
        return (self.ids, self.mask, temperatures, crow, col, temperature, self.softcap or 0.0, self.scale, offset, total)


def readable(tensor: Tensor) -> bool:
    """Whether its contents may steer Python: on the CPU, outside torch.compile. Elsewhere that waits for the device or breaks the graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def select_keep(keep: Keep, rows: Tensor | slice) -> Keep:
    """The keep set of some rows. Offsets of a slice stay those of the whole, so `crow` need not begin at 0."""
    crow, col = keep
    if isinstance(rows, slice):
        return crow[rows.start : rows.stop + 1], col
    lengths = crow.diff()[rows]
    new_crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shift = (crow[:-1][rows] - new_crow[:-1]).repeat_interleave(lengths)
    return new_crow, col[shift + torch.arange(len(shift), device=col.device)]


def grids(tensor: Tensor) -> list[tuple[int, Tensor]]:
    """Split (…, V) with any leading strides into (first row, (A, B, V) view) pieces in row order, without a copy; nearly always one."""
    if tensor.is_contiguous():  # what `_split` would find too, in more time than a small kernel takes
        return [(0, tensor.view(1, -1, tensor.shape[-1]))] if tensor.numel() else []
    return list(_split(0, tensor)) if tensor.numel() else []


def _split(start: int, t: Tensor) -> Iterator[tuple[int, Tensor]]:
    merged: list[tuple[int, int]] = []  # (size, stride) of the leading dimensions, merged where they lie end to end
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) <= 2:
        (a, a_stride), (b, b_stride) = [(1, 0)] * (2 - len(merged)) + merged
        yield start, t.as_strided((a, b, t.shape[-1]), (a_stride, b_stride, 1))
    else:
        rows = t[0].numel() // t.shape[-1]
        for i in range(t.shape[0]):
            yield from _split(start + i * rows, t[i])
