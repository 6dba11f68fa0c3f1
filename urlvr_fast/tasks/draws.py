"""What the draws of procedural tasks share: which split a problem belongs to, draws without repetition, and checks of their options."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

SPLITS = ("train", "test")
DEFAULT_LIMIT = 4096
ATTEMPTS = 20_000  # without a new problem before a split counts as exhausted


class Keyed(Protocol):
    @property
    def key(self) -> str:
        """One text for all problems that are the same in substance, such as one that only swaps operands."""
        ...


P = TypeVar("P", bound=Keyed)


def split_of(key: str) -> str:
    """`test` for one key in five, by its SHA-256: the same in every process, on every machine and for every seed."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 5 == 0 else "train"


def distinct(make: Callable[[random.Random], P | None], split: str, seed: int, task: str) -> Iterator[P]:
    """An endless draw of what `make` makes (None: discarded) in this split. No key comes again until new ones no longer turn up.

    Raises ValueError for an unknown split, and for one in which nothing turns up at all.
    """
    check_split(task, split)
    rng = random.Random(seed)
    seen: set[str] = set()
    misses = 0
    while True:
        problem = make(rng)
        if problem is not None and problem.key not in seen and split_of(problem.key) == split:
            seen.add(problem.key)
            misses = 0
            yield problem
            continue
        misses += 1
        if misses == ATTEMPTS:
            if not seen:
                raise ValueError(f"{task}: the {split} split has no problem with these options; let them allow more")
            seen.clear()
            misses = 0


def take(problems: Iterator[P], limit: int | None) -> list[P]:
    """The first `limit` (None: 4096)."""
    return [next(problems) for _ in range(DEFAULT_LIMIT if limit is None else limit)]


def check_split(task: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{task} has no split {split!r}; it has {' and '.join(SPLITS)}")


def checked_integer(task: str, name: str, value: int, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{task}: {name}={value!r}; valid is an integer from {lowest} to {highest}")
    return value


def checked_counts(task: str, name: str, value: int | Sequence[int], lowest: int, highest: int) -> tuple[int, ...]:
    """One count or several."""
    counts = tuple(value) if isinstance(value, Sequence) else (value,)
    if not counts or any(type(count) is not int or not lowest <= count <= highest for count in counts):
        raise ValueError(
            f"{task}: {name}={value!r}; valid is a count from {lowest} to {highest}, or several, such as ({lowest}, {highest})"
        )
    return counts
