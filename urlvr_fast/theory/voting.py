"""What a vote of N rollouts does: how often it finds the likeliest answer (assumption A1), and what GRPO makes of its 0/1 rewards.

Theorem 1 assumes that the sampled majority is the same at every iteration. With N = 8 rollouts and answers of probability .40, .35 and .25
it is the likeliest answer in 47 % of the votes (57 % when every tie goes to it); with N = 1024 in 97 %.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.theory.sharpening import distribution

MAX_COMPOSITIONS = 5_000_000  # of N into A counts: some 1 GB and a few seconds

TIES = ("first_seen", "first_index", "none")


def compositions(total: int, parts: int) -> Tensor:
    """All ways to write `total` as an ordered sum of `parts` counts ≥ 0: (C(total + parts − 1, parts − 1), parts) int64.

    Raises ValueError when there are more than MAX_COMPOSITIONS.
    """
    number = math.comb(total + parts - 1, parts - 1)
    if number > MAX_COMPOSITIONS:
        raise ValueError(f"{number} ways to split {total} rollouts over {parts} answers: too many to enumerate (limit {MAX_COMPOSITIONS})")
    counts, left = torch.empty(1, 0, dtype=torch.int64), torch.tensor([total])
    for _ in range(parts - 1):
        row = torch.repeat_interleave(torch.arange(len(left)), left + 1)
        count = torch.arange(len(row)) - (torch.cumsum(left + 1, 0) - left - 1)[row]  # 0 … left of each row
        counts, left = torch.cat([counts[row], count[:, None]], 1), left[row] - count
    return torch.cat([counts, left[:, None]], 1)


def log_multinomial(total: int, parts: int) -> Tensor:
    """log of N! / Π n_a! for each of `compositions(total, parts)`: the number of sequences with these counts."""
    return math.lgamma(total + 1) - torch.lgamma(compositions(total, parts).double() + 1).sum(1)


def vote_success_probability(answer_probs: Any, rollouts: int, ties: str = "first_seen") -> float:
    """P(the vote of N independent rollouts elects the likeliest answer), exactly, from the multinomial law of the counts.

    answer_probs: (A,) distribution with one largest entry; rollouts: N ≥ 1. ties: what becomes of several answers with the top count:
        "first_seen": the one that was sampled first, as `Counter.most_common(1)` has it (the released code). Rollouts being exchangeable,
            each of t tied answers comes first with probability 1/t, so this is a fair draw as well.
        "first_index": the one that is listed first in `answer_probs`. With the likeliest answer listed first it wins every tie: an upper
            bound for all rules.
        "none": nobody; a lower bound.

    Raises ValueError for no distribution, two likeliest answers, N < 1, an unknown rule, and too many compositions (see there).
    """
    probs = distribution(answer_probs)
    mode = int(probs.argmax())
    if probs.ndim != 1 or int((probs == probs[mode]).sum()) != 1:
        raise ValueError("expected one distribution (A,) with a single likeliest answer")
    if rollouts < 1 or ties not in TIES:
        raise ValueError(f"rollouts={rollouts} must be at least 1, and ties={ties!r} one of {', '.join(TIES)}")
    counts = compositions(rollouts, len(probs))
    log_weight = log_multinomial(rollouts, len(probs)) + torch.xlogy(counts.double(), probs).sum(1)
    winners = counts == counts.amax(1, keepdim=True)
    won = winners[:, mode]
    if ties == "first_index":
        share = (won & ~winners[:, :mode].any(1)).double()
    else:
        tied = winners.sum(1)
        share = won / tied if ties == "first_seen" else (won & (tied == 1)).double()
    return float((log_weight.exp() * share).sum())


def binary_advantages(matches: int, rollouts: int, eps: float = 0.0) -> tuple[float, float]:
    """GRPO's advantages (of a match, of a miss) when m of N rollouts have reward 1 and the others 0.

    (1 − m/N)/(s + eps) and −(m/N)/(s + eps) with the unbiased s = √(m(N−m)/(N(N−1))); for eps = 0, √((N−m)(N−1)/(N m)) and
    −√(m(N−1)/(N(N−m))). Both 0 at m = 0 and m = N: a unanimous vote teaches nothing, majority voting puts itself out.

    Raises ValueError unless 0 ≤ m ≤ N and N ≥ 1.
    """
    if not 0 <= matches <= rollouts or rollouts < 1:
        raise ValueError(f"{matches} matches of {rollouts} rollouts")
    if matches in (0, rollouts):
        return 0.0, 0.0
    share = matches / rollouts
    deviation = math.sqrt(matches * (rollouts - matches) / (rollouts * (rollouts - 1))) + eps
    return (1 - share) / deviation, -share / deviation
