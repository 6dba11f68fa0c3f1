"""Procedural verification: a program that knows the task judges a response. No answer is needed where checking one is easy (Countdown)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

Verify = Callable[[str, Mapping[str, Any]], float]  # (the whole response, the prompt's other columns) -> reward


class Procedural:
    """r(y) = verify(y, columns of x): the task's own exact check, from the response and what the prompt states (its numbers, its target).

    The paper's external rewards from generation-verification asymmetry (section 2: LADDER, RLSR on Countdown), for tasks whose check needs
    no code to be run. The verifier sees the prompt's columns, in which no answer can be. It must hold its own against hostile text: no
    evaluation, bounded time. Fails where the check is weaker than the task: whatever satisfies it is learnt.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, verify: Verify) -> None:
        self.verify = verify

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        rewards = [
            float(self.verify(completion, {name: values[index] for name, values in batch.columns.items()}))
            for index, completion in enumerate(batch.completions)
        ]
        return torch.tensor(rewards, dtype=torch.float32)
