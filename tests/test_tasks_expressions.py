"""The parser of what models write: exact on expressions, None on everything else, and never slow."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from urlvr_fast.tasks.expressions import MAX_DEPTH, parse


@pytest.mark.parametrize(
    ("text", "value", "integers"),
    [
        ("7", Fraction(7), (7,)),
        ("3*7+5", Fraction(26), (3, 7, 5)),
        ("3+7*5", Fraction(38), (3, 7, 5)),
        ("(3+7)*5", Fraction(50), (3, 7, 5)),
        ("9-4-3", Fraction(2), (9, 4, 3)),
        ("8/4/2", Fraction(1), (8, 4, 2)),
        ("8/(4/2)", Fraction(4), (8, 4, 2)),
        ("1/3+1/6", Fraction(1, 2), (1, 3, 1, 6)),
        ("-3+-(2-4)", Fraction(-1), (3, 2, 4)),
        ("2*-3", Fraction(-6), (2, 3)),
        (" ( 1 +\t2 )\n* 3 ", Fraction(9), (1, 2, 3)),
        ("0*5", Fraction(0), (0, 5)),
        ("999999999999", Fraction(999999999999), (999999999999,)),
        ("(((5)))", Fraction(5), (5,)),
    ],
)
def test_value_and_integers(text: str, value: Fraction, integers: tuple[int, ...]) -> None:
    assert parse(text) == (value, integers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "-",
        "3+",
        "*3",
        "+3",
        "3 5",
        "3 +* 5",
        "(3",
        "3)",
        "()",
        "2(3)",
        "(2)(3)",
        "3=3",
        "3*7+5=26",
        "2**3",
        "7//2",
        "7%2",
        "2^3",
        "1.5",
        "1,000",
        "0x10",
        "1_0",
        "1e3",
        "007",
        "00",
        "x",
        "3×5",
        "٣+٤",
        "３",
        "²",
        "3\xa0+4",
        "3\x00",
        "3−1",
        "5/0",
        "5/(3-3)",
        "0/0",
        "1234567890123",
        "__import__('os')",
        "9**9**9**9",
        "(lambda: 1)()",
        "[1]",
        "3;4",
        "3#4",
        "True",
    ],
)
def test_what_is_no_expression(text: str) -> None:
    assert parse(text) is None


def test_the_bounds() -> None:
    assert parse("1" + "+1" * 249) == (250, (1,) * 250)  # 499 characters
    assert parse("1+" * 250 + "1") is None  # 501
    assert parse("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == (1, (1,))
    assert parse("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    assert parse("-" * MAX_DEPTH + "1") == (1, (1,))
    assert parse("-" * (MAX_DEPTH + 1) + "1") is None


SLOW_ELSEWHERE = [
    "9**9**9**9",
    "(" * 250,
    "(" * 100_000,
    "(" * 50_000 + "1" + ")" * 50_000,
    "1" * 100_000,
    "1+" * 50_000,
    " " * 100_000,
    "-" * 499 + "1",
    "*".join(["999999999999"] * 38),
    "+".join(f"1/{999999999999 - i}" for i in range(33)),
    "٣" * 100_000,
    "\ud800" * 400,
]


@pytest.mark.parametrize("text", SLOW_ELSEWHERE, ids=range(len(SLOW_ELSEWHERE)))
def test_no_text_takes_long(text: str) -> None:
    parse(text)  # the first call may import or compile something
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        parse(text)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


@given(st.text(max_size=600))
def test_nothing_raises(text: str) -> None:
    parse(text)


@given(st.text(alphabet="0123456789+-*/() \n=.", max_size=60))
def test_agrees_with_python_wherever_there_is_a_value(text: str) -> None:
    parsed = parse(text)
    if parsed is not None:
        # Safe: `parse` has accepted it, so it is digits, four operators and parentheses. Brackets let it span lines.
        exact = eval("(" + "".join(f"F({t})" if t.isdigit() else t for t in tokens(text)) + ")", {"F": Fraction})
        assert parsed.value == exact


def tokens(text: str) -> list[str]:
    import re

    return re.findall(r"[0-9]+|[^0-9]", text)


@st.composite
def trees(draw: st.DrawFn, depth: int = 4) -> tuple[str, Fraction | None, tuple[int, ...]]:
    """Text, value (None after a division by zero) and integers of a random expression, fully parenthesised."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number), (number,)
    (a, x, left), (b, y, right) = draw(trees(depth=depth - 1)), draw(trees(depth=depth - 1))
    operator = draw(st.sampled_from("+-*/"))
    value = None
    if x is not None and y is not None and not (operator == "/" and y == 0):
        value = {"+": x + y, "-": x - y, "*": x * y}.get(operator) if operator != "/" else x / y
    return f"({a} {operator} {b})", value, left + right


@given(trees())
def test_random_expressions(tree: tuple[str, Fraction | None, tuple[int, ...]]) -> None:
    text, value, integers = tree
    assert parse(text) == (None if value is None else (value, integers))
