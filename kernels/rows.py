"""What a row of logits is reduced to, and back, in Triton: the numbers of `csrc/rows.h`, whose names and order these functions keep.

    y = softcap(z · scale + bias),   x = y · factor,   factor = 1 / temperature
    FOLDED (no bias, no softcap, scale > 0):   y = z,   factor = scale / temperature

Differences x − m are fma(y, factor, −m), rounded once however large x and m are. Three tuples go through the functions:
`scaling`  (bias, factor, scale, softcap, 1 / softcap)
`sums`     (m, s, t, total, finite, s2, second, argmax), of a row or one a lane; T, TOTAL and RARE (the last three) say which are kept
`co`       (m, log s, a, b, c, d) of the gradient p_j (a + b ℓ_j) + c [j = id] + d [x_j finite]
"""

import triton
import triton.language as tl
from urlvr_fast.kernels.targets import Constant

from urlvr_fast.ops import layout

LOG2E = Constant(1.4426950408889634)
LOWEST = Constant(-1e20)  # exp(x) is 0 below this: stands for −inf where that meets a probability of 0
NO_COLUMN = Constant(2**31 - 1)
INF = Constant(float("inf"))

LOGP = Constant(int(layout.Stat.LOGP))
LSE = Constant(int(layout.Stat.LSE))
ENTROPY = Constant(int(layout.Stat.ENTROPY))
SELF_CERTAINTY = Constant(int(layout.Stat.SELF_CERTAINTY))
MEAN_LOGIT = Constant(int(layout.Stat.MEAN_LOGIT))
PROB_GAP = Constant(int(layout.Stat.PROB_GAP))
SUM_P2 = Constant(int(layout.Stat.SUM_P2))
ROW_MAX = Constant(int(layout.Stat.ROW_MAX))
LOG_S = Constant(int(layout.Stat.LOG_S))
FINITE = Constant(int(layout.Stat.FINITE))
KEEP_LOG_S = Constant(int(layout.Stat.KEEP_LOG_S))
ID_COUNTS = Constant(int(layout.Stat.ID_COUNTS))
STATS = Constant(layout.STATS)
ENTROPY_ON_KEEP = Constant(layout.ENTROPY_ON_KEEP)
RAW = Constant(layout.RAW)
PARTIALS = Constant(8)  # numbers of a segment


# ---- one element ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    return tl.math.exp2(x * LOG2E)


@triton.jit
def safe(m):
    """Of a maximum over nothing but −inf."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def tanh_and_slope(u):
    """tanh u and 1 − tanh² u from one exponential; both to a few ulp of themselves, also near 0 and where tanh saturates."""
    e = tl.math.exp2(tl.abs(u) * (-2 * LOG2E))
    over = 1 / (1 + e)
    far = 1 - 2 * e * over
    # Near 0 that cancels. u + u³ P(u²) with P fitted to tanh on |u| ≤ 0.6, error 3e-9.
    z = u * u
    p = tl.fma(z, -0.005905785597860813, 0.02080531045794487)
    p = tl.fma(z, p, -0.053786661475896835)
    p = tl.fma(z, p, 0.13331958651542664)
    p = tl.fma(z, p, -0.33333298563957214)
    tanh = tl.where(tl.abs(u) < 0.6, tl.fma(u * z, p, u), tl.where(u < 0, -far, far))
    return tanh, 4 * e * over * over


@triton.jit
def before_temperature(z, cols, inside, scaling, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr):
    """y (−inf outside the row) and dy / d(scaled logit), which is 1 without a softcap, from logits that are −inf outside the row."""
    bias, _, scale, softcap, inv_softcap = scaling
    z = z.to(tl.float32)
    y, slope = z, 1.0
    if not FOLDED:
        y = z * scale if bias is None else tl.fma(z, scale, tl.load(bias + cols, mask=inside, other=0.0))
        if SOFTCAP:
            tanh, slope = tanh_and_slope(y * inv_softcap)
            y = tanh * softcap
        y = tl.where(inside, y, -INF)
    return y, slope


# ---- one row ----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def row_of(tensor, n, inner, stride_a, stride_b, HINT: tl.constexpr):
    """Where row n of an (A, B, V) tensor starts; HINT is what its address is said to be a multiple of."""
    return tl.multiple_of(tensor + ((n // inner).to(tl.int64) * stride_a + (n % inner).to(tl.int64) * stride_b), HINT)


@triton.jit
def is_live(mask, n):
    return n >= 0 if mask is None else tl.load(mask + n) != 0


@triton.jit
def row_factor(n, live, temperatures, factor, scale, FOLDED: tl.constexpr):
    by = tl.zeros((), tl.float32) + factor
    if temperatures is not None:
        temperature = tl.load(temperatures + n, mask=live, other=1.0)
        one = tl.full((), 1, tl.float32)
        by = tl.div_rn(one * scale if FOLDED else one, tl.where(temperature > 0, temperature, float("nan")))
    return by


@triton.jit
def local_id(n, live, ids, id_offset, columns, total):
    """Column of the row's id, −1 where it lies in another shard, and whether it is no id at all."""
    local, bad = tl.full((), -1, tl.int32), n < 0
    if ids is not None:
        chosen = tl.load(ids + n, mask=live, other=0)
        column = chosen - id_offset
        local = tl.where((column >= 0) & (column < columns), column, -1).to(tl.int32)
        bad = (chosen < 0) | (chosen >= total)
    return local, bad


# ---- sums -------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def no_sums(LANES: tl.constexpr):
    zero = tl.zeros((LANES,), tl.float32)
    lowest = tl.full((LANES,), -INF, tl.float32)
    return lowest, zero, zero, zero, zero, zero, lowest, tl.zeros((LANES,), tl.int32)


@triton.jit
def no_sums_of_row():
    zero = tl.zeros((), tl.float32)
    lowest = tl.full((), -INF, tl.float32)
    return lowest, zero, zero, zero, zero, zero, lowest, tl.zeros((), tl.int32)


@triton.jit
def add_tile(sums, y, cols, factor, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr, GUARDED: tl.constexpr):
    """Add a (depth, lanes, vector) tile to the lanes' sums: the tile's maximum of each lane first, then one exponential an element.

    GUARDED: some y may be −inf. Otherwise a lane that meets one has t = NaN and total = −inf or NaN: see `polluted`.
    """
    m, s, t, total, finite, s2, second, argmax = sums
    top = tl.max(tl.max(y, 2), 0)
    x_top = top * factor
    new_m = tl.maximum(m, x_top)
    base = safe(new_m)
    shift = tl.where(m == -INF, LOWEST, m - base)
    w = exp(shift)
    above = tl.fma(y, factor, -base[None, :, None])
    e = exp(above)
    if GUARDED:
        is_finite = y != -INF
        above = tl.where(is_finite, above, 0.0)
    if TOTAL:
        total = tl.fma(shift, finite, total) + tl.sum(tl.sum(above, 2), 0)
        finite += tl.sum(tl.sum(tl.where(is_finite, 1.0, 0.0), 2), 0) if GUARDED else y.shape[0] * y.shape[2]
    if T:  # e is 0 where x is −inf, or so far below the largest that its distance is
        above = tl.maximum(above, LOWEST) if GUARDED else above
        t = tl.fma(w, tl.fma(tl.maximum(shift, LOWEST), s, t), tl.sum(tl.sum(e * above, 2), 0))
    s = tl.fma(w, s, tl.sum(tl.sum(e, 2), 0))
    if RARE:
        s2 = tl.fma(w * w, s2, tl.sum(tl.sum(e * e, 2), 0))
        first = tl.min(tl.min(tl.where(y == top[None, :, None], cols, NO_COLUMN), 2), 0)
        runner_up = tl.max(tl.max(tl.where(cols == first[None, :, None], -INF, y), 2), 0) * factor
        second = tl.maximum(tl.maximum(second, tl.minimum(m, x_top)), runner_up)
        argmax = tl.where(x_top > m, first, argmax)
    return new_m, s, t, total, finite, s2, second, argmax


@triton.jit
def polluted(sums, T: tl.constexpr, TOTAL: tl.constexpr):
    """Whether sums without a guard have met an x that is −inf. A row with a NaN has nothing to lose."""
    _, s, t, total, _, _, _, _ = sums
    met = s != s
    if T:
        met = t != t
    if TOTAL:
        met = met | (total == -INF) | (total != total)
    return met & (s == s)


@triton.jit
def across_lanes(sums, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr):
    """The sums of a segment from those of its lanes."""
    m, s, t, total, finite, s2, second, argmax = sums
    row_m, row_s, row_t, row_total, row_finite, row_s2, row_second, row_argmax = no_sums_of_row()
    row_m = tl.max(m, 0)
    shift = tl.where(m == -INF, LOWEST, m - safe(row_m))
    w = exp(shift)
    row_s = tl.sum(w * s, 0)
    if T:
        row_t = tl.sum(w * tl.fma(tl.maximum(shift, LOWEST), s, t), 0)
    if TOTAL:
        row_total = tl.sum(tl.fma(shift, finite, total), 0)
        row_finite = tl.sum(finite, 0)
    if RARE:
        row_s2 = tl.sum(w * w * s2, 0)
        row_argmax = tl.min(tl.where(m == row_m, argmax, NO_COLUMN), 0)
        row_second = tl.max(tl.where((m == row_m) & (argmax == row_argmax), second, m), 0)
    return row_m, row_s, row_t, row_total, row_finite, row_s2, row_second, row_argmax


@triton.jit
def merge(before, following):
    """Sums of a row's first columns with those of the columns that follow: in index order, the same bits however the work was split."""
    a_m, a_s, a_t, a_total, a_finite, a_s2, a_second, a_argmax = before
    b_m, b_s, b_t, b_total, b_finite, b_s2, b_second, b_argmax = following
    up = b_m > a_m
    m = tl.where(up, b_m, a_m)
    other = tl.where(up, a_m, b_m)
    shift_a = tl.where(a_m == -INF, LOWEST, a_m - safe(m))
    shift_b = tl.where(b_m == -INF, LOWEST, b_m - safe(m))
    wa, wb = exp(shift_a), exp(shift_b)
    return (
        m,
        tl.fma(wa, a_s, wb * b_s),
        tl.fma(wa, tl.fma(tl.maximum(shift_a, LOWEST), a_s, a_t), wb * tl.fma(tl.maximum(shift_b, LOWEST), b_s, b_t)),
        tl.fma(shift_a, a_finite, a_total) + tl.fma(shift_b, b_finite, b_total),
        a_finite + b_finite,
        tl.fma(wa * wa, a_s2, wb * wb * b_s2),
        tl.maximum(tl.maximum(a_second, b_second), other),
        tl.where(up, b_argmax, a_argmax),
    )


@triton.jit
def load_vectors(row, cols, inside, STREAM: tl.constexpr):
    """STREAM: nobody reads this again, so it should not push anything out of L2."""
    return tl.load(row + cols, mask=inside, other=-INF, eviction_policy="evict_first" if STREAM else "")


@triton.jit
def whole_vectors(columns, VECTOR: tl.constexpr, VECTORS: tl.constexpr):
    """How many columns fill vectors; the fewer than VECTOR that are left over are read one by one. With VECTORS (rows start on a vector
    boundary) the compiler can see that it is a multiple, so that one test covers the columns of a vector."""
    return columns // VECTOR * VECTOR if VECTORS else columns - columns % VECTOR


@triton.jit
def segment_sums(
    row, start, end, scaling, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Sums over the columns start … end − 1. The next tile is loaded before this one is reduced.

    `row` has to come with the hint 16, aligned or not: the hint decides which columns a thread holds, hence the order of the sums and
    their bits, which must not depend on where a row lies in memory. Loads of an unaligned row stay scalar all the same, because without
    VECTORS nothing is known of `end`, so every column is tested for itself; tests/test_kernels_triton_compile.py looks at that.
    """
    TILE: tl.constexpr = DEPTH * LANES * VECTOR
    depth, lane = tl.arange(0, DEPTH)[:, None, None], tl.arange(0, LANES)[None, :, None]
    cols = (depth * LANES + lane) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    sums = no_sums(LANES)
    whole = start + (end - start) // TILE * TILE
    ahead = load_vectors(row, start + cols, start + cols < end, STREAM)  # `end`: of `whole` too much is known, see above
    for at in range(start, whole, TILE):
        here = at + cols
        z, inside = ahead, here < end
        ahead = load_vectors(row, here + TILE, here + TILE < end, STREAM)
        y = before_temperature(z, here, inside, scaling, FOLDED, SOFTCAP)[0]
        sums = add_tile(sums, y, here, scaling[1], T, TOTAL, RARE, False)
    sums = add_guarded(sums, row, whole, end, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, LANES, VECTOR, STREAM)
    found = across_lanes(sums, T, TOTAL, RARE)
    if T or TOTAL:  # noqa: SIM102 (known when it is compiled)
        if polluted(found, T, TOTAL):  # rare: the segment again, from L2
            sums = add_guarded(no_sums(LANES), row, start, end, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, LANES, VECTOR, STREAM)
            found = across_lanes(sums, T, TOTAL, RARE)
    return found


@triton.jit
def add_guarded(
    sums, row, start, end, scaling, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Add columns start … end − 1, some of which may be −inf, as what lies beyond `end` is. A vector a lane at a time, for registers."""
    cols = (tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :])[None, :, :]
    for at in range(start, end, LANES * VECTOR):
        here = at + cols
        z = load_vectors(row, here, here < end, STREAM)
        y = before_temperature(z, here, here < end, scaling, FOLDED, SOFTCAP)[0]
        sums = add_tile(sums, y, here, scaling[1], T, TOTAL, RARE, True)
    return sums


@triton.jit
def row_sums(
    row, columns, scaling, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, SEGMENT: tl.constexpr, VECTORS: tl.constexpr,
    STREAM: tl.constexpr,
):  # fmt: skip
    """Sums over the whole vectors of a row: `merge_rest` adds the columns that are left over."""
    end = whole_vectors(columns, VECTOR, VECTORS)
    sums = no_sums_of_row()
    for start in range(0, end, SEGMENT):
        part = segment_sums(
            row, start, min(start + SEGMENT, end), scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, DEPTH, LANES, VECTOR, STREAM,
        )  # fmt: skip
        sums = merge(sums, part)
    return sums


@triton.jit
def merge_rest(
    sums, row, columns, scaling,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    cols = (columns - columns % VECTOR + tl.arange(0, VECTOR))[None, :, None]
    inside = cols < columns
    z = tl.load(row + cols, mask=inside, other=-INF)
    y = before_temperature(z, cols, inside, scaling, FOLDED, SOFTCAP)[0]
    lanes = add_tile(no_sums(VECTOR), y, cols, scaling[1], T, TOTAL, RARE, True)
    return merge(sums, across_lanes(lanes, T, TOTAL, RARE))


@triton.jit
def keep_sums(
    row, n, local, columns, scaling, crow, col, id_offset,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, KEEP_LANES: tl.constexpr,
):  # fmt: skip
    """(m, s, t) over this shard's kept columns, and how often the id is among them."""
    lane = tl.arange(0, KEEP_LANES)
    start, stop = tl.load(crow + n), tl.load(crow + n + 1)
    sums, hits = no_sums(KEEP_LANES), tl.zeros((KEEP_LANES,), tl.float32)
    for at in range(start, stop, KEEP_LANES):
        cols = tl.load(col + at + lane, mask=at + lane < stop, other=-1) - id_offset
        inside = (at + lane < stop) & (cols >= 0) & (cols < columns)
        z = tl.load(row + cols, mask=inside, other=-INF)
        y = before_temperature(z, cols, inside, scaling, FOLDED, SOFTCAP)[0]
        sums = add_tile(sums, y[None, :, None], cols[None, :, None], scaling[1], True, False, False, True)
        hits += tl.where(inside & (cols == local), 1.0, 0.0)
    m, s, t, _, _, _, _, _ = across_lanes(sums, True, False, False)
    return m, s, t, tl.sum(hits, 0)


# ---- statistics -------------------------------------------------------------------------------------------------------------------------


@triton.jit
def wanted(flags, stat, value):
    return tl.where((flags >> stat) & 1 != 0, value, 0.0)


@triton.jit
def statistics_lines(sums, x_id, y_id, factor, bad_id, keep, flags, HAS_KEEP: tl.constexpr):
    """The lines of the packed statistics, in order."""
    m, s, t, total, finite, s2, second, argmax = sums
    nowhere = (m == -INF) | (m != m) | bad_id
    log_s = tl.where(nowhere, float("nan"), tl.log(s))
    poison = log_s - log_s
    base, base_log_s, id_counts = m, log_s, x_id != -INF
    on_keep = log_s
    if HAS_KEEP:
        keep_m, keep_s, keep_t, keep_id = keep
        base = keep_m
        base_log_s = tl.where(keep_m == -INF, float("nan"), tl.log(keep_s)) + poison
        id_counts = id_counts & (keep_id > 0)
        on_keep = base_log_s - keep_t / keep_s
    logp = tl.where(id_counts, tl.fma(y_id, factor, -base), -INF) - base_log_s
    entropy = tl.where(flags & ENTROPY_ON_KEEP != 0, on_keep, log_s - t / s)
    mean = total / finite
    max_prob = exp(-log_s)
    return (
        wanted(flags, LOGP, logp),
        m + log_s,
        wanted(flags, ENTROPY, entropy),
        wanted(flags, SELF_CERTAINTY, log_s - mean - tl.log(finite)),
        wanted(flags, MEAN_LOGIT, m + mean + poison),
        max_prob,
        wanted(flags, PROB_GAP, (1 - exp(second - m)) * max_prob),
        wanted(flags, SUM_P2, s2 / (s * s) + poison),
        tl.where(log_s != log_s, -1, argmax).to(tl.float32),
        m,
        log_s,
        finite,
        (base - m) + base_log_s,
        tl.where(id_counts, 1.0, 0.0),
    )


@triton.jit
def raw_lines(sums, x_id, bad_id, keep, id_offset, HAS_KEEP: tl.constexpr):
    """The lines of the packed sums, in order."""
    m, s, t, total, finite, s2, second, argmax = sums
    keep_m, keep_s, keep_t, keep_id = 0.0, 0.0, 0.0, 0.0
    if HAS_KEEP:
        keep_m, keep_s, keep_t, keep_id = keep
    bad = tl.where(bad_id, 1.0, 0.0)
    # In fp32 a column is exact below 2^24, far above any vocabulary.
    return m, s, t, total, finite, x_id, bad, s2, second, (argmax + id_offset).to(tl.float32), keep_m, keep_s, keep_t, keep_id


@triton.jit
def store_lines(out, stride, n, lines):
    for line in tl.static_range(STATS):
        tl.store(out + line * stride.to(tl.int64) + n, lines[line])


@triton.jit
def store_zeros(out, stride, n):
    for line in tl.static_range(STATS):
        tl.store(out + line * stride.to(tl.int64) + n, 0.0)


@triton.jit
def chosen_logit(row, local, ids, scaling, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr):
    """x and y at the id: −inf where it lies in another shard, 0 where there are no ids."""
    x, y = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    if ids is not None:
        z = tl.load(row + local, mask=local >= 0, other=-INF)
        y = before_temperature(z, local, local >= 0, scaling, FOLDED, SOFTCAP)[0]
        x = tl.where(y == -INF, -INF, y * scaling[1])
    return x, y


@triton.jit
def finish_row(
    sums, row, n, columns, scaling, ids, local, bad_id, crow, col, id_offset, flags,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    VECTOR: tl.constexpr, KEEP_LANES: tl.constexpr, RAW_LINES: tl.constexpr,
):  # fmt: skip
    """The lines that are written for a row, from the sums over its whole vectors."""
    HAS_KEEP: tl.constexpr = crow is not None
    sums = merge_rest(sums, row, columns, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, VECTOR)
    m, s, t, total, finite, s2, second, argmax = sums
    if not TOTAL:
        finite = tl.zeros((), tl.float32) + columns
    # Nothing but NaN and −inf: a row that is NaN, not one that is −inf throughout.
    m = tl.where((m == -INF) & (s != s), float("nan"), m)
    sums = (m, s, t, total, finite, s2, second, argmax)
    x_id, y_id = chosen_logit(row, local, ids, scaling, FOLDED, SOFTCAP)
    keep = (m, s, t, s)
    if HAS_KEEP:
        keep = keep_sums(row, n, local, columns, scaling, crow, col, id_offset, FOLDED, SOFTCAP, KEEP_LANES)
    if RAW_LINES:
        lines = raw_lines(sums, x_id, bad_id, keep, id_offset, HAS_KEEP)
    else:
        lines = statistics_lines(sums, x_id, y_id, scaling[1], bad_id, keep, flags, HAS_KEEP)
    return lines


# ---- gradient ---------------------------------------------------------------------------------------------------------------------------


@triton.jit
def coefficients(m, entropy, finite, id_counts, g_logp, g_lse, g_h, g_sc, g_mean, flags, HAS_KEEP: tl.constexpr):
    """(a, b, c, d, keep_a, keep_b) of dx_j = p_j (a + b ℓ_j) + c [j = id] + d [x_j finite] + p'_j (keep_a + keep_b ℓ'_j), and whether the
    gradient is 0 without reading the row."""
    on_keep = flags & ENTROPY_ON_KEEP != 0
    # The entropy of a row that has none in its loss may be anything.
    b_times_h = tl.where(g_h == 0, 0.0, -g_h * entropy)
    a = g_lse + g_sc + tl.where(on_keep, 0.0, b_times_h)
    keep_a = tl.zeros_like(a)
    if HAS_KEEP:
        keep_a = -g_logp + tl.where(on_keep, b_times_h, 0.0)
    else:
        a = a - g_logp
    b = tl.where(on_keep, 0.0, -g_h)
    c = tl.where(id_counts, g_logp, 0.0)
    d = tl.where(g_mean - g_sc == 0, 0.0, (g_mean - g_sc) / finite)
    keep_b = tl.where(on_keep, -g_h, 0.0)
    nothing = (g_logp == 0) & (g_lse == 0) & (g_h == 0) & (g_sc == 0) & (g_mean == 0)
    return a, b, c, d, keep_a, keep_b, (m == -INF) | nothing


@triton.jit
def gradient_term(above, log_s, a, b, HAS_B: tl.constexpr):
    """p (a + b ℓ) with ℓ = x − m − log s; 0 where x is −inf, NaN where it is NaN."""
    log_p = above - log_s
    if HAS_B:
        log_p = tl.maximum(log_p, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        a = tl.fma(log_p, b, a)
    return exp(log_p) * a


@triton.jit
def dense_gradient(y, cols, local, factor, co, HAS_B: tl.constexpr, HAS_D: tl.constexpr, WITH_ID: tl.constexpr = True):
    """dL/dx without the terms of a keep set, and without WITH_ID without that of the id."""
    m, log_s, a, b, c, d = co
    dx = gradient_term(tl.fma(y, factor, -m), log_s, a, b, HAS_B)
    if HAS_D:
        dx += tl.where(y == -INF, 0.0, d)
    if WITH_ID:
        dx += tl.where(cols == local, c, 0.0)
    return dx


@triton.jit
def gradient_at_id(
    row, local, scaling, co, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, HAS_D: tl.constexpr
):  # fmt: skip
    """The gradient at the column of the id, from a row that is still there. To look for that column at every logit costs a fifth of the
    instructions of `gradient_step`."""
    z = tl.load(row + local, mask=local >= 0, other=-INF)
    y, slope = before_temperature(z, local, local >= 0, scaling, FOLDED, SOFTCAP)
    return dense_gradient(y, local, local, scaling[1], co, HAS_B, HAS_D) * slope


@triton.jit
def gradient_step(
    row, target, cols, end, local, scaling, co,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, HAS_D: tl.constexpr, WITH_ID: tl.constexpr = True,
):  # fmt: skip
    """Write the gradient at some columns of a row. `target` may be `row`: all of them are read before one is written."""
    inside = cols < end
    z = tl.load(row + cols, mask=inside, other=-INF, eviction_policy="evict_first")
    y, slope = before_temperature(z, cols, inside, scaling, FOLDED, SOFTCAP)
    dx = dense_gradient(y, cols, local, scaling[1], co, HAS_B, HAS_D, WITH_ID) * slope
    tl.store(target + cols, dx.to(target.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit
def zero_step(target, cols, end):
    tl.store(target + cols, tl.zeros(cols.shape, target.dtype.element_ty), mask=cols < end, eviction_policy="evict_first")
