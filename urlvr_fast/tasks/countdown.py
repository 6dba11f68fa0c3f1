"""Countdown: reach a target from given numbers, each used exactly once. Easy to check and hard to find, so a model may verify itself.

The one external reward that the paper trains is self-verification on this task (section 7). Its data are problems of three or four
numbers; these are drawn the same way, and every one can be solved, because its target is the value of a random expression.

Two styles. `plain` is for a small character model: `3 5 7=26:` is completed by `3*7+5`. `words` is an instruction in English for a chat
model, whose answer stands between `<answer>` and `</answer>`. A SHA-256 of the sorted numbers and the target decides whether a problem
belongs to the test split (one in five), so no order of the numbers takes a problem to the other split.

The score is what TinyZero's `countdown.py` intends, without its `eval` and without its reward of 0.1 for a wrong expression: 1 when the
answer is an expression (no equation), with every given number exactly once, whose exact value is the target.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from urlvr_fast.tasks import expressions
from urlvr_fast.tasks.answer_tags import tagged_answer
from urlvr_fast.tasks.draws import checked_counts, checked_integer, distinct, split_of, take

STYLES = ("plain", "words")
OPERATORS = "+-*/"
LARGEST = {"plain": 9, "words": 99}  # of the numbers, where the option does not say

INSTRUCTION = (
    "Using the numbers {numbers}, write an arithmetic expression whose value is {target}. Use every number exactly once, and only "
    "+, -, *, / and parentheses. Think step by step, then give the expression alone, without an equals sign, between <answer> and "
    "</answer>, for example <answer>(1 + 2) * 3</answer>."
)
VERIFICATION = """You are given a problem and a proposed solution. Decide whether the solution is correct.

Problem:
{question}

Proposed solution:
{solution}

Check each of these:
1. It uses only the given numbers.
2. It uses each given number exactly once.
3. Its answer is an expression, not an equation.
4. The value of the expression is exactly the target.

If every check holds, end your reply with \\boxed{True}. If one fails, end it with \\boxed{False}."""
PLACEHOLDER = re.compile(r"\{(question|solution)\}")


@dataclass(frozen=True)
class Problem:
    numbers: tuple[int, ...]  # in the order of the prompt
    target: int
    solution: str  # one of them, without spaces; neither a column nor the answer, so nothing but pre-training sees it
    style: str = "plain"

    @property
    def prompt(self) -> str:
        if self.style == "plain":
            return f"{' '.join(map(str, self.numbers))}={self.target}:"
        return INSTRUCTION.format(numbers=", ".join(map(str, self.numbers)), target=self.target)

    @property
    def answer(self) -> str:
        """Many expressions are right, so the audit map keeps what any of them must satisfy, as JSON."""
        return json.dumps({"numbers": list(self.numbers), "target": self.target})

    @property
    def columns(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers), "target": self.target, "style": self.style}

    @property
    def key(self) -> str:
        return f"{' '.join(map(str, sorted(self.numbers)))}={self.target}"

    @property
    def split(self) -> str:
        return split_of(self.key)


def random_problem(rng: random.Random, numbers: Sequence[int], largest: int, operators: str, style: str) -> Problem:
    """Numbers from 1 to `largest` and a random expression of them."""
    given = [rng.randint(1, largest) for _ in range(rng.choice(numbers))]
    target, solution = random_expression(given, operators, rng)
    rng.shuffle(given)
    return Problem(tuple(given), target, solution, style)


def random_expression(numbers: Sequence[int], operators: str, rng: random.Random) -> tuple[int, str]:
    """(value, text) of a random expression of all of `numbers`. All its intermediate values are positive integers, as in the game."""
    parts = [(number, str(number), "") for number in numbers]  # value, text, outermost operator
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        possible = ["+", "*"] + ["-"] * (a[0] > b[0]) + ["/"] * (a[0] % b[0] == 0)
        parts.append(combined(a, rng.choice([o for o in possible if o in operators]), b))
    return parts[0][0], parts[0][1]


def combined(a: tuple[int, str, str], operator: str, b: tuple[int, str, str]) -> tuple[int, str, str]:
    """`a operator b`, with parentheses only where they are needed."""
    value = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0], "/": a[0] // b[0]}[operator]
    left = f"({a[1]})" if operator in "*/" and a[2] in ("+", "-") else a[1]
    in_parentheses = {"+": (), "-": ("+", "-"), "*": ("+", "-"), "/": ("+", "-", "*", "/")}[operator]
    right = f"({b[1]})" if b[2] in in_parentheses else b[1]
    return value, f"{left}{operator}{right}", operator


def draw(
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
    numbers: int | Sequence[int] = (3, 4),
    largest: int | None = None,
    largest_target: int = 100,
    operators: str = OPERATORS,
    style: str = "plain",
) -> list[Problem]:
    """The first `limit` (unset: 4096) problems of the seed's order; a smaller limit gives a prefix.

    numbers: how many numbers a problem has, one count or several equally likely ones, each 2 to 6. largest: of the numbers (unset: 9 in
    plain style, 99 in words). largest_target: the target is 1 to this. operators: those of the hidden solution, `+` or `*` among them; an
    answer may use any. style: `plain` or `words`.

    Raises ValueError, which says what is valid, for anything else.
    """
    if style not in STYLES:
        raise ValueError(f"countdown: style={style!r}; valid are {', '.join(STYLES)}")
    if not isinstance(operators, str) or set(operators) - set(OPERATORS) or not set(operators) & set("+*"):
        raise ValueError(f"countdown: operators={operators!r}; valid are some of {OPERATORS}, + or * among them")
    counts = checked_counts("countdown", "numbers", numbers, 2, 6)
    top = checked_integer("countdown", "largest", LARGEST[style] if largest is None else largest, 1, 10**6)
    checked_integer("countdown", "largest_target", largest_target, 1, 10**6)

    def make(rng: random.Random) -> Problem | None:
        problem = random_problem(rng, counts, top, operators, style)
        return problem if problem.target <= largest_target else None

    return take(distinct(make, split, seed, "countdown"), limit)


def extract(completion: str) -> str | None:
    """The expression a completion gives, without white space: the last `<answer>…</answer>`, or, without one, the whole completion.

    None where that is no expression: an equation, words, a division by zero, or over the bounds of `expressions.py`. Linear time.
    """
    answer = tagged_answer(completion)
    return None if expressions.parse(answer) is None else "".join(answer.split())


def solves(expression: str, numbers: Sequence[int], target: int) -> bool:
    parsed = expressions.parse(expression)
    return parsed is not None and sorted(parsed.integers) == sorted(numbers) and parsed.value == target


def verify(completion: str, columns: Mapping[str, Any]) -> float:
    """1.0 where the completion's expression uses each of `columns["numbers"]` exactly once and equals `columns["target"]`, else 0.0."""
    expression = extract(completion)
    return float(expression is not None and solves(expression, columns["numbers"], columns["target"]))


def verification_prompt(prompt: str, completion: str, columns: Mapping[str, Any]) -> str:
    """What self-verification asks the policy; `prompt` and `completion` stand in it exactly as they are.

    In plain style `3 5 7=26:3*7+5?`, whose next character is the verdict. In words style a question whose answer ends in `\\boxed{True}` or
    `\\boxed{False}`.
    """
    if columns.get("style", "plain") == "plain":
        return f"{prompt}{completion}?"
    # One pass over the template: neither text is scanned, so a brace or a placeholder in one of them stays what it is.
    inserted = {"question": prompt, "solution": completion}
    return PLACEHOLDER.sub(lambda match: inserted[match[1]], VERIFICATION)


VERDICTS = ("T", "F")
VERDICTS_IN_WORDS = ("True", "False")


def verdicts(*, style: str = "plain", **options: Any) -> tuple[str, str]:
    """What the policy writes for a right and for a wrong solution, given the options of the draw."""
    return VERDICTS if style == "plain" else VERDICTS_IN_WORDS


class CountdownAnswers:
    """An `AnswerChecker` for expressions. An answer of the audit map is JSON: the numbers and the target.

    Votes: two expressions are one answer when they are the same text without white space. `3*7+5` and `5+3*7` are two, although both may
    be right: a class by value would put every correct rollout in one, which is to vote with the verifier, and the agreement that
    a majority vote measures is the policy's with itself. Which of them are right is `correct`'s to say.
    """

    def extract(self, completion: str) -> str | None:
        return extract(completion)

    def canonical(self, answer: str) -> str:
        return "".join(answer.split())

    def equivalent(self, a: str, b: str) -> bool:
        return self.canonical(a) == self.canonical(b)

    def correct(self, given: str, answer: str) -> bool:
        """Whether the expression solves the problem. ValueError (KeyError, TypeError) when `answer` is not what `Problem.answer` gives."""
        problem = json.loads(answer)
        return solves(given, problem["numbers"], problem["target"])


def checker() -> CountdownAnswers:
    return CountdownAnswers()
