"""How well a reward agrees with the truth: the paper's metrics, under its names, on one batch of rollouts.

Each is a mean over the prompts' groups, a group being the rollouts that share a `group_ids` value, wherever they lie in the batch: nothing
is reshaped, so no reordering of the batch can mix prompts. Groups of different sizes weigh the same. All rollouts count, also those that
are not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.monitor.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import Votes, vote
from urlvr_fast.rewards.external import correct

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

__all__ = ["alignment_metrics", "avg_at_k", "maj_at_k", "pass_at_k", "point_biserial"]


def alignment_metrics(
    batch: RolloutBatch, rewards: Tensor, answers: Mapping[int, str] | None, checker: AnswerChecker, *, votes: Votes | None = None
) -> dict[str, float]:
    """The alignment of `rewards` (B,) with the truth in `answers` (prompt id -> answer). `votes` saves a second vote where there was one.

    Always there, without labels:
      majority_ratio          share of the winning answer among all rollouts of the prompt
      majority_voting_reward  mean of the majority-voting reward. With rewards by membership in the winning class it equals the ratio above
      parse_rate              share of rollouts that have an answer at all
    From the prompts that have an answer, and absent when none does:
      label_accuracy          the vote's winner is the true answer. Nothing parses: it is not
      ground_truth_reward     mean true reward of the same rollouts
      pass@N                  some rollout is right; N is the size of the groups, the letter n when they differ
      pseudo_label_accuracy   the rollout with the highest reward is right (several of them: the share that is)
      point_biserial          correlation of reward and truth over the rollouts; 0 when either does not vary
      reward_accuracy         share of rollouts whose reward equals the true 0/1 reward; only when all rewards are 0 or 1
      majority_reward_accuracy  the same of the majority-voting reward on these rollouts, whatever the reward that is trained on
    """
    if len(batch) == 0:
        raise ValueError("an empty batch has no metrics")
    if rewards.shape != (len(batch),):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)} for {len(batch)} rollouts")
    votes = vote(batch, checker) if votes is None else votes
    groups = batch.groups()
    metrics = {
        "majority_ratio": _mean(list(votes.ratios.values())),
        "majority_voting_reward": _mean([votes.in_winner[rows].double().mean().item() for rows in groups.values()]),
        "parse_rate": votes.parse_rate,
    }
    truth = correct(batch, answers or {}, checker).double()
    labelled = {group: rows for group, rows in groups.items() if not truth[rows].isnan().any()}
    if labelled:
        metrics |= _against_truth(labelled, rewards.detach().cpu().double(), truth, votes, batch, answers or {}, checker)
    return metrics


def _against_truth(
    groups: dict[int, list[int]],
    rewards: Tensor,
    truth: Tensor,
    votes: Votes,
    batch: RolloutBatch,
    answers: Mapping[int, str],
    checker: AnswerChecker,
) -> dict[str, float]:
    is_correct = getattr(checker, "correct", checker.equivalent)

    def label_is_true(group: int, rows: list[int]) -> float:
        label = votes.labels[group]
        return float(label is not None and is_correct(label, answers[batch.prompt_ids[rows[0]]]))

    def top_is_true(rows: list[int]) -> float:
        return truth[rows][rewards[rows] == rewards[rows].max()].mean().item()

    sizes = {len(rows) for rows in groups.values()}
    pass_key = f"pass@{sizes.pop()}" if len(sizes) == 1 else "pass@n"
    flat = [row for rows in groups.values() for row in rows]

    def agreement(proxy: Tensor) -> float:
        return _mean([(proxy[rows] == truth[rows]).double().mean().item() for rows in groups.values()])

    metrics = {
        "label_accuracy": _mean([label_is_true(group, rows) for group, rows in groups.items()]),
        "ground_truth_reward": _mean([truth[rows].mean().item() for rows in groups.values()]),
        pass_key: _mean([truth[rows].max().item() for rows in groups.values()]),
        "pseudo_label_accuracy": _mean([top_is_true(rows) for rows in groups.values()]),
        "point_biserial": point_biserial(truth[flat], rewards[flat]),
        "majority_reward_accuracy": agreement(votes.in_winner.double()),
    }
    if bool(((rewards == 0) | (rewards == 1)).all()):
        metrics["reward_accuracy"] = agreement(rewards)
    return metrics


def point_biserial(truth: Tensor, rewards: Tensor) -> float:
    """Pearson correlation of a 0/1 truth and a reward, both (n,); 0 when either is constant, where it is undefined."""
    x, y = truth.double(), rewards.double()
    if len(x) == 0 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    y = y / y.abs().max()  # rewards may be as small as exp of a long sum: their squares must not underflow
    return torch.clamp((x @ y) / (x.norm() * y.norm()), -1.0, 1.0).item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
