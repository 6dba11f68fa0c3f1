"""Procedural arithmetic: `23+45=`, `81-37=`, `7*46=`. The completion, up to the end of the sequence, is the answer.

Four kinds of graded difficulty: sums and differences of two-digit numbers (a difference may be negative), products with a one-digit factor,
products of two two-digit numbers. A SHA-256 of the prompt decides whether it belongs to the test split (one in five), so the split is
the same in every process, on every machine and for every seed. Sums and products are hashed with their operands in order: `45+23=` is
always in the split of `23+45=`; otherwise most of the test split would be in the training split with its operands swapped.

There is no verifier beside the answer: one that computes the sum has the answer.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

SPLITS = ("train", "test")
DEFAULT_LIMIT = 4096


class Problem(NamedTuple):
    left: int
    operation: str  # "+", "-" or "*"
    right: int

    @property
    def prompt(self) -> str:
        return f"{self.left}{self.operation}{self.right}="

    @property
    def answer(self) -> int:
        if self.operation == "+":
            return self.left + self.right
        return self.left - self.right if self.operation == "-" else self.left * self.right

    @property
    def difficulty(self) -> int:
        """The position in `KINDS` of the kind that it belongs to, 0 to 3."""
        if self.operation in "+-":
            return "+-".index(self.operation)
        return 2 if self.left in ONE_DIGIT or self.right in ONE_DIGIT else 3

    @property
    def columns(self) -> dict[str, Any]:
        return {"operation": self.operation, "difficulty": self.difficulty}

    @property
    def split(self) -> str:
        left, right = (self.left, self.right) if self.operation == "-" else sorted((self.left, self.right))
        digest = hashlib.sha256(f"{left}{self.operation}{right}=".encode()).digest()
        return "test" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"


class Kind(NamedTuple):
    name: str
    share: float  # of the prompts in a draw
    operation: str
    operands: list[tuple[int, int]]


ONE_DIGIT, TWO_DIGITS, ANY = range(2, 10), range(10, 100), range(2, 100)
KINDS = (  # in order of difficulty
    Kind("sum", 0.38, "+", [(a, b) for a in TWO_DIGITS for b in TWO_DIGITS]),
    Kind("difference", 0.34, "-", [(a, b) for a in TWO_DIGITS for b in TWO_DIGITS]),
    Kind("short_product", 0.08, "*", [(a, b) for a in ANY for b in ANY if a in ONE_DIGIT or b in ONE_DIGIT]),
    Kind("long_product", 0.20, "*", [(a, b) for a in TWO_DIGITS for b in TWO_DIGITS]),
)


@lru_cache(maxsize=len(SPLITS))
def pools(split: str) -> tuple[tuple[Problem, ...], ...]:
    """All the problems of a split, one pool per entry of `KINDS`, in a fixed order."""
    if split not in SPLITS:
        raise ValueError(f"arithmetic has no split {split!r}; it has {' and '.join(SPLITS)}")
    problems = ([Problem(a, kind.operation, b) for a, b in kind.operands] for kind in KINDS)
    return tuple(tuple(p for p in pool if p.split == split) for pool in problems)


def shares_of(kinds: str | Sequence[str] | Mapping[str, float] | None) -> list[float]:
    """The share of each entry of `KINDS`: today's for the kinds that are named, the given ones of a mapping, 0 for all others."""
    if kinds is None:
        return [kind.share for kind in KINDS]
    names = [kind.name for kind in KINDS]
    chosen: Any = (kinds,) if isinstance(kinds, str) else kinds
    if not isinstance(chosen, (Mapping, Sequence)) or not chosen or any(name not in names for name in chosen):
        raise ValueError(f"arithmetic: kinds={kinds!r}; valid are some of {', '.join(names)}, or a mapping from these to shares")
    if not isinstance(chosen, Mapping):
        return [kind.share if kind.name in chosen else 0.0 for kind in KINDS]
    if any(isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 < s < float("inf") for s in chosen.values()):
        raise ValueError(f"arithmetic: kinds={kinds!r}; a share is a number above 0")
    return [float(chosen.get(name, 0.0)) for name in names]


def stream(split: str, seed: int, kinds: str | Sequence[str] | Mapping[str, float] | None = None) -> Iterator[Problem]:
    """An endless draw in the shares of `kinds` (unset: of `KINDS`). No problem comes twice before all of these in the split have come."""
    rng = random.Random(seed)
    shares = shares_of(kinds)
    while True:
        remaining = [list(pool) if share else [] for pool, share in zip(pools(split), shares, strict=True)]
        for pool in remaining:
            rng.shuffle(pool)
        while any(remaining):
            # An exhausted kind weighs nothing, so the others go on in their own proportions.
            weights = [share if pool else 0.0 for share, pool in zip(shares, remaining, strict=True)]
            (pool,) = rng.choices(remaining, weights)
            yield pool.pop()


def draw(
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    kinds: str | Sequence[str] | Mapping[str, float] | None = None,
) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix.

    kinds: some of `sum`, `difference`, `short_product`, `long_product`, in the proportions of `KINDS`, or a mapping from these to shares.

    Raises ValueError for an unknown split or kind.
    """
    problems = stream(split, seed, kinds)
    return [next(problems) for _ in range(DEFAULT_LIMIT if limit is None else limit)]


class IntegerAnswers:
    """An `AnswerChecker`: the whole completion, surrounding white space aside, must be one integer in ASCII digits, or it has no answer.

    An answer is in canonical form: no leading zeros, no plus sign, and minus zero is zero. `007`, `+7` and `7` are one answer.
    """

    INTEGER = re.compile(r"([+-]?)0*([0-9]+)")

    def extract(self, completion: str) -> str | None:
        match = self.INTEGER.fullmatch(completion.strip())
        if match is None:
            return None
        sign, digits = match.groups()
        return f"-{digits}" if sign == "-" and digits != "0" else digits

    def equivalent(self, a: str, b: str) -> bool:
        return a == b


def checker() -> IntegerAnswers:
    return IntegerAnswers()
