"""Sorting: `sort 5 3 9:`, completed by `3 5 9`. Verified from the numbers in the prompt alone.

A SHA-256 of the sorted numbers decides the split, so the same numbers in another order are in the same split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from urlvr_fast.rewards.answers import ExactAnswers
from urlvr_fast.tasks.draws import checked_counts, checked_integer, distinct, split_of, take

LEADING_ZEROS = re.compile(r"\b0+(?=[0-9])")


class Problem(NamedTuple):
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"sort {' '.join(map(str, self.numbers))}:"

    @property
    def answer(self) -> str:
        return " ".join(map(str, sorted(self.numbers)))

    @property
    def columns(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers)}

    @property
    def key(self) -> str:
        return self.answer

    @property
    def split(self) -> str:
        return split_of(self.key)


def draw(
    split: str = "train", *, limit: int | None = None, seed: int = 0, numbers: int | Sequence[int] = (3, 4, 5), largest: int = 99
) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix.

    numbers: how many numbers a problem has, one count or several equally likely ones, each 2 to 50. largest: they are 0 to this.

    Raises ValueError, which says what is valid, for anything else.
    """
    counts = checked_counts("sorting", "numbers", numbers, 2, 50)
    top = checked_integer("sorting", "largest", largest, 1, 10**6)

    def make(rng: random.Random) -> Problem:
        return Problem(random_numbers(rng, counts, top))

    return take(distinct(make, split, seed, "sorting"), limit)


def random_numbers(rng: random.Random, counts: Sequence[int], largest: int) -> tuple[int, ...]:
    return tuple(rng.randint(0, largest) for _ in range(rng.choice(counts)))


def plain_list(answer: str) -> str:
    """One space between numbers and no leading zeros. Text, not integers: Python refuses to convert very long ones."""
    return LEADING_ZEROS.sub("", " ".join(answer.split()))


def checker() -> ExactAnswers:
    """The whole completion must be non-negative integers in ASCII digits with spaces between them."""
    return ExactAnswers(r"([0-9]+(?: +[0-9]+)*)", plain_list)


def is_list(completion: str, numbers: Sequence[int]) -> float:
    """1.0 where the completion is exactly these numbers in this order, else 0.0."""
    answers = checker()
    given = answers.extract(completion)
    return float(given is not None and answers.canonical(given) == " ".join(map(str, numbers)))


def verify(completion: str, columns: Mapping[str, Any]) -> float:
    """1.0 where the completion is `columns["numbers"]` in ascending order, each as often as there, else 0.0."""
    return is_list(completion, sorted(columns["numbers"]))
