"""Voting (paper, Table 2; TTRL, SRT, RLCCF): a rollout is right when its answer is the one that most rollouts of its prompt gave.

The vote is over equivalence classes of answers, not over their spellings, and the reward is membership in the winning class: a rollout
that voted for the winner is rewarded however it spelt it, and no label is ever graded again in another spelling. All rollouts vote, those
with `train_mask` False too. A rollout without an answer belongs to no class, gets 0, and still counts in the ratio's denominator.

The tie rule: the largest class wins; among equals the one whose rollouts the model found likelier (mean over the class of the mean token
log-probability); if that is equal too, the one whose label comes first in string order. The order of the rollouts decides nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError
from urlvr_fast.rewards.answers import AnswerChecker, equivalence_classes

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


Group = TypeVar("Group", bound=Hashable)
Classes = dict[int, list[int]]  # of one group: class -> its rollouts; rollouts without an answer are in none


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


def answer_classes(
    answers: Sequence[str | None], groups: Mapping[Group, Sequence[int]], checker: AnswerChecker
) -> tuple[list[int], dict[Group, Classes]]:
    """Each answer's class within its group, by first appearance there (−1 without an answer), and the classes of each group."""

    def classes_of(rows: Sequence[int]) -> list[int]:
        return equivalence_classes([answers[row] for row in rows], checker)

    # Comparisons wait for worker processes: with several of them, several groups can be sorted at once. The result is the same.
    with ThreadPoolExecutor(max_workers=max(1, getattr(checker, "workers", 1))) as threads:
        sorted_groups = list(threads.map(classes_of, groups.values()))
    classes = [-1] * len(answers)
    members: dict[Group, Classes] = {}
    for (group, rows), numbers in zip(groups.items(), sorted_groups, strict=True):
        members[group] = {}
        for row, number in zip(rows, numbers, strict=True):
            classes[row] = number
            if number >= 0:
                members[group].setdefault(number, []).append(row)
    return classes, members


def mean_logp(batch: RolloutBatch) -> list[float]:
    """(B,) mean log-probability of each rollout's tokens: what decides between equally large classes."""
    return batch.sequence_mean(batch.sampled_logp.detach().double()).tolist()


def vote(batch: RolloutBatch, checker: AnswerChecker) -> Votes:
    """Extract every rollout's answer, sort each group's into classes, and let it elect one (see the tie rule above)."""
    answers = [checker.extract(completion) for completion in batch.completions]
    groups, likelihood = batch.groups(), mean_logp(batch)
    classes, members = answer_classes(answers, groups, checker)
    winners: dict[int, int] = {}
    labels: dict[int, str | None] = {}
    ratios: dict[int, float] = {}
    in_winner = torch.zeros(len(batch), dtype=torch.bool)
    for group, rows in groups.items():
        winner, label = elect(members[group], answers, likelihood)
        winners[group], labels[group] = winner, label
        voters = members[group].get(winner, [])
        ratios[group] = len(voters) / len(rows)
        in_winner[voters] = True
    return Votes(answers, classes, winners, ratios, labels, in_winner)


def elect(
    members: Classes,
    answers: Sequence[str | None],
    likelihood: Sequence[float],
    weight: Callable[[list[int]], int | Fraction] = len,
) -> tuple[int, str | None]:
    """The winning class and its label; (−1, None) when there are no classes. weight: what the votes of these rollouts count, exactly."""
    candidates = [
        # fsum is exact whatever the order, so equal sets of rollouts tie exactly.
        (-weight(rows), -math.fsum(likelihood[row] for row in rows) / len(rows), label_of(rows, answers), number)
        for number, rows in members.items()
    ]
    if not candidates:
        return -1, None
    *_, label, number = min(candidates)
    return number, label


def label_of(rows: Sequence[int], answers: Sequence[str | None]) -> str:
    """The commonest spelling among rollouts of one class; of equally common ones the first in string order."""
    spellings = Counter(answer for row in rows if (answer := answers[row]) is not None)
    return min(spellings, key=lambda spelling: (-spellings[spelling], spelling))


def checked_share(threshold: float, name: str) -> float:
    if not 0 <= threshold <= 1:
        raise RewardError(f"{name}: threshold={threshold} is a share of the rollouts, from 0 to 1")
    return threshold


class MajorityVoting:
    """r(y) = 1[ans(y) is in the winning class] (TTRL, arXiv 2504.16084; SRT, arXiv 2505.21444), or soft, the share of y's own class.

    soft: r(y) = |class of y| / N instead, N all rollouts of the group (SRT's soft reward; SC-RL in EM-RL, arXiv 2505.15134).
    threshold: a group whose winning class holds less than this share of its rollouts gets 0 for all, so it teaches nothing (SRT's
        self-consistency threshold). 0, the default, is plain majority voting (TTRL).

    No answer gives 0, so a group in which nothing parses gets 0 for all. Votes may outnumber samples: rollouts with `train_mask` False
    vote too. Fails by gradual degradation: where the commonest answer is wrong it is learnt all the same, the vote becomes unanimous, and
    reward rises while accuracy falls.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, checker: AnswerChecker, threshold: float = 0.0, soft: bool = False) -> None:
        self.checker, self.soft = checker, soft
        self.threshold = checked_share(threshold, "majority_voting")

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        votes = vote(batch, self.checker)
        groups = batch.group_ids.tolist()
        agreed = torch.tensor([votes.ratios[group] >= self.threshold for group in groups], dtype=torch.bool)
        if not self.soft:
            return (votes.in_winner & agreed).float()
        total = Counter(groups)
        size = Counter(zip(groups, votes.classes, strict=True))
        shares = [size[group, number] / total[group] if number >= 0 else 0.0 for group, number in zip(groups, votes.classes, strict=True)]
        return torch.tensor(shares, dtype=torch.float32) * agreed


class WeightedVoting:
    """r(y) = 1[ans(y) is in the class with the largest Σ_i s_m(i)], i over its rollouts: a vote over several models (RLCCF, 2508.12338).

    s_m, the self-consistency of model m on this prompt, is the share of its rollouts in its own largest class. RLCCF says that votes are
    weighted by self-consistency and we found no formula: that each vote counts s_m as it is, is our choice.

    column: the batch column that names the model of each rollout. Rollouts of other models than the one that is trained vote with
    `train_mask` False. No answer gives 0. Ties as in majority voting. Fails where the models share their mistakes: the surest one then
    outvotes the others, and being sure is what is learnt. Raises RewardError when the column is missing.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, checker: AnswerChecker, column: str = "model") -> None:
        self.checker, self.column = checker, column

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        models = batch.columns.get(self.column)
        if models is None:
            raise RewardError(
                f"weighted_voting needs a column {self.column!r} that names the model of each rollout (option `column`); "
                f"the batch has {', '.join(batch.columns) or 'none'}"
            )
        answers = [self.checker.extract(completion) for completion in batch.completions]
        groups, likelihood = batch.groups(), mean_logp(batch)
        _, members = answer_classes(answers, groups, self.checker)
        rewards = torch.zeros(len(batch))
        for group, rows in groups.items():
            trust = self_consistency(rows, members[group], models)
            winner, _ = elect(members[group], answers, likelihood, partial(trusted_votes, models=models, trust=trust))
            rewards[members[group].get(winner, [])] = 1.0
        return rewards


def trusted_votes(voters: Sequence[int], models: Sequence[Any], trust: Mapping[Any, Fraction]) -> Fraction:
    """Σ s_m over the voters' models."""
    return sum((trust[models[row]] for row in voters), Fraction(0))


def self_consistency(rows: Sequence[int], members: Classes, models: Sequence[Any]) -> dict[Any, Fraction]:
    """Of each model, the share of its rollouts of one group in its own largest class; 0 when none of them has an answer."""
    drawn = Counter(models[row] for row in rows)
    largest = dict.fromkeys(drawn, 0)
    for voters in members.values():
        for model, count in Counter(models[row] for row in voters).items():
            largest[model] = max(largest[model], count)
    return {model: Fraction(largest[model], drawn[model]) for model in drawn}
