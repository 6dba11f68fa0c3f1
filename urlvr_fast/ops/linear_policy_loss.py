"""linear_policy_loss: a policy loss from hidden states and the lm_head weight, with its gradients made in the forward.

Where a token's gradient depends on its own log-prob alone, each chunk of rows goes through once: product, statistics, coefficient,
gradient of the logits, and the two products of the backward. That is three products. Where the rows of a sequence are joined (one ratio
a sequence), all log-probs come first and the logits of the chunks are made again, unless one chunk holds them all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import GradientInForward
from urlvr_fast.ops.head import HeadRows, bias_gradient, row_chunks, weight_gradient, without_autocast
from urlvr_fast.ops.linear_token_stats import CHUNK_BYTES, join, spread
from urlvr_fast.ops.policy_loss import LossArguments, PreparedLoss, prepare_loss, row_gradients, unless_all
from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.row_ops import unpack
from urlvr_fast.ops.spec import readable

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _live_index(loss: PreparedLoss, live: Tensor | None, advantages: Tensor, per_token: bool) -> Tensor | None:
    """(n,) int64: the rows that go through the head, where the host knows them; None means all."""
    rows = loss.rows
    if live is not None:
        index = live
    elif readable(rows.live):
        index = rows.live.nonzero()[:, 0]
    elif readable(advantages) and per_token and not loss.options.regularised and not loss.joined:
        index = advantages.reshape(-1).nonzero()[:, 0].to(rows.live.device, non_blocking=True)
    else:
        return None
    return None if len(index) == len(rows.live) else index


def _check_live(live: Tensor, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sorted indices on the device, and the same as (N,) bool."""
    if live.dim() != 1 or live.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"live must be a 1-D int64 or int32 tensor of row indices, not {tuple(live.shape)} {live.dtype}")
    index = live.long().sort().values
    if readable(index) and len(index):
        if int(index[0]) < 0 or int(index[-1]) >= rows:
            raise IndexError(f"live must lie in 0..{rows - 1}; it has {int(index[0])}..{int(index[-1])}")
        if bool((index.diff() == 0).any()):
            raise ValueError("live names a row twice")
    index = index.to(device, non_blocking=True)
    return index, torch.zeros(rows, dtype=torch.bool, device=device).index_fill_(0, index, True)


def _check_nothing_lost(loss: PreparedLoss, needed: Tensor) -> None:
    """`live` may leave out dead rows only; checked where that needs no host read."""
    lost = needed & ~loss.rows.live
    if readable(lost) and bool(lost.any()):
        raise ValueError(
            f"live leaves out row {int(lost.nonzero()[0])}, which counts and has a gradient: dead is where mask is False, or where the "
            "advantage is 0 and there is no KL, entropy or self-certainty term (for losses that join a sequence: throughout it)"
        )


def _run(
    rows: HeadRows, loss: PreparedLoss, columns: int, chunk_bytes: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, its metrics, and (in `rows`) the gradients that are wanted."""
    total = len(loss.rows.mask)
    chunks = list(row_chunks(rows.count, rows.spec, columns, rows.head.dtype, chunk_bytes))
    rows.start_gradients(*wanted)
    each: list[Tensor] = []
    retained: tuple[Tensor, Tensor] | None = None
    for chunk in chunks:
        operand = rows.operand(chunk)
        tile = rows.logits(operand)
        each.append(rows.statistics(tile, chunk))
        if not any(wanted):
            continue
        if not loss.joined:
            which = chunk if rows.index is None else rows.index[chunk]
            part = replace(loss, rows=loss.rows.select(which))
            rows.add_gradients(tile, operand, chunk, each[-1], row_gradients(part, unpack(each[-1], rows.spec.wanted)))
        elif len(chunks) == 1:
            retained = operand, tile
    stats = join(each, rows.hidden, rows.head.dtype)
    values = unpack(spread(stats, rows.index, total), rows.spec.wanted)
    if any(wanted) and loss.joined:
        upstream = row_gradients(loss, values)
        for chunk, part_stats in zip(chunks, each, strict=True):
            which = chunk if rows.index is None else rows.index[chunk]
            if retained is None:
                operand = rows.operand(chunk)
                tile = rows.logits(operand)
            else:
                operand, tile = retained
            rows.add_gradients(tile, operand, chunk, part_stats, {name: g[which] for name, g in upstream.items()})
    rows.finish_gradients()
    return loss.objective(values)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    entropy_support: str = "full",
    vocab_size: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    live: Tensor | None = None,
    grad_weight_out: Tensor | None = None,
    shard_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
    **loss: Unpack[LossArguments],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of the tokens that hidden @ weightᵀ predicts, with the gradients made in the forward and never the whole logits.

    Args:
        hidden: (…, H); weight: (V, H); ids: (…). These, temperature … vocab_size, chunk_bytes, shard_group and backend are those of
            `linear_token_stats`. A weight or hidden state that requires no gradient costs none.
        advantages, mask and the keywords in `loss` are those of `policy_loss`; entropy and self-certainty come from the logits.
        live: (n,) int64 indices of the rows to run, for callers who know them on the host; the others must be dead (see `policy_loss`),
            which is checked on the CPU. None: on the CPU, and with per-token advantages that are on the CPU, dead rows are found and
            dropped; otherwise every row runs and nothing waits for the device. Denominators and token counts come from `mask` all the same.
            The metrics' means are over the `live` rows that count, where it is given.
        grad_weight_out: (V, H) fp32 (fp64 for fp64) buffer that the backward adds the weight's gradient to; `weight.grad` is left alone.

    Returns:
        (loss, metrics) as `policy_loss`; the metric `entropy` is always there. Backward multiplies the gradients by the upstream
        gradient on the device, rounds them once to the dtypes of hidden, weight and bias, and releases them; a second backward raises.
        Under no_grad: one product, no gradient. All rows dead: loss 0 and zero gradients.

    Raises:
        As `linear_token_stats` and `policy_loss`; ValueError where `live` leaves out a row that has a gradient, or `grad_weight_out`
        does not fit.
    """
    product_dtype = checks.check_linear(hidden, weight, bias)
    checks.check_chunk_bytes(chunk_bytes)
    shape, device, dtype = tuple(hidden.shape[:-1]), hidden.device, accumulation_dtype(product_dtype)
    _check_buffer(grad_weight_out, weight, dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    prepared = prepare_loss(shape, device, dtype, advantages, mask, **loss)
    spec, columns = checks.row_spec(
        prepared.outputs,
        ids,
        shape,
        len(weight),
        device,
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
    if live is not None:
        needed = prepared.rows.live
        live, chosen = _check_live(live, len(flat), device)
        prepared = replace(prepared, rows=replace(prepared.rows, live=prepared.rows.mask & chosen))
        _check_nothing_lost(prepared, needed)
    index = _live_index(prepared, live, advantages, tuple(advantages.shape) == shape)
    spec = replace(spec, mask=unless_all(prepared.rows.live))
    spec = spec if index is None else spec.select(index)
    spec = spec if spec.mask is None else replace(spec, mask=unless_all(spec.mask))

    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad)
    rows = HeadRows(flat, weight, bias, spec, columns, product_dtype, index)
    with torch.no_grad(), without_autocast(hidden):
        value, metrics = _run(rows, prepared, columns, chunk_bytes, wanted)
    if not any(wanted):
        return value, metrics
    d_hidden, d_weight, d_bias = rows.d_hidden, rows.d_weight, rows.d_bias

    def deliver(upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden = None if d_hidden is None else d_hidden.mul_(upstream).to(hidden.dtype).view(hidden.shape)
        by_bias = None if d_bias is None else bias_gradient(d_bias.mul_(upstream), bias)
        if d_weight is None or grad_weight_out is None:
            return by_hidden, None if d_weight is None else weight_gradient(d_weight.mul_(upstream), weight), by_bias
        grad_weight_out[: len(d_weight)].addcmul_(d_weight, upstream.to(d_weight.dtype))
        return by_hidden, None, by_bias

    return GradientInForward.apply("linear_policy_loss", value, deliver, hidden, weight, bias), metrics


def _check_buffer(buffer: Tensor | None, weight: Tensor, dtype: torch.dtype) -> None:
    if buffer is None:
        return
    if buffer.shape != weight.shape or buffer.dtype != dtype or buffer.device != weight.device:
        raise ValueError(
            f"grad_weight_out must be {tuple(weight.shape)} {dtype} on {weight.device}, "
            f"not {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}"
        )
    if buffer.requires_grad:
        raise ValueError("grad_weight_out is a plain buffer: it must not require grad")
    if not weight.requires_grad:
        raise ValueError("grad_weight_out was given, but weight does not require grad")
