"""Anchors: what the base model was sure of, before training, on prompts that nobody needs to have answers for.

`anchored_majority` is what the default stop rule reads: the share of the anchors that greedy answers still give, times the majority ratio
of the training rollouts. The first says whether the mode is still what it was, the second how much of the mass is on it: together a
label-free stand-in for the accuracy of a sample, which rises while a policy sharpens what it knew and falls when it leaves that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import Votes

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

ANCHORED_MAJORITY = "eval/anchored_majority"  # the metric's name
RATIO_STEPS = 5  # training steps over which the majority ratio is averaged
CLEAR_MAJORITY = 0.5  # share of the rollouts from which a vote counts as clear


@dataclass(frozen=True)
class Anchors:
    """The clear votes of the model that training starts from: prompt id -> answer."""

    labels: Mapping[int, str]

    @classmethod
    def of(cls, batch: RolloutBatch, votes: Votes, share: float = CLEAR_MAJORITY) -> Anchors:
        """Of each prompt whose winning answer holds at least `share` of its rollouts."""
        labels = {}
        for group, rows in batch.groups().items():
            label = votes.labels[group]
            if label is not None and votes.ratios[group] >= share:
                labels[batch.prompt_ids[rows[0]]] = label
        return cls(labels)

    def agreement(self, greedy: RolloutBatch, checker: AnswerChecker) -> float | None:
        """Share of the anchored prompts on which the greedy completions give the anchor's answer; None when there is no anchor.

        An anchored prompt that is not in the batch, or whose completion has no answer, disagrees.
        """
        if not self.labels:
            return None
        agreed = set()
        for prompt_id, completion in zip(greedy.prompt_ids, greedy.completions, strict=True):
            answer = checker.extract(completion) if prompt_id in self.labels else None
            if answer is not None and checker.equivalent(answer, self.labels[prompt_id]):
                agreed.add(prompt_id)
        return len(agreed) / len(self.labels)


def anchored_majority(lines: Sequence[Mapping[str, float | None]]) -> dict[int, float]:
    """Step -> anchored majority, at each evaluation in the lines of a metrics.jsonl.

    The majority ratio is the mean of the last 5 steps; for the evaluation before training, that of the steps up to the next evaluation,
    5 at most, so its reading is known from then on and does not change any more.
    """
    readings: dict[int, float] = {}
    ratios: list[float] = []
    start: float | None = None
    for line in lines:
        if (ratio := line.get("majority_ratio")) is not None:
            ratios.append(ratio)
            if start is not None and len(ratios) <= RATIO_STEPS:
                readings[0] = start * fmean(ratios)
        agreement, step = line.get("eval/anchor_agreement"), line["step"]
        if agreement is None or step is None:
            continue
        if step == 0:
            start = agreement
        elif ratios:
            readings[int(step)] = agreement * fmean(ratios[-RATIO_STEPS:])
            start = None
    return readings
