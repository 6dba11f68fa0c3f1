"""The products of an lm_head with rows of hidden states: fp32 logits out, gradients accumulated in fp32, whatever the inputs are.

16-bit operands are exact numbers in fp32, so they are upcast, the weight a slab of vocabulary at a time: log-probs are as accurate as
those of an fp32 head, and the extra memory is a slab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.row_ops import Upstream, gradient, statistics
from urlvr_fast.ops.spec import RowSpec, readable

SLAB_ELEMENTS = 1 << 23  # of the weight, upcast at a time: 32 MiB


@dataclass(frozen=True)
class Head:
    """(columns, H) weight; `product_dtype` is what its operands count in (autocast's dtype under autocast)."""

    weight: Tensor
    product_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.product_dtype)

    def operand(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states as the products take them."""
        return hidden.to(self.product_dtype).to(self.dtype)

    def _slabs(self) -> Iterator[tuple[int, int, Tensor]]:
        rows, width = self.weight.shape
        step = rows if self.weight.dtype == self.dtype == self.product_dtype else max(1, SLAB_ELEMENTS // max(1, width))
        for a in range(0, rows, step):
            yield a, min(a + step, rows), self.operand(self.weight[a : a + step])

    def logits(self, operand: Tensor) -> Tensor:
        """(n, H) -> (n, columns)."""
        out = operand.new_empty(len(operand), len(self.weight))
        for a, b, weight in self._slabs():
            torch.mm(operand, weight.t(), out=out[:, a:b])
        return out

    def hidden_gradient(self, d_logits: Tensor) -> Tensor:
        """(n, columns) -> (n, H)."""
        out = d_logits.new_zeros(len(d_logits), self.weight.shape[1])
        for a, b, weight in self._slabs():
            out.addmm_(d_logits[:, a:b], weight)
        return out

    def add_weight_gradient(self, d_logits: Tensor, operand: Tensor, out: Tensor) -> None:
        """Add d_logitsᵀ · operand to the first rows of `out`."""
        out[: len(self.weight)].addmm_(d_logits.t(), operand)


def row_chunks(rows: int, spec: RowSpec, columns: int, dtype: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    """Cut rows so that the logits tile of a piece fits `chunk_bytes` (a piece has at least one row)."""
    widest = columns if spec.shard is None else spec.shard.widest
    step = max(1, chunk_bytes // (widest * dtype.itemsize))
    return (slice(a, min(a + step, rows)) for a in range(0, rows, step))


class HeadRows:
    """Rows of hidden states on their way through the head, and the gradients they leave: one chunk in memory at a time."""

    def __init__(
        self,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        spec: RowSpec,
        columns: int,
        product_dtype: torch.dtype,
        index: Tensor | None = None,  # (n,) int64: which of the N rows these are; None means all, in order
    ) -> None:
        self.hidden, self.spec, self.index = hidden.detach(), spec, index
        self.head = Head(weight.detach()[:columns], product_dtype)
        self.bias = None if bias is None else bias.detach()[:columns].to(self.head.dtype)
        self.count = len(hidden) if index is None else len(index)

    def operand(self, rows: slice) -> Tensor:
        chosen = self.hidden[rows] if self.index is None else self.hidden.index_select(0, self.index[rows])
        chosen = self.head.operand(chosen)
        mask = None if self.spec.mask is None else self.spec.mask[rows]
        return chosen if mask is None else chosen.masked_fill(~mask[:, None], 0)  # 0 · NaN of a masked row would reach dW

    def logits(self, operand: Tensor) -> Tensor:
        return self.head.logits(operand)

    def statistics(self, tile: Tensor, rows: slice) -> Tensor:
        """(STATS, n) packed."""
        return statistics(tile, self.bias, tile.shape[1], self.spec.select(rows))

    def start_gradients(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Buffers in the accumulation dtype for what is wanted."""
        make = self.hidden.new_zeros
        dtype, width = self.head.dtype, self.hidden.shape[1]
        self.d_hidden = make(len(self.hidden), width, dtype=dtype) if hidden else None
        self.d_weight = make(len(self.head.weight), width, dtype=dtype) if weight else None
        self.d_bias = make(len(self.head.weight), dtype=dtype) if bias else None

    def add_gradients(self, tile: Tensor, operand: Tensor, rows: slice, stats: Tensor, upstream: Upstream, keep_tile: bool = False) -> None:
        """The gradients of a chunk, from those of its statistics. Overwrites the tile unless `keep_tile`."""
        spec, target = self.spec.select(rows), self.index[rows] if self.index is not None else None
        alive = self._alive(upstream)
        if alive is not None:
            if len(alive) == 0:
                return
            tile, operand, spec, keep_tile = tile[alive], operand[alive], spec.select(alive), False
            stats = stats[:, alive]
            upstream = {name: g[alive] for name, g in upstream.items()}
            target = torch.arange(rows.start, rows.stop)[alive] if target is None else target[alive]
        bias_wanted = self.d_bias is not None
        d_tile, d_bias = gradient(tile, self.bias, tile.shape[1], spec, stats, upstream, inplace=not keep_tile, bias_wanted=bias_wanted)
        if self.d_bias is not None and d_bias is not None:
            self.d_bias.add_(d_bias)
        if self.d_hidden is not None:
            d_rows = self.head.hidden_gradient(d_tile)
            if target is None:
                self.d_hidden[rows] = d_rows
            else:
                self.d_hidden.index_copy_(0, target, d_rows)
        if self.d_weight is not None:
            self.head.add_weight_gradient(d_tile, operand, self.d_weight)

    def _alive(self, upstream: Upstream) -> Tensor | None:
        """Rows with a gradient, where that is known on the host and dropping the others pays; None otherwise."""
        if not readable(self.hidden) or self.spec.shard is not None:
            return None
        alive = torch.stack([g != 0 for g in upstream.values()]).any(0)
        return alive.nonzero()[:, 0] if int(alive.sum()) <= 0.9 * len(alive) else None

    def finish_gradients(self) -> None:
        """Vocabulary shards each hold a part of the hidden states' gradient."""
        if self.spec.shard is not None and self.d_hidden is not None:
            self.spec.shard.sum_(self.d_hidden)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast was followed when the dtype of the products was chosen; inside, dtypes are ours."""
    return torch.autocast(tensor.device.type, enabled=False)


def weight_gradient(d_weight: Tensor | None, weight: Tensor) -> Tensor | None:
    """The gradient of all of the weight in its dtype, rounded once: 0 beyond vocab_size."""
    if d_weight is None:
        return None
    return torch.nn.functional.pad(d_weight, (0, 0, 0, len(weight) - len(d_weight))).to(weight.dtype)


def bias_gradient(d_bias: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The same for the bias."""
    if d_bias is None or bias is None:
        return None
    return torch.nn.functional.pad(d_bias, (0, len(bias) - len(d_bias))).to(bias.dtype)
