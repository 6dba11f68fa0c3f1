"""The Model Collapse Step (paper, section 5): when a run with an intrinsic reward stops agreeing with the truth.

    MCS = min{t : RA(t) < 0.01},   RA the Reward Accuracy of the training rollouts of step t.

It needs an audit set: Reward Accuracy compares rewards with answers, though the training that it watches needs none. What can be had
without answers are the proxies `unanimity_step` and `one_answer_step`; they are named as such wherever they are shown, and are never
called a collapse step.

The paper gives no smoothing and no persistence rule. `raw` is its definition to the letter; `windowed` puts a moving average in the place
of RA, `persistent` asks RA to stay below for so many steps. A run that never gets there is censored: its collapse step is None, which
means "later than the run is long" and ranks as a tie with every other such run.

1 % is a property of the paper's models, not a law: a vote that is not unanimous and wrong agrees with the truth on every rollout that lost
it, so that a small model can be ruined while its RA stays above 5 %. Hence the further thresholds of `THRESHOLDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WINDOW, PERSISTENCE = 5, 5  # steps
INITIAL_STEPS = 5  # whose mean is the initial Reward Accuracy
# Name -> threshold on Reward Accuracy; None is half of its initial value. Fixed before any run was made.
THRESHOLDS: dict[str, float | None] = {"MCS": 0.01, "MCS_0.1": 0.1, "MCS_0.25": 0.25, "MCS_half": None}


@dataclass(frozen=True)
class CollapseStep:
    """One threshold's collapse step in its three variants; None is censored: not reached by `last_step`."""

    threshold: float
    raw: int | None
    windowed: int | None
    persistent: int | None
    last_step: int  # of the run: what a censored step is later than


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    return [math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def first_below(steps: Sequence[int], values: Sequence[float], threshold: float, *, persistence: int = 1) -> int | None:
    """The first step from which `values` stay below `threshold` for `persistence` values running; None when there is none."""
    run = 0
    for index, value in enumerate(values):
        run = run + 1 if value < threshold else 0
        if run == persistence:
            return steps[index + 1 - persistence]
    return None


def model_collapse_step(
    steps: Sequence[int], reward_accuracy: Sequence[float], threshold: float = 0.01, *, window: int = WINDOW, persistence: int = PERSISTENCE
) -> CollapseStep:
    """MCS_τ of one run. steps: increasing step numbers; reward_accuracy: RA at each, in [0, 1].

    Raises ValueError when there is nothing to look at, when the two differ in length, and on steps that do not increase or an RA that is
    no share: a step of NaN would otherwise pass for one that has not collapsed.
    """
    if not steps or len(steps) != len(reward_accuracy):
        raise ValueError(f"{len(steps)} steps and {len(reward_accuracy)} values of Reward Accuracy: one each, and at least one")
    if any(b <= a for a, b in pairwise(steps)):
        raise ValueError("the steps must increase")
    if any(not 0 <= value <= 1 for value in reward_accuracy):
        raise ValueError("Reward Accuracy is a share: every value must be from 0 to 1")
    if window < 1 or persistence < 1:
        raise ValueError("window and persistence must be at least 1")
    return CollapseStep(
        threshold=threshold,
        raw=first_below(steps, reward_accuracy, threshold),
        windowed=first_below(steps, moving_average(reward_accuracy, window), threshold),
        persistent=first_below(steps, reward_accuracy, threshold, persistence=persistence),
        last_step=steps[-1],
    )


def collapse_steps(steps: Sequence[int], reward_accuracy: Sequence[float]) -> dict[str, CollapseStep]:
    """The collapse step at each of `THRESHOLDS`, by name. Raises ValueError as `model_collapse_step` does."""
    initial = math.fsum(reward_accuracy[:INITIAL_STEPS]) / max(1, len(reward_accuracy[:INITIAL_STEPS]))
    # Half of nothing is never fallen below, and a run that begins at 0 has collapsed from the start.
    half = initial / 2 or math.ulp(0.0)
    return {
        name: model_collapse_step(steps, reward_accuracy, half if threshold is None else threshold)
        for name, threshold in THRESHOLDS.items()
    }


def reward_accuracy_series(lines: Sequence[Mapping[str, object]]) -> tuple[list[int], list[float]]:
    """(steps, RA) out of the lines of a metrics.jsonl, as `model_collapse_step` takes them.

    The Reward Accuracy of the training reward where it is 0 or 1; for a continuous reward, which has none, that of the majority vote on the
    same rollouts (`majority_reward_accuracy`). One of the two for the whole run. Empty where the data has no answers.
    """
    for name in ("reward_accuracy", "majority_reward_accuracy"):
        found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
        trained = sum(1 for line in lines if "reward" in line)
        if found and len(found) == trained:
            return [int(step) for step, _ in found], [float(value) for _, value in found]  # type: ignore[call-overload,arg-type]
    return [], []


# ---- proxies that need no answer -------------------------------------------------------------------------------------------------------


def unanimity_step(steps: Sequence[int], majority_ratio: Sequence[float], share: float = 0.99) -> int | None:
    """Label-free proxy: the first step at which the winning answers hold at least `share` of the rollouts. Nothing is left to sharpen
    there; whether the answers are right it cannot say."""
    return first_below(steps, [-ratio for ratio in majority_ratio], math.nextafter(-share, math.inf))


def one_answer_step(steps: Sequence[int], top_answer_share: Sequence[float], share: float = 0.5) -> int | None:
    """Label-free proxy: the first step at which one answer wins at least `share` of the prompts. Of use where answers ought to differ."""
    return first_below(steps, [-value for value in top_answer_share], math.nextafter(-share, math.inf))


# ---- comparing runs --------------------------------------------------------------------------------------------------------------------


def later(step: int | None) -> float:
    """A collapse step as a number to compare: a censored one is later than any."""
    return math.inf if step is None else float(step)


def average_ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1 for the smallest; equal ones share the mean of their ranks."""
    order = sorted(values)
    return [sum(i + 1 for i, other in enumerate(order) if other == value) / order.count(value) for value in values]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation with ties (Pearson's of the average ranks); None when either does not vary. Infinities are fine: they are ties."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError("two or more pairs are needed")
    x, y = average_ranks(a), average_ranks(b)
    mean = (len(a) + 1) / 2
    covariance = math.fsum((p - mean) * (q - mean) for p, q in zip(x, y, strict=True))
    spread = math.fsum((p - mean) ** 2 for p in x) * math.fsum((q - mean) ** 2 for q in y)
    return covariance / math.sqrt(spread) if spread else None
