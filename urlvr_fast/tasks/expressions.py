"""Integer expressions that a model wrote: an exact value, and the integers in it. Nothing is ever evaluated as code.

    expression = product  (("+" | "-") product)*
    product    = signed   (("*" | "/") signed)*
    signed     = "-" signed | integer | "(" expression ")"

Integers are ASCII digits without leading zeros; space, tab and newline may stand between tokens. There is no power operator, so a value is
at most about as long as its text, and length, depth and digits are bounded, so the time is too. Anything else is None, not an exception.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS, MAX_DEPTH, MAX_DIGITS = 500, 50, 12
TOKEN = re.compile(rf"[ \t\r\n]*(?:(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(?![0-9])|([-+*/()]))")


class Expression(NamedTuple):
    value: Fraction
    integers: tuple[int, ...]  # every literal, in order of appearance, as often as it appears; a minus sign is not part of it


class NotAnExpression(Exception):
    """Stays in this file: `parse` turns it into None."""


def parse(text: str) -> Expression | None:
    """The expression that the whole of `text` is, or None: other characters, an equation, a division by zero, or over a bound.

    The bounds: 500 characters, 50 open parentheses and minus signs at once, 12 digits an integer.
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        reader = _Reader(text)
        value = reader.expression(0)
        if reader.next is not None:
            return None
        return Expression(value, tuple(reader.integers))
    except (NotAnExpression, ZeroDivisionError):
        return None


class _Reader:
    """Recursive descent with one token of look-ahead: an int, an operator or parenthesis, or None at the end."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text.rstrip(" \t\r\n"), 0
        self.integers: list[int] = []
        self.next: int | str | None = None
        self.advance()

    def advance(self) -> None:
        if self.position == len(self.text):
            self.next = None
            return
        match = TOKEN.match(self.text, self.position)
        if match is None:
            raise NotAnExpression
        self.position = match.end()
        self.next = match[2] or int(match[1])

    def expression(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in ("+", "-"):
            operator = self.next
            self.advance()
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.signed(depth)
        while self.next in ("*", "/"):
            operator = self.next
            self.advance()
            factor = self.signed(depth)
            value = value * factor if operator == "*" else value / factor
        return value

    def signed(self, depth: int) -> Fraction:
        token = self.next
        if depth > MAX_DEPTH:
            raise NotAnExpression
        if isinstance(token, int):
            self.integers.append(token)
            self.advance()
            return Fraction(token)
        if token not in ("-", "("):
            raise NotAnExpression
        self.advance()
        if token == "-":
            return -self.signed(depth + 1)
        value = self.expression(depth + 1)
        if self.next != ")":
            raise NotAnExpression
        self.advance()
        return value
