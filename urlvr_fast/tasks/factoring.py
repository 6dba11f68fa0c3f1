"""Factoring: `91=`, completed by `7*13`. Generation is hard and verification is one multiplication, without running any code.

Every number is composite. Any product of two or more factors above 1 is right: in either order, and `2*2*2` as well as `2*4` for 8.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from urlvr_fast.tasks import expressions
from urlvr_fast.tasks.draws import checked_integer, distinct, split_of, take

PRODUCT = re.compile(r"[0-9]+(?: *\* *[0-9]+)+")
VERDICTS = ("T", "F")


class Problem(NamedTuple):
    number: int
    factor: int  # one of its factors; neither a column nor the answer

    @property
    def prompt(self) -> str:
        return f"{self.number}="

    @property
    def solution(self) -> str:
        return f"{self.factor}*{self.number // self.factor}"

    @property
    def answer(self) -> int:
        """Several products are right, so the audit map keeps what any of them must multiply to."""
        return self.number

    @property
    def columns(self) -> dict[str, Any]:
        return {"number": self.number}

    @property
    def key(self) -> str:
        return str(self.number)

    @property
    def split(self) -> str:
        return split_of(self.key)


def draw(split: str = "train", *, limit: int | None = None, seed: int = 0, largest: int = 9999) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix. largest: of the numbers, at least 4.

    Raises ValueError, which says what is valid, for anything else.
    """
    top = checked_integer("factoring", "largest", largest, 4, 10**9)

    def make(rng: random.Random) -> Problem:
        factor = rng.randint(2, math.isqrt(top))
        return Problem(factor * rng.randint(factor, top // factor), factor)

    return take(distinct(make, split, seed, "factoring"), limit)


def factors(text: str) -> list[int] | None:
    """The factors that a product such as `7*13` writes out, each above 1, in ascending order; None when `text` is no such product."""
    text = text.strip()
    if len(text) > expressions.MAX_CHARS or PRODUCT.fullmatch(text) is None:
        return None
    product = expressions.parse(text)
    return None if product is None or min(product.integers) < 2 else sorted(product.integers)


def verify(completion: str, columns: Mapping[str, Any]) -> float:
    """1.0 where the completion is a product of two or more factors above 1 that equals `columns["number"]`, else 0.0."""
    given = factors(completion)
    return float(given is not None and math.prod(given) == columns["number"])


def verification_prompt(prompt: str, completion: str, columns: Mapping[str, Any]) -> str:
    """`91=7*13?`, whose next character is the verdict. `prompt` and `completion` stand in it exactly as they are."""
    return f"{prompt}{completion}?"


def verdicts(**options: Any) -> tuple[str, str]:
    return VERDICTS


class ProductAnswers:
    """An `AnswerChecker` for products. Two are one vote when they have the same factors, in whatever order."""

    def extract(self, completion: str) -> str | None:
        given = factors(completion)
        return None if given is None else "*".join(map(str, given))

    def canonical(self, answer: str) -> str:
        return self.extract(answer) or answer

    def equivalent(self, a: str, b: str) -> bool:
        return self.canonical(a) == self.canonical(b)

    def correct(self, given: str, answer: str) -> bool:
        """Whether the product is that of the number in `answer`. ValueError when `answer` is no integer."""
        return verify(given, {"number": int(answer)}) == 1.0


def checker() -> ProductAnswers:
    return ProductAnswers()
