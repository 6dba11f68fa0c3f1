"""The optimum of each reward (paper, App. A.5) on a table of trajectories: pi (T,) probabilities, lengths (T,) tokens, answers (T,) int.

Each `…_reward` is the reward under the policy `pi`, each `…_tilt` one step to the optimum π* ∝ π_ref exp(r_π/β), with π_ref = π (reset)
unless `pi_ref` is given. Rewards depend on the policy, so a fixed point has to be found by iterating; where k steps have a closed form:

    sum of log-probabilities, reset    π_k ∝ π_0^{(1+1/β)^k}                   to the likeliest trajectory, at any β
    the same, fixed reference          π_k ∝ π_ref^{1 + 1/β + … + 1/β^k}       β > 1: stops at exponent β/(β−1); β ≤ 1: to the mode
    soft vote of two answers, reset    logit p_{k+1} = logit p_k + (2p_k − 1)/β    0 and 1 attract, ½ repels
    entropy of two-token responses     first token ∝ π_0(v) exp(k c_v / (2β)), c_v the certainty of what follows v; second token unchanged

A mean of log-probabilities has none when lengths differ: each step's log Z enters the next reward divided by the length.

Token entropy and self-certainty take a policy over responses of L tokens as a joint table of shape (V,)·L. They do not look at which token
was sampled, only at the distributions met on the way: on single-token responses the reward is a constant and the tilt does nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from urlvr_fast.theory.sharpening import distribution, inverse, kl_regularised_optimum, mass, real


def log_prob_reward(pi: Any) -> Tensor:
    """log π(y) = Σ_t log π(y_t | y_<t), (T,): EM-RL's sum form. −∞ where π is 0."""
    return distribution(pi).log()


def mean_log_prob_reward(pi: Any, lengths: Any) -> Tensor:
    """log π(y) / |y|, (T,): trajectory entropy as the paper has it. Raises ValueError for a length below 1."""
    tokens = real(lengths)
    if not bool((tokens >= 1).all()):
        raise ValueError("a response has at least one token")
    return distribution(pi).log() / tokens


def probability_reward(pi: Any) -> Tensor:
    """π(y), (T,): RLSC."""
    return distribution(pi)


def answer_mass(pi: Any, answers: Any) -> Tensor:
    """Mass of each answer, (A,) with A = 1 + the largest answer. answers: (T,) int64, ≥ 0."""
    pi, index = distribution(pi), torch.as_tensor(answers, dtype=torch.int64)
    return torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(0, index, pi)


def soft_vote_reward(pi: Any, answers: Any) -> Tensor:
    """Mass of the trajectory's own answer, (T,): EMPO's |C(y)|/G with G → ∞."""
    return answer_mass(pi, answers)[torch.as_tensor(answers, dtype=torch.int64)]


def majority_reward(pi: Any, answers: Any) -> Tensor:
    """1 where the trajectory gives the likeliest answer (of equals the lowest), else 0, (T,): majority voting with N → ∞."""
    return (torch.as_tensor(answers, dtype=torch.int64) == answer_mass(pi, answers).argmax()).double()


def log_prob_tilt(pi: Any, beta: float, pi_ref: Any = None) -> Tensor:
    """π* ∝ π_ref · π^{1/β}, (T,)."""
    return kl_regularised_optimum(pi if pi_ref is None else pi_ref, log_prob_reward(pi), beta)


def mean_log_prob_tilt(pi: Any, lengths: Any, beta: float, pi_ref: Any = None) -> Tensor:
    """π* ∝ π_ref · π^{1/(β|y|)}, (T,): at equal probability a longer trajectory is preferred."""
    return kl_regularised_optimum(pi if pi_ref is None else pi_ref, mean_log_prob_reward(pi, lengths), beta)


def probability_tilt(pi: Any, beta: float, pi_ref: Any = None) -> Tensor:
    """π* ∝ π_ref · exp(π/β), (T,)."""
    return kl_regularised_optimum(pi if pi_ref is None else pi_ref, probability_reward(pi), beta)


def soft_vote_tilt(pi: Any, answers: Any, beta: float, pi_ref: Any = None) -> Tensor:
    """π* ∝ π_ref · exp(p_{c(y)}/β), (T,). Odds between trajectories of one answer do not change."""
    return kl_regularised_optimum(pi if pi_ref is None else pi_ref, soft_vote_reward(pi, answers), beta)


def power(pi: Any, exponent: float) -> Tensor:
    """π^exponent, normalised, in log space: zeros stay zeros. Raises ValueError for an exponent ≤ 0."""
    if not exponent > 0:
        raise ValueError(f"exponent={exponent}: must be positive")
    log_pi = distribution(pi).log()
    # Relative to the mode first, so that an exponent of 1e300 and more gives the mode and not NaN.
    return torch.softmax((log_pi - log_pi.amax(-1, keepdim=True)) * exponent, -1)


def log_prob_sharpened(pi0: Any, k: int, beta: float) -> Tensor:
    """π_k ∝ π_0^{(1+1/β)^k}, (T,): k steps of `log_prob_tilt`, reference reset. Modes that tie share the limit equally."""
    return power(pi0, (1 + inverse(beta)) ** k)


def log_prob_fixed_reference(pi_ref: Any, k: int, beta: float) -> Tensor:
    """π_k ∝ π_ref^{1 + 1/β + … + 1/β^k}, (T,): k steps of `log_prob_tilt` from π_ref, with that reference kept."""
    return power(pi_ref, sum(inverse(beta) ** j for j in range(k + 1)))


def log_prob_fixed_point(pi_ref: Any, beta: float) -> Tensor:
    """π_ref^{β/(β−1)}, normalised, (T,): where `log_prob_fixed_reference` ends. ValueError for β ≤ 1, where it is the mode instead."""
    if not beta > 1:
        raise ValueError(f"beta={beta}: the exponents 1 + 1/beta + … grow without bound unless beta > 1")
    return power(pi_ref, 1 / (1 - inverse(beta)))


def soft_vote_step(p: Any, beta: float, p_ref: Any = None) -> Tensor:
    """The soft vote's step on two answers of mass p and 1 − p: logit p' = logit p_ref + (2p − 1)/β; p_ref is p (reset) unless given."""
    p = mass(p)
    return torch.sigmoid(torch.logit(p if p_ref is None else mass(p_ref)) + (2 * p - 1) * inverse(beta))


class FixedPoint(NamedTuple):
    mass: float
    multiplier: float  # dp'/dp there: a small deviation grows by it in each step

    @property
    def stable(self) -> bool:
        return abs(self.multiplier) < 1


def soft_vote_fixed_points(beta: float) -> tuple[FixedPoint, FixedPoint, FixedPoint]:
    """The fixed points of `soft_vote_step` with a reset reference: 0 and 1, where deviations shrink by e^{−1/β}, and ½, where they grow.

    With a fixed reference they are others: 0 and 1 are none (p' has the support and at most e^{1/β} times the odds of p_ref), and for
    p_ref = ½ the point ½ has the multiplier 1/(2β), so that it attracts for β > ½.
    """
    attracting = float(torch.tensor(-inverse(beta), dtype=torch.float64).exp())
    return FixedPoint(0.0, attracting), FixedPoint(0.5, 1 + inverse(beta) / 2), FixedPoint(1.0, attracting)


def token_distributions(joint: Any) -> Tensor:
    """The next-token distributions met on the way to each response: (V, …, V, L, V) from a joint table (V, …, V) over L tokens.

    Entry [y_1, …, y_L, t] is π(· | y_<t). After a prefix without mass, where it is undefined, it is uniform.
    Raises ValueError when the table is not square in all its dimensions or is no distribution.
    """
    table = real(joint)
    vocabulary, length = table.shape[-1] if table.ndim else 0, table.ndim
    if table.shape != (vocabulary,) * length or length == 0:
        raise ValueError(f"joint has shape {tuple(table.shape)}: expected one dimension of the same size for each token")
    distribution(table.flatten())
    positions = []
    for t in range(length):
        prefix = table.sum(tuple(range(t + 1, length))) if t + 1 < length else table  # (V,)·(t+1): mass of y_≤t
        total = prefix.sum(-1, keepdim=True)
        conditional = torch.where(total > 0, prefix / total, 1 / vocabulary)
        positions.append(conditional.view(*(vocabulary,) * t, *(1,) * (length - t), vocabulary).expand(*table.shape, vocabulary))
    return torch.stack(positions, -2)


def token_entropy(probs: Any) -> Tensor:
    """H(p) = −Σ p log p in nats over the last dimension, with 0 log 0 = 0."""
    return -torch.xlogy(probs := distribution(probs), probs).sum(-1)


def token_self_certainty(probs: Any) -> Tensor:
    """KL(U‖p) = −log V − mean log p in nats over the last dimension; ∞ where a token has probability 0."""
    probs = distribution(probs)
    return -probs.log().mean(-1) - torch.tensor(float(probs.shape[-1]), dtype=torch.float64).log()


def token_entropy_reward(joint: Any) -> Tensor:
    """−(1/L) Σ_t H(π(· | y_<t)), in the shape of the joint table."""
    return -token_entropy(token_distributions(joint)).mean(-1)


def self_certainty_reward(joint: Any) -> Tensor:
    """(1/L) Σ_t KL(U‖π(· | y_<t)), in the shape of the joint table; ∞ on the way past a token of probability 0 (not to be tilted by)."""
    return token_self_certainty(token_distributions(joint)).mean(-1)


def joint_tilt(joint: Any, reward: Any, beta: float, joint_ref: Any = None) -> Tensor:
    """π* ∝ π_ref exp(r/β) of a joint table, in its shape; for `token_entropy_reward` and `self_certainty_reward`."""
    ref = real(joint if joint_ref is None else joint_ref)
    return kl_regularised_optimum(ref.flatten(), real(reward).flatten(), beta).view(ref.shape)


def two_token_first_marginal(first: Any, certainty: Any, k: int, beta: float) -> Tensor:
    """Law of the first of two tokens after k tilts with a reset reference, ∝ first · exp(k · certainty / (2β)): (V,).

    first: (V,) its law at the start; certainty: (V,) of the second token's distribution after each, −H or KL(U‖p). That distribution never
    changes, because the reward does not look at the last token. The limit is the first token with the surest continuation, however
    unlikely it was: not the mode.
    """
    return kl_regularised_optimum(first, k * real(certainty) / 2, beta)
