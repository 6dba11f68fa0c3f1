"""The ops that torch knows, `torch.ops.urlvr_fast.*`: rows of logits to packed statistics, and to the gradient of any mix of them.

`token_stats` carries autograd, `token_stats_backward` makes a new tensor, `token_stats_backward_` writes over the logits, `…_out` into a
tensor of any dtype. `policy_gradient`, `…_` and `…_out` make the gradient of a policy loss in the forward alike, `scale_rows_` multiplies
it in the backward. Each runs the kernel package of `backend` (see `layout.py`); the functions of those names here call the ops (see
`registered.py`). Below them: `statistics` and `gradient`, what the other files call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.ops.autograd import first_order
from urlvr_fast.ops.backend import kernels
from urlvr_fast.ops.layout import GRADS, RAW, STATS
from urlvr_fast.ops.reference import TokenStats, accumulation_dtype
from urlvr_fast.ops.registered import define, library
from urlvr_fast.ops.rows import LOWEST, Partials, finish, safe
from urlvr_fast.ops.shards import Shard
from urlvr_fast.ops.spec import LINES, STATISTICS, RowSpec, grids

_ROWS = (
    "Tensor? bias, Tensor? ids, Tensor? mask, Tensor? temperatures, Tensor? crow, Tensor? col, float temperature, float softcap, "
    "float scale, SymInt id_offset, SymInt total, SymInt columns, int flags, str backend"
)
_LOSS = "Tensor loss, int present, int kind, int kl, int correction, float[] numbers, bool scaled"
_BACKWARD = "Tensor stats, Tensor upstream, int given, bool bias_wanted"
DIFFERENTIABLE_FLAGS = (1 << GRADS) - 1  # the flags' bits of the lines that have a gradient


# ---- running a kernel over logits of any leading shape ---------------------------------------------------------------------------------


def _rows_of(logits: Tensor) -> int:
    return math.prod(logits.shape[:-1])


def _columns(tensor: Tensor, columns: int) -> Tensor:
    return tensor if columns == tensor.shape[-1] else tensor[..., :columns]


def _zero_beyond(tensor: Tensor, columns: int) -> None:
    if columns != tensor.shape[-1]:
        tensor[..., columns:].zero_()


def _pieces(logits: Tensor, columns: int, rows: tuple) -> list[tuple[slice, tuple]]:
    """(rows, their arguments for a kernel package, without the flags) for each piece of the logits that has regular strides."""
    pieces = grids(_columns(logits, columns))
    if len(pieces) == 1:
        return [(slice(0, _rows_of(logits)), (pieces[0][1], *rows))]
    bias, ids, mask, temperatures, crow, col, *numbers = rows
    out = []
    for start, grid in pieces:
        here = slice(start, start + grid.shape[0] * grid.shape[1])
        per_row = (None if value is None else value[here] for value in (ids, mask, temperatures))
        offsets = None if crow is None else crow[here.start : here.stop + 1]
        out.append((here, (grid, bias, *per_row, offsets, col, *numbers)))
    return out


def _whole(part: slice, lines: Tensor) -> Tensor:
    """The columns of packed lines that a piece reads or writes: the tensor itself where the piece is everything."""
    return lines if part.start == 0 and part.stop == lines.shape[1] else lines[:, part].contiguous()


def _packed(logits: Tensor, lines: int) -> Tensor:
    return logits.new_empty((lines, _rows_of(logits)), dtype=accumulation_dtype(logits.dtype))


def _statistics(logits: Tensor, *arguments: Any) -> Tensor:
    *rows, columns, flags, backend = arguments
    out = _packed(logits, STATS)
    for part, call in _pieces(logits, columns, tuple(rows)):
        target = _whole(part, out)
        kernels(backend).statistics(*call, flags, target)
        if target is not out:
            out[:, part] = target
    return out


def _target(out: Tensor | None, part: slice, grid: Tensor) -> Tensor:
    """Where a piece's gradient goes: into the contiguous `out`, or over the logits themselves."""
    if out is None:
        return grid
    return out.view(-1, out.shape[-1])[part].view(*grid.shape[:2], -1)[..., : grid.shape[2]]


def _gradient(logits: Tensor, out: Tensor | None, arguments: tuple) -> Tensor:
    """Returns the bias's gradient, empty where it is not wanted."""
    *rows, columns, flags, backend, stats, upstream, given, bias_wanted = arguments
    stats, upstream = stats.contiguous(), upstream.contiguous()
    bias_grad = stats.new_zeros(columns if bias_wanted else 0)
    for part, call in _pieces(logits, columns, tuple(rows)):
        lines = _whole(part, stats), _whole(part, upstream)
        target = _target(out, part, call[0])
        kernels(backend).gradient(*call, flags, *lines, given, target, bias_grad if bias_wanted else None)
    _zero_beyond(logits if out is None else out, columns)
    return bias_grad


def _overwritten(tensor: Tensor) -> None:
    """Kernels write past autograd's eyes: tell it, so that it raises where another operation had saved what is gone."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _contiguous(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = _contiguous(logits)
    return out, _gradient(logits, out, arguments)


def _backward_(logits: Tensor, *arguments: Any) -> Tensor:
    bias_grad = _gradient(logits, None, arguments)
    _overwritten(logits)
    return bias_grad


def _check_out(logits: Tensor, out: Tensor, backend: str) -> None:
    if out.dtype != logits.dtype and backend not in ("torch", "triton"):
        raise TypeError(f"backend {backend!r} writes a gradient in the logits' dtype, {logits.dtype}, not in {out.dtype}")


def _backward_out(logits: Tensor, *arguments: Any) -> Tensor:
    *rest, out = arguments
    _check_out(logits, out, rest[-5])
    return _gradient(logits, out, tuple(rest))


def _policy(logits: Tensor, out: Tensor | None, arguments: tuple) -> tuple[Tensor, Tensor]:
    """The packed statistics, and the power of two that each row's gradient was divided by (empty unless `scaled`)."""
    *rows, columns, flags, backend, loss, present, kind, kl, correction, numbers, scaled = arguments
    stats, row_scale = _packed(logits, STATS), loss.new_empty(loss.shape[1] if scaled else 0)
    for part, call in _pieces(logits, columns, tuple(rows)):
        packed = _whole(part, stats)
        target, scale = _target(out, part, call[0]), row_scale[part] if scaled else None
        kernels(backend).policy(*call, flags, _whole(part, loss), present, kind, kl, correction, numbers, packed, target, scale)
        if packed is not stats:
            stats[:, part] = packed
    _zero_beyond(logits if out is None else out, columns)
    return stats, row_scale


def _policy_gradient(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = _contiguous(logits)
    stats, row_scale = _policy(logits, out, arguments)
    return stats, out, row_scale


def _policy_gradient_(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = _policy(logits, None, arguments)
    _overwritten(logits)
    return out


def _policy_gradient_out(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, out = arguments
    _check_out(logits, out, rest[-8])
    return _policy(logits, out, tuple(rest))


def _scale_rows_(gradient: Tensor, factor: Tensor, row_scale: Tensor | None, backend: str) -> None:
    """gradient (…, V) times `factor` (0-d) and, where there is one, a power of two a row. Nothing is read or written where that is 1."""
    for start, grid in grids(gradient):
        rows = slice(start, start + grid.shape[0] * grid.shape[1])
        kernels(backend).scale(grid, factor, None if row_scale is None else row_scale[rows])
    _overwritten(gradient)


# ---- the ops ---------------------------------------------------------------------------------------------------------------------------


def _bias_shape(arguments: tuple) -> tuple[int]:
    return (arguments[-7] if arguments[-1] else 0,)  # columns, bias_wanted


def _scale_shape(logits: Tensor, arguments: tuple) -> tuple[int]:
    return (_rows_of(logits) if arguments[-1] else 0,)  # scaled


def _small(logits: Tensor, shape: tuple[int]) -> Tensor:
    return logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))


token_stats = define("token_stats", f"(Tensor logits, {_ROWS}) -> Tensor", _statistics, lambda logits, *_: _packed(logits, STATS))
token_stats_backward = define(
    "token_stats_backward",
    f"(Tensor logits, {_ROWS}, {_BACKWARD}) -> (Tensor, Tensor)",
    _backward,
    lambda logits, *rest: (_contiguous(logits), _small(logits, _bias_shape(rest))),
)
token_stats_backward_ = define(
    "token_stats_backward_",
    f"(Tensor(a!) logits, {_ROWS}, {_BACKWARD}) -> Tensor",
    _backward_,
    lambda logits, *rest: _small(logits, _bias_shape(rest)),
)
token_stats_backward_out = define(
    "token_stats_backward_out",
    f"(Tensor logits, {_ROWS}, {_BACKWARD}, Tensor(a!) out) -> Tensor",
    _backward_out,
    lambda logits, *rest: _small(logits, _bias_shape(rest[:-1])),
)
policy_gradient = define(
    "policy_gradient",
    f"(Tensor logits, {_ROWS}, {_LOSS}) -> (Tensor, Tensor, Tensor)",
    _policy_gradient,
    lambda logits, *rest: (_packed(logits, STATS), _contiguous(logits), _small(logits, _scale_shape(logits, rest))),
)
policy_gradient_ = define(
    "policy_gradient_",
    f"(Tensor(a!) logits, {_ROWS}, {_LOSS}) -> (Tensor, Tensor)",
    _policy_gradient_,
    lambda logits, *rest: (_packed(logits, STATS), _small(logits, _scale_shape(logits, rest))),
)
policy_gradient_out = define(
    "policy_gradient_out",
    f"(Tensor logits, {_ROWS}, {_LOSS}, Tensor(a!) out) -> (Tensor, Tensor)",
    _policy_gradient_out,
    lambda logits, *rest: (_packed(logits, STATS), _small(logits, _scale_shape(logits, rest[:-1]))),
)
scale_rows_ = define(
    "scale_rows_",
    "(Tensor(a!) gradient, Tensor factor, Tensor? row_scale, str backend) -> ()",
    _scale_rows_,
    lambda *_: None,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    logits, bias, ids, mask, temperatures, crow, col, *rest = inputs
    ctx.save_for_backward(logits, bias, ids, mask, temperatures, crow, col, output)
    ctx.op, ctx.single_use, ctx.rest = "token_stats", False, rest


@first_order
def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    *rows, stats = ctx.saved_tensors
    given = ctx.rest[-2] & DIFFERENTIABLE_FLAGS
    gradient, bias_grad = token_stats_backward(*rows, *ctx.rest, stats, upstream[:GRADS].contiguous(), given, ctx.needs_input_grad[1])
    return gradient, bias_grad if ctx.needs_input_grad[1] else None, *(None,) * 13


torch.library.register_autograd("urlvr_fast::token_stats", _differentiate, setup_context=_save, lib=library)


# ---- what the other files call ---------------------------------------------------------------------------------------------------------

Upstream = dict[str, Tensor]  # name of a statistic -> gradient of the loss by it, (N,)


def statistics(logits: Tensor, bias: Tensor | None, columns: int, spec: RowSpec, *, all_finite: bool = False) -> Tensor:
    """The packed statistics (STATS, N) of the first `columns` of logits (…, V); over all ranks where there are shards.

    all_finite: no logit is −inf, so that shards need not tell each other how many are.
    """
    if spec.shard is None:
        return token_stats(logits, bias, *spec.arguments(columns), columns, spec.flags, spec.backend)
    sums = token_stats(logits, bias, *spec.arguments(columns), columns, spec.flags | RAW, spec.backend)
    return finish(_merge_shards(Partials(*sums), spec, spec.shard, all_finite), spec.flags, spec.keep is not None, spec.mask)


def gradient(
    logits: Tensor,
    bias: Tensor | None,
    columns: int,
    spec: RowSpec,
    stats: Tensor,
    upstream: Upstream | Tensor,
    *,
    inplace: bool,
    bias_wanted: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """d loss / d logits, in memory of its own, in the logits' (`inplace`) or in `out`, contiguous and of any dtype; and d loss / d bias
    (columns,) where that is wanted. `upstream` by name, or (GRADS, N) with 0 in what was not asked for."""
    if isinstance(upstream, Tensor):
        lines, given = upstream, spec.flags & DIFFERENTIABLE_FLAGS
    else:
        lines, given = stats.new_zeros(GRADS, stats.shape[1]), 0
        for name, value in upstream.items():
            line = STATISTICS.index(name)
            lines[line] = value
            given |= 1 << line
    call = (logits, bias, *spec.arguments(columns), columns, spec.flags, spec.backend, stats, lines, given, bias_wanted)
    if out is not None:
        bias_grad = token_stats_backward_out(*call, out)
        return out, bias_grad if bias_wanted else None
    if inplace:
        bias_grad = token_stats_backward_(*call)
        return logits, bias_grad if bias_wanted else None
    out, bias_grad = token_stats_backward(*call)
    return out, bias_grad if bias_wanted else None


def power_of_two_below(size: Tensor) -> Tensor:
    """2^⌊log2 size⌋, and 1 where that is no number above 0: what is taken out of a 16-bit gradient."""
    power = size.log2().floor().exp2()
    return torch.where(power.isfinite() & (power > 0), power, 1)


def unpack(stats: Tensor, wanted: frozenset[str] | set[str]) -> TokenStats:
    """The lines that were asked for, (N,) each."""
    lines: list[Tensor | None] = [None] * len(STATISTICS)
    for name in wanted:
        index = LINES[name]
        value = stats[index] if index < GRADS else stats[index].detach()
        lines[index] = value.long() if name == "argmax" else value
    return TokenStats(*lines)


def _exchanged(spec: RowSpec, all_finite: bool) -> list[str]:
    """The sums that shards tell each other: five for the differentiable statistics of finite logits."""
    wanted = spec.wanted
    lines = {
        "m": True,
        "s": True,
        "t": "entropy" in wanted and not spec.entropy_on_keep,
        "total": "self_certainty" in wanted or "mean_logit" in wanted,
    }
    lines |= {"finite": lines["total"] and not all_finite, "x_id": spec.ids is not None}
    lines |= {"s2": "sum_p2" in wanted, "second": "prob_gap" in wanted, "argmax": "argmax" in wanted}
    lines |= dict.fromkeys(("keep_m", "keep_s", "keep_t", "keep_id"), spec.keep is not None)
    return [name for name, needed in lines.items() if needed]


def _merge_shards(parts: Partials, spec: RowSpec, shard: Shard, all_finite: bool) -> Partials:
    """One exchange; merged in float64 and in rank order, so every rank holds the same bits."""
    dtype, names = parts.m.dtype, _exchanged(spec, all_finite)
    received = shard.gather(torch.stack([getattr(parts, name) for name in names])).double()  # (ranks, lines, N)
    zero = torch.zeros_like(received[:, 0])
    every = Partials(*(received[:, names.index(name)] if name in names else zero for name in Partials._fields))
    if "finite" not in names:
        sizes = torch.tensor(shard.sizes, dtype=zero.dtype, device=zero.device)
        every = every._replace(finite=sizes[:, None].expand_as(zero))
    m, keep_m = every.m.amax(0), every.keep_m.amax(0)
    shift = (every.m - safe(m)).clamp(min=LOWEST)
    keep_shift = (every.keep_m - safe(keep_m)).clamp(min=LOWEST)
    w, keep_w = shift.exp(), keep_shift.exp()
    top = torch.cat([every.m, every.second]).topk(2, dim=0).values
    merged = Partials(
        m=m,
        s=(w * every.s).sum(0),
        t=(w * (every.t + shift * every.s)).sum(0),
        total=(every.total + shift * every.finite).sum(0),
        finite=every.finite.sum(0),
        x_id=every.x_id.amax(0),
        bad_id=parts.bad_id,  # ids are global: all ranks see alike
        s2=(w * w * every.s2).sum(0),
        second=top[1],
        argmax=every.argmax.gather(0, every.m.argmax(0, keepdim=True))[0],
        keep_m=keep_m,
        keep_s=(keep_w * every.keep_s).sum(0),
        keep_t=(keep_w * (every.keep_t + keep_shift * every.keep_s)).sum(0),
        keep_id=every.keep_id.sum(0),
    )
    return Partials(*(value.to(dtype) for value in merged))
