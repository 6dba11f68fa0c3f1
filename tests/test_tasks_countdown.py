"""Countdown: every problem can be solved, the scorer is exact, and the question to the verifier holds what it should, unchanged."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urlvr_fast.tasks import countdown
from urlvr_fast.tasks.countdown import CountdownAnswers, Problem, extract, verification_prompt, verify

COLUMNS: dict[str, Any] = {"numbers": [3, 5, 7], "target": 26, "style": "plain"}


def test_a_problem_by_hand() -> None:
    problem = Problem((3, 5, 7), 26, "3*7+5")
    assert problem.prompt == "3 5 7=26:"
    assert json.loads(problem.answer) == {"numbers": [3, 5, 7], "target": 26}
    assert problem.columns == COLUMNS
    assert "3*7" not in str(problem.columns) + problem.answer


@pytest.mark.parametrize(
    "completion",
    [
        "3*7+5",
        "5+3*7",
        " 7 * 3 + 5\n",
        "(5+(7*3))",
        "--5+3*7",
        "so <answer>3*7+5</answer>",
        "<answer>1</answer> no: <answer> 5 + 7*3 </answer>.",
        "<answer>3*7+5</answer> and then <answer>3*",
        "<answer><answer>3*7+5</answer>",
    ],
)
def test_right_completions(completion: str) -> None:
    assert verify(completion, COLUMNS) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "26",
        "3*7+5=26",
        "26=3*7+5",
        "3*7",
        "3*7+5+5-5",
        "3*7+5*1",
        "35-7",
        "3*7-5",
        "3*5+7",
        "3 7 5",
        "the answer is 3*7+5",
        "3*7+5.",
        "<answer>3*7+5</answer><answer>26</answer>",
        "<answer></answer>",
        "3*7+5 <answer>3+7+5</answer>",
        "<answer>3*7+5",
        "٣*7+5",
        "3×7+5",
    ],
)
def test_wrong_completions(completion: str) -> None:
    assert verify(completion, COLUMNS) == 0.0


def test_every_number_counts_as_often_as_it_is_given() -> None:
    twice = {"numbers": [4, 4, 2], "target": 6}
    assert verify("4+4-2", twice) == 1.0
    assert verify("4+2", twice) == 0.0
    assert verify("2+2+4-2", twice) == 0.0


def test_the_value_is_exact() -> None:
    thirds = {"numbers": [8, 3, 8, 3], "target": 24}
    assert verify("8/(3-8/3)", thirds) == 1.0  # fractions on the way: in floating point it is 23.999999999999989
    # 3 + 1/(10^11 - 1) is within TinyZero's 1e-5 of 3, and is not 3.
    assert verify("3+1/99999999999", {"numbers": [3, 1, 99999999999], "target": 3}) == 0.0


@pytest.mark.parametrize(
    "options", [{}, {"numbers": 3}, {"numbers": [3, 4], "style": "words"}, {"numbers": 6, "largest": 30, "largest_target": 999}]
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_drawn_problem_can_be_solved(split: str, options: dict[str, Any]) -> None:
    problems = countdown.draw(split, limit=400, seed=5, **options)
    for problem in problems:
        assert verify(problem.solution, problem.columns) == 1.0
        assert verify(problem.solution + "+1", problem.columns) == 0.0
        assert verify(problem.solution, {**problem.columns, "target": problem.target + 1}) == 0.0
        assert 1 <= problem.target <= options.get("largest_target", 100)
        assert max(problem.numbers) <= options.get("largest", 99 if problem.style == "words" else 9)
        assert problem.split == split
    counts = options.get("numbers", (3, 4))
    assert {len(problem.numbers) for problem in problems} == ({counts} if isinstance(counts, int) else set(counts))


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 99))
def test_solutions_of_any_draw(seed: int, numbers: int, largest: int) -> None:
    (problem,) = countdown.draw(limit=1, seed=seed, numbers=numbers, largest=max(largest, 6), largest_target=10**6)
    assert verify(problem.solution, problem.columns) == 1.0
    assert problem.prompt.isascii()


def test_solutions_fit_a_short_completion() -> None:
    assert max(len(p.solution) for p in countdown.draw(limit=2000)) <= 11
    assert max(len(p.solution) for p in countdown.draw(limit=2000, largest=99)) <= 15
    assert max(len(p.prompt) for p in countdown.draw(limit=2000)) <= 12


def test_all_four_operators_and_parentheses_occur() -> None:
    assert set("+-*/()") <= set("".join(p.solution for p in countdown.draw(limit=500)))


def test_the_draw() -> None:
    whole = countdown.draw(limit=300, seed=1)
    assert countdown.draw(limit=300, seed=1) == whole
    assert countdown.draw(limit=100, seed=1) == whole[:100]
    assert countdown.draw(limit=300, seed=2) != whole
    assert len({(tuple(sorted(p.numbers)), p.target) for p in whole}) == 300


def test_the_splits_share_no_problem_in_any_order() -> None:
    train, test = (
        {(tuple(sorted(p.numbers)), p.target) for p in countdown.draw(s, limit=1000, numbers=3, seed=i)}
        for i, s in enumerate(("train", "test"))
    )
    assert not train & test
    for numbers in itertools.permutations((3, 5, 7)):
        assert Problem(numbers, 26, "").split == Problem((3, 5, 7), 26, "").split


def test_an_exhausted_split_begins_again() -> None:
    problems = countdown.draw(limit=40, numbers=2, largest=3)
    pool = len({p.key for p in problems})
    assert 1 < pool < 40
    assert {p.key for p in problems[:pool]} == {p.key for p in problems}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; it has train and test"),
        ({"style": "latex"}, "style='latex'; valid are plain, words"),
        ({"numbers": 1}, "numbers=1; valid is a count from 2 to 6"),
        ({"numbers": ()}, r"numbers=\(\)"),
        ({"numbers": (3, "4")}, "numbers="),
        ({"numbers": "34"}, "numbers='34'"),
        ({"numbers": True}, "numbers=True"),
        ({"largest": 0}, "largest=0; valid is an integer from 1"),
        ({"largest_target": 2.5}, "largest_target=2.5"),
        ({"numbers": 6, "largest": 1, "largest_target": 1, "split": "test"}, "the test split has no problem with these options"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        countdown.draw(**{"limit": 5, **options})


# --- the checker ------------------------------------------------------------------------------------------------------


def test_votes_are_texts_and_correctness_is_not() -> None:
    checker, answer = CountdownAnswers(), Problem((3, 5, 7), 26, "").answer
    assert checker.extract(" 3*7 + 5 ") == checker.extract("<answer>3 * 7+5</answer>") == "3*7+5"
    assert checker.equivalent("3*7+5", "3 * 7 + 5")
    assert not checker.equivalent("3*7+5", "5+3*7")
    assert checker.correct("3*7+5", answer)
    assert checker.correct("5+3*7", answer)
    assert not checker.correct("3*7-5", answer)
    assert not checker.correct("3+5+7", answer)


@pytest.mark.parametrize("completion", ["", "I give up", "3*7+5=26", "<answer>none</answer>", "5/0", "3*7+5 <answer>x</answer>"])
def test_no_answer(completion: str) -> None:
    assert extract(completion) is None


HOSTILE = [
    "<answer>" * 12_500,
    "</answer>" * 12_500,
    "<answer>9**9**9**9</answer>",
    "<answer>" + "(" * 100_000 + "</answer>",
    "1" * 100_000,
    " " * 100_000,
    "__import__('os').system('true')",
    "\ud800" * 1000,
]


@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_completions_are_wrong_and_fast(completion: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert verify(completion, COLUMNS) == 0.0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


@given(st.text())
def test_the_verifier_raises_on_no_text(completion: str) -> None:
    assert verify(completion, COLUMNS) in (0.0, 1.0)


# --- self-verification ------------------------------------------------------------------------------------------------


def test_the_plain_question() -> None:
    assert verification_prompt("3 5 7=26:", "3*7+5", COLUMNS) == "3 5 7=26:3*7+5?"
    assert countdown.verdicts() == ("T", "F")
    assert countdown.verdicts(style="words", numbers=3) == ("True", "False")


@given(st.text(), st.text())
def test_the_question_in_words_holds_both_texts_unchanged(question: str, solution: str) -> None:
    asked = verification_prompt(question, solution, {**COLUMNS, "style": "words"})
    assert asked.startswith(countdown.VERIFICATION.partition("{question}")[0] + question + "\n\nProposed solution:\n" + solution)


def test_braces_and_placeholders_survive() -> None:
    question, solution = r"\boxed{Q} {solution} {0}", r"\frac{1}{2} {question} {{x}} \g<1> \1 %s $x"
    asked = verification_prompt(question, solution, {"style": "words"})
    assert asked.count(question) == asked.count(solution) == 1
    assert r"\boxed{{" not in asked
    assert asked.endswith(r"end your reply with \boxed{True}. If one fails, end it with \boxed{False}.")
    for check in ("only the given numbers", "each given number exactly once", "an expression, not an equation", "exactly the target"):
        assert check in asked


def test_the_instruction_in_words() -> None:
    prompt = Problem((3, 5, 7), 26, "", "words").prompt
    assert re.search(r"numbers 3, 5, 7, .* value is 26\..*<answer>", prompt)
    assert prompt.isascii()
