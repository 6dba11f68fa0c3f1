"""The packed numbers that kernels exchange with the ops: `csrc/rows.h` repeats these enums and says what they mean.

A kernel package (C++, CUDA, Triton, PyTorch) is four functions over rows, all writing into tensors that they are given:

    statistics(*rows, flags, out)                                     out (STATS, N)
    gradient(*rows, flags, stats, upstream, given, out, bias_grad)    out (A, B, V), may be the logits' memory; bias_grad (V,) is added to
    policy(*rows, flags, loss, present, kind, kl, correction, numbers, stats, out, row_scale)
    scale(gradient, factor, row_scale)                                gradient (A, B, V) times a 0-d tensor and a number a row, in place

with rows = (logits (A, B, V), bias (V,), ids (N,), mask (N,), temperatures (N,), crow (N + 1,), col (nnz,), temperature, softcap, scale,
id_offset, total). N = A · B; the last stride of logits is 1, the others are free. Absent tensors are None; softcap 0.0 means none.
C++ for the CPU and Triton have one more, over rollouts, all contiguous: advantages(rewards, group_ids, mask, scale, baseline, eps, out).
"""

from __future__ import annotations

from enum import IntEnum


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
    ROLLOUT = 5  # log-prob of the sampler; with HAS_OLD the log of the correction


LOSS_LINES = len(LossLine)
HAS_OLD = 1
LOSS_KINDS = {"reinforce": 0, "grpo": 1, "dapo": 1, "bnpo": 1, "dr_grpo": 1, "cispo": 2, "sapo": 3}
KL_KINDS = {None: 0, "k1": 1, "k2": 2, "k3": 3}
CORRECTIONS = {None: 0, "truncate": 1, "mask": 2}
