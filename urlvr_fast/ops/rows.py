"""The `torch` backend: row statistics and their gradient in plain torch, the closed form in bounded memory.

With p = softmax(x), H the entropy, V_f the number of finite columns and ℓ_j = log p_j, upstream gradients g give

    dL/dx_j = p_j (a + b ℓ_j) + c [j = id] + d [x_j finite]
    a = g_lse + g_sc − g_logp − g_H · H      b = −g_H      c = g_logp      d = (g_mean − g_sc) / V_f

A keep set moves the terms of logp (and of the entropy, if it is taken there) to the softmax over that set. Row maximum m and log Σ e^(x
− m) stay apart, and the maximum is taken off before the temperature divides: a common offset of the logits costs the gradient no digit.
Sums over V add halves to each other: a row's result does not depend on how many rows or threads there are. `layout.py` says what goes in
and out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from urlvr_fast.ops.layout import ENTROPY_ON_KEEP, GRADS, RAW, Stat
from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.spec import STATISTICS, readable

BLOCK_ELEMENTS = 1 << 21  # scratch of one step: 8 MiB per fp32 temporary, whatever N is
LOWEST = -1e20  # stands for −inf where it meets a probability of 0


class Rows(NamedTuple):
    """The arguments that `statistics` and `gradient` share, and what they make of them."""

    logits: Tensor  # (A, B, V)
    bias: Tensor | None
    ids: Tensor | None  # (N,)
    mask: Tensor | None
    temperatures: Tensor | None
    crow: Tensor | None
    col: Tensor | None
    temperature: float
    softcap: float
    scale: float
    id_offset: int
    total: int
    flags: int

    def wants(self, *names: str) -> bool:
        return any(self.flags >> STATISTICS.index(name) & 1 for name in names)

    @property
    def plain(self) -> bool:
        """Whether x is the logit times a positive number."""
        return self.bias is None and not self.softcap and self.scale > 0

    @property
    def entropy_on_keep(self) -> bool:
        return bool(self.flags & ENTROPY_ON_KEEP)


def blocks(*tensors: Tensor) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(first row, end row, an (n, V) view of each) pieces of (A, B, V) tensors, of at most BLOCK_ELEMENTS elements (but at least a row)."""
    outer, inner, columns = tensors[0].shape
    step = max(1, BLOCK_ELEMENTS // columns)
    merge = outer == 1 or all(tensor.stride(0) == inner * tensor.stride(1) for tensor in tensors)
    grids = [tuple(tensor.view(-1, columns) for tensor in tensors)] if merge else zip(*tensors, strict=True)
    for index, grid in enumerate(grids):
        for a in range(0, len(grid[0]), step):
            pieces = [tensor[a : a + step] for tensor in grid]
            yield index * inner + a, index * inner + a + len(pieces[0]), pieces


def row_sum(values: Tensor) -> Tensor:
    """(n, V) -> (n,), by halves: the same bits at any n, with any number of threads, and as exact as pairs are."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        upper = values[:, half:]
        values = values[:, :half] + (upper if upper.shape[1] == half else torch.nn.functional.pad(upper, (0, 1)))
    return values[:, 0].clone()  # of one column, not the argument's memory


Factor = float | Tensor  # a number, or (n,)


def _read(z: Tensor, rows: Rows, a: int, b: int) -> tuple[Tensor, Factor]:
    """Rows a:b as a fresh (n, V) tensor y and a factor above 0, with x = y · factor. Masked rows become 0."""
    y = torch.empty(z.shape, dtype=accumulation_dtype(z.dtype), device=z.device).copy_(z)
    if rows.mask is not None:
        y.masked_fill_(~rows.mask[a:b, None], 0)
    temperature = _temperature(rows, a, b)
    if rows.plain:
        return y, rows.scale / temperature
    if rows.scale != 1.0:
        y.mul_(rows.scale)
    if rows.bias is not None:
        y.add_(rows.bias)
    if rows.softcap:
        y.div_(rows.softcap).tanh_().mul_(rows.softcap)
    return y, 1 / temperature


def _temperature(rows: Rows, a: int, b: int) -> Factor:
    """1 in masked rows, NaN where it is no temperature (callers on the CPU were checked)."""
    if rows.temperatures is None:
        return rows.temperature
    t = rows.temperatures[a:b]
    t = t.masked_fill(~(t > 0), math.nan)
    return t if rows.mask is None else t.masked_fill(~rows.mask[a:b], 1.0)


def _multiply(values: Tensor, factor: Factor) -> Tensor:
    """(n, V) in place."""
    if isinstance(factor, Tensor):
        return values.mul_(factor[:, None])
    return values if factor == 1.0 else values.mul_(factor)


def _below(y: Tensor, top: Tensor, factor: Factor) -> Tensor:
    """x − m in place of y, whose maxima are `top`: exactly 0 there."""
    return _multiply(y.sub_(safe(top)[:, None]), factor)


def _local_ids(rows: Rows, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Column of each row's id clamped into this shard, whether it lies here, and whether it is an id at all."""
    assert rows.ids is not None
    ids, columns = rows.ids[a:b], rows.logits.shape[-1]
    valid = (ids >= 0) & (ids < rows.total)
    local = ids - rows.id_offset
    here = (local >= 0) & (local < columns)
    return local.clamp(0, columns - 1), here, valid


def _kept(rows: Rows, a: int, b: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(row − a, column, valid) of the keep set's entries in rows a:b. On the CPU they are sliced out; elsewhere that would need a host
    read, so all entries are passed and `valid` tells the ones that belong."""
    assert rows.crow is not None
    assert rows.col is not None
    crow, col, columns = rows.crow, rows.col, rows.logits.shape[-1]
    valid: Tensor | None = None
    if readable(crow):
        crow = crow[a : b + 1]
        col = col[int(crow[0]) : int(crow[-1])]
        row = torch.arange(b - a).repeat_interleave(crow.diff())
    else:
        row = torch.searchsorted(crow, torch.arange(len(col), device=col.device, dtype=crow.dtype), right=True) - 1 - a
        valid = (row >= 0) & (row < b - a)
        row = row.clamp(0, b - a - 1)
    col = col - rows.id_offset
    if columns != rows.total or valid is not None:
        inside = (col >= 0) & (col < columns)
        valid = inside if valid is None else valid & inside
        col = col.clamp(0, columns - 1)
    return row, col, valid


class Partials(NamedTuple):
    """Sums over (this shard of) each row, (N,), relative to its maximum m (to 0 where the row is −inf throughout): the packed lines that
    go out with the flag RAW."""

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


def safe(m: Tensor) -> Tensor:
    return m.masked_fill(m == -math.inf, 0)


def _partials(y: Tensor, factor: Factor, rows: Rows, a: int, b: int) -> Partials:
    """Of rows whose x is y · factor. Consumes y."""
    n, columns = y.shape
    zero = y.new_zeros(n)
    top = y.amax(-1)
    m = top * factor
    second, argmax, x_id, bad_id = zero, zero, zero, zero
    if rows.wants("argmax"):
        argmax = y.argmax(-1).to(y.dtype) + rows.id_offset
    if rows.wants("prob_gap"):
        second = y.topk(2, dim=-1).values[:, 1] * factor if columns > 1 else torch.full_like(m, -math.inf)
    if rows.ids is not None:
        local, here, valid = _local_ids(rows, a, b)
        x_id = (y.gather(1, local[:, None])[:, 0] * factor).masked_fill(~here, -math.inf)
        bad_id = (~valid if rows.mask is None else ~valid & rows.mask[a:b]).to(y.dtype)
    shifted = _below(y, top, factor)
    keep_m, keep_s, keep_t, keep_id = zero, zero, zero, zero
    if rows.crow is not None:
        keep_m, keep_s, keep_t, keep_id = _keep_partials(shifted, m, rows, a, b)
    total, finite = zero, y.new_full((n,), columns)
    if rows.wants("self_certainty", "mean_logit"):
        infinite = shifted == -math.inf
        finite = columns - infinite.sum(-1).to(y.dtype)
        total = row_sum(shifted.masked_fill(infinite, 0))
    e = shifted.exp()
    s, t, s2 = row_sum(e), zero, zero
    if rows.wants("entropy") and not rows.entropy_on_keep:
        t = row_sum(shifted.clamp_(min=LOWEST).mul_(e))
    if rows.wants("sum_p2"):
        s2 = row_sum(e.mul_(e))
    return Partials(m, s, t, total, finite, x_id, bad_id, s2, second, argmax, keep_m, keep_s, keep_t, keep_id)


def _keep_partials(shifted: Tensor, m: Tensor, rows: Rows, a: int, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rows of x − m, as dense rows that are −inf elsewhere: summed like the others, and not in an order that a GPU chooses."""
    row, col, valid = _kept(rows, a, b)
    n, columns = shifted.shape
    kept = shifted.new_full((n, columns + 1), -math.inf)  # the last column takes what is not valid
    kept[row, col if valid is None else torch.where(valid, col, columns)] = shifted[row, col]
    kept = kept[:, :-1]
    keep_m = safe(m) + kept.amax(-1)
    kept = kept - (safe(keep_m) - safe(m))[:, None]
    e = kept.exp()
    found = torch.zeros_like(m)
    if rows.ids is not None:
        hit = col + rows.id_offset == rows.ids[a:b][row]
        found = found.index_add(0, row, (hit if valid is None else hit & valid).to(m.dtype))
    return keep_m, row_sum(e), row_sum(kept.clamp_(min=LOWEST).mul_(e)), found


def finish(parts: Partials, flags: int, has_keep: bool, mask: Tensor | None) -> Tensor:
    """The packed statistics (STATS, N) of sums over whole rows."""

    def wants(stat: Stat) -> bool:
        return bool(flags >> stat & 1)

    on_keep = bool(flags & ENTROPY_ON_KEEP)
    m, zero = parts.m, torch.zeros_like(parts.m)
    nowhere = (m == -math.inf) | (parts.bad_id > 0)  # no distribution, or no such id: NaN
    log_s = parts.s.log().masked_fill(nowhere, math.nan)
    poison = log_s - log_s  # 0, or NaN in a row that is NaN
    keep_m, keep_log_s, id_counts = m, log_s, parts.x_id != -math.inf
    if has_keep:
        keep_m = parts.keep_m
        keep_log_s = parts.keep_s.log().masked_fill(keep_m == -math.inf, math.nan) + poison
        id_counts = id_counts & (parts.keep_id > 0)
    mean, max_prob = parts.total / parts.finite, (-log_s).exp()
    logp = (parts.x_id - keep_m).masked_fill(~id_counts, -math.inf) - keep_log_s
    entropy = keep_log_s - parts.keep_t / parts.keep_s if on_keep else log_s - parts.t / parts.s
    lines = {
        Stat.LOGP: logp if wants(Stat.LOGP) else zero,
        Stat.LSE: m + log_s,
        Stat.ENTROPY: entropy if wants(Stat.ENTROPY) else zero,
        Stat.SELF_CERTAINTY: log_s - mean - parts.finite.log(),
        Stat.MEAN_LOGIT: m + mean + poison,
        Stat.MAX_PROB: max_prob,
        Stat.PROB_GAP: (1 - (parts.second - m).exp()) * max_prob,
        Stat.SUM_P2: parts.s2 / (parts.s * parts.s) + poison,
        Stat.ARGMAX: parts.argmax.masked_fill(log_s.isnan(), -1),
        Stat.ROW_MAX: m,
        Stat.LOG_S: log_s,
        Stat.FINITE: parts.finite,
        Stat.KEEP_LOG_S: (keep_m - m) + keep_log_s,
        Stat.ID_COUNTS: id_counts.to(m.dtype),
    }
    packed = torch.stack([lines[stat] for stat in Stat])
    return packed if mask is None else packed.masked_fill_(~mask, 0)


def statistics(*arguments) -> None:
    """Of every row, packed: see `layout.py`."""
    rows, out = Rows(*arguments[:-1]), arguments[-1]
    for a, b, (piece,) in blocks(rows.logits):
        parts = _partials(*_read(piece, rows, a, b), rows, a, b)
        mask = None if rows.mask is None else rows.mask[a:b]
        out[:, a:b] = torch.stack(parts) if rows.flags & RAW else finish(parts, rows.flags, rows.crow is not None, mask)


# --------------------------------------------------------------------------------------------------------------- gradient


class Coefficients(NamedTuple):
    """The row scalars of the gradient, (N,)."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    keep_a: Tensor
    keep_b: Tensor
    dead: Tensor  # bool: the gradient is 0 whatever the row holds


def coefficients(rows: Rows, stats: Tensor, upstream: Tensor, given: int) -> Coefficients:
    m, finite = stats[Stat.ROW_MAX], stats[Stat.FINITE]
    zero = torch.zeros_like(m)
    g = [upstream[i] if given >> i & 1 else zero for i in range(GRADS)]
    g_logp, g_entropy = g[Stat.LOGP], g[Stat.ENTROPY]
    g_flat = g[Stat.MEAN_LOGIT] - g[Stat.SELF_CERTAINTY]
    minus_entropy = torch.where(g_entropy == 0, 0, -g_entropy * stats[Stat.ENTROPY])
    on_keep = rows.entropy_on_keep
    nothing = torch.stack([value == 0 for value in g]).all(0)
    dead = (m == -math.inf) | nothing  # every x is −inf: the gradient is 0 like that of any −inf
    return Coefficients(
        a=g[Stat.LSE] + g[Stat.SELF_CERTAINTY] + (zero if rows.crow is not None else -g_logp) + (zero if on_keep else minus_entropy),
        b=zero if on_keep else -g_entropy,
        c=torch.where(stats[Stat.ID_COUNTS] != 0, g_logp, 0),
        d=torch.where(g_flat == 0, 0, g_flat / finite),
        keep_a=-g_logp + (minus_entropy if on_keep else zero),
        keep_b=-g_entropy if on_keep else zero,
        dead=dead if rows.mask is None else dead | ~rows.mask,
    )


def gradient(*arguments) -> None:
    """d loss / d logits into `out`, which may be the logits: see `layout.py`."""
    rows, (stats, upstream, given, out, bias_grad) = Rows(*arguments[:-5]), arguments[-5:]
    co = coefficients(rows, stats, upstream, given)
    for a, b, (piece, target) in blocks(rows.logits, out):
        y, factor = _read(piece, rows, a, b)
        slope = 1 - (y / rows.softcap).square_() if rows.softcap else None  # of the softcap: 1 − tanh²
        dx = _multiply(_block_gradient(y, factor, rows, stats, co, given, a, b), factor)
        if slope is not None:
            dx.mul_(slope)
        dx.masked_fill_(co.dead[a:b, None], 0)
        if bias_grad is not None:
            bias_grad.add_(dx.sum(0))
        target.copy_(dx if rows.plain or rows.scale == 1.0 else dx.mul_(rows.scale))


def _block_gradient(y: Tensor, factor: Factor, rows: Rows, stats: Tensor, co: Coefficients, given: int, a: int, b: int) -> Tensor:
    """dL/dx of rows a:b, of anything in dead rows. Consumes y."""

    def column(value: Tensor) -> Tensor:
        return value[a:b, None]

    top = y.amax(-1)
    shifted = _below(y, top, factor)
    if y.shape[1] != rows.total:  # a shard: the row's maximum may lie in another
        shifted.add_((safe(top * factor) - safe(stats[Stat.ROW_MAX, a:b]))[:, None])
    flat = given & (1 << Stat.SELF_CERTAINTY | 1 << Stat.MEAN_LOGIT)
    infinite = shifted == -math.inf if flat else None
    kept = None
    if rows.crow is not None:
        row, col, valid = _kept(rows, a, b)
        log_p = shifted[row, col] - stats[Stat.KEEP_LOG_S, a:b][row]
        value = log_p.exp() * (co.keep_a[a:b][row] + co.keep_b[a:b][row] * log_p.clamp(min=LOWEST))
        kept = row, col, value if valid is None else value.masked_fill(~valid, 0)
    log_p = shifted.sub_(column(stats[Stat.LOG_S]))
    dx = log_p.exp()
    if given >> Stat.ENTROPY & 1 and not rows.entropy_on_keep:
        dx.mul_(log_p.clamp_(min=LOWEST).mul_(column(co.b)).add_(column(co.a)))
    else:
        dx.mul_(column(co.a))
    if kept is not None:
        dx.index_put_(kept[:2], kept[2], accumulate=True)
    if infinite is not None:
        dx.add_(column(co.d)).masked_fill_(infinite, 0)
    if given >> Stat.LOGP & 1:
        local, here, _ = _local_ids(rows, a, b)
        dx.scatter_add_(1, local[:, None], torch.where(here, co.c[a:b], 0)[:, None])
    return dx


def scale(gradient: Tensor, factor: Tensor, row_scale: Tensor | None) -> None:
    """gradient (A, B, V) times a number, and one a row, in place; 16-bit gradients in fp32 with one rounding."""
    if row_scale is None and readable(factor) and float(factor) == 1.0:
        return
    for a, b, (piece,) in blocks(gradient):
        by = factor if row_scale is None else (factor * row_scale[a:b])[:, None]
        piece.copy_(piece.to(accumulation_dtype(piece.dtype)).mul_(by))
