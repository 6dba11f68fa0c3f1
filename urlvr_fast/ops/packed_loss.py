"""The rows of policy losses in kernels: weights and liveness before their log-probs are known, what a sequence's add up to where a loss
joins them, and loss and metrics afterwards.

In PyTorch (`reference.py`) these are 60 to 130 operations on vectors of N numbers: nothing beside a large vocabulary on a CPU, but on a
GPU each of them is a launch, and together they take longer than the pass over the logits of a small batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from urlvr_fast.ops.backend import kernels
from urlvr_fast.ops.layout import (
    CORRECTIONS,
    GRADS,
    HAS_CORRECTION,
    HAS_OLD,
    HAS_RATIO,
    HAS_REF,
    HAS_ROLLOUT,
    KL_KINDS,
    LOSS_KINDS,
    LOSS_LINES,
    METRICS,
    LossLine,
    Metric,
    Weighing,
)
from urlvr_fast.ops.reference import SEQUENCE_MEAN, SEQUENCE_RATIO, LossOptions, TokenStats
from urlvr_fast.ops.registered import define

# ---- the ops ---------------------------------------------------------------------------------------------------------------------------


def _new_rows(advantages: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return advantages.new_empty(LOSS_LINES, rows), advantages.new_empty(rows, dtype=torch.bool), advantages.new_empty(2)


def _loss_rows(advantages: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, rows, backend = arguments
    out = _new_rows(advantages, rows)
    kernels(backend).loss_rows(advantages, *given, *out)
    return out


def _join_rows_(lines: Tensor, *arguments: Any) -> None:
    *given, backend = arguments
    kernels(backend).join(*given, lines)


def _new_results(logp: Tensor, differentiate: bool, metrics: int) -> tuple[Tensor, Tensor]:
    return logp.new_empty(metrics), logp.new_empty(GRADS, len(logp) if differentiate else 0)


def _objective(
    logp, entropy, self_certainty, lines, live, counts, present, kind, kl, correction, numbers, differentiate, size, backend
) -> tuple[Tensor, Tensor]:
    metrics, upstream = _new_results(logp, differentiate, size)
    given = (logp, entropy, self_certainty, lines, live, counts, present, kind, kl, correction, numbers)
    kernels(backend).objective(*given, metrics, upstream if differentiate else None)
    return metrics, upstream


loss_rows = define(
    "loss_rows",
    "(Tensor advantages, Tensor? mask, Tensor? cu_seqlens, Tensor? old_logp, Tensor? ref_logp, Tensor? rollout_logp, Tensor? denominator, "
    "float number, Tensor? token_denominator, float token_number, int weighing, SymInt rows, str backend) -> (Tensor, Tensor, Tensor)",
    _loss_rows,
    lambda advantages, *rest: _new_rows(advantages, rest[-2]),
)
join_rows_ = define(
    "join_rows_",
    "(Tensor(a!) lines, Tensor? logp, Tensor cu_seqlens, Tensor? which, int present, int kind, int correction, bool product, "
    "float[] numbers, str backend) -> ()",
    _join_rows_,
    lambda *_: None,
)
# `metrics` is METRICS, always: torch keeps compiled graphs on disk by the ops' names and arguments, and must not find those of a version
# that had other metrics.
policy_objective = define(
    "policy_objective",
    "(Tensor logp, Tensor? entropy, Tensor? self_certainty, Tensor lines, Tensor live, Tensor counts, int present, int kind, int kl, "
    "int correction, float[] numbers, bool differentiate, int metrics, str backend) -> (Tensor, Tensor)",
    _objective,
    lambda logp, *rest: _new_results(logp, *rest[-3:-1]),
)


# ---- what the other files call ---------------------------------------------------------------------------------------------------------


def loss_numbers(o: LossOptions) -> list[float]:
    """In the order of LossNumbers in csrc/rows.h."""
    log_delta = math.inf if o.delta is None else math.log(o.delta)
    first = (1 - o.eps_low, 1 + o.eps_high, log_delta, o.beta, o.entropy_coef, o.self_certainty_coef)
    return [*first, o.ratio_cap, o.tau_pos, o.tau_neg, o.rollout_cap, o.rollout_floor]


def kernel_kinds(o: LossOptions, present: int) -> tuple[int, int, int, int, list[float]]:
    """What the kernels `policy` and `objective` take of the options: present, kind, kl, correction, numbers."""
    kl = KL_KINDS[o.kl if present & HAS_REF else None]
    return present, LOSS_KINDS[o.loss_type], kl, CORRECTIONS[o.rollout_correction], loss_numbers(o)


def _divisor(given: float | Tensor | None) -> tuple[Tensor | None, float]:
    return (given, 1.0) if isinstance(given, Tensor) else (None, 1.0 if given is None else float(given))


@dataclass(frozen=True)
class PackedRows:
    """What a policy loss knows of its rows before any log-prob, as `LossRows` of reference.py, in the lines that kernels take."""

    lines: Tensor  # (LOSS_LINES, N)
    live: Tensor  # (N,) bool
    counts: Tensor  # (2,): the tokens and the sequences that count, in all of the call
    mask: Tensor | None  # (N,) bool; None: every row counts
    cu_seqlens: Tensor | None  # (B + 1,) int64, where rows wait for the log-probs of their sequence
    present: int
    sequences: bool  # whether there are any
    backend: str
    sequence_weight: ClassVar[None] = None  # no term is a sequence's

    @staticmethod
    def of(
        options: LossOptions,
        backend: str,
        rows: int,
        *,
        advantages: Tensor,  # (N,) or (B,), contiguous as the rest
        mask: Tensor | None,  # (N,) bool
        cu_seqlens: Tensor | None,  # (B + 1,) int64
        old_logp: Tensor | None,  # (N,)
        ref_logp: Tensor | None,  # (N,)
        rollout_logp: Tensor | None,  # (N,)
        denominator: float | Tensor | None,
        token_denominator: float | Tensor | None = None,
    ) -> PackedRows:
        kind, joined = options.loss_type, options.joins_rows(old_logp is not None)
        divisor, number = _divisor(denominator)
        if kind == "dr_grpo" and denominator is None:
            number = float(options.max_length or math.nan)
        weighing = {
            Weighing.PER_SEQUENCE: len(advantages) != rows,
            Weighing.COUNTED: denominator is None,
            Weighing.BY_SEQUENCES: denominator is None and kind in (*SEQUENCE_MEAN, *SEQUENCE_RATIO, "dr_grpo"),
            Weighing.SEQUENCE_MEAN: kind in (*SEQUENCE_MEAN, *SEQUENCE_RATIO) and kind != "luspo",  # whose term is L times gspo's
            Weighing.REGULARISED: options.regularised,
            Weighing.JOINED: joined,
            Weighing.ONE_TERM: kind in SEQUENCE_RATIO,
            Weighing.TOKENS_COUNTED: token_denominator is None,
        }
        present = {
            HAS_OLD: old_logp is not None,
            HAS_REF: ref_logp is not None,
            HAS_ROLLOUT: rollout_logp is not None,
            HAS_RATIO: kind in SEQUENCE_RATIO and old_logp is not None,  # otherwise every ratio is 1
            HAS_CORRECTION: options.rollout_correction is not None and (options.rollout_level == "sequence" or kind in SEQUENCE_RATIO),
        }
        given = (advantages, mask, cu_seqlens, old_logp, ref_logp, rollout_logp, divisor, number, *_divisor(token_denominator))
        lines, live, counts = loss_rows(*given, _bits(weighing), rows, backend)
        out = PackedRows(lines, live, counts, mask, cu_seqlens, _bits(present), cu_seqlens is not None, backend)
        if present[HAS_RATIO] or (present[HAS_CORRECTION] and joined):
            return out
        if present[HAS_CORRECTION]:  # by sequence, and known already
            out._join(None, mask, options)
        return replace(out, cu_seqlens=None)

    @property
    def joined(self) -> bool:
        """Whether a row's gradient waits for the log-probs of other rows."""
        return self.cu_seqlens is not None

    def _join(self, logp: Tensor | None, which: Tensor | None, options: LossOptions) -> None:
        present, kind, _, correction, numbers = kernel_kinds(options, self.present)
        product = options.rollout_level == "sequence"
        join_rows_(self.lines, logp, self.cu_seqlens, which, present, kind, correction, product, numbers, self.backend)

    @property
    def advantages(self) -> Tensor:
        return self.lines[LossLine.ADVANTAGE]

    @property
    def weight(self) -> Tensor:
        return self.lines[LossLine.WEIGHT]

    @property
    def regulariser_weight(self) -> Tensor:
        return self.lines[LossLine.REGULARISER]

    @property
    def old_logp(self) -> Tensor | None:
        return self.lines[LossLine.OLD] if self.present & HAS_OLD else None

    def select(self, rows: Tensor | slice) -> PackedRows:
        """These rows alone, whole sequences of them where rows are joined; indices rise."""
        if isinstance(rows, slice) and rows.start == 0 and rows.stop == len(self.live):
            return self
        mask, cu_seqlens = None if self.mask is None else self.mask[rows], self.cu_seqlens
        if cu_seqlens is not None:
            if isinstance(rows, slice):
                cu_seqlens = (cu_seqlens - rows.start).clamp(0, rows.stop - rows.start)
            else:
                cu_seqlens = torch.searchsorted(rows, cu_seqlens)
        return replace(self, lines=self.lines[:, rows].contiguous(), live=self.live[rows], mask=mask, cu_seqlens=cu_seqlens)

    def divided(self, power: Tensor) -> PackedRows:
        """The rows of a loss that is smaller by `power`, 0-d."""
        lines = self.lines.clone()
        lines[LossLine.WEIGHT : LossLine.REGULARISER + 1] /= power
        return replace(self, lines=lines)

    def with_live(self, chosen: Tensor) -> PackedRows:
        """Only the `chosen` (N,) rows that count are live."""
        return replace(self, live=chosen if self.mask is None else self.mask & chosen)

    def evaluate(self, values: TokenStats, options: LossOptions, *, differentiate: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """`policy_objective` of reference.py, without autograd: the loss, the metrics that there are, 0-d, and the gradient by the
        statistics of every row, (GRADS, N) where it is wanted."""
        given = [None if value is None else value.contiguous() for value in (values.logp, values.entropy, values.self_certainty)]
        kinds = kernel_kinds(options, self.present)
        if self.cu_seqlens is not None:
            self._join(given[0], self.live, options)
        results, upstream = policy_objective(*given, self.lines, self.live, self.counts, *kinds, differentiate, METRICS, self.backend)
        there = {
            "loss": False,  # not a metric
            "sequences": self.sequences,
            "rollout_weight_mean": options.rollout_correction is not None,
            "kl": bool(self.present & HAS_REF),
            "entropy": values.entropy is not None,
            "self_certainty": values.self_certainty is not None,
            "rollout_gap_mean": bool(self.present & HAS_ROLLOUT),
            "rollout_gap_max": bool(self.present & HAS_ROLLOUT),
        }
        lines = results.unbind()
        metrics = {name: line for name, line in zip(_NAMES, lines, strict=True) if there.get(name, True)}
        return lines[0], metrics, upstream


def _bits(which: dict[Any, bool]) -> int:
    return sum(int(bit) for bit, there in which.items() if there)


_NAMES = [metric.name.lower() for metric in Metric]
