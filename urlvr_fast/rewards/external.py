"""The truth. `GroundTruth` is the oracle that label-free rewards are measured against; `correct` is what the metrics ask.

Answers arrive as an audit map, prompt id -> answer, which nothing else in this package receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, rollout_text
from urlvr_fast.rewards.answers import AnswerChecker

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


def correct(batch: RolloutBatch, answers: Mapping[int, str], checker: AnswerChecker) -> Tensor:
    """(B,) fp32: 1 where the rollout's answer is right for its prompt, else 0 (also without any); NaN where the prompt has no answer.

    Right means `checker.correct(given, answer)` where the checker has that: a task in which many answers are right has no single one to be
    equal to. Otherwise it means `checker.equivalent`.
    """
    judge: Callable[[str, str], bool] = getattr(checker, "correct", checker.equivalent)
    truth = torch.empty(len(batch))
    for index, (prompt_id, completion) in enumerate(zip(batch.prompt_ids, batch.completions, strict=True)):
        if prompt_id not in answers:
            truth[index] = math.nan
            continue
        given = checker.extract(completion)
        truth[index] = float(given is not None and judge(given, answers[prompt_id]))
    return truth


class GroundTruth:
    """r(y) = 1[ans(y) is right for x]: the oracle, and the paper's GT control. Training on it is what label-free rewards are measured by.

    No answer in the response gives 0. Fails like any sparse reward: a group that is all right or all wrong teaches nothing. Raises
    RewardError on a prompt without an answer.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, answers: Mapping[int, str], checker: AnswerChecker) -> None:
        self.answers, self.checker = answers, checker

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        rewards = correct(batch, self.answers, self.checker)
        missing = rewards.isnan().nonzero().flatten().tolist()
        if missing:
            prompts = len({batch.prompt_ids[index] for index in missing})
            raise RewardError(
                f"reward=ground_truth needs an answer for every prompt, and {prompts} of this batch have none; the first is "
                f"{rollout_text(batch, missing[0])}. Check the answer column of the data (prompts.answer_column)"
            )
        return rewards
