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
    """r = (1/|y|) Σ_t KL(U‖p_t), in nats (Intuitor, arXiv 2505.19590). The paper's log V is left in; it drops out of the advantages.

    The slowest of the certainty rewards to fail: it degrades gradually, into confident wrong answers. Raises RewardError without
    batch.self_certainty, and on a response without tokens.
    """

    needs = frozenset({"self_certainty"})

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        return batch.sequence_mean(statistic(batch, "self_certainty", self)).float()


class TokenEntropy:
    """r = −(1/|y|) Σ_t H(p_t), H the full-vocabulary Shannon entropy in nats (RENT, arXiv 2505.22660; EM-RL, arXiv 2505.15134).

    aggregate: "mean" is the paper's; "sum" leaves out the 1/|y|, as EM-RL itself does.
    Fails by repetition: padding a response with what is sure to come lowers the mean. The sum fails by short responses instead. Raises
    RewardError without batch.entropy (read as zeros it would teach nothing, silently), and on a response without tokens.
    """

    needs = frozenset({"entropy"})

    def __init__(self, aggregate: str = "mean") -> None:
        self.aggregate = checked_aggregate(aggregate, "token_entropy")

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        values = statistic(batch, "entropy", self)
        return -(batch.sequence_mean(values) if self.aggregate == "mean" else batch.sequence_sum(values)).float()


class TrajectoryEntropy:
    """r = (1/|y|) Σ_t log π(y_t | x, y_<t), the sampled tokens' log-probability (EM-RL, arXiv 2505.15134, length-normalised by the paper).

    aggregate: "mean" is the paper's; "sum" leaves out the 1/|y|, as EM-RL itself does.
    Fails by repetition (the mean) or by short responses (the sum). Raises RewardError on a response without tokens.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, aggregate: str = "mean") -> None:
        self.aggregate = checked_aggregate(aggregate, "trajectory_entropy")

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        values = statistic(batch, "sampled_logp", self)
        return (batch.sequence_mean(values) if self.aggregate == "mean" else batch.sequence_sum(values)).float()


def checked_aggregate(aggregate: str, name: str) -> str:
    if aggregate not in ("mean", "sum"):
        raise RewardError(f"{name}: aggregate={aggregate!r}; valid are mean, sum")
    return aggregate


class Probability:
    """r = Π_t π(y_t | x, y_<t), the probability of the whole response, without length normalisation (RLSC, arXiv 2506.06395).

    Responses of a hundred tokens underflow fp32, so each group is divided by its likeliest response first: rewards in (0, 1], 1 for the
    likeliest, and the same advantages once a group is divided by its standard deviation. `paper_exact=True` is the released
    code: exp of the fp32 sum, exactly 0 below about −103 nats, which leaves the reward to the shortest responses alone.

    Fails by length collapse: a shorter response has fewer factors below 1. Raises RewardError on a response without tokens.
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
