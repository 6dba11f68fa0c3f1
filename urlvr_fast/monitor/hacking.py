"""Detectors of training on nothing: rewards that cannot move the model, and answers that nobody can read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


class RewardAlarm:
    """Says so, loudly and once each, when a run has no signal. Call `update` after every step's rewards and `final` at the end.

    Three things are watched: every reward of the run so far is the same number; within every group the rewards are constant, so all
    advantages are zero, for `constant_steps` steps in a row; no answer could be extracted from any rollout so far. Nothing is said before
    `min_rollouts` rollouts, so a first step of that many can raise the first and the third at once (and the second with constant_steps=1).
    """

    def __init__(self, constant_steps: int = 3, min_rollouts: int = 16) -> None:
        if constant_steps < 1 or min_rollouts < 1:
            raise ValueError("constant_steps and min_rollouts must be at least 1")
        self.constant_steps, self.min_rollouts = constant_steps, min_rollouts
        self.steps = self.rollouts = self.parsed_steps = self.flat_steps = self.flat_in_a_row = 0
        self.lowest = float("inf")
        self.highest = -float("inf")
        self.votes_known = False
        self.example = ""
        self.singles = False
        self.said: set[str] = set()

    def update(self, step: int, batch: RolloutBatch, rewards: Tensor, parse_rate: float | None) -> list[str]:
        """New warnings after this step. rewards (B,); parse_rate: share of rollouts with an answer, None when nobody looked for one."""
        self.steps += 1
        self.rollouts += len(batch)
        self.lowest = min(self.lowest, rewards.min().item())
        self.highest = max(self.highest, rewards.max().item())
        flat = all(bool((rewards[rows] == rewards[rows[0]]).all()) for rows in batch.groups().values())
        self.flat_steps += flat
        self.flat_in_a_row = self.flat_in_a_row + 1 if flat else 0
        if parse_rate is not None:
            self.votes_known = True
            self.parsed_steps += parse_rate > 0
            self.example = batch.completions[0]
        self.singles = all(len(rows) == 1 for rows in batch.groups().values())
        if self.rollouts < self.min_rollouts:
            return []
        holds = {
            "nothing parses": self.votes_known and self.parsed_steps == 0,
            "all equal": self.lowest == self.highest,
            "flat groups": self.flat_in_a_row >= self.constant_steps,
        }
        new = [kind for kind, held in holds.items() if held and kind not in self.said]
        self.said.update(new)
        return [f"step {step}: {self._sentence(kind)}" for kind in new]

    def final(self) -> list[str]:
        """What was true of the whole run, whether or not it was said before."""
        if self.steps == 0:
            return []
        holds = {
            "nothing parses": self.votes_known and self.parsed_steps == 0,
            "all equal": self.rollouts > 1 and self.lowest == self.highest,
            "flat groups": self.flat_steps == self.steps,
        }
        return [f"whole run ({self.steps} steps): {self._sentence(kind)}" for kind, held in holds.items() if held]

    def _sentence(self, kind: str) -> str:
        if kind == "nothing parses":
            return (
                f"no answer could be extracted from any of the {self.rollouts} rollouts so far, so there is nothing to vote on. "
                "Check that the prompt asks for the form that the checker reads (prompts.suffix, such as an instruction to put "
                "the answer in \\boxed{}; answers.kind) and that responses are not cut off (rollout.max_tokens). The last response seen "
                "ends "
                f"{self.example[-120:]!r}"
            )
        if kind == "all equal":
            return (
                f"every one of the {self.rollouts} rewards so far is {self.lowest:g}, so all advantages are zero and the model does "
                "not change. Check the reward function, that answers parse, and that the prompts are neither trivial nor hopeless"
            )
        reason = (
            "every group has a single rollout (raise rollout.group_size)"
            if self.singles
            else "check that rollouts of a prompt differ (rollout.temperature), that the reward tells them apart, and how hard they are"
        )
        return (
            f"the rewards were constant within every group for {self.flat_in_a_row} steps in a row, so there was no gradient: {reason}. "
            "If the majority ratio is 1 the model has converged on one answer per prompt and there is nothing left to sharpen"
        )
