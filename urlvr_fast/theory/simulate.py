"""Tabular training, where every distribution is a table: `iterate_optimum` takes exact KL-regularised steps on trajectories, and
`train_tabular` runs GRPO with a majority reward on softmax tables over answers, one table a prompt.

The second shows the paper's rise and fall without a language model. A prompt whose likeliest answer is right (aligned) climbs to 1, one
whose likeliest answer is wrong falls to 0. Votes of few rollouts flip while the lead is narrow, which cancels most of the push, so a prompt
with a wide lead gets there sooner. Mean accuracy therefore rises and then falls when the aligned prompts have the wide leads, and falls and
then rises when the misaligned ones do. With N → ∞ no vote flips and a narrow lead costs nothing; with few sampled rollouts
and large steps some misaligned prompts cross over to the right answer, against the expectation. Prompts do not share parameters here:
nothing generalises from one to another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.ops import group_advantages
from urlvr_fast.theory.sharpening import distribution, kl_regularised_optimum, step_share
from urlvr_fast.theory.voting import binary_advantages, compositions, log_multinomial

EPS = 1e-6  # added to the standard deviation, as in `group_advantages`


def iterate_optimum(
    pi0: Any, reward: Callable[[Tensor], Any], beta: float, steps: int, *, eta: float = 1.0, reset_reference: bool = True
) -> Tensor:
    """Policies π_0 … π_n of n steps π ← π + η(π* − π), π* ∝ π_ref exp(r_π/β), the reward taken from the current policy: (n + 1, T).

    pi0: (T,); reward: policy (T,) -> (T,). reset_reference: π_ref is the current policy, else pi0.
    Raises what `kl_regularised_optimum` does.
    """
    policies = [distribution(pi0)]
    for _ in range(steps):
        current = policies[-1]
        optimum = kl_regularised_optimum(current if reset_reference else policies[0], reward(current), beta)
        policies.append(torch.lerp(current, optimum, step_share(eta)))  # exact at η = 1, never negative
    return torch.stack(policies)


@dataclass(frozen=True)
class TabularRun:
    """What happened, means over prompts of the policies before each step and after the last: (steps + 1,) float64, `policies` (P, A)."""

    accuracy: Tensor  # mass of the correct answer
    majority_mass: Tensor  # of the answer that is likeliest at that time
    reward_accuracy: Tensor  # share of rollouts whose majority reward equals the true one, in expectation, N → ∞
    policies: Tensor  # the final ones


def train_tabular(
    answer_probs: Any, correct: Any, *, lr: float, steps: int, rollouts: int | None = None, generator: torch.Generator | None = None
) -> TabularRun:
    """Plain gradient ascent with GRPO advantages of the majority reward on the logits of P tables over A answers.

    answer_probs: (P, A) initial distributions, all positive; correct: (P,) indices of the right answers, which only the metrics see. Each
    step adds lr · (1/N) Σ_i A_i (onehot(y_i) − π) to the logits; of equal counts the answer sampled first wins the vote. rollouts: N, None
    for N → ∞. generator: draws the samples of finite N; without one a step is its exact expectation, over all counts of N rollouts.

    Raises ValueError for distributions with zeros, which a softmax cannot represent, for `correct` out of shape or range, for N < 1, and
    for more counts than `compositions` enumerates.
    """
    probs = distribution(answer_probs)
    right = torch.as_tensor(correct, dtype=torch.int64)
    if probs.ndim != 2 or bool((probs == 0).any()) or right.shape != probs.shape[:1]:
        raise ValueError("expected positive answer_probs (P, A) and correct (P,)")
    if bool(((right < 0) | (right >= probs.shape[1])).any()):
        raise ValueError("expected positive answer_probs (P, A) and correct (P,), indices of answers")
    if rollouts is not None and rollouts < 1:
        raise ValueError(f"rollouts={rollouts} must be at least 1")
    gradient = gradient_of(rollouts, probs.shape[1], generator)
    logits = probs.log()
    history = [metrics(probs, right)]
    for _ in range(steps):
        logits = logits + lr * gradient(probs)
        probs = torch.softmax(logits, -1)
        history.append(metrics(probs, right))
    accuracy, majority_mass, reward_accuracy = torch.stack(history, 1)
    return TabularRun(accuracy, majority_mass, reward_accuracy, probs)


def metrics(probs: Tensor, correct: Tensor) -> Tensor:
    """Accuracy, majority mass and Reward Accuracy, means over prompts: (3,). Under a wrong majority the other wrong ones agree."""
    top, majority = probs.max(-1)
    own = probs.gather(-1, correct[:, None]).squeeze(-1)
    agreement = torch.where(majority == correct, 1.0, 1 - top - own)
    return torch.stack([own.mean(), top.mean(), agreement.mean()])


def gradient_of(rollouts: int | None, answers: int, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """The step's direction as a function of the policies (P, A) -> (P, A)."""
    if rollouts is None:
        return limit_gradient
    if generator is not None:
        return lambda probs: sampled_gradient(probs, rollouts, generator)
    counts, log_ways = compositions(rollouts, answers).double(), log_multinomial(rollouts, answers)
    pushes = pushes_of_counts(counts)
    return lambda probs: (log_ways + probs.log() @ counts.T).exp() @ pushes


def pushes_of_counts(counts: Tensor) -> Tensor:
    """Σ_i A_i onehot(y_i) / N for each outcome of N rollouts, averaged over the t answers that tie, each elected with 1/t: (C, A) both."""
    rollouts = int(counts[0].sum())
    match, miss = torch.tensor([binary_advantages(m, rollouts, EPS) for m in range(rollouts + 1)], dtype=torch.float64).T
    top = counts.amax(-1, keepdim=True)
    winners = (counts == top).double()
    chance = winners / winners.sum(-1, keepdim=True)  # of being elected
    index = top.long()
    return counts / rollouts * (chance * match[index] + (1 - chance) * miss[index])


def limit_gradient(probs: Tensor) -> Tensor:
    """E_{y~π}[A(y) (onehot(y) − π)] with A = (r − E r) / (std r + ε) and r = 1 on the likeliest answer: (P, A). E A = 0 takes π out."""
    top, majority = probs.max(-1, keepdim=True)
    reward = torch.zeros_like(probs).scatter(-1, majority, 1.0)
    return probs * (reward - top) / ((top * (1 - top)).clamp(min=0).sqrt() + EPS)


def sampled_gradient(probs: Tensor, rollouts: int, generator: torch.Generator) -> Tensor:
    """From N samples a prompt: mean of A_i (onehot(y_i) − π) = mean of A_i onehot(y_i), as advantages sum to 0. (P, A)."""
    samples = torch.multinomial(probs, rollouts, replacement=True, generator=generator)
    counts = torch.zeros_like(probs).scatter_add_(-1, samples, torch.ones_like(samples, dtype=probs.dtype))
    first_of_largest = counts.gather(-1, samples).argmax(-1, keepdim=True)  # argmax is the first one: Counter.most_common's tie rule
    reward = (samples == samples.gather(-1, first_of_largest)).to(probs.dtype)
    groups = torch.arange(len(probs)).repeat_interleave(rollouts)
    advantages = group_advantages(reward.flatten(), groups, eps=EPS, backend="torch").view_as(reward)
    return torch.zeros_like(probs).scatter_add_(-1, samples, advantages) / rollouts
