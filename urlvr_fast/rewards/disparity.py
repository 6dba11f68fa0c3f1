"""Probability disparity (paper, Table 1; RLSF): how sure the model was of its answer, whatever it thought of the way there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, rollout_text
from urlvr_fast.rewards.answers import AnswerChecker, answer_characters

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

COLUMN = "answer_tokens"


class ProbabilityDisparity:
    """r = (1/M) Σ_t [max_v p(v | x, c, a_<t) − second max_v p(v | x, c, a_<t)] over the M tokens of the answer (RLSF, arXiv 2507.21931).

    That M is the number of the answer's tokens follows CoT decoding (Wang & Zhou 2024), whose quantity it is; RLSF itself ranks whole
    responses by it and is no on-line reward. The answer's tokens are those whose text overlaps it: from the batch column `answer_tokens`
    ([first, last) in the response, None without an answer) where there is one, else the policy finds them (`token_span`).

    0 for a response without an answer, or whose answer does not stand in it verbatim. Fails like self-certainty: a confident wrong answer
    earns as much as a right one, and an answer that can be copied from the prompt earns most. Raises RewardError without
    batch.prob_gap, and when there is neither the column nor a policy.
    """

    needs = frozenset({"prob_gap"})

    def __init__(self, checker: AnswerChecker) -> None:
        self.checker = checker

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        if batch.prob_gap is None:
            raise RewardError(
                "probability_disparity needs batch.prob_gap, which is not filled: have it taken while sampling or score the batch"
            )
        gap, offsets = batch.prob_gap.detach().double(), batch.response_cu_seqlens.tolist()
        rewards = torch.zeros(len(batch), dtype=torch.float64)
        for index in range(len(batch)):
            first, last = self.answer_tokens(batch, index, policy)
            if first < last:
                rewards[index] = gap[offsets[index] + first : offsets[index] + last].mean()
        return rewards.float()

    def answer_tokens(self, batch: RolloutBatch, index: int, policy: Policy | None) -> tuple[int, int]:
        """The answer's tokens [first, last) in the response; empty without an answer."""
        if COLUMN in batch.columns:
            span = batch.columns[COLUMN][index]
            if span is None:
                return 0, 0
            first, last = span
            if not 0 <= first <= last <= int(batch.response_lens[index]):
                raise RewardError(f"probability_disparity: {COLUMN} {span} is not within the response of {rollout_text(batch, index)}")
            return first, last
        answer = self.checker.extract(batch.completions[index])
        characters = None if answer is None else answer_characters(batch.completions[index], answer, self.checker)
        if characters is None:
            return 0, 0
        if policy is None:
            raise RewardError(
                f"probability_disparity must know which tokens are the answer's: give the batch a column {COLUMN!r} with [first, last) "
                "of each response, or call the reward with a policy, which has the tokenizer"
            )
        return policy.token_span(batch, index, *characters)
