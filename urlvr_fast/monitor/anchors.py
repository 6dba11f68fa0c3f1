"""Anchors: what the base model was sure of, before training, on prompts that nobody needs to have answers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import Votes

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

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
