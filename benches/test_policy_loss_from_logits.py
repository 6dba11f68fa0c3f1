"""pytest-benchmark entry of policy_loss_from_logits; see conftest.py."""

from __future__ import annotations

from collections.abc import Callable

from benches import policy_loss_from_logits as op
from benches.measure import Case

__all__ = ["op"]


def test_policy_loss_from_logits(case: Case, timed: Callable[[Case], None]) -> None:
    timed(case)
