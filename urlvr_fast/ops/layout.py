"""The packed numbers that kernels exchange with the ops: `csrc/rows.h` repeats these enums and says what they mean.

A kernel package (C++, CUDA, Triton, PyTorch) is functions over rows, all writing into tensors that they are given:

    statistics(*rows, flags, out)                                     out (STATS, N)
    gradient(*rows, flags, stats, upstream, given, out, bias_grad)    out (A, B, V), may be the logits' memory; bias_grad (V,) is added to
    policy(*rows, flags, loss, present, kind, kl, correction, numbers, stats, out, row_scale)
    scale(gradient, factor, row_scale)                                gradient (A, B, V) times a 0-d tensor and a number a row, in place

with rows = (logits (A, B, V), bias (V,), ids (N,), mask (N,), temperatures (N,), crow (N + 1,), col (nnz,), temperature, softcap, scale,
id_offset, total). N = A · B; the last stride of logits is 1, the others are free. Absent tensors are None; softcap 0.0 means none.

All but PyTorch have three more for policy losses: before any log-prob, where the rows of a sequence are joined, and after; everything is
contiguous:

    loss_rows(advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, denominator, number, token_denominator, token_number,
              weighing, lines, live, counts)
    join(logp, cu_seqlens, which, present, kind, correction, product, numbers, lines)
    objective(logp, entropy, self_certainty, lines, live, counts, present, kind, kl, correction, numbers, metrics, upstream)

with lines (LOSS_LINES, N), live (N,) bool, counts (2,): the tokens and the sequences that count, metrics (METRICS,), upstream (GRADS, N).
`join` adds up `which` (N,) bool of a sequence's rows, None being all of them, and writes those of the lines RATIO and CORRECTION that
`present` names into them. logp may be None where only CORRECTION is, with old_logp.
C++ for the CPU and Triton have one over rollouts, contiguous too: advantages(rewards, group_ids, mask, scale, baseline, eps, out).
"""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Stat(IntEnum):
    """Lines of the packed statistics. The first nine are those of `TokenStats`, the rest is kept for the gradient."""

    LOGP = 0
    LSE = 1
    ENTROPY = 2
    SELF_CERTAINTY = 3
    MEAN_LOGIT = 4
    MAX_PROB = 5
    PROB_GAP = 6
    SUM_P2 = 7
    ARGMAX = 8
    ROW_MAX = 9
    LOG_S = 10
    FINITE = 11
    KEEP_LOG_S = 12
    ID_COUNTS = 13


STATS = len(Stat)
GRADS = 5  # LOGP … MEAN_LOGIT are differentiable
ENTROPY_ON_KEEP = 1 << 9
RAW = 1 << 10


class LossLine(IntEnum):
    """Lines of the packed loss rows of `policy`."""

    ADVANTAGE = 0
    WEIGHT = 1
    REGULARISER = 2
    OLD = 3
    REF = 4
    ROLLOUT = 5
    RATIO = 6  # mean log-ratio of the row's sequence
    CORRECTION = 7  # rollout weight of the row's sequence


LOSS_LINES = len(LossLine)
HAS_OLD, HAS_REF, HAS_ROLLOUT, HAS_RATIO, HAS_CORRECTION = 1, 2, 4, 8, 16  # bits of `present`
LOSS_KINDS = {"reinforce": 0, "grpo": 1, "dapo": 1, "bnpo": 1, "dr_grpo": 1, "gspo": 1, "luspo": 1, "cispo": 2, "sapo": 3, "gmpo": 4}
KL_KINDS = {None: 0, "k1": 1, "k2": 2, "k3": 3}
CORRECTIONS = {None: 0, "truncate": 1, "mask": 2}


class Weighing(IntFlag):
    """How `loss_rows` weighs rows. The divisor is `denominator` or `number`, or as many times the tokens (the sequences) that count."""

    PER_SEQUENCE = 1  # an advantage a sequence, not a token
    COUNTED = 2
    BY_SEQUENCES = 4
    SEQUENCE_MEAN = 8  # divided by the tokens of the row's sequence as well
    REGULARISED = 16  # a row with advantage 0 is not dead
    JOINED = 32  # nor is one whose sequence has another advantage
    ONE_TERM = 64  # a sequence's advantage is the mean over its tokens; regularisers are divided by `token_denominator` or `token_number`
    TOKENS_COUNTED = 128  # or by the tokens that count


class Metric(IntEnum):
    """What `objective` returns, under the names that users see; the first is the loss."""

    LOSS = 0
    POLICY_LOSS = 1
    TOKENS = 2
    LIVE_TOKENS = 3
    SEQUENCES = 4
    RATIO_MEAN = 5
    CLIP_FRAC_LOW = 6
    CLIP_FRAC_HIGH = 7
    ROLLOUT_WEIGHT_MEAN = 8
    KL = 9
    ENTROPY = 10
    SELF_CERTAINTY = 11
    ROLLOUT_GAP_MEAN = 12
    RATIO_MAX = 13
    ROLLOUT_GAP_MAX = 14


METRICS = len(Metric)
