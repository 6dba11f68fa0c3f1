"""Next-token reasoning on raw text, after RPT (Reinforcement Pre-Training): the prompt is a prefix, and the text itself is the target.

Nobody labels anything, so the true continuation is a public column, and `verify` is a reward that needs no answer. As in RPT, a completion
is right when it is a prefix of the true continuation that ends where a word ends. Two rules of ours: it must hold at least one whole word,
or a single space would be right, and text beyond the known continuation is wrong, because nothing says that it is right.

The text comes from UTF-8 files, cut into windows that do not overlap; a SHA-256 of a window decides its split. Without files it is made up
here: counting, alphabets and refrains, whose continuation a reader can infer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from urlvr_fast.tasks.draws import DEFAULT_LIMIT, check_split, checked_integer, distinct, split_of, take

NUMBER_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
NAMES = ["ada", "ben", "cleo", "dan", "eva", "finn", "gus", "hana"]
VERBS = ["sees", "finds", "likes", "draws", "hides"]
THINGS = ["apple", "boat", "cat", "door", "egg", "fish", "goat", "hat"]
WORD, SPACE, NO_SPACE = re.compile(r"\s*\w+"), re.compile(r"\s*"), re.compile(r"\S*")
INSIDE_WORD = re.compile(r"\w\w")


class Problem(NamedTuple):
    prefix: str
    continuation: str  # begins with the white space after the prefix

    @property
    def prompt(self) -> str:
        return self.prefix

    @property
    def answer(self) -> str:
        return self.continuation

    @property
    def columns(self) -> dict[str, Any]:
        return {"continuation": self.continuation}

    @property
    def key(self) -> str:
        return self.prefix + self.continuation

    @property
    def split(self) -> str:
        return split_of(self.key)


def draw(
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    files: str | Path | Sequence[str | Path] = (),
    prefix: int = 48,
    continuation: int = 24,
) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order, fewer where the files have fewer; a smaller limit gives a prefix.

    files: one text file or several; without any, made-up text. prefix, continuation: the most characters of each; both end with a word.

    Raises ValueError for a file that cannot be read or is too short, an unknown split, and lengths under 8 and 4 or over 100000.
    """
    checked_integer("next_token", "prefix", prefix, 8, 100_000)
    checked_integer("next_token", "continuation", continuation, 4, 100_000)
    paths = [files] if isinstance(files, (str, Path)) else list(files)
    if not paths:
        return take(
            distinct(lambda rng: cut(made_up_text(rng, prefix + continuation), prefix, continuation), split, seed, "next_token"), limit
        )
    check_split("next_token", split)
    # Equal windows (a licence header in every file) are one problem.
    problems = list(dict.fromkeys(p for path in paths for p in windows(read_text(path), prefix, continuation) if p.split == split))
    if not problems:
        raise ValueError(f"next_token: the {split} split of {', '.join(map(str, paths))} is empty; give more text or a shorter prefix")
    random.Random(seed).shuffle(problems)
    return problems[: DEFAULT_LIMIT if limit is None else limit]


def made_up_text(rng: random.Random, length: int) -> str:
    """At least `length` characters of one pattern with random parts."""
    pattern = rng.randrange(3)
    if pattern < 2:
        words = (NUMBER_WORDS, LETTERS)[pattern]
        start, step = rng.randrange(len(words)), rng.choice((1, 2, 3))
        return " ".join(words[(start + step * index) % len(words)] for index in range(length))
    refrain = " ".join(f"{rng.choice(NAMES)} {rng.choice(VERBS)} the {rng.choice(THINGS)}." for _ in range(rng.choice((1, 2))))
    return " ".join([refrain] * (length // len(refrain) + 1))


def read_text(path: str | Path) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"next_token: {path} cannot be read as UTF-8 text ({error})") from None


def windows(text: str, prefix: int, continuation: int) -> Iterator[Problem]:
    """The text as problems, one after the other, without overlap. Each begins with a word."""
    start = 0
    while (start := SPACE.match(text, start).end()) < len(text):  # type: ignore[union-attr]  # it matches anywhere
        problem = cut(text[start : start + prefix + continuation + 1], prefix, continuation)
        if problem is not None:
            yield problem
            start += len(problem.key)
        else:  # an endless word, or no word to go on with
            start = NO_SPACE.match(text, start + prefix).end()  # type: ignore[union-attr]


def cut(text: str, prefix: int, continuation: int) -> Problem | None:
    """The first `prefix` characters, back to the end of a word, and what follows, back to the end of a word; None where there are none."""
    middle = last_space(text, prefix)
    if not text[:middle].strip():
        return None
    end = len(text) if len(text) <= middle + continuation else last_space(text, middle + continuation)
    problem = Problem(text[:middle], text[middle:end].rstrip())
    return problem if WORD.match(problem.continuation) else None


def last_space(text: str, most: int) -> int:
    """The last position up to `most` with white space; 0 when there is none. A run of white space counts from where it begins."""
    for position in range(min(most, len(text) - 1), 0, -1):
        if text[position].isspace() and not text[position - 1].isspace():
            return position
    return 0


def verify(completion: str, columns: Mapping[str, Any]) -> float:
    """1.0 where the completion, white space at its end aside, is whole words from the start of `columns["continuation"]`, else 0.0."""
    return float(continues(completion, columns["continuation"]))


def continues(completion: str, continuation: str) -> bool:
    given = completion.rstrip()
    if WORD.match(given) is None or not continuation.startswith(given):
        return False
    return INSIDE_WORD.match(continuation, len(given) - 1) is None


class ContinuationAnswers:
    """An `AnswerChecker` for continuations: the whole completion, white space at its end aside. One vote per text; blank is no answer."""

    def extract(self, completion: str) -> str | None:
        return completion.rstrip() or None

    def canonical(self, answer: str) -> str:
        return answer.rstrip()

    def equivalent(self, a: str, b: str) -> bool:
        return self.canonical(a) == self.canonical(b)

    def correct(self, given: str, answer: str) -> bool:
        return continues(given, answer)


def checker() -> ContinuationAnswers:
    return ContinuationAnswers()
