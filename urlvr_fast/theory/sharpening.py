"""Sharpening under a majority reward (paper, Theorem 1): what KL-regularised optimisation does to the mass p of the majority's answers.

    max_π E_{y~π}[r(y)] − β KL(π‖π_ref),     optimum  π*(y) = π_ref(y) exp(r(y)/β) / Z

With r = 1 on the majority's trajectories and 0 elsewhere, the odds p/(1−p) are multiplied by e^{1/β}. What follows depends on π_ref:

* reset (π_ref is the current policy, mirror descent): every step multiplies the odds again and p → 1. The ratio (1−p_{k+1})/(1−p_k)
  tends to e^{−1/β}, but only tends to it: the first is 1/Z_0, larger. Theorem 1's "rate" is asymptotic.
* fixed (π_ref never moves): one step, and it stays there, short of 1.

Theorem 1 needs A1, a majority that never changes (`voting.py` says how often a vote of N gets it wrong), and A2, progress. Growth
p_{k+1} > p_k is not enough: steps that shrink fast enough stop anywhere. What is enough is a share η ≥ η_min > 0 of the way to the
optimum (`damped_step`), and the rate is then 1 − η(1 − e^{−1/β}). Training without a KL term has no β; take the rate as a model of one
update, not as a prediction of speed.

Here and in the other files: arguments are anything `torch.as_tensor` takes, results float64 on the CPU; β > 0 is a number, β = ∞ changes
nothing; p is a mass in [0, 1], of any shape, and k a number of iterations, real or an array that broadcasts against p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-9  # how far from 1 a distribution may sum; it is not renormalised


def real(values: Any) -> Tensor:
    """`values` as a float64 tensor on the CPU, without a graph."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def distribution(values: Any) -> Tensor:
    """`values` as float64 distributions over the last dimension. Raises ValueError when they are negative, NaN or do not sum to 1."""
    probs = real(values)
    if probs.ndim == 0 or not bool((probs >= 0).all()) or not bool(((probs.sum(-1) - 1).abs() <= SUM_TOLERANCE).all()):
        raise ValueError("expected probabilities: no negative or NaN entries, sum 1 over the last dimension")
    return probs


def mass(p: Any) -> Tensor:
    """`p` as float64. Raises ValueError outside [0, 1]."""
    values = real(p)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("a mass is from 0 to 1")
    return values


def inverse(beta: float) -> float:
    """1/β. Raises ValueError unless β > 0."""
    if not beta > 0:
        raise ValueError(f"beta={beta}: the strength of the KL term must be positive")
    return 1.0 / beta


def kl_regularised_optimum(pi_ref: Any, reward: Any, beta: float) -> Tensor:
    """π* ∝ π_ref exp(r/β), the policy that maximises E_π[r] − β KL(π‖π_ref).

    pi_ref: (…, T) distributions; reward: broadcasts to them. Returns (…, T) float64. Computed in log space from r − max r, so no β
    overflows. Where π_ref is 0, π* is exactly 0 whatever the reward there, NaN and ∞ included: a KL term lets nothing come back. A reward
    of −∞ takes all mass away. β = 0 is the limit β → 0: π_ref restricted to its best trajectories, not the uniform distribution on them.

    Raises ValueError for no distribution, β < 0, and a reward on the support of π_ref that is NaN, +∞, or −∞ throughout.
    """
    ref = distribution(pi_ref)
    ref, reward = torch.broadcast_tensors(ref, real(reward))
    reward = torch.where(ref > 0, reward, -torch.inf)
    best = reward.amax(-1, keepdim=True)
    if not bool(best.isfinite().all()):
        raise ValueError("the reward is NaN or infinite where pi_ref has mass")
    if beta == 0:
        kept = ref * (reward == best)
        return kept / kept.sum(-1, keepdim=True)
    # −∞ · 0 at β = ∞ would be NaN.
    tilt = torch.where(reward == -torch.inf, -torch.inf, (reward - best) * inverse(beta))
    return torch.softmax(ref.log() + tilt, -1)


def kl_regularised_objective(pi: Any, pi_ref: Any, reward: Any, beta: float) -> Tensor:
    """E_π[r] − β KL(π‖π_ref), in nats, of (…, T) distributions: (…,). −∞ where π has mass and π_ref has none."""
    pi, pi_ref, reward = distribution(pi), distribution(pi_ref), real(reward)
    divergence = torch.where(pi > 0, pi * (pi.log() - pi_ref.log()), 0.0).sum(-1)
    return torch.where(pi > 0, pi * reward, 0.0).sum(-1) - beta * divergence


def one_step_optimum(p: Any, beta: float) -> Tensor:
    """p* = p e^{1/β} / (p e^{1/β} + 1 − p): the majority's mass at the optimum whose reference has mass p (paper, App. A.2).

    With a fixed reference this is also where iterating ends: the reward is the same at every step, so the first step is the last.
    """
    return sharpened_mass(p, 1, beta)


def sharpened_mass(p0: Any, k: Any, beta: float) -> Tensor:
    """p_k = p_0 e^{k/β} / (p_0 e^{k/β} + 1 − p_0): k steps to the optimum, the reference reset to the current policy before each."""
    return torch.sigmoid(torch.logit(mass(p0)) + real(k) * inverse(beta))


def remaining_mass(p0: Any, k: Any, beta: float) -> Tensor:
    """1 − p_k, to full relative accuracy where p_k itself has rounded to 1."""
    return torch.sigmoid(-torch.logit(mass(p0)) - real(k) * inverse(beta))


def contraction(p: Any, beta: float) -> Tensor:
    """(1 − p*) / (1 − p) = 1/Z = 1 / (1 + p (e^{1/β} − 1)): what one step leaves of the mass off the majority.

    From 1 at p = 0 down to `asymptotic_rate(beta)` at p = 1: slow while the majority is small.
    """
    decay = math.exp(-inverse(beta))
    return decay / (decay + mass(p) * (1 - decay))


def asymptotic_rate(beta: float, eta: float = 1.0) -> float:
    """lim (1 − p_{k+1}) / (1 − p_k) = 1 − η(1 − e^{−1/β}) of damped steps with a reset reference; η = 1 is Theorem 1's ρ = e^{−1/β}."""
    return 1 + step_share(eta) * math.expm1(-inverse(beta))


def step_share(eta: float) -> float:
    """η. Raises ValueError unless it is in [0, 1]: a step from p towards p* is a part of the way."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: a share of the way to the optimum, from 0 to 1")
    return eta


def damped_step(p: Any, eta: float, beta: float) -> Tensor:
    """p + η(p* − p): a share η of the way to the one-step optimum, what one optimiser step does instead of all of it.

    Every η in [0, 1] satisfies the paper's ordering p* ≥ p_{k+1} ≥ p_k.
    """
    return torch.lerp(mass(p), one_step_optimum(p, beta), step_share(eta))


def damped_masses(p0: float, etas: Sequence[float], beta: float) -> Tensor:
    """p_0 … p_n of n damped steps with a reset reference, one η each: (n + 1,).

    Growth in every step does not make it converge to 1: with Σ η finite it stops short (an upper bound on 1 − p_k needs η ≥ η_min > 0).
    """
    masses = [mass(p0)]
    for eta in etas:
        masses.append(damped_step(masses[-1], eta, beta))
    return torch.stack(masses)


def fixed_reference_mass(p_ref: Any, k: Any, beta: float, eta: float = 1.0, p0: Any = None) -> Tensor:
    """p_k = p* + (p_0 − p*)(1 − η)^k with p* = one_step_optimum(p_ref): k damped steps whose reference stays where it is.

    p0: the mass of the policy that starts; without it p_ref. Tends to p* < 1, so Theorem 1 does not hold with a fixed reference.
    """
    target = one_step_optimum(p_ref, beta)
    start = mass(p_ref if p0 is None else p0)
    return target + (start - target) * (1 - step_share(eta)) ** real(k)


def iterations_to_reach(p0: Any, p: Any, beta: float) -> Tensor:
    """k = β (logit p − logit p_0), the inverse of `sharpened_mass`: real-valued, round up to count steps.

    ∞ for p = 1, negative for p < p_0. Raises ValueError where p_0 or p is no mass, and at p_0 = 0 or 1, which no number of steps moves.
    """
    start = mass(p0)
    if not bool(((start > 0) & (start < 1)).all()):
        raise ValueError("a mass of 0 or 1 does not change: nothing else is ever reached from it")
    return (torch.logit(mass(p)) - torch.logit(start)) / inverse(beta)


def limit_policy(pi_ref: Any, majority: Any) -> Tensor:
    """lim π^(k) of Theorem 1: π_ref conditioned on the majority's answer. Deterministic in the answer, not in the trajectory.

    pi_ref: (…, T) distributions; majority: (…, T) bool, True where a trajectory gives the majority's answer. Raises ValueError when the
    majority has no mass.
    """
    kept = distribution(pi_ref) * torch.as_tensor(majority, dtype=torch.bool)
    total = kept.sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("the majority's trajectories have no mass under pi_ref")
    return kept / total


def sharpening_helps(answer_probs: Any, correct: Any) -> Tensor:
    """Whether the correct answer starts strictly ahead of every wrong one: P(correct) > max P(wrong). The limit's accuracy is then 1.

    answer_probs: (…, A) distributions over answers; correct: (…,) indices. Returns (…,) bool. False, the limit's accuracy is 0, or, when
    the correct answer ties for first, whatever the tie rule makes of it. It concerns rewards of the answer (majority, EMPO): one of the
    trajectory's own probability picks the likeliest trajectory, whose answer need not be the likeliest answer.
    """
    probs = distribution(answer_probs)
    index = torch.as_tensor(correct, dtype=torch.int64).unsqueeze(-1)
    own = probs.gather(-1, index)
    rest = probs.scatter(-1, index, -torch.inf)
    return (own > rest.amax(-1, keepdim=True)).squeeze(-1)
