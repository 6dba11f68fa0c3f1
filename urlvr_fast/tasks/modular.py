"""Modular arithmetic: `(17*5+3)%11=`, completed by `0`. The answer is one integer from 0 to below the modulus.

Short to write and hard to guess from the size of the numbers, which a sum gives away. As in `arithmetic`, there is no verifier beside the
answer: one that computes the remainder has the answer.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from urlvr_fast.tasks.arithmetic import IntegerAnswers
from urlvr_fast.tasks.draws import checked_integer, distinct, split_of, take


class Problem(NamedTuple):
    left: int
    right: int
    addend: int
    modulus: int

    @property
    def prompt(self) -> str:
        return f"({self.left}*{self.right}+{self.addend})%{self.modulus}="

    @property
    def answer(self) -> int:
        return (self.left * self.right + self.addend) % self.modulus

    @property
    def columns(self) -> dict[str, Any]:
        return {"modulus": self.modulus}

    @property
    def key(self) -> str:
        """The prompt with its factors in order: swapped, they are the same problem."""
        return self._replace(left=min(self.left, self.right), right=max(self.left, self.right)).prompt

    @property
    def split(self) -> str:
        return split_of(self.key)


def draw(split: str = "train", *, limit: int | None = None, seed: int = 0, largest: int = 20, largest_modulus: int = 13) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix.

    largest: factors and addend are 2 to this. largest_modulus: the modulus is 2 to this.

    Raises ValueError, which says what is valid, for anything else.
    """
    top = checked_integer("modular", "largest", largest, 2, 10**6)
    top_modulus = checked_integer("modular", "largest_modulus", largest_modulus, 2, 10**6)

    def make(rng: random.Random) -> Problem:
        left, right, addend = (rng.randint(2, top) for _ in range(3))
        return Problem(left, right, addend, rng.randint(2, top_modulus))

    return take(distinct(make, split, seed, "modular"), limit)


def checker() -> IntegerAnswers:
    return IntegerAnswers()
