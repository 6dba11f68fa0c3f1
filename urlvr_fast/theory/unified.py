"""The unified reward (paper, App. A.3): every intrinsic reward as a cross-entropy between an anchor q and a predicted distribution π.

    r_uni(x, y) = ψ(σ · [1/|I|] · Σ_{i∈I} H(q_i, π^i)),     H(q, p) = −Σ q log p

I are the token positions of the response, or the single distribution over answers. `INSTANCES` says what the rest is for each method,
with what depends on the sampled response spelt out, which the paper leaves open. Two things the formula hides:

* Majority voting's π^i is not the model's distribution but the one-hot of the response's own answer; the model enters through the anchor.
* Self-certainty is the only one with σ = +1; its reward is r_uni − log V.

The paper's Proposition 1, π(y_a) > π(y_b) ⇒ r(y_a) > r(y_b) for the methods with σ = −1, holds as stated for `probability` (and for the
mean log-probability of responses of equal length). It does not hold for the others: `monotonicity_violations` finds the pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.theory.sharpening import distribution, real


@dataclass(frozen=True)
class Response:
    """A sampled response, as the certainty and ensemble rewards see it."""

    token_probs: Any  # (L, V) the next-token distributions it was sampled from
    tokens: Any  # (L,) int64, the sampled tokens
    answer_probs: Any  # (A,) the policy's distribution over answers
    answer: int  # the response's answer
    majority: int  # the answer that won the vote


@dataclass(frozen=True)
class Instance:
    """One row of the table: a method as an instance of r_uni."""

    method: str  # the name of the reward in `urlvr_fast.rewards`
    index_set: str  # "tokens": the positions of the response; "answer": the distribution over answers
    anchor: str  # q: "uniform", "policy" (π^i itself), "sampled token", "own answer" or "majority answer", the last three one-hot
    predicted: str  # π^i: "policy" or "own answer" (one-hot)
    sigma: int
    psi: str  # "identity" or "exp"
    averaged: bool  # whether 1/|I| is there; a sum is the mean form with ψ(s) = exp(|y| s)
    log_vocabulary: int = 0  # the method's reward is r_uni + this · log V


INSTANCES: dict[str, Instance] = {
    instance.method: instance
    for instance in (
        Instance("self_certainty", "tokens", "uniform", "policy", +1, "identity", averaged=True, log_vocabulary=-1),
        Instance("token_level_entropy", "tokens", "policy", "policy", -1, "identity", averaged=True),
        Instance("trajectory_level_entropy", "tokens", "sampled token", "policy", -1, "identity", averaged=True),
        Instance("probability", "tokens", "sampled token", "policy", -1, "exp", averaged=False),
        Instance("empo", "answer", "own answer", "policy", -1, "exp", averaged=True),
        Instance("majority_voting", "answer", "majority answer", "own answer", -1, "exp", averaged=True),
    )
}


def cross_entropy(q: Any, p: Any) -> Tensor:
    """H(q, p) = −Σ q log p in nats over the last dimension, 0 log 0 = 0: ∞ where q has mass and p has none. Shapes broadcast."""
    return -torch.xlogy(distribution(q), distribution(p)).sum(-1)


def r_uni(cross_entropies: Any, sigma: int, psi: str, *, averaged: bool = True) -> Tensor:
    """ψ(σ · mean or sum of H(q_i, π^i)). cross_entropies: (…, |I|) nats. Returns (…,).

    Raises ValueError for σ other than ±1, a ψ other than "identity" and "exp", and an empty I.
    """
    terms = real(cross_entropies)
    if sigma not in (-1, 1) or psi not in ("identity", "exp"):
        raise ValueError(f"sigma={sigma!r} must be 1 or -1, and psi={psi!r} 'identity' or 'exp'")
    if terms.ndim == 0 or terms.shape[-1] == 0:
        raise ValueError("the index set is empty")
    score = sigma * (terms.mean(-1) if averaged else terms.sum(-1))
    return score.exp() if psi == "exp" else score


def anchors(instance: Instance, response: Response) -> tuple[Tensor, Tensor]:
    """The anchor q and the predicted distribution π^i of a method on a response: (|I|, V), or (1, A) for the distribution over answers."""
    policy = distribution(response.token_probs if instance.index_set == "tokens" else [real(response.answer_probs).tolist()])
    one_hot = torch.eye(policy.shape[-1], dtype=torch.float64)
    tokens = torch.as_tensor(response.tokens, dtype=torch.int64)
    choices = {
        "policy": lambda: policy,
        "uniform": lambda: torch.full_like(policy, 1 / policy.shape[-1]),
        "sampled token": lambda: one_hot[tokens],
        "own answer": lambda: one_hot[[response.answer]],
        "majority answer": lambda: one_hot[[response.majority]],
    }
    return choices[instance.anchor](), choices[instance.predicted]()


def unified_reward(method: str, response: Response) -> Tensor:
    """The reward of `method` for a response, through r_uni: a 0-d float64 tensor, equal to the method's own formula.

    Raises ValueError for a method that INSTANCES does not have, and for distributions that are none.
    """
    if method not in INSTANCES:
        raise ValueError(f"{method!r} is none of {', '.join(INSTANCES)}")
    instance = INSTANCES[method]
    q, p = anchors(instance, response)
    vocabulary = torch.tensor(float(p.shape[-1]), dtype=torch.float64)
    reward = r_uni(cross_entropy(q, p), instance.sigma, instance.psi, averaged=instance.averaged)
    return reward + instance.log_vocabulary * vocabulary.log()


def monotonicity_violations(pi: Any, reward: Any) -> list[tuple[int, int]]:
    """The pairs (a, b) with π(a) > π(b) but not r(a) > r(b): empty where Proposition 1 holds. pi, reward: (T,). O(T²) memory.

    With `pi` over trajectories the statement is the paper's; with a distribution over answers it is the one that ensemble rewards can meet.
    """
    pi, reward = distribution(pi), real(reward)
    likelier, better = pi[:, None] > pi[None, :], reward[:, None] > reward[None, :]
    return [(int(a), int(b)) for a, b in (likelier & ~better).nonzero()]
