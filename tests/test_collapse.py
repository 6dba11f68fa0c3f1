"""The Model Collapse Step, its variants and thresholds, its label-free proxies, and the ranks of what is censored."""

import math
import random

import pytest
import torch

from urlvr_fast.monitor.collapse import (
    THRESHOLDS,
    average_ranks,
    collapse_steps,
    first_below,
    later,
    model_collapse_step,
    moving_average,
    one_answer_step,
    reward_accuracy_series,
    spearman,
    unanimity_step,
)


def test_the_papers_definition_by_hand():
    """MCS = min{t : RA(t) < 0.01}: strictly below, the first time, and by step number rather than by index."""
    found = model_collapse_step([10, 20, 30, 40, 50], [0.5, 0.01, 0.0099, 0.3, 0.0])
    assert found.raw == 30
    assert found.threshold == 0.01
    assert found.last_step == 50


def test_variants_by_hand():
    steps = list(range(1, 11))
    accuracy = [0.6, 0.0, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    found = model_collapse_step(steps, accuracy, 0.1, window=3, persistence=3)
    assert found.raw == 2  # one bad batch
    assert found.windowed == 6  # the first window of three below 0.1 is that of steps 4 to 6
    assert found.persistent == 4  # the first of three running
    assert model_collapse_step(steps, accuracy, 0.1, window=1, persistence=1).windowed == 2


def test_not_reached_is_censored():
    found = model_collapse_step([1, 2, 3], [0.9, 0.5, 0.2])
    assert (found.raw, found.windowed, found.persistent, found.last_step) == (None, None, None, 3)
    # Four of five steps below are not five.
    assert model_collapse_step(range(1, 6), [0.5, 0, 0, 0, 0], 0.1).persistent is None


def test_thresholds_were_fixed_and_half_is_of_the_initial_mean():
    assert THRESHOLDS == {"MCS": 0.01, "MCS_0.1": 0.1, "MCS_0.25": 0.25, "MCS_half": None}
    accuracy = [0.9, 0.7, 0.9, 0.7, 0.8, 0.41, 0.39, 0.2, 0.05, 0.005]
    found = collapse_steps(range(1, 11), accuracy)
    assert found["MCS_half"].threshold == pytest.approx(0.4)
    assert [found[name].raw for name in THRESHOLDS] == [10, 9, 8, 7]


def test_a_run_that_begins_at_nothing_has_collapsed_from_the_start():
    assert collapse_steps(range(1, 7), [0.0] * 6)["MCS_half"].raw == 1


@pytest.mark.parametrize(
    ("steps", "accuracy", "options"),
    [([], [], {}), ([1, 2], [0.5], {}), ([2, 1], [0.5, 0.5], {}), ([1], [math.nan], {}), ([1], [1.5], {}), ([1], [0.5], {"window": 0})],
)
def test_what_is_no_course_of_reward_accuracy_is_refused(steps, accuracy, options):
    with pytest.raises(ValueError, match=r"Reward Accuracy|increase|at least 1"):
        model_collapse_step(steps, accuracy, **options)


def test_moving_average_against_a_loop():
    rng = random.Random(0)
    values = [rng.random() for _ in range(50)]
    for window in (1, 3, 7, 60):
        expected = [torch.tensor(values[max(0, i - window + 1) : i + 1], dtype=torch.float64).mean().item() for i in range(50)]
        assert moving_average(values, window) == pytest.approx(expected, abs=1e-14)


def test_first_below_gives_the_beginning_of_the_run():
    assert first_below([5, 6, 7, 8], [1, 0, 0, 0], 0.5, persistence=2) == 6
    assert first_below([5, 6, 7, 8], [0, 1, 0, 0], 0.5, persistence=2) == 7
    assert first_below([5, 6], [1, 1], 0.5) is None


def test_series_of_one_kind_only():
    """A continuous reward has no Reward Accuracy of its own, and one that is 0/1 by chance must not be mixed with the vote's."""
    voting = [{"step": 0, "eval/x": 1.0}, {"step": 1, "reward": 0.5, "reward_accuracy": 0.8, "majority_reward_accuracy": 0.7}]
    assert reward_accuracy_series(voting) == ([1], [0.8])
    mixed = [
        {"step": 1, "reward": 0.5, "majority_reward_accuracy": 0.7},
        {"step": 2, "reward": 1.0, "reward_accuracy": 0.1, "majority_reward_accuracy": 0.6},
    ]
    assert reward_accuracy_series(mixed) == ([1, 2], [0.7, 0.6])
    assert reward_accuracy_series([{"step": 1, "reward": 0.5}]) == ([], [])


def test_proxies():
    assert unanimity_step([1, 2, 3], [0.98, 0.99, 1.0]) == 2
    assert unanimity_step([1, 2], [0.5, 0.9]) is None
    assert one_answer_step([1, 2, 3], [0.1, 0.5, 0.4]) == 2


def test_a_censored_step_ranks_as_a_tie():
    steps = [later(s) for s in (None, 40, None, 90)]
    assert average_ranks(steps) == [3.5, 1.0, 3.5, 2.0]


def test_spearman_by_hand_and_against_pearson_of_ranks():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([math.inf, math.inf, 1, 2], [4, 3, 1, 2]) == pytest.approx(0.9486832980505138)  # ranks 3.5 3.5 1 2 and 4 3 1 2
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    rng = random.Random(1)
    a, b = ([rng.randrange(6) for _ in range(40)] for _ in range(2))
    ranks = torch.tensor([average_ranks(a), average_ranks(b)], dtype=torch.float64)
    assert spearman(a, b) == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-12)
    with pytest.raises(ValueError, match="two or more"):
        spearman([1], [1])
