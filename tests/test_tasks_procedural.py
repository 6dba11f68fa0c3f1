"""Modular arithmetic, sorting, reversal, factoring and next-token: what all of them promise, and what each one counts as right."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urlvr_fast.tasks import countdown, factoring, modular, next_token, reversal, sorting
from urlvr_fast.tasks.draws import split_of

TASKS = [countdown, factoring, modular, next_token, reversal, sorting]
VERIFIED = [countdown, factoring, next_token, reversal, sorting]


def name_of(task: ModuleType) -> str:
    return task.__name__.rpartition(".")[2]


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_the_draw(task: ModuleType) -> None:
    whole = task.draw("train", limit=200, seed=1)
    assert task.draw("train", limit=200, seed=1) == whole
    assert task.draw("train", limit=60, seed=1) == whole[:60]
    assert task.draw("train", limit=200, seed=2) != whole
    assert len({problem.key for problem in whole}) == 200
    assert not {problem.key for problem in whole} & {problem.key for problem in task.draw("test", limit=200, seed=1)}
    assert all(problem.prompt.isascii() and problem.prompt for problem in whole)
    with pytest.raises(ValueError, match=f"{name_of(task)} has no split 'dev'; it has train and test"):
        task.draw("dev")


@pytest.mark.parametrize("task", TASKS, ids=name_of)
def test_its_own_solution_is_right_and_another_problem_s_is_wrong(task: ModuleType) -> None:
    problems = task.draw("test", limit=100, seed=3)
    checker = task.checker()
    correct = getattr(checker, "correct", checker.equivalent)
    solutions = [str(getattr(problem, "solution", problem.answer)) for problem in problems]
    for problem, solution in zip(problems, solutions, strict=True):
        given = checker.extract(solution)
        assert given is not None
        assert correct(given, str(problem.answer))
        if task in VERIFIED:
            assert task.verify(solution, problem.columns) == 1.0
    wrong = sum(correct(checker.extract(solutions[i - 1]) or "", str(problems[i].answer)) for i in range(100))
    assert wrong < (40 if task in (modular, next_token) else 10)  # remainders and refrains coincide by chance
    if task in VERIFIED:
        assert sum(task.verify(solutions[i - 1], problems[i].columns) for i in range(100)) == wrong


HOSTILE = [
    "",
    " ",
    "9**9**9**9",
    "__import__('os')",
    "٣",
    "\ud800",
    "1" * 100_000,
    "1 " * 50_000 + "x",
    "1*" * 50_000,
    "(" * 100_000,
    " " * 100_000,
]


@pytest.mark.parametrize("task", VERIFIED, ids=name_of)
def test_hostile_completions_are_wrong_and_fast(task: ModuleType) -> None:
    columns = task.draw(limit=1)[0].columns
    for completion in HOSTILE:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            assert task.verify(completion, columns) == 0.0
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.05


@pytest.mark.parametrize("task", VERIFIED, ids=name_of)
@settings(max_examples=50)
@given(completion=st.text())
def test_a_verifier_raises_on_no_text(task: ModuleType, completion: str) -> None:
    assert task.verify(completion, task.draw(limit=1)[0].columns) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (modular, {"largest": 1}, "modular: largest=1; valid is an integer from 2"),
        (modular, {"largest_modulus": "9"}, "modular: largest_modulus='9'"),
        (sorting, {"numbers": (3, 51)}, r"sorting: numbers=\(3, 51\); valid is a count from 2 to 50"),
        (sorting, {"largest": -1}, "sorting: largest=-1"),
        (reversal, {"numbers": 1}, "reversal: numbers=1"),
        (factoring, {"largest": 3}, "factoring: largest=3; valid is an integer from 4"),
        (next_token, {"prefix": 2}, "next_token: prefix=2"),
        (next_token, {"files": "/nowhere.txt"}, r"next_token: /nowhere\.txt cannot be read"),
    ],
)
def test_bad_options(task: ModuleType, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.draw(limit=3, **options)


# --- modular ----------------------------------------------------------------------------------------------------------


def test_modular_by_hand() -> None:
    problem = modular.Problem(17, 5, 3, 11)
    assert (problem.prompt, problem.answer, problem.columns) == ("(17*5+3)%11=", 0, {"modulus": 11})
    for left in range(2, 21):  # swapped factors are the same problem
        assert modular.Problem(left, 5, 3, 11).split == modular.Problem(5, left, 3, 11).split
    assert modular.Problem(2, 3, 4, 7).answer == 3
    assert not hasattr(modular, "verify")  # a verifier that computes the remainder has the answer


def test_modular_options() -> None:
    for problem in modular.draw(limit=200, largest=5, largest_modulus=4):
        assert max(problem.left, problem.right, problem.addend) <= 5
        assert 2 <= problem.modulus <= 4
        assert 0 <= problem.answer < problem.modulus


# --- sorting and reversal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "is_sorted", "is_reversed"),
    [
        ("3 5 9 9", 1, 0),
        ("9 9 3 5", 0, 1),
        (" 3  5 9 9\n", 1, 0),
        ("03 5 9 09", 1, 0),
        ("3 5 9", 0, 0),
        ("3 5 9 9 9", 0, 0),
        ("3,5,9,9", 0, 0),
        ("3 5 9 9.", 0, 0),
        ("5 9 3 9", 0, 0),
        ("sort 3 5 9 9", 0, 0),
        ("3 5 9 -9", 0, 0),
        ("3599", 0, 0),
    ],
)
def test_lists_by_hand(completion: str, is_sorted: int, is_reversed: int) -> None:
    columns = {"numbers": [5, 3, 9, 9]}
    assert sorting.Problem((5, 3, 9, 9)).prompt == "sort 5 3 9 9:"
    assert reversal.Problem((5, 3, 9, 9)).prompt == "reverse 5 3 9 9:"
    assert (sorting.Problem((5, 3, 9, 9)).answer, reversal.Problem((5, 3, 9, 9)).answer) == ("3 5 9 9", "9 9 3 5")
    assert sorting.verify(completion, columns) == is_sorted
    assert reversal.verify(completion, columns) == is_reversed
    assert columns == {"numbers": [5, 3, 9, 9]}


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=50))
def test_lists(numbers: list[int]) -> None:
    columns = {"numbers": numbers}
    assert sorting.verify(" ".join(map(str, sorted(numbers))), columns) == 1.0
    assert reversal.verify(" ".join(map(str, reversed(numbers))), columns) == 1.0
    assert sorting.verify(" ".join(map(str, sorted(numbers, reverse=True))), columns) == float(len(set(numbers)) == 1)
    assert sorting.Problem(tuple(numbers)).split == sorting.Problem(tuple(sorted(numbers))).split
    assert reversal.Problem(tuple(numbers)).split == reversal.Problem(tuple(reversed(numbers))).split


# --- factoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "number", "right"),
    [
        ("7*13", 91, 1),
        ("13*7", 91, 1),
        (" 7 * 13\n", 91, 1),
        ("2*4", 8, 1),
        ("4*2", 8, 1),
        ("2*2*2", 8, 1),
        ("8", 8, 0),
        ("1*8", 8, 0),
        ("8*1", 8, 0),
        ("2*2*2*1", 8, 0),
        ("-2*-4", 8, 0),
        ("16/2", 8, 0),
        ("2+6", 8, 0),
        ("(2*4)", 8, 0),
        ("2*4=8", 8, 0),
        ("2**3", 8, 0),
        ("7*12", 91, 0),
        ("0*91", 91, 0),
        ("07*13", 91, 0),
        ("7*13*", 91, 0),
        ("7·13", 91, 0),
        ("٧*13", 91, 0),
    ],
)
def test_products_by_hand(completion: str, number: int, right: int) -> None:
    assert factoring.verify(completion, {"number": number}) == right
    given = factoring.checker().extract(completion)
    assert (given is not None and factoring.checker().correct(given, str(number))) == bool(right)


def test_products_in_another_order_are_one_vote() -> None:
    checker = factoring.checker()
    assert checker.extract("13 * 7") == checker.extract("7*13") == "7*13"
    assert checker.equivalent("13*7", "7*13")
    assert not checker.equivalent("2*4", "2*2*2")
    assert not checker.equivalent("9*9", "27*3")  # the same value, and another factorisation


def test_every_number_is_composite() -> None:
    for problem in factoring.draw(limit=800, largest=5000):
        assert any(problem.number % factor == 0 for factor in range(2, math.isqrt(problem.number) + 1))
        assert problem.number <= 5000
        assert problem.prompt == f"{problem.number}="
    assert factoring.verification_prompt("91=", "7*{13}", {}) == "91=7*{13}?"
    assert factoring.verdicts(largest=9) == ("T", "F")


# --- next token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" lazy", 1),
        (" lazy dog", 1),
        (" lazy dog, he", 1),
        (" lazy dog,", 1),
        (" lazy\n", 1),
        (" lazy dog, he said", 1),
        ("", 0),
        (" ", 0),
        (" la", 0),
        (" lazy do", 0),
        ("lazy", 0),
        (" Lazy", 0),
        (" lazy cat", 0),
        (" lazy dog, he said no", 0),
    ],
)
def test_continuations_by_hand(completion: str, right: int) -> None:
    columns = {"continuation": " lazy dog, he said"}
    assert next_token.verify(completion, columns) == right
    given = next_token.checker().extract(completion)
    assert (given is not None and next_token.checker().correct(given, columns["continuation"])) == bool(right)


@pytest.mark.parametrize(("completion", "right"), [(" snake", 0), (" snake_", 0), (" snake_case", 1), (" snake_case (", 1), (" ", 0)])
def test_where_a_word_ends(completion: str, right: int) -> None:
    assert next_token.verify(completion, {"continuation": " snake_case (in code)"}) == right
    assert next_token.verify(" (", {"continuation": " (in code)"}) == 0.0  # a bracket is no word


def test_text_files(tmp_path: Path) -> None:
    words = [f"word{index}" for index in range(4000)]
    (tmp_path / "a.txt").write_text(" ".join(words[:2000]) + " " + "x" * 500 + "\n\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n".join(words[2000:]), encoding="utf-8")
    files = [tmp_path / "a.txt", str(tmp_path / "b.txt")]
    train, test = (next_token.draw(split, files=files, prefix=40, continuation=20) for split in ("train", "test"))
    text = " ".join(words)
    for problem in (*train, *test):
        assert " ".join(problem.key.split()) in text  # whole words, in order
        assert len(problem.prefix) <= 40
        assert len(problem.continuation) <= 20
        assert problem.prefix == problem.prefix.strip()
        assert problem.continuation[0].isspace()
        assert next_token.verify(problem.continuation, problem.columns) == 1.0
    used = [word for problem in (*train, *test) for word in problem.key.split()]
    assert len(used) == len(set(used))  # no word in two windows, so nothing of the test split is in the training split
    assert len(used) > 3900
    assert train == next_token.draw(files=files, prefix=40, continuation=20)
    assert next_token.draw(files=files, prefix=40, continuation=20, limit=5) == train[:5]
    assert next_token.draw(files=files, prefix=40, continuation=20, seed=1) != train


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(ValueError, match=r"latin\.txt cannot be read as UTF-8 text"):
        next_token.draw(files=tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("word")
    with pytest.raises(ValueError, match=r"the train split of .*short\.txt is empty"):
        next_token.draw(files=tmp_path / "short.txt")


def test_made_up_text_fits_and_ends_with_words() -> None:
    for problem in next_token.draw(limit=500, prefix=30, continuation=12):
        assert len(problem.prefix) <= 30
        assert 0 < len(problem.continuation) <= 12
        assert problem.answer == problem.columns["continuation"] == problem.continuation


def test_the_split_is_the_hash_of_arithmetic() -> None:
    assert split_of("23+45=") == "test"
    assert split_of("81-37=") == "train"
