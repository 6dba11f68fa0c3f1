"""linear_token_stats: token statistics from hidden states and the lm_head weight, without the whole logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import first_order
from urlvr_fast.ops.head import CHUNK_BYTES, HeadRows, parameter_gradient, without_autocast
from urlvr_fast.ops.layout import STATS
from urlvr_fast.ops.reference import TokenStats, accumulation_dtype
from urlvr_fast.ops.row_ops import power_of_two_below, unpack
from urlvr_fast.ops.spec import STATISTICS, RowSpec, readable

SAVE_BYTES = 2 << 30


class _LinearTokenStats(Function):
    """The packed statistics, (STATS, N)."""

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
    ) -> Tensor:
        rows = HeadRows(hidden, weight, bias, spec, columns, product_dtype, chunk_bytes, index)
        stats, saved = rows.hidden.new_zeros(STATS, rows.count, dtype=rows.head.dtype), []
        if not any(ctx.needs_input_grad):
            save_bytes = 0
        with without_autocast(hidden):
            for chunk in rows.chunks():
                save_bytes -= (chunk.stop - chunk.start) * columns * rows.head.dtype.itemsize
                tile = rows.logits(rows.operand(chunk), reuse=save_bytes < 0)
                stats[:, chunk] = rows.statistics(tile, chunk)
                saved.append(tile if save_bytes >= 0 else None)
                del tile  # before the next one is made
        ctx.save_for_backward(hidden, weight, bias, index, stats, *saved)
        ctx.op, ctx.single_use = "linear_token_stats", False
        ctx.spec, ctx.columns, ctx.product_dtype, ctx.chunk_bytes = spec, columns, product_dtype, chunk_bytes
        return stats.clone() if index is None else stats.new_zeros(STATS, len(hidden)).index_copy_(1, index, stats)

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, index, stats, *saved = ctx.saved_tensors
        upstream = upstream if index is None else upstream[:, index]
        given = {name: upstream[STATISTICS.index(name)] for name in checks.differentiable(ctx.spec.wanted)}
        power = None
        if torch.float16 in (hidden.dtype, ctx.product_dtype) and given and upstream.numel():  # or small gradients would vanish on the way
            power = power_of_two_below(torch.stack([g.abs().amax() for g in given.values()]).amax())
            given = {name: g / power for name, g in given.items()}
        rows = HeadRows(hidden, weight, bias, ctx.spec, ctx.columns, ctx.product_dtype, ctx.chunk_bytes, index)
        rows.start_gradients(*ctx.needs_input_grad[:3])
        with without_autocast(hidden):
            for chunk, kept in zip(rows.chunks(), saved, strict=True):
                operand = rows.operand(chunk)
                tile = rows.logits(operand) if kept is None else kept
                part = {name: g[chunk] for name, g in given.items()}
                rows.add_gradients(tile, operand, chunk, stats[:, chunk], part, keep_tile=kept is not None)
                del tile
            rows.finish_gradients()
        if power is not None:
            rows.scale_gradients(power)
        d_hidden = None if rows.d_hidden is None else rows.d_hidden.to(hidden.dtype)
        return d_hidden, parameter_gradient(rows.d_weight, weight), parameter_gradient(rows.d_bias, bias), *(None,) * 6


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
        backend=backend,
    )
    index = None
    if spec.mask is not None and readable(hidden):  # elsewhere this would need a host read
        index = spec.mask.nonzero()[:, 0]
        spec = spec.select(index)
    budget = {"auto": save_bytes, "logits": float("inf"), "recompute": 0}[save]
    flat = hidden.reshape(-1, hidden.shape[-1])
    stats = _LinearTokenStats.apply(flat, weight, bias, spec, index, columns, product_dtype, budget, chunk_bytes)
    return TokenStats(*(None if value is None else value.view(shape) for value in unpack(stats, spec.wanted)))
