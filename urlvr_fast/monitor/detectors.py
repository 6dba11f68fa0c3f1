"""Detectors: rules on a run's label-free figures that say, in one sentence, that it has left the ground where its reward means anything.

Each watches one metric of the step (`monitor.signals`, the learner, the evaluation), compares it with what it was in the run's first steps,
and fires once, after `patience` readings in a row beyond its limit. None of them sees an answer. What happens then is the caller's:
`Detection.action` says what was asked for.

`anchor_drift` is the default stop rule. Sharpening, which is all that an intrinsic reward can do (the paper's Theorem 1 and its
assumption A1), raises what the base model already preferred: where its vote was clear, its answer stays and gains. So the clear votes of
the base model on a fixed set of prompts are an anchor (`monitor.anchors`): when greedy answers leave them faster than the votes gain, the
policy is no longer sharpening, whatever its reward says. It needs prompts, not answers. It is meant for intrinsic rewards: a weak model
that learns from the truth changes clear votes too, for the better, and can set it off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from urlvr_fast.monitor.anchors import ANCHORED_MAJORITY

ACTIONS = ("off", "warn", "stop", "lower_rate", "rollback")


class Rule(NamedTuple):
    metric: str
    above: bool  # whether it fires above its limit, or below
    threshold: float
    limit: Callable[[float, list[float], float], float]  # (reference, earlier readings, threshold) -> limit
    meaning: str  # what it is a sign of
    patience: int = 3  # readings in a row
    reference_readings: int = 5  # whose mean is the reference; nothing fires before


def _times(reference: float, _earlier: list[float], threshold: float) -> float:
    return threshold * reference


def _times_best(_reference: float, earlier: list[float], threshold: float) -> float:
    return threshold * max(earlier)


def _plus(reference: float, _earlier: list[float], threshold: float) -> float:
    return reference + threshold


def _absolute(_reference: float, _earlier: list[float], threshold: float) -> float:
    return threshold


def _share_or_twice(reference: float, _earlier: list[float], threshold: float) -> float:
    return min(1 - 1e-9, max(threshold, 2 * reference))  # with two possible answers one of them always wins half of the prompts


def _times_or_never(reference: float, _earlier: list[float], threshold: float) -> float:
    return max(threshold * reference, 0.02)  # a run in which nothing ever parsed has a reference of 0


def _jump(_reference: float, earlier: list[float], threshold: float) -> float:
    return threshold + 3 * fmean(earlier[-5:]) if earlier else math.inf


RULES: dict[str, Rule] = {
    "anchor_drift": Rule(
        ANCHORED_MAJORITY, False, 0.68, _times_best, "the answers that the base model was sure of are changing", 2, reference_readings=1
    ),
    "one_answer": Rule("top_answer_share", True, 0.5, _share_or_twice, "one answer wins prompts that should not share it"),
    "short_responses": Rule("response_length", False, 0.5, _times, "length collapse"),
    "long_responses": Rule("response_length", True, 2.0, _times, "responses grow without need"),
    "repetition": Rule("repetition", True, 0.2, _plus, "repetition collapse"),
    "eos_loss": Rule("truncated_rate", True, 0.25, _plus, "responses no longer end by themselves"),
    "entropy_floor": Rule("actor_entropy", False, 0.1, _times, "hardly anything is left to sample, so hardly anything is learnt"),
    "entropy_rise": Rule("actor_entropy", True, 1.5, _times, "the policy becomes less sure, which sharpening never does"),
    "unanimity": Rule("majority_ratio", True, 0.99, _absolute, "every vote is unanimous: nothing is left to sharpen"),
    "constant_rewards": Rule("flat_groups", True, 0.99, _absolute, "the rewards within the groups are all alike, so nothing is learnt"),
    "unparsable": Rule("parse_rate", False, 0.5, _times_or_never, "answers can no longer be read"),
    "kl_spike": Rule("kl_start", True, 0.1, _jump, "the policy has jumped away from the model that it started as", 1, reference_readings=1),
}
STOP_RULE = "anchor_drift"


@dataclass(frozen=True)
class Detection:
    step: int
    detector: str
    action: str  # one of `ACTIONS`, never "off"
    value: float
    limit: float
    message: str  # one sentence


@dataclass
class _State:
    rule: Rule
    threshold: float
    action: str
    readings: list[float] = field(default_factory=list)
    beyond: int = 0
    fired: bool = False


class Detectors:
    """All the rules on one run.

    actions: detector -> action; those that are not named warn. thresholds: detector -> number in the place of the rule's own.
    Raises ValueError for a name that is no detector or an action that there is not.
    """

    def __init__(self, actions: Mapping[str, str] | None = None, thresholds: Mapping[str, float] | None = None) -> None:
        actions, thresholds = dict(actions or {}), dict(thresholds or {})
        for name in (*actions, *thresholds):
            if name not in RULES:
                raise ValueError(f"there is no detector {name!r}; there are {', '.join(RULES)}")
        for name, action in actions.items():
            if action not in ACTIONS:
                raise ValueError(f"detector {name}: there is no action {action!r}; valid are {', '.join(ACTIONS)}")
        self._states = {
            name: _State(rule, thresholds.get(name, rule.threshold), actions.get(name, "warn"))
            for name, rule in RULES.items()
            if actions.get(name) != "off"
        }

    def update(self, step: int, metrics: Mapping[str, float | None]) -> list[Detection]:
        """What fires at this step. A metric that is missing or None is no reading: nothing is concluded from it."""
        found = []
        for name, state in self._states.items():
            value = metrics.get(state.rule.metric)
            if value is not None and (detection := self._read(name, state, step, float(value))):
                found.append(detection)
        return found

    def watches(self, detector: str) -> bool:
        return detector in self._states

    @property
    def may_roll_back(self) -> bool:
        return any(state.action == "rollback" for state in self._states.values())

    @property
    def calm(self) -> bool:
        """Whether no detector that does more than warn was beyond its limit at its last reading: what is here is worth going back to."""
        return not any(state.beyond or state.fired for state in self._states.values() if state.action != "warn")

    def _read(self, name: str, state: _State, step: int, value: float) -> Detection | None:
        rule, earlier = state.rule, list(state.readings)
        state.readings.append(value)
        if state.fired or len(earlier) < rule.reference_readings:
            return None
        reference = fmean(earlier[: rule.reference_readings])
        limit = rule.limit(reference, earlier, state.threshold)
        # NaN is beyond every limit: a figure that is no number must not pass for a healthy one.
        healthy = value <= limit if rule.above else value >= limit
        state.beyond = 0 if healthy else state.beyond + 1
        if state.beyond < rule.patience:
            return None
        state.fired = True
        side = "above" if rule.above else "below"
        running = f" for {rule.patience} readings running" if rule.patience > 1 else ""
        sentence = (
            f"{name}: {rule.metric} is {value:.3g}, {side} {limit:.3g}{running} (it was {reference:.3g} when the run began): {rule.meaning}"
        )
        return Detection(step, name, state.action, value, limit, sentence)
