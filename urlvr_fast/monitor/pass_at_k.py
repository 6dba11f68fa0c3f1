"""avg@k, pass@k and maj@k of one prompt from n rollouts, n ≥ k: the expectation over all ways to draw k of the n. Exact integers inside."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


def _check(n: int, k: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be between 1 and the number of rollouts, {n}")


def avg_at_k(correct: Sequence[bool], k: int) -> float:
    """Mean correctness of k rollouts drawn from these: c/n whatever k is, which only sets how many rollouts there must be."""
    _check(len(correct), k)
    return sum(map(bool, correct)) / len(correct)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k rollouts drawn from n, c of them correct, is correct: 1 − C(n−c, k)/C(n, k) (Chen et al. 2021)."""
    _check(n, k)
    if not 0 <= c <= n:
        raise ValueError(f"c={c} must be between 0 and n={n}")
    # One division of integers of any size, rounded once: nothing overflows and nothing cancels.
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def maj_at_k(classes: Sequence[int], correct: Sequence[bool], k: int) -> float:
    """Probability that the majority answer of k rollouts drawn from these is correct.

    classes: the answer class of each rollout, −1 for no answer (such rollouts can be drawn and do not vote). correct: whether that answer
    is right. A class is right when its rollouts are; should they disagree (equivalence need not be transitive), by the share that is.
    Several classes with the most votes share the draw equally, which is a tie broken at random; a draw in which nobody votes is wrong.
    Meant for n of up to some hundreds; k = n is cheap at any n.
    """
    n = len(classes)
    _check(n, k)
    sizes = Counter(classes)
    silent = sizes.pop(-1, 0)
    votes_right = Counter(number for number, truth in zip(classes, correct, strict=True) if truth)
    right = {number: Fraction(votes_right[number], size) for number, size in sizes.items()}
    if k == n:
        top = [number for number, size in sizes.items() if size == max(sizes.values())]
        return float(sum(right[number] for number in top) / len(top)) if top else 0.0
    return float(sum(right[number] * _wins(number, sizes, silent, k) for number in sizes if right[number]) / math.comb(n, k))


def _wins(number: int, sizes: dict[int, int], silent: int, k: int) -> Fraction:
    """How many of the C(n, k) draws this class wins, a draw shared by s classes counting 1/s."""
    others = [size for other, size in sizes.items() if other != number]
    wins = Fraction(0)
    for votes in range(1, min(sizes[number], k) + 1):
        # ways[(drawn, ties)]: ways to draw so many from the other classes, none above `votes`, with so many of them exactly at it
        ways: dict[tuple[int, int], int] = {(0, 0): 1}
        for size in others:
            extended: dict[tuple[int, int], int] = {}
            for (drawn, ties), count in ways.items():
                for taken in range(min(size, votes, k - votes - drawn) + 1):
                    state = (drawn + taken, ties + (taken == votes))
                    extended[state] = extended.get(state, 0) + count * math.comb(size, taken)
            ways = extended
        for (drawn, ties), count in ways.items():
            wins += Fraction(math.comb(sizes[number], votes) * count * math.comb(silent, k - votes - drawn), ties + 1)
    return wins


def bootstrap_interval(values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean over prompts: `values` holds one figure a prompt (avg@k, pass@k, maj@k of it).

    Prompts are what is drawn again, as they are the sample; rollouts within a prompt are not independent of one another. Deterministic in
    `seed`. One prompt has no interval but itself. Raises ValueError without values, or for a level outside (0, 1).
    """
    if not values or not 0 < level < 1:
        raise ValueError(f"{len(values)} values and level={level}: one value at least, and a level between 0 and 1")
    rng = random.Random(seed)
    means = sorted(math.fsum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    tail = (1 - level) / 2
    return means[int(tail * draws)], means[min(draws - 1, int((1 - tail) * draws))]
