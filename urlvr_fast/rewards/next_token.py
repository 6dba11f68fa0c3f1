"""Next-token reward (paper, section 2; RPT): raw text is its own verifier."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, rollout_text

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

UNIT = {"word": re.compile(r"\w+(?:['’]\w+)*|[^\w\s]"), "character": re.compile(r"\S", re.DOTALL)}


class NextToken:
    """r(y) = 1[y is a non-empty prefix of the true continuation that ends where a unit of it ends] (after RPT, Reinforcement Pre-Training).

    The paper names RPT without a formula. Ours, and our choice: white space around the response and before the continuation does not count,
    and a unit is a word (with its apostrophes) or a punctuation mark, since a boundary of tokens would be the tokenizer's.

    unit: "word" or "character" (then any prefix will do). column: the batch column with the true text, which a data set of raw text has for
    every prompt; it is data, not a label. Fails by short predictions: one sure word earns what a sentence does. Raises RewardError when the
    column is missing or holds no text.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, unit: str = "word", column: str = "continuation") -> None:
        if unit not in UNIT:
            raise RewardError(f"next_token: unit={unit!r}; valid are {', '.join(UNIT)}")
        self.unit, self.column = unit, column

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        truths = batch.columns.get(self.column)
        if truths is None:
            raise RewardError(
                f"next_token needs a column {self.column!r} with the text that truly follows each prompt (option `column`); "
                f"the batch has {', '.join(batch.columns) or 'none'}"
            )
        for index, truth in enumerate(truths):
            if not isinstance(truth, str):
                raise RewardError(f"next_token: column {self.column!r} holds {truth!r:.80}, not text, for {rollout_text(batch, index)}")
        pairs = zip(batch.completions, truths, strict=True)
        return torch.tensor([float(self.predicts(said.strip(), truth.lstrip())) for said, truth in pairs])

    def predicts(self, said: str, truth: str) -> bool:
        if not said or not truth.startswith(said):
            return False
        ends = (match.end() for match in UNIT[self.unit].finditer(truth))
        return next((end for end in ends if end >= len(said)), None) == len(said)
