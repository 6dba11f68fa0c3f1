"""Row statistics and their gradient in plain torch: the closed form that the `torch` backend runs, in bounded memory.

With p = softmax(x), H the entropy, V_f the number of finite columns and ℓ_j = log p_j, upstream gradients g give

    dL/dx_j = p_j (a + b ℓ_j) + c [j = id] + d [x_j finite]
    a = g_lse + g_sc − g_logp − g_H · H      b = −g_H      c = g_logp      d = (g_mean − g_sc) / V_f

A keep set moves the terms of logp (and of the entropy, if it is taken there) to the softmax over that set. Row maximum m and log Σ e^(x
− m) stay apart, so that a common offset of the logits costs no digit. Sums over V run over fixed-width segments: a row's result does not
depend on how many rows or threads there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from urlvr_fast.ops.reference import TokenStats, accumulation_dtype
from urlvr_fast.ops.shards import Shard

BLOCK_ELEMENTS = 1 << 21  # scratch of one step: 8 MiB per fp32 temporary, whatever N is
SEGMENT = 4096  # columns summed in one go
LOWEST = -1e20  # stands for −inf where it meets a probability of 0

Keep = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RowSpec:
    """How rows of logits are read: everything about a call except the logits and the bias."""

    wanted: frozenset[str]
    ids: Tensor | None = None  # (N,) int64, global
    temperature: float | Tensor = 1.0  # (N,) in the accumulation dtype
    softcap: float | None = None
    scale: float = 1.0
    mask: Tensor | None = None  # (N,)
    keep: Keep | None = None
    entropy_on_keep: bool = False
    shard: Shard | None = None

    def select(self, rows: Tensor | slice) -> RowSpec:
        """These rows alone. A slice costs nothing; indices pick the keep set apart, which on CUDA reads its size."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        keep = None if self.keep is None else select_keep(self.keep, rows)
        return replace(self, ids=pick(self.ids), temperature=temperature, mask=pick(self.mask), keep=keep)


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


def row_views(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Split (…, V) with any leading strides into (first row, 2-D view) pieces in row order, without a copy."""

    def split(start: int, t: Tensor) -> Iterator[tuple[int, Tensor]]:
        try:
            yield start, t.view(-1, t.shape[-1])
        except RuntimeError:  # leading dimensions that do not merge
            rows = t[0].numel() // t.shape[-1]
            for i in range(t.shape[0]):
                yield from split(start + i * rows, t[i])

    if tensor.numel():
        yield from split(0, tensor)


def blocks(tensor: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end row, (n, V) view) pieces of at most BLOCK_ELEMENTS elements (but at least a row)."""
    step = max(1, BLOCK_ELEMENTS // tensor.shape[-1])
    for start, view in row_views(tensor):
        for a in range(0, len(view), step):
            piece = view[a : a + step]
            yield start + a, start + a + len(piece), piece


def row_sum(values: Tensor) -> Tensor:
    """(n, V) -> (n,) by segments of fixed width, merged in index order: the same bits at any n and any number of threads."""
    whole = values.shape[1] // SEGMENT * SEGMENT
    if whole == 0:
        return values.sum(-1)
    parts = values[:, :whole].unflatten(1, (-1, SEGMENT)).sum(-1)
    if whole < values.shape[1]:
        parts = torch.cat([parts, values[:, whole:].sum(-1, keepdim=True)], 1)
    return parts[:, 0] if parts.shape[1] == 1 else parts.cumsum(1)[:, -1]


def _scaled(z: Tensor, bias: Tensor | None, spec: RowSpec, a: int, b: int) -> Tensor:
    """x of rows a:b as a fresh (n, V) tensor; masked rows become 0."""
    x = torch.empty(z.shape, dtype=accumulation_dtype(z.dtype), device=z.device).copy_(z)
    if spec.mask is not None:
        x.masked_fill_(~spec.mask[a:b, None], 0)
    if spec.scale != 1.0:
        x.mul_(spec.scale)
    if bias is not None:
        x.add_(bias)
    if spec.softcap is not None:
        x.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if isinstance(spec.temperature, Tensor):
        t = spec.temperature[a:b]
        t = t.masked_fill(~(t > 0), math.nan)  # CPU callers were checked; elsewhere such a row is NaN
        x.div_((t if spec.mask is None else t.masked_fill(~spec.mask[a:b], 1.0))[:, None])
    elif spec.temperature != 1.0:
        x.div_(spec.temperature)
    return x


def _local_ids(spec: RowSpec, a: int, b: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column of each row's id clamped into this shard, whether it lies here, and whether it is an id at all."""
    assert spec.ids is not None
    ids, total = spec.ids[a:b], columns if spec.shard is None else spec.shard.total
    valid = (ids >= 0) & (ids < total)
    local = ids if spec.shard is None else ids - spec.shard.offset
    here = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1), here, valid


def _kept(spec: RowSpec, a: int, b: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(row − a, column, valid) of the keep set's entries in rows a:b. On the CPU they are sliced out; elsewhere that would need a host
    read, so all entries are passed and `valid` tells the ones that belong."""
    assert spec.keep is not None
    crow, col = spec.keep
    offset = 0 if spec.shard is None else spec.shard.offset
    valid: Tensor | None = None
    if readable(crow):
        crow = crow[a : b + 1]
        col = col[int(crow[0]) : int(crow[-1])]
        row = torch.arange(b - a).repeat_interleave(crow.diff())
    else:
        row = torch.searchsorted(crow, torch.arange(len(col), device=col.device, dtype=crow.dtype), right=True) - 1 - a
        valid = (row >= 0) & (row < b - a)
        row = row.clamp(0, b - a - 1)
    col = col.long() - offset
    if spec.shard is not None or valid is not None:
        inside = (col >= 0) & (col < columns)
        valid = inside if valid is None else valid & inside
        col = col.clamp(0, columns - 1)
    return row, col, valid


class Partials(NamedTuple):
    """Sums over (this shard of) each row, (N,), relative to its maximum m (to 0 where the row is −inf throughout)."""

    m: Tensor
    s: Tensor  # Σ e^(x−m)
    t: Tensor  # Σ e^(x−m) (x−m)
    total: Tensor  # Σ x−m over finite x
    finite: Tensor  # number of finite x
    x_id: Tensor  # x at the id, −inf where it lies in another shard
    bad_id: Tensor  # 1 where the id is out of range
    s2: Tensor  # Σ e^2(x−m)
    second: Tensor  # second largest x
    argmax: Tensor
    keep_m: Tensor  # the same over the keep set
    keep_s: Tensor
    keep_t: Tensor
    keep_id: Tensor  # how often the id occurs in the keep set


def _safe(m: Tensor) -> Tensor:
    return m.masked_fill(m == -math.inf, 0)


def _partials(x: Tensor, spec: RowSpec, a: int, b: int) -> Partials:
    """Consumes x."""
    n, columns = x.shape
    want = spec.wanted
    zero = x.new_zeros(n)
    m = x.amax(-1)
    second, argmax, x_id, bad_id = zero, zero, zero, zero
    if "argmax" in want:
        argmax = x.argmax(-1).to(x.dtype) + (0 if spec.shard is None else spec.shard.offset)
    if "prob_gap" in want:
        second = x.topk(2, dim=-1).values[:, 1] if columns > 1 else torch.full_like(m, -math.inf)
    if spec.ids is not None:
        local, here, valid = _local_ids(spec, a, b, columns)
        x_id = x.gather(1, local[:, None])[:, 0].masked_fill(~here, -math.inf)
        bad_id = (~valid if spec.mask is None else ~valid & spec.mask[a:b]).to(x.dtype)
    keep_m, keep_s, keep_t, keep_id = zero, zero, zero, zero
    if spec.keep is not None:
        keep_m, keep_s, keep_t, keep_id = _keep_partials(x, spec, a, b)
    shifted = x.sub_(_safe(m)[:, None])
    total, finite = zero, x.new_full((n,), columns)
    if want & {"self_certainty", "mean_logit"}:
        infinite = shifted == -math.inf
        finite = columns - infinite.sum(-1).to(x.dtype)
        total = row_sum(shifted.masked_fill(infinite, 0))
    e = shifted.exp()
    s, t, s2 = row_sum(e), zero, zero
    if "entropy" in want and not spec.entropy_on_keep:
        t = row_sum(shifted.clamp_(min=LOWEST).mul_(e))
    if "sum_p2" in want:
        s2 = row_sum(e.mul_(e))
    return Partials(m, s, t, total, finite, x_id, bad_id, s2, second, argmax, keep_m, keep_s, keep_t, keep_id)


def _keep_partials(x: Tensor, spec: RowSpec, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row, col, valid = _kept(spec, a, b, x.shape[1])
    values = x[row, col]
    if valid is not None:
        values = values.masked_fill(~valid, -math.inf)
    zero = x.new_zeros(len(x))
    m = torch.full_like(zero, -math.inf).scatter_reduce_(0, row, values, "amax")
    values = values - _safe(m)[row]
    e = values.exp()
    t = zero.index_add(0, row, e * values.clamp(min=LOWEST))
    found = zero
    if spec.ids is not None:
        offset = 0 if spec.shard is None else spec.shard.offset
        hit = col + offset == spec.ids[a:b][row]
        found = zero.index_add(0, row, (hit if valid is None else hit & valid).to(x.dtype))
    return m, zero.index_add(0, row, e), t, found


def _merge_shards(parts: Partials, shard: Shard) -> Partials:
    """One exchange; merged in rank order, so every rank holds the same bits."""
    dtype = parts.m.dtype
    every = Partials(*shard.gather(torch.stack([p.to(torch.float64) for p in parts])).unbind(1))  # (ranks, N) each
    m, keep_m = every.m.amax(0), every.keep_m.amax(0)
    shift = (every.m - _safe(m)).clamp(min=LOWEST)
    keep_shift = (every.keep_m - _safe(keep_m)).clamp(min=LOWEST)
    w, keep_w = shift.exp(), keep_shift.exp()
    top = torch.cat([every.m, every.second]).topk(2, dim=0).values
    merged = Partials(
        m=m,
        s=(w * every.s).sum(0),
        t=(w * (every.t + shift * every.s)).sum(0),
        total=(every.total + shift * every.finite).sum(0),
        finite=every.finite.sum(0),
        x_id=every.x_id.amax(0),
        bad_id=every.bad_id.amax(0),
        s2=(w * w * every.s2).sum(0),
        second=top[1],
        argmax=every.argmax.gather(0, every.m.argmax(0, keepdim=True))[0],
        keep_m=keep_m,
        keep_s=(keep_w * every.keep_s).sum(0),
        keep_t=(keep_w * (every.keep_t + keep_shift * every.keep_s)).sum(0),
        keep_id=every.keep_id.sum(0),
    )
    return Partials(*(value.to(dtype) for value in merged))


class RowStats(NamedTuple):
    """The statistics, and per row what the gradient needs beside them. All (N,)."""

    values: TokenStats
    m: Tensor
    log_s: Tensor
    finite: Tensor
    keep_log_s: Tensor  # relative to m as well
    id_counts: Tensor  # bool: the id has a probability above 0, so its logit has a gradient


def _finish(parts: Partials, spec: RowSpec) -> RowStats:
    want, m = spec.wanted, parts.m
    nowhere = (m == -math.inf) | (parts.bad_id > 0)  # no distribution, or no such id: NaN
    log_s = parts.s.log().masked_fill(nowhere, math.nan)
    poison = log_s - log_s  # 0, or NaN in a row that is NaN
    values: dict[str, Tensor] = {}
    keep_m, keep_log_s, id_counts = m, log_s, parts.x_id != -math.inf
    if spec.keep is not None:
        keep_m = parts.keep_m
        keep_log_s = parts.keep_s.log().masked_fill(keep_m == -math.inf, math.nan) + poison
        id_counts = id_counts & (parts.keep_id > 0)
    if "logp" in want:
        values["logp"] = (parts.x_id - keep_m).masked_fill(~id_counts, -math.inf) - keep_log_s
    if "lse" in want:
        values["lse"] = m + log_s
    if "entropy" in want:
        on_keep = keep_log_s - parts.keep_t / parts.keep_s if spec.entropy_on_keep else None
        values["entropy"] = log_s - parts.t / parts.s if on_keep is None else on_keep
    if "self_certainty" in want:
        values["self_certainty"] = log_s - parts.total / parts.finite - parts.finite.log()
    if "mean_logit" in want:
        values["mean_logit"] = m + parts.total / parts.finite + poison
    if "max_prob" in want:
        values["max_prob"] = (-log_s).exp()
    if "prob_gap" in want:
        values["prob_gap"] = (1 - (parts.second - m).exp()) * (-log_s).exp()
    if "sum_p2" in want:
        values["sum_p2"] = parts.s2 / (parts.s * parts.s) + poison
    if "argmax" in want:
        values["argmax"] = parts.argmax.masked_fill(log_s.isnan(), -1).long()
    if spec.mask is not None:
        values = {name: value.masked_fill(~spec.mask, 0) for name, value in values.items()}
    return RowStats(TokenStats(**values), m, log_s, parts.finite, (keep_m - m) + keep_log_s, id_counts)


def row_statistics(logits: Tensor, bias: Tensor | None, spec: RowSpec) -> RowStats:
    """Statistics of every row of logits (…, V)."""
    pieces = list(blocks(logits)) or [(0, 0, logits.reshape(0, logits.shape[-1]))]
    each = [_partials(_scaled(piece, bias, spec, a, b), spec, a, b) for a, b, piece in pieces]
    parts = each[0] if len(each) == 1 else Partials(*(torch.cat(column) for column in zip(*each, strict=True)))
    return _finish(parts if spec.shard is None else _merge_shards(parts, spec.shard), spec)


# --------------------------------------------------------------------------------------------------------------- gradient


class Coefficients(NamedTuple):
    """The row scalars of the gradient, (N,); None where a term is absent."""

    a: Tensor | None
    b: Tensor | None
    c: Tensor | None
    d: Tensor | None
    keep_a: Tensor | None
    keep_b: Tensor | None


Upstream = dict[str, Tensor]  # name of a statistic -> gradient of the loss by it, (N,)


def _total(*terms: Tensor | None) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], present[0]) if present else None


def coefficients(stats: RowStats, upstream: Upstream, spec: RowSpec) -> Coefficients:
    g_logp, g_entropy = upstream.get("logp"), upstream.get("entropy")
    g_sc, g_mean = upstream.get("self_certainty"), upstream.get("mean_logit")
    minus_logp = None if g_logp is None else -g_logp
    b, b_times_h = None, None
    if g_entropy is not None:
        assert stats.values.entropy is not None
        b, b_times_h = -g_entropy, -g_entropy * stats.values.entropy
    d = _total(g_mean, None if g_sc is None else -g_sc)
    d = None if d is None else d / stats.finite
    on_keep, entropy_on_keep = spec.keep is not None, spec.entropy_on_keep
    raw = Coefficients(
        a=_total(upstream.get("lse"), g_sc, None if on_keep else minus_logp, None if entropy_on_keep else b_times_h),
        b=None if entropy_on_keep else b,
        c=None if g_logp is None else torch.where(stats.id_counts, g_logp, 0),
        d=d,
        keep_a=_total(minus_logp, b_times_h if entropy_on_keep else None) if on_keep else None,
        keep_b=b if entropy_on_keep else None,
    )
    dead = stats.m == -math.inf  # every x is −inf: the gradient is 0 like that of any −inf
    dead = dead if spec.mask is None else dead | ~spec.mask
    return Coefficients(*(None if value is None else value.masked_fill(dead, 0) for value in raw))


def row_gradient(
    logits: Tensor,
    bias: Tensor | None,
    spec: RowSpec,
    stats: RowStats,
    upstream: Upstream,
    out: Tensor | None,
    bias_grad: Tensor | None = None,
) -> None:
    """Write d loss / d logits into `out` (contiguous, shape of logits), or over the logits where it is None; add to `bias_grad` (V,)."""
    co = coefficients(stats, upstream, spec)
    for a, b, piece in blocks(logits):
        target = piece if out is None else out.view(-1, logits.shape[-1])[a:b]
        x = _scaled(piece, bias, spec, a, b)
        slope = None if spec.softcap is None else _softcap_slope(x, spec, a, b)
        dx = _block_gradient(x, spec, stats, co, a, b)
        if isinstance(spec.temperature, Tensor):
            dx.div_((spec.temperature[a:b] if spec.mask is None else spec.temperature[a:b].masked_fill(~spec.mask[a:b], 1.0))[:, None])
        elif spec.temperature != 1.0:
            dx.div_(spec.temperature)
        if slope is not None:
            dx.mul_(slope)
        if bias_grad is not None:
            bias_grad.add_(dx.sum(0))
        target.copy_(dx if spec.scale == 1.0 else dx.mul_(spec.scale))


def _softcap_slope(x: Tensor, spec: RowSpec, a: int, b: int) -> Tensor:
    """d softcap(z) / dz = 1 − tanh², recovered from x = softcap(z) / temperature."""
    temperature = spec.temperature[a:b, None] if isinstance(spec.temperature, Tensor) else spec.temperature
    assert spec.softcap is not None
    tanh = x * (temperature / spec.softcap)
    slope = 1 - tanh * tanh
    return slope if spec.mask is None else slope.masked_fill(~spec.mask[a:b, None], 0)


def _block_gradient(x: Tensor, spec: RowSpec, stats: RowStats, co: Coefficients, a: int, b: int) -> Tensor:
    """dL/dx of rows a:b. Consumes x."""
    rows = slice(a, b)

    def column(value: Tensor) -> Tensor:
        return value[rows, None]

    infinite = None if co.d is None else x == -math.inf
    x.sub_(column(_safe(stats.m)))
    kept = None
    if co.keep_a is not None:
        row, col, valid = _kept(spec, a, b, x.shape[1])
        log_p = x[row, col] - stats.keep_log_s[rows][row]
        factor = co.keep_a[rows][row]
        if co.keep_b is not None:
            factor = factor + co.keep_b[rows][row] * log_p.clamp(min=LOWEST)
        values = torch.where(factor == 0, 0, log_p.exp() * factor)  # a dead row must not leak a NaN through 0 · NaN
        kept = row, col, values if valid is None else values.masked_fill(~valid, 0)
    dx = torch.zeros_like(x)
    if co.a is not None or co.b is not None:
        log_p = x.sub_(column(stats.log_s.masked_fill(stats.m == -math.inf, 0)))
        dx = log_p.exp()
        if co.b is None:
            assert co.a is not None
            dx.mul_(column(co.a))
        else:
            assert co.a is not None
            dx.mul_(log_p.clamp_(min=LOWEST).mul_(column(co.b)).add_(column(co.a)))
    if kept is not None:
        dx.index_put_(kept[:2], kept[2], accumulate=True)
    if co.d is not None and infinite is not None:
        dx.add_(column(co.d)).masked_fill_(infinite, 0)
    if co.c is not None:
        local, here, _ = _local_ids(spec, a, b, x.shape[1])
        dx.scatter_add_(1, local[:, None], (co.c[rows] * here)[:, None])
    return dx
