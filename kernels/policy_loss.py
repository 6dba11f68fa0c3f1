"""Policy losses: what a row weighs before its log-prob is known, what the rows of a sequence add up to, a row's coefficient, and what all
rows come to.

`csrc/rows.h` says the same in C++, and why a loss with one term a sequence is one with a term a token too; `urlvr_fast/ops/layout.py`
states the calls. Two launches before and after, because every row waits for a sum over all of them. Which tensors are there is told in
bits, not compiled in: the kinds of losses cost no compilations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from urlvr_fast.kernels import targets
from urlvr_fast.kernels.rows import ENTROPY, LOGP, SELF_CERTAINTY, exp
from urlvr_fast.kernels.targets import RUNTIME, Constant, Launch

from urlvr_fast.ops import layout
from urlvr_fast.ops.layout import CORRECTIONS, KL_KINDS, LOSS_KINDS, LossLine, Metric, Weighing

ADVANTAGE = Constant(int(LossLine.ADVANTAGE))
WEIGHT = Constant(int(LossLine.WEIGHT))
REGULARISER = Constant(int(LossLine.REGULARISER))
OLD = Constant(int(LossLine.OLD))
REF = Constant(int(LossLine.REF))
ROLLOUT = Constant(int(LossLine.ROLLOUT))
RATIO = Constant(int(LossLine.RATIO))
CORRECTION = Constant(int(LossLine.CORRECTION))
HAS_OLD = Constant(layout.HAS_OLD)
HAS_REF = Constant(layout.HAS_REF)
HAS_ROLLOUT = Constant(layout.HAS_ROLLOUT)
HAS_RATIO = Constant(layout.HAS_RATIO)
HAS_CORRECTION = Constant(layout.HAS_CORRECTION)
PER_SEQUENCE = Constant(int(Weighing.PER_SEQUENCE))
COUNTED = Constant(int(Weighing.COUNTED))
BY_SEQUENCES = Constant(int(Weighing.BY_SEQUENCES))
SEQUENCE_MEAN = Constant(int(Weighing.SEQUENCE_MEAN))
REGULARISED = Constant(int(Weighing.REGULARISED))
JOINED = Constant(int(Weighing.JOINED))
ONE_TERM = Constant(int(Weighing.ONE_TERM))
TOKENS_COUNTED = Constant(int(Weighing.TOKENS_COUNTED))
REINFORCE = Constant(LOSS_KINDS["reinforce"])
CLIPPED = Constant(LOSS_KINDS["dapo"])
CISPO = Constant(LOSS_KINDS["cispo"])
SAPO = Constant(LOSS_KINDS["sapo"])
GMPO = Constant(LOSS_KINDS["gmpo"])
K1 = Constant(KL_KINDS["k1"])
K2 = Constant(KL_KINDS["k2"])
NO_CORRECTION = Constant(CORRECTIONS[None])
TRUNCATE = Constant(CORRECTIONS["truncate"])
MAX_LOG_RATIO = Constant(60.0)
GRADS = Constant(layout.GRADS)

# What a block of rows adds to `metrics_kernel`: the weighted sums that make the loss, then those behind the means and the two maxima in
# the order of the metrics.
POLICY, KL_TERM, ENTROPY_TERM, SELF_CERTAINTY_TERM = Constant(0), Constant(1), Constant(2), Constant(3)
LIVE, MEANS, MAXIMA, SUMS = Constant(4), Constant(5), Constant(13), Constant(15)
METRIC_LOSS = Constant(int(Metric.LOSS))
METRIC_POLICY = Constant(int(Metric.POLICY_LOSS))
METRIC_TOKENS = Constant(int(Metric.TOKENS))
METRIC_LIVE = Constant(int(Metric.LIVE_TOKENS))
METRIC_SEQUENCES = Constant(int(Metric.SEQUENCES))
METRIC_MEANS = Constant(int(Metric.RATIO_MEAN))
METRIC_MAXIMA = Constant(int(Metric.RATIO_MAX))
assert Metric.RATIO_MAX - Metric.RATIO_MEAN == 8, "between MEANS and MAXIMA"

# The order of LossNumbers in csrc/rows.h.
NUMBERS = (
    *("low", "high", "log_delta", "beta", "entropy_coef", "self_certainty_coef"),
    *("ratio_cap", "tau_pos", "tau_neg", "rollout_cap", "rollout_floor"),
)


# ---- the terms of a row -----------------------------------------------------------------------------------------------------------------


@triton.jit
def smaller(x, bound):
    """min(x, bound), where NaN stays."""
    return tl.where(x > bound, bound, x)


@triton.jit
def larger(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def larger_or_nan(x, y):
    return tl.where((x > y) | (x != x), x, y)


@triton.jit
def largest_or_nan(values):
    """Of a block."""
    return tl.where(tl.max((values != values).to(tl.int32), 0) != 0, float("nan"), tl.max(values, 0))


@triton.jit
def reciprocal_or_0(x):
    """A batch in which nothing counts has loss 0."""
    return tl.where(x == 0, 0.0, tl.div_rn(tl.zeros_like(x) + 1, x))


@triton.jit
def expm1(d):
    """e^d − 1 to a few ulp of itself: by its series near 0, where the difference cancels."""
    near = tl.fma(d, 1.0 / 8, 1.0)
    near = tl.fma(d * (1.0 / 7), near, 1.0)
    near = tl.fma(d * (1.0 / 6), near, 1.0)
    near = tl.fma(d * (1.0 / 5), near, 1.0)
    near = tl.fma(d * (1.0 / 4), near, 1.0)
    near = tl.fma(d * (1.0 / 3), near, 1.0)
    near = tl.fma(d * (1.0 / 2), near, 1.0)
    return tl.where(tl.abs(d) < 0.5, d * near, exp(d) - 1)


@triton.jit
def rollout_weight(log_weight, correction, rollout_cap, rollout_floor):
    """What a policy term is multiplied by, of a token or of a sequence."""
    w = exp(smaller(log_weight, MAX_LOG_RATIO))
    outside = (w < rollout_floor) | (w > rollout_cap)
    return tl.where(correction == TRUNCATE, smaller(w, rollout_cap), tl.where(outside, 0.0, w))


@triton.jit
def loss_terms(
    logp, advantage, weight, regulariser, old, ref, rollout, of_sequence, own_correction,
    present, loss_kind, kl_kind, correction,
    low, high, log_delta, beta, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
):  # fmt: skip
    """(policy term with its rollout weight, ratio, clipped low, clipped high, rollout weight, KL, rollout gap, d loss / d logp) of tokens.
    What does not apply is computed too and not chosen: a row costs a few exponentials either way."""
    has_old = (present & HAS_OLD) != 0
    raw = tl.where(has_old, logp - old, logp - logp)  # 0, or NaN with logp
    log_ratio = smaller(raw, MAX_LOG_RATIO)
    moves = (raw > MAX_LOG_RATIO) == 0  # a clamped log-ratio has no derivative
    of_token, clips = exp(log_ratio), (loss_kind == CLIPPED) | (loss_kind == GMPO)
    log_ratio = tl.where((present & HAS_RATIO) != 0, of_sequence, log_ratio)
    moves &= (clips & (log_ratio > log_delta)) == 0
    log_ratio = tl.where(clips, smaller(log_ratio, log_delta), log_ratio)
    r = exp(log_ratio)
    side = tl.where(loss_kind == GMPO, of_token, r)  # gmpo clips tokens, on the way to the sequence's ratio
    below, above = side < low, side > high
    product, clipped = r * advantage, tl.where(below, low, tl.where(above, high, r)) * advantage
    policy = tl.where((loss_kind != GMPO) & (clipped < product), -clipped, -product)
    pessimistic = tl.where(advantage > 0, above, below)  # the clipped product is the smaller one: constant
    slope = tl.where(moves & (pessimistic == 0), -advantage * r, 0.0)
    slope = tl.where(product != product, product, slope)
    clipped_low = tl.where(clips & below & (advantage < 0), 1.0, 0.0)
    clipped_high = tl.where(clips & above & (advantage > 0), 1.0, 0.0)
    clipped_high = tl.where((loss_kind == CISPO) & (r > ratio_cap), 1.0, clipped_high)
    tau = tl.where(advantage > 0, tau_pos, tau_neg)
    sigma = 1 / (1 + exp(-tau * (r - 1)))
    policy = tl.where(loss_kind == SAPO, -advantage * 4 * sigma / tau, policy)
    slope = tl.where(loss_kind == SAPO, tl.where(moves, -advantage * 4 * sigma * (1 - sigma) * r, 0.0), slope)
    detached = tl.where(loss_kind == CISPO, -smaller(r, ratio_cap) * advantage, -advantage)
    by_logp = (loss_kind == CISPO) | (loss_kind == REINFORCE)
    policy = tl.where(by_logp, detached * logp, policy)
    slope = tl.where(by_logp, detached, slope)
    w = rollout_weight(tl.where(has_old, old, logp) - rollout, correction, rollout_cap, rollout_floor)
    w = tl.where((present & HAS_CORRECTION) != 0, own_correction, w)
    w = tl.where(correction == NO_CORRECTION, 1.0, w)
    corrected = correction != NO_CORRECTION
    gradient = weight * tl.where(corrected, slope * w, slope)
    d = ref - logp
    e = expm1(d)
    kl = tl.where(kl_kind == K1, -d, tl.where(kl_kind == K2, d * d / 2, e - d))
    kl = tl.where((present & HAS_REF) != 0, kl, 0.0)
    by_kl = tl.where(kl_kind == K1, 1.0, tl.where(kl_kind == K2, -d, -e))
    gradient = tl.where((beta != 0) & ((present & HAS_REF) != 0), gradient + beta * regulariser * by_kl, gradient)
    gap = tl.where((present & HAS_ROLLOUT) != 0, tl.abs(logp - rollout), 0.0)
    return tl.where(corrected, policy * w, policy), r, clipped_low, clipped_high, w, kl, gap, gradient


@triton.jit
def load_lines(loss, loss_stride, n, inside):
    """(advantage, weight, regulariser, old, ref, rollout, the sequence's log-ratio, its correction) of rows."""
    line = loss + n
    stride = loss_stride.to(tl.int64)
    advantage = tl.load(line + ADVANTAGE * stride, mask=inside, other=0.0)
    weight = tl.load(line + WEIGHT * stride, mask=inside, other=0.0)
    regulariser = tl.load(line + REGULARISER * stride, mask=inside, other=0.0)
    old = tl.load(line + OLD * stride, mask=inside, other=0.0)
    ref = tl.load(line + REF * stride, mask=inside, other=0.0)
    rollout = tl.load(line + ROLLOUT * stride, mask=inside, other=0.0)
    ratio = tl.load(line + RATIO * stride, mask=inside, other=0.0)
    own_correction = tl.load(line + CORRECTION * stride, mask=inside, other=0.0)
    return advantage, weight, regulariser, old, ref, rollout, ratio, own_correction


@triton.jit
def regulariser_gradient(coefficient, regulariser):
    """d loss / d entropy or self-certainty. A coefficient of 0 is no term at all, whatever the weight."""
    return tl.where(coefficient == 0, 0.0, -coefficient * regulariser)


@triton.jit
def power_of_two_below(size):
    """2^⌊log2 size⌋, and 1 where that is no normal number above 0."""
    bits = size.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.where((bits == 0) | (bits == 0x7F800000), 1.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def row_upstream(
    logp, loss, loss_stride, n, inside, present, loss_kind, kl_kind, correction, scale,
    low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    SCALED: tl.constexpr,
):  # fmt: skip
    """The gradient of the loss by a row's logp, entropy and self-certainty; SCALED: divided by the power of two that comes last."""
    advantage, weight, regulariser, old, ref, rollout, ratio, own_correction = load_lines(loss, loss_stride, n, inside)
    _, _, _, _, _, _, _, g_logp = loss_terms(
        logp, advantage, weight, regulariser, old, ref, rollout, ratio, own_correction, present, loss_kind, kl_kind, correction,
        low, high, log_delta, beta, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    )  # fmt: skip
    g_h, g_sc = regulariser_gradient(entropy_coef, regulariser), regulariser_gradient(self_certainty_coef, regulariser)
    power = tl.zeros_like(g_logp) + 1
    if SCALED:
        power = power_of_two_below((tl.abs(g_logp) + tl.abs(g_h) + tl.abs(g_sc)) * tl.abs(power * scale))
        g_logp, g_h, g_sc = g_logp / power, g_h / power, g_sc / power
    return g_logp, g_h, g_sc, power


# ---- kernels: before the log-probs ------------------------------------------------------------------------------------------------------


@triton.jit
def _load_if(there, values, n, inside):
    loaded = tl.zeros(n.shape, tl.float32)
    if there:
        loaded = tl.load(values + n, mask=inside, other=0.0)
    return loaded


@triton.jit(do_not_specialize=RUNTIME)
def lengths_kernel(mask, cu_seqlens, advantages, lengths, means, alive, rows, BLOCK: tl.constexpr, PART: tl.constexpr):
    """A program per sequence, or where there are none per PART rows: how many tokens count. Nobody has checked cu_seqlens where that would
    be a wait for the device: -1 says that they do not rise from 0 to the number of rows. Where rows are joined, also the mean of their
    advantages, and whether one is not 0."""
    sequence = tl.program_id(0)
    begin = tl.zeros((), tl.int64) + sequence * PART
    end = tl.minimum(begin + PART, rows)
    broken = begin > end
    if cu_seqlens is not None:
        begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
        first, last = sequence == 0, sequence == tl.num_programs(0) - 1
        broken = (begin < 0) | (begin > end) | (end > rows) | (first & (begin != 0)) | (last & (end != rows))
        end = tl.where(broken, begin, end)
    length = end - begin
    if mask is not None:
        counted = tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            n = start + tl.arange(0, BLOCK)
            counted += (tl.load(mask + n, mask=n < end, other=0) != 0).to(tl.int32)
        length = tl.sum(counted, 0).to(tl.int64)
    tl.store(lengths + sequence, tl.where(broken, -1, length))
    if advantages is not None:
        total, found = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
        for start in range(begin, end, BLOCK):
            n = start + tl.arange(0, BLOCK)
            inside = n < end
            if mask is not None:
                inside = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
            advantage = tl.load(advantages + n, mask=inside, other=0.0)
            total += advantage
            found |= (advantage != 0).to(tl.int32)
        tl.store(means + sequence, tl.sum(total, 0) * reciprocal_or_0(length.to(tl.float32)))
        tl.store(alive + sequence, tl.max(found, 0) != 0)


@triton.jit(do_not_specialize=RUNTIME)
def loss_rows_kernel(
    advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, denominator, number, token_denominator, token_number, weighing, present,
    lengths, means, alive, sequences, steps, loss, loss_stride, live, counts, rows,
    BLOCK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK rows; each adds up all lengths for itself. Absent log-probs are the advantages' memory, which is not read for
    them. `means` and `alive` of the sequences: where rows are joined that have advantages of their own."""
    tokens, counting, lowest = tl.zeros((), tl.int64) + rows, (tl.zeros((), tl.int64) + rows > 0).to(tl.int64), tl.zeros((), tl.int64)
    if lengths is not None:
        tokens_of, counting_of, lowest_of = (tl.zeros((SEQUENCES,), tl.int64),) * 3
        for start in range(0, sequences, SEQUENCES):
            s = start + tl.arange(0, SEQUENCES)
            length = tl.load(lengths + s, mask=s < sequences, other=0)
            tokens_of += length
            counting_of += (length > 0).to(tl.int64)
            lowest_of = tl.minimum(lowest_of, length)
        tokens, counting, lowest = tl.sum(tokens_of, 0), tl.sum(counting_of, 0), tl.min(lowest_of, 0)
        if cu_seqlens is None:
            counting = (tokens > 0).to(tl.int64)
    poison = tl.where(lowest < 0, float("nan"), 0.0)
    if tl.program_id(0) == 0:
        tl.store(counts, tokens.to(tl.float32) + poison)
        tl.store(counts + 1, counting.to(tl.float32) + poison)
    divisor = tl.zeros((), tl.float32) + number
    if denominator is not None:
        divisor = tl.load(denominator)
    by = tl.where((weighing & BY_SEQUENCES) != 0, counting, tokens).to(tl.float32)
    inverse = reciprocal_or_0(tl.where((weighing & COUNTED) != 0, by * divisor, divisor))

    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    at, sequence, weight = n.to(tl.int64), tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.float32) + inverse
    if cu_seqlens is not None:  # noqa: SIM102  (known when it is compiled, the other when it runs)
        if (weighing & (PER_SEQUENCE | SEQUENCE_MEAN | JOINED)) != 0:
            # The last sequence that begins at or before the row.
            first, last = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64) + (sequences - 1)
            for _ in range(steps):
                middle = (first + last + 1) // 2
                begins = tl.load(cu_seqlens + middle, mask=inside, other=0)
                first, last = tl.where(begins <= n, middle, first), tl.where(begins <= n, last, middle - 1)
            sequence = tl.maximum(first, 0)
            if (weighing & SEQUENCE_MEAN) != 0:
                weight *= reciprocal_or_0(tl.load(lengths + sequence, mask=inside, other=1).to(tl.float32))
            if (weighing & PER_SEQUENCE) != 0:
                at = sequence
    advantage = tl.load(advantages + at, mask=inside, other=0.0) + poison
    weight += poison
    matters = advantage != 0
    if means is not None:
        matters = tl.load(alive + sequence, mask=inside, other=0) != 0
        if (weighing & ONE_TERM) != 0:
            advantage = tl.load(means + sequence, mask=inside, other=0.0) + poison
    counted = inside
    if mask is not None:
        counted = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    tl.store(live + n, counted & (((weighing & REGULARISED) != 0) | matters), mask=inside)
    regulariser = weight
    if (weighing & ONE_TERM) != 0:
        token_divisor = tl.zeros((), tl.float32) + token_number
        if token_denominator is not None:
            token_divisor = tl.load(token_denominator)
        token_divisor = tl.where((weighing & TOKENS_COUNTED) != 0, tokens.to(tl.float32), token_divisor)
        regulariser = tl.zeros((BLOCK,), tl.float32) + (reciprocal_or_0(token_divisor) + poison)
    stride, line = loss_stride.to(tl.int64), loss + n
    tl.store(line + ADVANTAGE * stride, advantage, mask=inside)
    tl.store(line + WEIGHT * stride, weight, mask=inside)
    tl.store(line + REGULARISER * stride, regulariser, mask=inside)
    tl.store(line + OLD * stride, _load_if((present & HAS_OLD) != 0, old_logp, n, inside), mask=inside)
    tl.store(line + REF * stride, _load_if((present & HAS_REF) != 0, ref_logp, n, inside), mask=inside)
    tl.store(line + ROLLOUT * stride, _load_if((present & HAS_ROLLOUT) != 0, rollout_logp, n, inside), mask=inside)
    tl.store(line + RATIO * stride, tl.zeros((BLOCK,), tl.float32), mask=inside)
    tl.store(line + CORRECTION * stride, tl.zeros((BLOCK,), tl.float32), mask=inside)


# ---- kernels: the rows of a sequence ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def join_kernel(
    logp, cu_seqlens, which, loss, loss_stride, present, loss_kind, correction, low, high, rollout_cap, rollout_floor, rows,
    BLOCK: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A program per sequence: its mean log-ratio and its rollout weight, into the lines of its rows. PRODUCT: the weight is that of the
    product of its tokens' ratios, otherwise the mean of their weights. Offsets that leave the rows are cut: such rows weigh NaN."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + tl.program_id(0)), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + tl.program_id(0) + 1), 0), rows)
    tokens, ratios, corrections = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    log_high = tl.log(tl.zeros((BLOCK,), tl.float32) + high)
    log_low = tl.where(low > 0, tl.log(tl.zeros((BLOCK,), tl.float32) + tl.where(low > 0, low, 1.0)), -float("inf"))
    stride = loss_stride.to(tl.int64)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        inside = n < end
        if which is not None:
            inside = inside & (tl.load(which + n, mask=inside, other=0) != 0)
        old = tl.load(loss + OLD * stride + n, mask=inside, other=0.0)
        current = old
        if logp is not None:
            current = tl.load(logp + n, mask=inside, other=0.0)
        own = tl.where((present & HAS_OLD) != 0, old, current)
        if (present & HAS_RATIO) != 0:
            ratio = smaller(current - own, MAX_LOG_RATIO)
            advantage = tl.load(loss + ADVANTAGE * stride + n, mask=inside, other=0.0)
            pessimistic = tl.where(advantage >= 0, smaller(ratio, log_high), larger(ratio, log_low))
            ratios += tl.where(inside, tl.where(loss_kind == GMPO, pessimistic, ratio), 0.0)
        if (present & HAS_CORRECTION) != 0:
            weight = own - tl.load(loss + ROLLOUT * stride + n, mask=inside, other=0.0)
            if not PRODUCT:
                weight = tl.where(inside, rollout_weight(weight, correction, rollout_cap, rollout_floor), 0.0)
            corrections += weight
        tokens += inside.to(tl.float32)
    count = tl.maximum(tl.sum(tokens, 0), 1.0)
    mean = tl.div_rn(tl.sum(ratios, 0), count)
    weight = tl.sum(corrections, 0)
    weight = rollout_weight(weight, correction, rollout_cap, rollout_floor) if PRODUCT else tl.div_rn(weight, count)
    for start in range(begin, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        if (present & HAS_RATIO) != 0:
            tl.store(loss + RATIO * stride + n, tl.zeros((BLOCK,), tl.float32) + mean, mask=n < end)
        if (present & HAS_CORRECTION) != 0:
            tl.store(loss + CORRECTION * stride + n, tl.zeros((BLOCK,), tl.float32) + weight, mask=n < end)


# ---- kernels: after them ----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def objective_kernel(
    logp, entropy, self_certainty, loss, loss_stride, live, present, loss_kind, kl_kind, correction,
    low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    partial, upstream, upstream_stride, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK rows: their sums to `partial` (blocks, SUMS), and where asked for the gradient by their statistics."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    alive = inside & (tl.load(live + n, mask=inside, other=0) != 0)
    advantage, weight, regulariser, old, ref, rollout, ratio, own_correction = load_lines(loss, loss_stride, n, alive)
    h = tl.zeros((BLOCK,), tl.float32)
    sc = h
    if entropy is not None:
        h = tl.load(entropy + n, mask=alive, other=0.0)
    if self_certainty is not None:
        sc = tl.load(self_certainty + n, mask=alive, other=0.0)
    policy, r, clipped_low, clipped_high, w, kl, gap, gradient = loss_terms(
        tl.load(logp + n, mask=alive, other=0.0), advantage, weight, regulariser, old, ref, rollout, ratio, own_correction,
        present, loss_kind, kl_kind, correction, low, high, log_delta, beta, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    )  # fmt: skip
    one = tl.zeros((BLOCK,), tl.float32) + 1
    summed = (
        policy * weight, kl * regulariser, h * regulariser, sc * regulariser,
        one, r, clipped_low, clipped_high, w, kl, h, sc, gap,
    )  # fmt: skip
    to = partial + tl.program_id(0).to(tl.int64) * SUMS
    for i in tl.static_range(MAXIMA):
        tl.store(to + i, tl.sum(tl.where(alive, summed[i], 0.0), 0))
    tl.store(to + MAXIMA, largest_or_nan(tl.where(alive, r, 0.0)))
    tl.store(to + MAXIMA + 1, largest_or_nan(tl.where(alive, gap, 0.0)))
    if upstream is not None:
        stride = upstream_stride.to(tl.int64)
        for i in tl.static_range(GRADS):
            if i == LOGP:
                g = gradient
            elif i == ENTROPY:
                g = regulariser_gradient(entropy_coef, regulariser)
            elif i == SELF_CERTAINTY:
                g = regulariser_gradient(self_certainty_coef, regulariser)
            else:
                g = tl.zeros((BLOCK,), tl.float32)
            tl.store(upstream + i * stride + n, tl.where(alive, g, 0.0), mask=inside)


@triton.jit
def _all_blocks(partial, line, blocks, BLOCK: tl.constexpr, MAXIMUM: tl.constexpr):
    """The sum (or maximum) of a line over the blocks of rows."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, blocks, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(partial + i.to(tl.int64) * SUMS + line, mask=i < blocks, other=0.0)
        total = larger_or_nan(value, total) if MAXIMUM else total + value
    return largest_or_nan(total) if MAXIMUM else tl.sum(total, 0)


@triton.jit(do_not_specialize=RUNTIME)
def metrics_kernel(partial, blocks, counts, beta, entropy_coef, self_certainty_coef, metrics, BLOCK: tl.constexpr):
    """One program: the sums of all blocks, and what users see of them."""
    policy = _all_blocks(partial, POLICY, blocks, BLOCK, False)
    loss = policy
    # A coefficient of 0 is no term at all, whatever its sum is.
    if beta != 0:
        loss += beta * _all_blocks(partial, KL_TERM, blocks, BLOCK, False)
    if entropy_coef != 0:
        loss -= entropy_coef * _all_blocks(partial, ENTROPY_TERM, blocks, BLOCK, False)
    if self_certainty_coef != 0:
        loss -= self_certainty_coef * _all_blocks(partial, SELF_CERTAINTY_TERM, blocks, BLOCK, False)
    alive = _all_blocks(partial, LIVE, blocks, BLOCK, False)
    each = reciprocal_or_0(alive)
    tl.store(metrics + METRIC_LOSS, loss)
    tl.store(metrics + METRIC_POLICY, policy)
    tl.store(metrics + METRIC_TOKENS, tl.load(counts))
    tl.store(metrics + METRIC_LIVE, alive)
    tl.store(metrics + METRIC_SEQUENCES, tl.load(counts + 1))
    for i in tl.static_range(MAXIMA - MEANS):
        tl.store(metrics + METRIC_MEANS + i, _all_blocks(partial, MEANS + i, blocks, BLOCK, False) * each)
    for i in tl.static_range(SUMS - MAXIMA):
        tl.store(metrics + METRIC_MAXIMA + i, _all_blocks(partial, MAXIMA + i, blocks, BLOCK, True))


# ---- the calls --------------------------------------------------------------------------------------------------------------------------


def plan_loss_rows(
    advantages: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    denominator: Tensor | None,
    number: float,
    token_denominator: Tensor | None,
    token_number: float,
    weighing: int,
    lines: Tensor,
    live: Tensor,
    counts: Tensor,
) -> list[Launch]:
    """What `loss_rows` launches, in this order."""
    rows, part = len(live), targets.LENGTHS_PART
    sequences = triton.cdiv(rows, part) if cu_seqlens is None else len(cu_seqlens) - 1  # or parts of everything
    given = ((layout.HAS_OLD, old_logp), (layout.HAS_REF, ref_logp), (layout.HAS_ROLLOUT, rollout_logp))
    arguments: dict[str, Any] = {
        "advantages": advantages,
        "mask": mask,
        "cu_seqlens": cu_seqlens,
        "old_logp": advantages if old_logp is None else old_logp,
        "ref_logp": advantages if ref_logp is None else ref_logp,
        "rollout_logp": advantages if rollout_logp is None else rollout_logp,
        "denominator": denominator,
        "number": float(number),
        "token_denominator": token_denominator,
        "token_number": float(token_number),
        "weighing": weighing,
        "present": sum(bit for bit, value in given if value is not None),
        "lengths": None,
        "means": None,
        "alive": None,
        "sequences": sequences,
        "steps": (sequences + 1).bit_length(),
        "loss": lines,
        "loss_stride": lines.stride(0),
        "live": live,
        "counts": counts,
        "rows": rows,
        "BLOCK": targets.ROWS.columns,
        "SEQUENCES": targets.LENGTHS.columns,
    }
    launches = []
    if mask is not None or cu_seqlens is not None:
        lengths = torch.empty(sequences, dtype=torch.int64, device=lines.device)
        arguments["lengths"] = lengths
        if weighing & Weighing.JOINED and not weighing & Weighing.PER_SEQUENCE:
            arguments["means"] = torch.empty(sequences, dtype=torch.float32, device=lines.device)
            arguments["alive"] = torch.empty(sequences, dtype=torch.bool, device=lines.device)
        of_lengths = {"mask": mask, "cu_seqlens": cu_seqlens, "lengths": lengths, "rows": rows}
        of_lengths |= {"means": arguments["means"], "alive": arguments["alive"]}
        of_lengths |= {"advantages": None if arguments["means"] is None else advantages}
        of_lengths |= {"BLOCK": targets.LENGTHS.columns, "PART": part}
        if sequences:
            launches.append(Launch(lengths_kernel, sequences, of_lengths, targets.LENGTHS.warps))
    blocks = max(1, triton.cdiv(rows, targets.ROWS.columns))  # one without rows too: it writes the counts
    return [*launches, Launch(loss_rows_kernel, blocks, arguments, targets.ROWS.warps)]


def plan_join(
    logp: Tensor | None,
    cu_seqlens: Tensor,
    which: Tensor | None,
    present: int,
    kind: int,
    correction: int,
    product: bool,
    numbers: Sequence[float],
    lines: Tensor,
) -> list[Launch]:
    """What `join` launches."""
    named = dict(zip(NUMBERS, map(float, numbers), strict=True))
    arguments: dict[str, Any] = {name: named[name] for name in ("low", "high", "rollout_cap", "rollout_floor")}
    arguments |= {
        "logp": logp,
        "cu_seqlens": cu_seqlens,
        "which": which,
        "loss": lines,
        "loss_stride": lines.stride(0),
        "present": present,
        "loss_kind": kind,
        "correction": correction,
        "rows": lines.shape[1],
        "BLOCK": targets.LENGTHS.columns,
        "PRODUCT": bool(product),
    }
    sequences = len(cu_seqlens) - 1
    return [Launch(join_kernel, sequences, arguments, targets.LENGTHS.warps)] if sequences else []


def plan_objective(
    logp: Tensor,
    entropy: Tensor | None,
    self_certainty: Tensor | None,
    lines: Tensor,
    live: Tensor,
    counts: Tensor,
    present: int,
    kind: int,
    kl: int,
    correction: int,
    numbers: Sequence[float],
    metrics: Tensor,
    upstream: Tensor | None,
) -> list[Launch]:
    """What `objective` launches, in this order."""
    rows, named = len(live), dict(zip(NUMBERS, map(float, numbers), strict=True))
    blocks = triton.cdiv(rows, targets.OBJECTIVE.columns)
    partial = torch.empty(blocks, SUMS.value, dtype=torch.float32, device=lines.device)
    arguments = named | {
        "logp": logp,
        "entropy": entropy,
        "self_certainty": self_certainty,
        "loss": lines,
        "loss_stride": lines.stride(0),
        "live": live,
        "present": present,
        "loss_kind": kind,
        "kl_kind": kl,
        "correction": correction,
        "partial": partial,
        "upstream": upstream,
        "upstream_stride": 0 if upstream is None else upstream.stride(0),
        "rows": rows,
        "BLOCK": targets.OBJECTIVE.columns,
    }
    of_metrics: dict[str, Any] = {name: named[name] for name in ("beta", "entropy_coef", "self_certainty_coef")}
    of_metrics |= {"partial": partial, "blocks": blocks, "counts": counts, "metrics": metrics, "BLOCK": targets.METRICS.columns}
    launches = [Launch(objective_kernel, blocks, arguments, targets.OBJECTIVE.warps)] if rows else []
    return [*launches, Launch(metrics_kernel, 1, of_metrics, targets.METRICS.warps)]


def loss_rows(
    advantages: Tensor,  # (N,) or (B,) fp32
    mask: Tensor | None,  # (N,)
    cu_seqlens: Tensor | None,  # (B + 1,)
    old_logp: Tensor | None,  # (N,)
    ref_logp: Tensor | None,  # (N,)
    rollout_logp: Tensor | None,  # (N,)
    denominator: Tensor | None,  # 0-d
    number: float,
    token_denominator: Tensor | None,  # 0-d
    token_number: float,
    weighing: int,
    lines: Tensor,  # (LOSS_LINES, N)
    live: Tensor,  # (N,) bool
    counts: Tensor,  # (2,)
) -> None:
    """Write what is known of every row before its log-prob. With cu_seqlens that do not rise from 0 to N all of it is NaN."""
    with torch.cuda.device_of(lines):
        given = (advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, denominator, number, token_denominator, token_number)
        for step in plan_loss_rows(*given, weighing, lines, live, counts):
            step.run()


def join(
    logp: Tensor | None,  # (N,)
    cu_seqlens: Tensor,  # (B + 1,)
    which: Tensor | None,  # (N,) bool
    present: int,
    kind: int,
    correction: int,
    product: bool,
    numbers: Sequence[float],  # NUMBERS
    lines: Tensor,  # (LOSS_LINES, N)
) -> None:
    """Write what the rows of each sequence add up to into their lines."""
    with torch.cuda.device_of(lines):
        for step in plan_join(logp, cu_seqlens, which, present, kind, correction, product, numbers, lines):
            step.run()


def objective(
    logp: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    self_certainty: Tensor | None,  # (N,)
    lines: Tensor,  # (LOSS_LINES, N)
    live: Tensor,  # (N,) bool
    counts: Tensor,  # (2,)
    present: int,
    kind: int,
    kl: int,
    correction: int,
    numbers: Sequence[float],  # NUMBERS
    metrics: Tensor,  # (METRICS,)
    upstream: Tensor | None,  # (GRADS, N)
) -> None:
    """Write the loss with its metrics and, where there is room for it, the gradient by the statistics of every row."""
    with torch.cuda.device_of(lines):
        given = (logp, entropy, self_certainty, lines, live, counts, present, kind, kl, correction, numbers)
        for step in plan_objective(*given, metrics, upstream):
            step.run()
