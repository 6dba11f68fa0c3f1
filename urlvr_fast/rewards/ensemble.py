"""Majority voting (paper, Table 2; TTRL): a rollout is right when its answer is the one that most rollouts of its prompt gave.

The vote is over equivalence classes of answers, not over their spellings, and the reward is membership in the winning class: a rollout
that voted for the winner is rewarded however it spelt it, and no label is ever graded again in another spelling. All rollouts vote, those
with `train_mask` False too. A rollout without an answer belongs to no class, gets 0, and still counts in the ratio's denominator.

The tie rule: the largest class wins; among equals the one whose rollouts the model found likelier (mean over the class of the mean token
log-probability); if that is equal too, the one whose label comes first in string order. The order of the rollouts decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError
from urlvr_fast.rewards.answers import AnswerChecker, equivalence_classes

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


@dataclass(frozen=True)
class Votes:
    answers: list[str | None]  # (B,) extracted answer; None when there is none (a model that answers "None" has the string)
    classes: list[int]  # (B,) class of the answer within its group, by first appearance there; −1 without an answer
    winners: dict[int, int]  # group id -> winning class; −1 when nothing in the group parses
    ratios: dict[int, float]  # group id -> share of the winning class among ALL rollouts of the group; 0 when nothing parses
    labels: dict[int, str | None]  # group id -> the winner's commonest spelling (then first in string order); None when nothing parses
    in_winner: Tensor  # (B,) bool: the rollout's answer is in its group's winning class

    @property
    def parse_rate(self) -> float:
        """Share of rollouts that have an answer."""
        return sum(answer is not None for answer in self.answers) / max(1, len(self.answers))


def vote(batch: RolloutBatch, checker: AnswerChecker) -> Votes:
    """Extract every rollout's answer, sort each group's into classes, and let it elect one (see the tie rule above)."""
    answers = [checker.extract(completion) for completion in batch.completions]
    groups = batch.groups()
    likelihood = batch.sequence_mean(batch.sampled_logp.detach().double()).tolist()

    def classes_of(rows: list[int]) -> list[int]:
        return equivalence_classes([answers[row] for row in rows], checker)

    # Comparisons wait for worker processes: with several of them, several groups can be sorted at once. The result is the same.
    with ThreadPoolExecutor(max_workers=max(1, getattr(checker, "workers", 1))) as threads:
        sorted_groups = list(threads.map(classes_of, groups.values()))
    classes = [-1] * len(batch)
    winners: dict[int, int] = {}
    labels: dict[int, str | None] = {}
    ratios: dict[int, float] = {}
    in_winner = torch.zeros(len(batch), dtype=torch.bool)
    for (group, rows), numbers in zip(groups.items(), sorted_groups, strict=True):
        members: dict[int, list[int]] = {}
        for row, number in zip(rows, numbers, strict=True):
            classes[row] = number
            if number >= 0:
                members.setdefault(number, []).append(row)
        winner, label = elect(members, answers, likelihood)
        winners[group], labels[group] = winner, label
        voters = members.get(winner, [])
        ratios[group] = len(voters) / len(rows)
        in_winner[voters] = True
    return Votes(answers, classes, winners, ratios, labels, in_winner)


def elect(members: dict[int, list[int]], answers: list[str | None], likelihood: list[float]) -> tuple[int, str | None]:
    """The winning class and its label, of classes given as lists of rollouts; (−1, None) when there are none."""

    def label_of(rows: list[int]) -> str:
        spellings = Counter(answer for row in rows if (answer := answers[row]) is not None)
        return min(spellings, key=lambda spelling: (-spellings[spelling], spelling))

    candidates = [
        # fsum is exact whatever the order, so equal sets of rollouts tie exactly.
        (-len(rows), -math.fsum(likelihood[row] for row in rows) / len(rows), label_of(rows), number)
        for number, rows in members.items()
    ]
    if not candidates:
        return -1, None
    *_, label, number = min(candidates)
    return number, label


class MajorityVoting:
    """1 for the rollouts in their group's winning class, 0 for the others; 0 for all of a group in which nothing parses.

    threshold: a group whose winning class holds less than this share of its rollouts gets 0 for all, so it teaches nothing (the
        self-consistency threshold of SRT, arXiv 2505.21444). 0, the default, is plain majority voting (TTRL).
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, checker: AnswerChecker, threshold: float = 0.0) -> None:
        if not 0 <= threshold <= 1:
            raise RewardError(f"majority_voting: threshold={threshold} is a share of the rollouts, from 0 to 1")
        self.checker = checker
        self.threshold = threshold

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        votes = vote(batch, self.checker)
        agreed = torch.tensor([votes.ratios[group] >= self.threshold for group in batch.group_ids.tolist()], dtype=torch.bool)
        return (votes.in_winner & agreed).float()
