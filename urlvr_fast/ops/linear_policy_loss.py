"""linear_policy_loss: a policy loss from hidden states and the lm_head weight, with its gradients made in the forward.

Each chunk of rows goes through once: product, statistics, coefficient, gradient of the logits, and the two products of the backward. That
is three products. Where the rows of a sequence are joined (one ratio a sequence, which is not 1) chunks are cut at the ends of sequences;
a sequence longer than a chunk has its log-probs taken first and its logits made again, a fourth product for that sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import GradientInForward
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.head import CHUNK_BYTES, HeadRows, parameter_gradient, without_autocast
from urlvr_fast.ops.policy_loss import LossArguments, PreparedLoss, in_one_kernel, loss_arguments, prepare_loss, unless_all
from urlvr_fast.ops.reference import TokenStats, accumulation_dtype
from urlvr_fast.ops.row_ops import policy_gradient_, policy_gradient_out, power_of_two_below, unpack
from urlvr_fast.ops.spec import STATISTICS, readable

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _live_index(loss: PreparedLoss, live: Tensor | None, advantages: Tensor, per_token: bool) -> Tensor | None:
    """(n,) int64: the rows that go through the head, where the host knows them; None means all."""
    rows = loss.rows
    if live is not None:
        index = live
    elif readable(rows.live):
        index = rows.live.nonzero()[:, 0]
    elif readable(advantages) and per_token and not loss.options.regularised and not loss.lives_by_sequence:
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


def _sequence_ends(cu_seqlens: Tensor | None, index: Tensor | None, live: Tensor | None) -> list[int] | None:
    """Where sequences end among the rows that run; None where the host does not know."""
    if cu_seqlens is None or not readable(cu_seqlens):
        return None
    if index is None:
        return cu_seqlens[1:].tolist()
    known = next((rows for rows in (index, live) if rows is not None and readable(rows)), None)
    return None if known is None else torch.searchsorted(known.long().sort().values, cu_seqlens[1:].long()).tolist()


def _groups(rows: HeadRows, joined: bool, ends: list[int] | None) -> list[list[slice]]:
    """The chunks, in groups that a gradient can be made of: one chunk, of whole sequences where those are joined, or the pieces of a
    sequence that is longer than a chunk (of everything, where the host does not know where sequences end)."""
    if not joined:
        return [[chunk] for chunk in rows.chunks()]
    if ends is None:
        return [rows.chunks()] if rows.count else []
    groups, begin, before = [], 0, 0
    for end in [*ends, rows.count]:
        if end - begin > rows.step and before > begin:
            groups.append([slice(begin, before)])
            begin = before
        if end - begin > rows.step:
            groups.append([slice(a, min(a + rows.step, end)) for a in range(begin, end, rows.step)])
            begin = end
        before = end
    if begin < rows.count:
        groups.append([slice(begin, rows.count)])
    return groups


class _Run:
    """One call: every chunk once through the head, with what comes of it."""

    def __init__(self, rows: HeadRows, loss: PreparedLoss, power: Tensor | None, columns: int) -> None:
        self.rows, self.loss, self.columns = rows, loss, columns
        self.differentiated = loss if power is None else replace(loss, rows=loss.rows.divided(power))
        self.values = rows.hidden.new_zeros(len(loss.outputs), len(loss.rows.live), dtype=rows.head.dtype)  # what the loss is made of

    def statistics_of(self, which: Tensor | slice) -> TokenStats:
        return TokenStats(**dict(zip(self.loss.outputs, self.values[:, which], strict=True)))

    def _keep(self, stats: Tensor, chunk: slice) -> None:
        which = self.rows.of_all(chunk)
        for line, name in zip(self.values, self.loss.outputs, strict=True):
            line[which] = stats[STATISTICS.index(name)]

    def _part(self, chunk: slice) -> PreparedLoss:
        return self.differentiated.select(self.rows.of_all(chunk))

    @property
    def _one_kernel(self) -> bool:
        """Whether one kernel makes statistics and gradient of a tile. On the CPU rows that turn out to be clipped are cheaper found
        first and left out of the products."""
        loss, rows = self.loss, self.rows
        may_skip = loss.rows.old_logp is not None or loss.options.rollout_correction == "mask"
        flat = loss.options.self_certainty_coef != 0
        return in_one_kernel(loss, rows.spec) and rows.d_bias is None and not flat and not (may_skip and readable(rows.hidden))

    def chunk(self, chunk: slice, gradients: bool) -> None:
        """All of a chunk whose gradient depends on no other chunk."""
        rows = self.rows
        operand = rows.operand(chunk)
        tile = rows.logits(operand)
        if not gradients or not self._one_kernel:
            stats = rows.statistics(tile, chunk)
            self._keep(stats, chunk)
            if gradients:
                upstream = self._part(chunk).gradients(unpack(stats, rows.spec.wanted))
                rows.add_gradients(tile, operand, chunk, stats, upstream)
            return
        spec, out = rows.spec.select(chunk), rows.narrow_tile(tile)
        call = (tile, rows.bias, *spec.arguments(self.columns), self.columns, spec.flags, spec.backend, *loss_arguments(self._part(chunk)))
        stats, _ = policy_gradient_(*call) if out is None else policy_gradient_out(*call, out)
        self._keep(stats, chunk)
        rows.add_products(tile if out is None else out, operand, rows.of_all(chunk))

    def pieces(self, chunks: list[slice], gradients: bool) -> None:
        """All of some chunks whose gradients depend on each other: log-probs first, then the logits again."""
        rows, together = self.rows, slice(chunks[0].start, chunks[-1].stop)
        packed = []
        for chunk in chunks:
            packed.append(rows.statistics(rows.logits(rows.operand(chunk)), chunk))
            self._keep(packed[-1], chunk)
        if not gradients:
            return
        upstream = self._part(together).gradients(self.statistics_of(rows.of_all(together)))
        for chunk, stats in zip(chunks, packed, strict=True):
            operand = rows.operand(chunk)
            here = slice(chunk.start - together.start, chunk.stop - together.start)
            rows.add_gradients(rows.logits(operand), operand, chunk, stats, {name: g[here] for name, g in upstream.items()})


def _power_to_take_out(loss: PreparedLoss, *dtypes: torch.dtype) -> Tensor | None:
    """0-d power of two near the largest factor of a row's gradient where gradients pass through fp16, in which one divided by some
    thousand tokens would vanish; multiplied back in the backward."""
    rows, o = loss.rows, loss.options
    if torch.float16 not in dtypes or len(rows.weight) == 0:
        return None
    weight = rows.weight if rows.sequence_weight is None else rows.sequence_weight
    policy = torch.where(rows.live, rows.advantages * weight, 0).abs().amax()
    regulariser = rows.regulariser_weight.amax() * (o.beta + abs(o.entropy_coef) + abs(o.self_certainty_coef))
    return power_of_two_below(torch.maximum(policy, regulariser))


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
        gradient on the device and releases them; a second backward raises. They have the dtypes of hidden, weight and bias, rounded
        once (16-bit hidden: a second time where the upstream gradient is no power of two; 1 touches nothing).
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
    backend = choose_backend(backend, device, dtype)
    prepared = prepare_loss(shape, device, dtype, advantages, mask, backend, **loss)
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
        prepared = replace(prepared, rows=prepared.rows.with_live(chosen))
        _check_nothing_lost(prepared, needed)
    index = _live_index(prepared, live, advantages, tuple(advantages.shape) == shape)
    spec = replace(spec, mask=unless_all(prepared.rows.live))
    spec = spec if index is None else spec.select(index)
    spec = spec if spec.mask is None else replace(spec, mask=unless_all(spec.mask))

    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad)
    rows = HeadRows(flat, weight, bias, spec, columns, product_dtype, chunk_bytes, index)
    power = _power_to_take_out(prepared, hidden.dtype, product_dtype) if any(wanted) else None
    with torch.no_grad(), without_autocast(hidden):
        run = _Run(rows, prepared, power, columns)
        rows.start_gradients(*wanted)
        for group in _groups(rows, prepared.joined, _sequence_ends(loss.get("cu_seqlens"), index, live)):
            run.chunk(group[0], any(wanted)) if len(group) == 1 else run.pieces(group, any(wanted))
        rows.finish_gradients()
        value, metrics = prepared.objective(run.statistics_of(slice(None)))
    if not any(wanted):
        return value, metrics

    def deliver(upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows.scale_gradients(upstream if power is None else upstream * power)
        by_hidden = None if rows.d_hidden is None else rows.d_hidden.to(hidden.dtype).view(hidden.shape)
        by_bias = parameter_gradient(rows.d_bias, bias)
        if rows.d_weight is None or grad_weight_out is None:
            return by_hidden, parameter_gradient(rows.d_weight, weight), by_bias
        grad_weight_out[: len(rows.d_weight)].add_(rows.d_weight)
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
