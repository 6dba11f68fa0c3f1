"""Certainty rewards (paper, Table 1): how sure the model was of what it sampled. Larger is better; no vote, no answer, no label.

Everything comes from the batch's statistics of the *sampling* distribution, so from the tempered one when the temperature is not 1. Sums
over a response are taken in float64: group normalisation divides by the group's standard deviation, which for these rewards can be 1e-4
of their size, and so magnifies rounding.

How they fail when trained too long: self-certainty degrades slowly, the entropies end in repetition, probability in very short responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, reward_name, rollout_text

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


def statistic(batch: RolloutBatch, name: str, reward: object) -> Tensor:
    """The batch's (R,) statistic `name` in float64. Raises RewardError when nobody took it, or when a response is empty.

    A missing statistic read as zeros would be a reward without any signal, and an empty response would score the best possible entropy.
    """
    values: Tensor | None = getattr(batch, name)
    if values is None:
        raise RewardError(
            f"{reward_name(reward)} needs batch.{name}, which is not filled: have the rollout engine take it while sampling, "
            f"or score the batch first (the reward declares it in `needs`)"
        )
    empty = (batch.response_lens == 0).nonzero().flatten().tolist()
    if empty:
        raise RewardError(f"{reward_name(reward)} is undefined on an empty response: {rollout_text(batch, empty[0])}")
    return values.detach().double()


class SelfCertainty:
    """Mean over the response's tokens of KL(U‖p), in nats (Intuitor). The paper's log V is left in; it drops out of the advantages."""

    needs = frozenset({"self_certainty"})

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        return batch.sequence_mean(statistic(batch, "self_certainty", self)).float()


class TokenEntropy:
    """Minus the mean over the response's tokens of the full-vocabulary Shannon entropy, in nats (EM-RL, RENT)."""

    needs = frozenset({"entropy"})

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        return -batch.sequence_mean(statistic(batch, "entropy", self)).float()


class TrajectoryEntropy:
    """Mean over the response's tokens of the sampled token's log-probability (EM-RL, length-normalised as in the paper)."""

    needs: frozenset[str] = frozenset()

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        return batch.sequence_mean(statistic(batch, "sampled_logp", self)).float()


class Probability:
    """The probability of the whole response, Π π(y_t | x, y_<t), without length normalisation (RLSC).

    Responses of a hundred tokens underflow fp32, so each group is divided by its likeliest response first: rewards in (0, 1], 1 for the
    likeliest, and the same advantages once a group is divided by its standard deviation. `paper_exact=True` is the released
    code: exp of the fp32 sum, exactly 0 below about −103 nats, which leaves the reward to the shortest responses alone.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, paper_exact: bool = False) -> None:
        self.paper_exact = paper_exact

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        logp = statistic(batch, "sampled_logp", self)
        if self.paper_exact:
            return batch.sequence_sum(logp.float()).exp()
        total = batch.sequence_sum(logp)
        for rows in batch.groups().values():
            total[rows] -= total[rows].max()
        return torch.exp(total).float()
