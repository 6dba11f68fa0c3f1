"""An lm_head and rows of hidden states: fp32 logits out, gradients accumulated in fp32, whatever the inputs are.

Logits come from the operands as they are, with fp32 results, or where the device has no such product from operands that are upcast: 16-bit
numbers are exact in fp32. The weight is upcast a slab of vocabulary at a time, so that the extra memory is a slab. Either way log-probs are
as accurate as those of an fp32 head. Where 16-bit products are faster the gradient of the logits is rounded to 16 bits for its two
(`products.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from urlvr_fast.ops import products
from urlvr_fast.ops.layout import Stat
from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.row_ops import Upstream, gradient, scale_rows_, statistics
from urlvr_fast.ops.spec import RowSpec, readable

CHUNK_BYTES = 256 << 20
SLAB_SHARE = 8  # an eighth of chunk_bytes holds the part of the weight that is upcast at a time
VECTOR_BYTES = 128  # of vectors a row in a call: statistics, loss rows, what metrics need


class Head:
    """weight: (columns, H). product_dtype: what its operands count in (autocast's dtype under autocast)."""

    def __init__(self, weight: Tensor, product_dtype: torch.dtype, slab_bytes: int) -> None:
        self.weight, self.product_dtype = weight, product_dtype
        self.dtype = accumulation_dtype(product_dtype)
        self.narrow = products.narrow(weight.device, product_dtype)
        self.operand_dtype = product_dtype if self.narrow else self.dtype
        # Under autocast a copy, which torch would make too.
        self._narrow_weight = weight.to(product_dtype) if self.narrow else None
        self._wide = self.narrow and products.wide(weight.device)
        self._whole = weight.dtype == self.dtype == product_dtype  # fp32 or fp64 throughout: nothing to upcast
        self._slab: Tensor | None = None
        self._slab_limit = max(1, slab_bytes // max(1, weight.shape[1] * self.dtype.itemsize))
        self._slab_rows = min(len(weight), self._slab_limit)
        self.fills = not (self._whole and products.onednn(weight.device, self.dtype))  # whether `logits` can use given memory

    def operand(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states as the products take them."""
        return hidden.to(self.product_dtype).to(self.operand_dtype)

    def bytes_needed(self, columns: int) -> tuple[int, int]:
        """Memory of products with so many columns: at any number of rows, and for each row that is in the head (its logits, what is made
        of them, its hidden state)."""
        width, wide, narrow = self.weight.shape[1], self.dtype.itemsize, self.product_dtype.itemsize
        slab = 0 if self._wide or self._whole else min(columns, self._slab_limit)
        if not self.narrow:
            return slab * width * wide, (columns + slab + 2 * width) * wide
        # With slabs: the upcast weight; the gradient in 16 bits, of a slab transposed, with its part of dW in 16 bits and in fp32.
        return slab * width * (2 * wide + narrow), columns * (wide + narrow) + slab * narrow + 2 * width * wide

    def release(self) -> None:
        """Give back what only products need: there will be no more."""
        self._narrow_weight = self._slab = None

    def _slabs(self) -> Iterator[tuple[int, int, Tensor]]:
        if self._whole:
            yield 0, len(self.weight), self.weight
            return
        if self._slab is None:
            self._slab = self.weight.new_empty(self._slab_rows, self.weight.shape[1], dtype=self.dtype)
        for a in range(0, len(self.weight), self._slab_rows):
            part = self.weight[a : a + self._slab_rows].to(self.product_dtype)
            yield a, a + len(part), self._slab[: len(part)].copy_(part)

    def logits(self, operand: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, H) -> (n, columns) in the accumulation dtype, in `out` where it `fills` that."""
        if not self.fills:
            return products.new_product(operand, self.weight.t())
        out = operand.new_empty(len(operand), len(self.weight), dtype=self.dtype) if out is None else out
        if self._wide:
            assert self._narrow_weight is not None
            products.product(operand, self._narrow_weight.t(), out)
            return out
        operand = operand.to(self.dtype)
        for a, b, weight in self._slabs():
            if products.onednn(out.device, out.dtype):
                out[:, a:b] = products.new_product(operand, weight.t())
            else:
                products.product(operand, weight.t(), out[:, a:b])
        return out

    def hidden_gradient(self, d_logits: Tensor, out: Tensor) -> None:
        """(n, columns) -> `out` (n, H)."""
        if self._narrow_weight is not None:
            products.product(d_logits, self._narrow_weight, out)
        elif self._whole:
            out.copy_(products.new_product(d_logits, self.weight))
        else:
            out.zero_()
            for a, b, weight in self._slabs():
                out.add_(products.new_product(d_logits[:, a:b], weight))

    def weight_gradient(self, d_logits: Tensor, operand: Tensor, out: Tensor, *, add: bool) -> None:
        """d_logitsᵀ · operand into `out` (columns, H), or added to it."""
        step = self._slab_rows if self.narrow and not self._wide else max(1, len(self.weight))  # a slab of results before they are added
        for a in range(0, len(self.weight), step):
            products.product(d_logits[:, a : a + step].t(), operand, out[a : a + step], add=add)

    def weight_sum(self) -> Tensor:
        """(H,) sum over the vocabulary."""
        return sum((weight.sum(0, dtype=self.dtype) for _, _, weight in self._slabs()), self.weight.new_zeros((), dtype=self.dtype))


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
        chunk_bytes: int,
        index: Tensor | None = None,  # (n,) int64: which of the N rows these are; None means all, in order
    ) -> None:
        self.hidden, self.spec, self.index = hidden.detach(), spec, index
        self.head = Head(weight.detach()[:columns], product_dtype, chunk_bytes // SLAB_SHARE)
        self.bias = None if bias is None else bias.detach()[:columns].to(self.head.dtype).contiguous()
        self.count = len(hidden) if index is None else len(index)
        self.step = self._rows_of_a_chunk(chunk_bytes)
        self._tile: Tensor | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def _rows_of_a_chunk(self, chunk_bytes: int) -> int:
        """So that a chunk and everything else that is neither an input nor a gradient fit `chunk_bytes`; at least one row."""
        widest = len(self.head.weight) if self.spec.shard is None else self.spec.shard.widest  # every rank cuts alike
        fixed, row = self.head.bytes_needed(widest)
        return max(1, (chunk_bytes - fixed - len(self.hidden) * VECTOR_BYTES) // row)

    def chunks(self) -> list[slice]:
        return [slice(a, min(a + self.step, self.count)) for a in range(0, self.count, self.step)]

    def of_all(self, rows: slice) -> Tensor | slice:
        """Which of the N rows these are."""
        return rows if self.index is None else self.index[rows]

    def operand(self, rows: slice) -> Tensor:
        chosen = self.hidden[rows] if self.index is None else self.hidden.index_select(0, self.index[rows])
        chosen = self.head.operand(chosen)
        mask = None if self.spec.mask is None else self.spec.mask[rows]
        return chosen if mask is None else chosen.masked_fill(~mask[:, None], 0)  # 0 · NaN of a masked row would reach dW

    def logits(self, operand: Tensor, *, reuse: bool = True) -> Tensor:
        """(n, columns) fp32; with `reuse` in memory that the next call may take again: fresh pages cost more than a pass over them."""
        if not reuse or not self.head.fills:
            return self.head.logits(operand)
        if self._tile is None:
            self._tile = operand.new_empty(min(self.step, self.count), len(self.head.weight), dtype=self.head.dtype)
        return self.head.logits(operand, self._tile[: len(operand)])

    def statistics(self, tile: Tensor, rows: slice) -> Tensor:
        """(STATS, n) packed."""
        return statistics(tile, self.bias, tile.shape[1], self.spec.select(rows), all_finite=self.bias is None)

    def start_gradients(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Buffers for what is wanted. A row of `d_hidden` is complete after its chunk and is stored in the hidden states' dtype, unless
        vocabulary shards have yet to be added up; what adds up over chunks is in the accumulation dtype."""
        dtype, (count, width) = self.head.dtype, self.hidden.shape
        whole = self.index is None and self.count > 0
        if hidden:
            stored = self.hidden.dtype if self.spec.shard is None else dtype
            self.d_hidden = self.hidden.new_empty(count, width, dtype=stored)
            if not whole:
                self.d_hidden.zero_()
        if weight:
            self.d_weight = self.hidden.new_empty(len(self.head.weight), width, dtype=dtype)
            self._weight_begun = False
        if bias:
            self.d_bias = self.hidden.new_zeros(len(self.head.weight), dtype=dtype)
        self._weight_sum: Tensor | None = None
        self._weight_row: Tensor | None = None  # (H,) what is added to every row of d_weight at the end

    def add_gradients(self, tile: Tensor, operand: Tensor, rows: slice, stats: Tensor, upstream: Upstream, keep_tile: bool = False) -> None:
        """The gradients of a chunk, from those of its statistics. Overwrites the tile unless `keep_tile`."""
        spec, target = self.spec.select(rows), self.of_all(rows)
        alive = self._alive(upstream)
        if alive is not None:
            if self.d_hidden is not None and self.index is None:
                self.d_hidden[rows] = 0
            if len(alive) == 0:
                return
            tile, operand, spec, keep_tile = tile[alive], operand[alive], spec.select(alive), False
            stats, upstream = stats[:, alive], {name: g[alive] for name, g in upstream.items()}
            target = alive + rows.start if isinstance(target, slice) else target[alive]
        upstream, flat = self._flat(upstream, stats, spec)
        out, wanted = self.narrow_tile(tile), self.d_bias is not None
        d_tile, d_bias = gradient(tile, self.bias, tile.shape[1], spec, stats, upstream, inplace=not keep_tile, bias_wanted=wanted, out=out)
        if self.d_bias is not None and d_bias is not None:
            self.d_bias.add_(d_bias)
        self.add_products(d_tile, operand, target, flat)

    def narrow_tile(self, tile: Tensor) -> Tensor | None:
        """Memory for the gradient of a tile where its products take it in 16 bits and the kernel can round; None: it comes in fp32."""
        rounds = self.head.narrow and self.spec.backend in ("torch", "triton")
        return torch.empty_like(tile, dtype=self.head.operand_dtype) if rounds else None

    def add_products(self, d_tile: Tensor, operand: Tensor, target: Tensor | slice, flat: Tensor | None = None) -> None:
        """dX and dW of a chunk from d loss / d logits, to which `flat` (n,) comes in every column."""
        d_tile = d_tile.to(self.head.operand_dtype)
        if self.d_hidden is not None:
            exact = flat is None and d_tile.dtype == self.d_hidden.dtype  # the product's own rounding is the only one
            whole = isinstance(target, slice) and (exact or self.d_hidden.dtype == self.head.dtype)
            d_rows = self.d_hidden[target] if whole else operand.new_empty(operand.shape, dtype=self.head.dtype)
            self.head.hidden_gradient(d_tile, d_rows)
            if flat is not None:
                self._weight_sum = self.head.weight_sum() if self._weight_sum is None else self._weight_sum
                d_rows.addr_(flat, self._weight_sum)
            if isinstance(target, Tensor):
                self.d_hidden.index_copy_(0, target, d_rows.to(self.d_hidden.dtype))
            elif not whole:
                self.d_hidden[target] = d_rows
        if self.d_weight is not None:
            self.head.weight_gradient(d_tile, operand, self.d_weight, add=self._weight_begun)
            self._weight_begun = True
            if flat is not None:
                row = flat @ operand.to(flat.dtype)
                self._weight_row = row if self._weight_row is None else self._weight_row + row

    def _alive(self, upstream: Upstream) -> Tensor | None:
        """Rows with a gradient, where that is known on the host and dropping the others pays; None otherwise."""
        if not readable(self.hidden) or self.spec.shard is not None:
            return None
        alive = torch.stack([g != 0 for g in upstream.values()]).any(0)
        return alive.nonzero()[:, 0] if int(alive.sum()) <= 0.9 * len(alive) else None

    def _flat(self, upstream: Upstream, stats: Tensor, spec: RowSpec) -> tuple[Upstream, Tensor | None]:
        """Take the part of the gradient that is the same in every column, −g_SC / V + g_mean / V, out of the tile: of rank one, it needs
        no product, and does not vanish among 16-bit numbers. Where a bias may hold −inf (a column without a gradient) and under a softcap
        (which bends it) it stays in the tile."""
        if self.bias is not None or spec.softcap is not None or not {"self_certainty", "mean_logit"} & set(upstream):
            return upstream, None
        rest = dict(upstream)
        zero = torch.zeros_like(stats[Stat.FINITE])
        certainty, mean = rest.pop("self_certainty", zero), rest.pop("mean_logit", zero)
        rest["lse"] = rest.get("lse", zero) + certainty  # self-certainty is lse − mean − log V
        flat = (mean - certainty) * (spec.scale / spec.temperature) / stats[Stat.FINITE]
        return rest, flat if spec.mask is None else flat.masked_fill(~spec.mask, 0)

    def finish_gradients(self) -> None:
        """What was left for the end. Vocabulary shards each hold a part of the hidden states' gradient."""
        if self.d_weight is not None and not self._weight_begun:
            self.d_weight.zero_()
        if self.d_weight is not None and self._weight_row is not None:
            self.d_weight.add_(self._weight_row)
        if self.spec.shard is not None and self.d_hidden is not None:
            self.spec.shard.sum_(self.d_hidden)
        self._tile = None
        self.head.release()

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients by a 0-d factor, on the device; nothing is read or written where it is 1."""
        for value in (self.d_hidden, self.d_weight):
            if value is not None and value.numel():
                scale_rows_(value, factor, None, self.spec.backend)
        if self.d_bias is not None:
            self.d_bias.mul_(factor)


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast was followed when the dtype of the products was chosen; inside, dtypes are ours."""
    return torch.autocast(tensor.device.type, enabled=False)


def parameter_gradient(d_weight: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """The gradient of all of a weight or bias in its dtype, rounded once: 0 beyond vocab_size."""
    if d_weight is None or weight is None:
        return None
    missing = len(weight) - len(d_weight)
    if missing:
        d_weight = torch.cat([d_weight, d_weight.new_zeros(missing, *d_weight.shape[1:])])
    return d_weight.to(weight.dtype)
