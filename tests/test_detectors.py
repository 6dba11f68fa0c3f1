"""Detectors: each fires on the course of a run that it is for, once, at the right reading, and stays quiet on a healthy one; signals and
anchors by hand."""

import math

import pytest
import torch

from urlvr_fast.monitor.anchors import Anchors, anchored_majority
from urlvr_fast.monitor.detectors import ACTIONS, RULES, STOP_RULE, Detectors
from urlvr_fast.monitor.pass_at_k import bootstrap_interval
from urlvr_fast.monitor.signals import repetition, signals
from urlvr_fast.rewards.answers import ExactAnswers
from urlvr_fast.rewards.ensemble import vote
from urlvr_fast.trainer.batch import RolloutBatch

WORD = ExactAnswers(r"(\S+)")
HEALTHY = {
    "top_answer_share": 0.1,
    "response_length": 100.0,
    "repetition": 0.05,
    "truncated_rate": 0.1,
    "actor_entropy": 0.6,
    "majority_ratio": 0.5,
    "flat_groups": 0.2,
    "parse_rate": 0.9,
    "kl_start": 0.01,
    "eval/anchored_majority": 0.5,
}


def readings(detectors, courses, steps=20):
    """Feed a healthy run with `courses` (metric -> function of the step) in the place of its own; what fired, as (step, detector)."""
    fired = []
    for step in range(steps):
        metrics = HEALTHY | {name: course(step) for name, course in courses.items()}
        fired += [(found.step, found.detector) for found in detectors.update(step, metrics)]
    return fired


def test_a_healthy_run_sets_nothing_off():
    assert readings(Detectors(), {}) == []
    # So does one that sharpens: surer, more unanimous, a little shorter, away from the start at a steady pace.
    better = {
        "actor_entropy": lambda s: 0.6 - 0.02 * s,
        "majority_ratio": lambda s: 0.5 + 0.02 * s,
        "response_length": lambda s: 100 - s,
        "kl_start": lambda s: 0.01 * s,
    }
    assert readings(Detectors(), better) == []


@pytest.mark.parametrize(
    ("detector", "metric", "bad"),
    [
        ("anchor_drift", "eval/anchored_majority", 0.3),
        ("one_answer", "top_answer_share", 0.6),
        ("short_responses", "response_length", 45.0),
        ("long_responses", "response_length", 210.0),
        ("repetition", "repetition", 0.3),
        ("eos_loss", "truncated_rate", 0.5),
        ("entropy_floor", "actor_entropy", 0.05),
        ("entropy_rise", "actor_entropy", 1.0),
        ("unanimity", "majority_ratio", 1.0),
        ("constant_rewards", "flat_groups", 1.0),
        ("unparsable", "parse_rate", 0.3),
        ("kl_spike", "kl_start", 0.5),
    ],
)
def test_each_detector_fires_once_after_its_patience(detector, metric, bad):
    assert set(RULES) >= {detector}
    fired = readings(Detectors(), {metric: lambda step: bad if step >= 10 else HEALTHY[metric]})
    assert (10 + RULES[detector].patience - 1, detector) in fired
    assert [name for _, name in fired].count(detector) == 1


def test_every_rule_has_a_case_above():
    cases = test_each_detector_fires_once_after_its_patience.pytestmark[0].args[1]
    assert {case[0] for case in cases} == set(RULES)


def test_the_stop_rule_compares_with_the_best_so_far():
    """A policy that has sharpened falls from where it got to, not from where it began."""
    course = {10: 0.8, 11: 0.53, 12: 0.53}  # 0.53 is above the start, and below 0.68 of 0.8
    assert readings(Detectors(), {"eval/anchored_majority": lambda step: course.get(step, 0.5)}) == [(12, "anchor_drift")]


def test_a_single_bad_step_is_no_collapse():
    assert readings(Detectors(), {"response_length": lambda step: 10.0 if step % 3 == 0 and step > 5 else 100.0}) == []


def test_limits_follow_the_runs_own_beginning():
    """Two answers that share the prompts equally are no collapse, and a task that starts at half cannot fire before all are one."""
    assert readings(Detectors(), {"top_answer_share": lambda step: 0.5 if step < 10 else 0.9}) == []
    assert (12, "one_answer") in readings(Detectors(), {"top_answer_share": lambda step: 0.5 if step < 10 else 1.0})


def test_nan_is_not_healthy_and_missing_is_no_reading():
    assert (12, "entropy_rise") in readings(Detectors(), {"actor_entropy": lambda step: math.nan if step >= 10 else 0.6})
    detectors = Detectors()
    for step in range(30):
        assert detectors.update(step, {"eval/anchored_majority": None, "reward": 1.0}) == []


def test_a_run_in_which_nothing_ever_parses():
    assert (7, "unparsable") in readings(Detectors(), {"parse_rate": lambda step: 0.0})


def test_actions_thresholds_and_off():
    detectors = Detectors({"repetition": "stop", "unparsable": "off"}, {"repetition": 0.6})
    fired = readings(
        detectors, {"repetition": lambda step: 0.5 if step >= 8 else 0.05, "parse_rate": lambda step: 0.0 if step > 8 else 1.0}
    )
    assert fired == []
    found = [d for step in range(20, 25) for d in detectors.update(step, HEALTHY | {"repetition": 0.9})]
    assert [(d.step, d.action) for d in found] == [(22, "stop")]
    assert "repetition is 0.9, above 0.65 for 3 readings running (it was 0.05 when the run began)" in found[0].message


@pytest.mark.parametrize(
    ("actions", "thresholds", "message"),
    [
        ({"repetitions": "stop"}, {}, "no detector 'repetitions'"),
        ({"repetition": "halt"}, {}, "no action 'halt'"),
        ({}, {"x": 1}, "no detector 'x'"),
    ],
)
def test_unknown_names_are_refused(actions, thresholds, message):
    with pytest.raises(ValueError, match=message):
        Detectors(actions, thresholds)


def test_calm_looks_at_what_does_more_than_warn():
    detectors = Detectors({STOP_RULE: "rollback"})
    detectors.update(0, HEALTHY)
    assert detectors.calm
    for step in range(1, 10):
        detectors.update(step, HEALTHY | {"repetition": 1.0})  # warns only
    assert detectors.calm
    detectors.update(10, {"eval/anchored_majority": 0.3})  # below its limit once: not enough to fire, and not calm
    assert not detectors.calm
    detectors.update(11, {"eval/anchored_majority": 0.5})
    assert detectors.calm


def test_the_stop_rule_is_a_rule_and_actions_are_named():
    assert STOP_RULE in RULES
    assert ACTIONS == ("off", "warn", "stop", "lower_rate", "rollback")


# ---- signals


def make_batch(completions, group_ids, tokens, prompt_ids=None, reasons=None):
    """One rollout per completion, with its response's token ids; the prompt is one token."""
    lengths = torch.tensor([1 + len(t) for t in tokens])
    return RolloutBatch(
        tokens=torch.tensor([x for t in tokens for x in (99, *t)]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        prompt_lens=torch.ones(len(tokens), dtype=torch.int64),
        group_ids=torch.tensor(group_ids),
        prompt_ids=prompt_ids or group_ids,
        prompts=[f"p{g}" for g in group_ids],
        completions=completions,
        finish_reasons=reasons or ["stop"] * len(tokens),
        sampled_logp=torch.full((int(lengths.sum()) - len(tokens),), -1.0),
        temperature=1.0,
    )


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 4-grams, one distinct
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition(list(range(100))) == 0


def test_signals_by_hand():
    tokens = [[1, 1, 1, 1, 1, 1], [1, 2], [3], [4, 5, 6]]
    batch = make_batch(["a", "a", "b", "c"], [0, 0, 1, 1], tokens, reasons=["length", "stop", "stop", "stop"])
    found = signals(batch, torch.tensor([1.0, 1.0, 0.0, 2.0]), vote(batch, WORD))
    assert found["reward"] == 1
    assert found["reward_std"] == pytest.approx(math.sqrt(0.5))
    assert found["flat_groups"] == 0.5
    assert found["response_length"] == 3
    assert found["truncated_rate"] == 0.25
    assert found["repetition"] == pytest.approx((2 / 3) / 4)
    assert "top_answer_share" not in found  # two prompts say nothing


def test_top_answer_share_counts_prompts_once():
    n = 6
    batch = make_batch(["x", "x", "x", "y", "z", "x"], list(range(n)), [[1]] * n, prompt_ids=[0, 1, 2, 3, 4, 0])
    assert signals(batch, torch.zeros(n), vote(batch, WORD))["top_answer_share"] == pytest.approx(3 / 5)


def test_signals_do_not_depend_on_order():
    batch = make_batch(list("aabbccdd"), [0, 1, 0, 1, 2, 2, 3, 3], [[1] * (i + 1) for i in range(8)])
    rewards = torch.arange(8.0)
    order = [3, 7, 0, 5, 1, 2, 6, 4]
    shuffled = batch.select(order)
    assert signals(shuffled, rewards[order], vote(shuffled, WORD)) == pytest.approx(signals(batch, rewards, vote(batch, WORD)))


# ---- anchors


def test_anchors_are_clear_votes_and_agreement_is_their_share():
    batch = make_batch(["7", "7", "7", "8", "1", "2", "3", "4", "5", "5", "a b", "a b"], [0] * 4 + [1] * 4 + [2] * 4, [[1]] * 12)
    anchors = Anchors.of(batch, vote(batch, WORD))
    assert anchors.labels == {0: "7", 2: "5"}  # prompt 1 has no clear vote; half of the rollouts is enough on prompt 2
    same = make_batch(["7", "9", "5"], [0, 1, 2], [[1]] * 3)
    assert anchors.agreement(same, WORD) == 1
    other = make_batch(["8", "9", "5"], [0, 1, 2], [[1]] * 3)
    assert anchors.agreement(other, WORD) == 0.5
    assert anchors.agreement(make_batch(["a b", "9"], [0, 1], [[1]] * 2), WORD) == 0  # no answer, and a prompt that is not there
    assert Anchors({}).agreement(same, WORD) is None


def test_anchored_majority_by_hand():
    lines = [{"step": 0, "eval/anchor_agreement": 1.0}]
    assert anchored_majority(lines) == {}  # no ratio is known yet
    lines += [{"step": s, "majority_ratio": 0.1 * s} for s in (1, 2, 3)]
    lines[-1]["eval/anchor_agreement"] = 0.5
    assert anchored_majority(lines) == pytest.approx({0: 0.2, 3: 0.5 * 0.2})
    lines += [{"step": s, "majority_ratio": 0.1 * s} for s in (4, 5, 6, 7)]
    lines[-1]["eval/anchor_agreement"] = 0.8
    # The start and step 3: mean of steps 1 to 3; step 7: of 3 to 7.
    assert anchored_majority(lines) == pytest.approx({0: 0.2, 3: 0.1, 7: 0.8 * 0.5})
    assert anchored_majority([{"step": 1, "majority_ratio": 0.5, "eval/anchor_agreement": None}]) == {}


# ---- bootstrap


def test_bootstrap_interval():
    values = [0.0] * 50 + [1.0] * 50
    low, high = bootstrap_interval(values)
    # 1.96 · sqrt(.25 / 100) = 0.098
    assert low == pytest.approx(0.402, abs=0.02)
    assert high == pytest.approx(0.598, abs=0.02)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    with pytest.raises(ValueError, match="one value at least"):
        bootstrap_interval([])


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        sample = (torch.rand(40, generator=generator) < 0.3).double().tolist()
        low, high = bootstrap_interval(sample, draws=400, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.88 <= covered / 200 <= 0.99
