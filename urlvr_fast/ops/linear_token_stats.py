"""linear_token_stats: token statistics from hidden states and the lm_head weight, without the whole logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import first_order
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.head import HeadRows, bias_gradient, row_chunks, weight_gradient, without_autocast
from urlvr_fast.ops.reference import TokenStats, accumulation_dtype
from urlvr_fast.ops.rows import RowSpec, RowStats, readable, row_statistics

CHUNK_BYTES = 256 << 20
SAVE_BYTES = 2 << 30


def spread(values: Tensor, index: Tensor | None, rows: int) -> Tensor:
    """(n,) numbers of some rows -> (N,), 0 elsewhere."""
    return values if index is None else values.new_zeros(rows).index_copy_(0, index, values)


def join(chunks: list[RowStats], spec: RowSpec, dtype: torch.dtype) -> RowStats:
    """The statistics of the chunks, end to end."""
    if not chunks:
        device = torch.device("cpu") if spec.ids is None else spec.ids.device
        return row_statistics(torch.zeros(0, 1, dtype=dtype, device=device), None, spec)
    values = (None if column[0] is None else torch.cat(column) for column in zip(*(c.values for c in chunks), strict=True))
    return RowStats(TokenStats(*values), *(torch.cat(column) for column in zip(*(c[1:] for c in chunks), strict=True)))


class _LinearTokenStats(Function):
    """The requested statistics, (N,) each, in the order of `TokenStats`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,
        spec: RowSpec,  # of the rows that count
        index: Tensor | None,  # (n,) which of the N rows those are
        columns: int,
        product_dtype: torch.dtype,
        save_bytes: float,
        chunk_bytes: int,
    ) -> tuple[Tensor, ...]:
        rows = HeadRows(hidden, weight, bias, spec, columns, product_dtype, index)
        chunks, saved, each = [], [], []
        if not any(ctx.needs_input_grad):
            save_bytes = 0
        with without_autocast(hidden):
            for chunk in row_chunks(rows.count, spec, columns, rows.head.dtype, chunk_bytes):
                tile = rows.logits(rows.operand(chunk))
                each.append(rows.statistics(tile, chunk))
                chunks.append(chunk)
                save_bytes -= tile.nbytes
                saved.append(tile if save_bytes >= 0 else None)
            stats = join(each, spec, rows.head.dtype)
        named = {name: value for name, value in zip(TokenStats._fields, stats.values, strict=True) if value is not None}
        outputs = {name: spread(value, index, len(hidden)) for name, value in named.items()}
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(value for name, value in outputs.items() if not checks.differentiable([name])))
        ctx.save_for_backward(hidden, weight, bias, index, stats.values.entropy, *stats[1:], *saved)
        ctx.op, ctx.single_use = "linear_token_stats", False
        ctx.spec, ctx.columns, ctx.product_dtype, ctx.chunks, ctx.names = spec, columns, product_dtype, chunks, tuple(named)
        return tuple(outputs.values())

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, entropy, *rest = ctx.saved_tensors
        stats, saved = RowStats(TokenStats(entropy=entropy), *rest[:5]), rest[5:]
        given = {name: g if index is None else g[index] for name, g in zip(ctx.names, upstream, strict=True) if g is not None}
        if not given:
            return (None,) * 9
        rows = HeadRows(hidden, weight, bias, ctx.spec, ctx.columns, ctx.product_dtype, index)
        rows.start_gradients(*ctx.needs_input_grad[:3])
        with without_autocast(hidden):
            for chunk, kept in zip(ctx.chunks, saved, strict=True):
                operand = rows.operand(chunk)
                tile = rows.logits(operand) if kept is None else kept
                values = TokenStats(entropy=None if entropy is None else entropy[chunk])
                part = RowStats(values, *(value[chunk] for value in stats[1:]))
                rows.add_gradients(tile, operand, chunk, part, {name: g[chunk] for name, g in given.items()}, keep_tile=kept is not None)
            rows.finish_gradients()
        d_hidden = None if rows.d_hidden is None else rows.d_hidden.to(hidden.dtype)
        return d_hidden, weight_gradient(rows.d_weight, weight), bias_gradient(rows.d_bias, bias), *(None,) * 6


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor | None,
    *,
    outputs: str | Iterable[str],
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    entropy_support: str = "full",
    vocab_size: int | None = None,
    save: str = "auto",
    save_bytes: int = SAVE_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    shard_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` of hidden @ weightᵀ, computed a chunk of rows at a time.

    Args:
        hidden: (…, H) fp16, bf16, fp32 or fp64, differentiable.
        weight: (V, H) of the same dtype, differentiable (its gradient is not computed where it does not require one).
        ids, outputs, temperature … vocab_size, shard_group, backend: as in `token_stats`. Masked rows are dropped before the product (on
            the CPU). With `shard_group`, `weight` and `bias` are this rank's slice and the gradient of `hidden` comes back summed over
            the ranks.
        save: what a backward finds. "logits" keeps every tile of logits (fp32), "recompute" none, "auto" those that fit `save_bytes`.
        save_bytes: for "auto".
        chunk_bytes: size of a tile of logits; it bounds the extra memory, whatever N is (but a tile has at least one row).

    Products are taken in fp32 (fp64) also of 16-bit operands, gradients are accumulated in it and rounded once to their tensor's dtype.
    Under autocast the operands are first rounded to autocast's dtype, as `torch.nn.functional.linear` would; their own dtypes may then
    differ.

    Returns:
        `TokenStats` with the leading shape of `hidden`, as `token_stats`.

    Raises:
        As `token_stats`; TypeError where hidden and weight differ in dtype outside autocast.
    """
    choose_backend(backend)
    names = checks.requested(outputs)
    product_dtype = checks.check_linear(hidden, weight, bias)
    if save not in ("auto", "logits", "recompute"):
        raise ValueError(f"save={save!r} must be 'auto', 'logits' or 'recompute'")
    checks.check_chunk_bytes(chunk_bytes)
    shape, dtype = tuple(hidden.shape[:-1]), accumulation_dtype(product_dtype)
    spec, columns = checks.row_spec(
        names,
        ids,
        shape,
        len(weight),
        hidden.device,
        dtype,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        mask=mask,
        keep=keep,
        entropy_support=entropy_support,
        vocab_size=vocab_size,
        shard_group=shard_group,
    )
    index = None
    if spec.mask is not None and readable(hidden):  # elsewhere this would need a host read
        index = spec.mask.nonzero()[:, 0]
        spec = spec.select(index)
    budget = {"auto": save_bytes, "logits": float("inf"), "recompute": 0}[save]
    flat = hidden.reshape(-1, hidden.shape[-1])
    values = _LinearTokenStats.apply(flat, weight, bias, spec, index, columns, product_dtype, budget, chunk_bytes)
    return TokenStats(**{name: value.view(shape) for name, value in zip(names, values, strict=True)})
