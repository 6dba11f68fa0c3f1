"""pytest-benchmark entry of token_stats; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from benches import token_stats as op
from benches.measure import Case

__all__ = ["op"]


def test_token_stats(case: Case, timed: Callable[[Case], None]) -> None:
    timed(case)
