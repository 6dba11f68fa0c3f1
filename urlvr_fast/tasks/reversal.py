"""Reversal: `reverse 5 3 9:`, completed by `9 3 5`. Verified from the numbers in the prompt alone; answers are those of `sorting`.

A list and its mirror image are one problem for the split and for repetition, since each is the other's answer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from urlvr_fast.tasks import sorting
from urlvr_fast.tasks.draws import checked_counts, checked_integer, distinct, split_of, take
from urlvr_fast.tasks.sorting import checker

__all__ = ["Problem", "checker", "draw", "verify"]


class Problem(NamedTuple):
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"reverse {' '.join(map(str, self.numbers))}:"

    @property
    def answer(self) -> str:
        return " ".join(map(str, reversed(self.numbers)))

    @property
    def columns(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers)}

    @property
    def key(self) -> str:
        return " ".join(map(str, min(self.numbers, self.numbers[::-1])))

    @property
    def split(self) -> str:
        return split_of(self.key)


def draw(
    split: str = "train", *, limit: int | None = None, seed: int = 0, numbers: int | Sequence[int] = (3, 4, 5), largest: int = 99
) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix. Options as in `sorting.draw`.

    Raises ValueError, which says what is valid, for anything else.
    """
    counts = checked_counts("reversal", "numbers", numbers, 2, 50)
    top = checked_integer("reversal", "largest", largest, 1, 10**6)

    def make(rng: random.Random) -> Problem:
        return Problem(sorting.random_numbers(rng, counts, top))

    return take(distinct(make, split, seed, "reversal"), limit)


def verify(completion: str, columns: Mapping[str, Any]) -> float:
    """1.0 where the completion is `columns["numbers"]` from last to first, else 0.0."""
    return sorting.is_list(completion, columns["numbers"][::-1])
