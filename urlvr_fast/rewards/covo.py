"""CoVo (paper, Table 2): does a response lead towards its answer all the way, or does it get there in a last jump?"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import Classes, answer_classes, label_of

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

STEP_END = {"line": re.compile(r"\n"), "sentence": re.compile(r"(?<=[.!?])\s|\n")}
MAX_ANSWER_CHARS = 500  # a longer one is no answer here: each is scored after every state of every rollout
BOUNDS = {"vector": 0.5, "linear": 0.05}


class CoVo:
    """Consistency and volatility of the way to an answer (CoVo, arXiv 2506.08745). For a rollout with states s_1 … s_n and answer a:

        D(s, b)      exp(−(1/m) Σ log π(b | x, s)), the perplexity of answer b, of m tokens, given the prompt and the state
        ratio_i      D(s_i, a) / min over the other answers b of the group of D(s_i, b)
        consistency  share of the states with ratio < 1
        volatility   1 − (length of the run of states at the end with ratio ≤ 1) / n
        RiV          ‖mean over the rollouts with this answer of consistency · (cos volatility, sin volatility)‖
        RiL          mean consistency − mean volatility, of the same rollouts
        r            1[RiV ≥ 0.5], or 1[RiL ≥ 0.05]: one reward for all rollouts with one answer

    States are the cumulative prefixes of the response at its steps' ends, the last one with the answer, as in the released code, which
    also divides a state's distances by their sum: that cancels in the ratio. Answers are classes, each in its commonest spelling.

    measure: "vector" (RiV) or "linear" (RiL). bound: in the place of 0.5 or 0.05; None gives RiV or RiL itself.
    step: "line" or "sentence" ends a step. max_states: at most so many states of a rollout, evenly spread, the last one among them (the
        released code merges lines into 15). bridge: what stands between state and answer, and counts as the answer's beginning.

    Left out: the optional curiosity bonus. A group with one answer has nothing to compare: 0 for all, as in the released code. No answer,
    or one of more than 500 characters (our bound), gives 0. It costs states × answers scored sequences for every rollout. Fails where an
    early guess is stuck to: consistency is not truth. Raises RewardError without a policy where there are answers to compare.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self,
        checker: AnswerChecker,
        measure: str = "vector",
        bound: float | str | None = "default",
        step: str = "line",
        max_states: int = 15,
        bridge: str = "\nThe answer is: ",
    ) -> None:
        if measure not in BOUNDS or step not in STEP_END or max_states < 1:
            raise RewardError(
                f"covo: measure={measure!r} is vector or linear, step={step!r} is line or sentence, max_states={max_states} at least 1"
            )
        if isinstance(bound, str) and bound != "default":
            raise RewardError(f"covo: bound={bound!r} is a number, None, or 'default'")
        self.checker, self.measure, self.step = checker, measure, step
        self.bound = BOUNDS[measure] if isinstance(bound, str) else bound
        self.max_states, self.bridge = max_states, bridge

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        answers = [self.checker.extract(completion) for completion in batch.completions]
        answers = [None if answer is None or len(answer) > MAX_ANSWER_CHARS else answer for answer in answers]
        groups = batch.groups()
        _, members = answer_classes(answers, groups, self.checker)
        compared = {group: classes for group, classes in members.items() if len(classes) > 1}
        rewards = torch.zeros(len(batch))
        if not compared:
            return rewards
        if policy is None:
            raise RewardError("covo asks the policy for the perplexity of answers, and there is none: call the reward with a policy")
        measured = self.consistency_volatility(batch, compared, answers, policy)
        for classes in compared.values():
            for rows in classes.values():
                value = self.measure_of([measured[row] for row in rows])
                rewards[rows] = value if self.bound is None else float(value >= self.bound)
        return rewards

    def consistency_volatility(
        self, batch: RolloutBatch, compared: dict[int, Classes], answers: Sequence[str | None], policy: Policy
    ) -> dict[int, tuple[float, float]]:
        """(consistency, volatility) of each rollout that has an answer to compare; one question to the policy for all of them."""
        states: dict[int, list[str]] = {}
        contexts, continuations = [], []
        labels = {group: {number: label_of(rows, answers) for number, rows in classes.items()} for group, classes in compared.items()}
        own = [(group, number, row) for group, classes in compared.items() for number, rows in classes.items() for row in rows]
        for group, _, row in own:
            states[row] = reasoning_states(batch.completions[row], STEP_END[self.step], self.max_states)
            for state in states[row]:
                contexts += [batch.prompts[row] + state] * len(labels[group])
                continuations += [self.bridge + label for label in labels[group].values()]
        logp, tokens = policy.likelihood(contexts, continuations)
        # Distances stay logarithms: their order is all that counts, and a perplexity may overflow.
        distances = iter((-logp.double() / tokens).tolist())
        measured = {}
        for group, number, row in own:
            table = [{other: next(distances) for other in labels[group]} for _ in states[row]]
            logs = [line[number] - min(value for other, value in line.items() if other != number) for line in table]
            measured[row] = consistency_and_volatility(logs)
        return measured

    def measure_of(self, rollouts: list[tuple[float, float]]) -> float:
        """RiV or RiL of the rollouts that share an answer."""
        n = len(rollouts)
        if self.measure == "linear":
            return math.fsum(c for c, _ in rollouts) / n - math.fsum(v for _, v in rollouts) / n
        x = math.fsum(c * math.cos(v) for c, v in rollouts) / n
        y = math.fsum(c * math.sin(v) for c, v in rollouts) / n
        return math.hypot(x, y)


def reasoning_states(completion: str, step_end: re.Pattern[str], most: int) -> list[str]:
    """Prefixes of `completion` at the ends of its steps that are not blank, evenly thinned out to `most`; the last has all steps."""
    ends = [match.start() for match in step_end.finditer(completion)] + [len(completion)]
    begins = [0, *ends]
    ends = [end for begin, end in zip(begins, ends, strict=False) if completion[begin:end].strip()] or [len(completion)]
    count = min(most, len(ends))
    return [completion[: ends[(k + 1) * len(ends) // count - 1]] for k in range(count)]


def consistency_and_volatility(log_ratios: Sequence[float]) -> tuple[float, float]:
    """Of a rollout, from the logarithms of its states' ratios."""
    settled = 0
    for value in reversed(log_ratios):
        if value > 0:
            break
        settled += 1
    return sum(value < 0 for value in log_ratios) / len(log_ratios), 1 - settled / len(log_ratios)
