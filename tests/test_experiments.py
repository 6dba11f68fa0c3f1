"""`make paper`: every claim runs for a few steps, the judges judge as their rules say, and docs/paper.md is made from what is committed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # experiments/ is no part of the package

from experiments import ablations, collapse_ranks, matrix, page, rise_then_fall, when_to_stop  # noqa: E402
from experiments.__main__ import CLAIMS  # noqa: E402
from experiments.matrix import Result, Spec, key_of  # noqa: E402
from experiments.settings import SEEDS, resolved, seeds, spec  # noqa: E402
from experiments.verdict import ACCURACY, collapse_by_accuracy, course, overall  # noqa: E402


def made(accuracy, run=None, key="0", every=5, **curves):
    """A result whose evaluations, `every` steps apart, are `accuracy`; other curves are per evaluation as well."""
    steps = [i * every for i in range(len(accuracy))]
    return Result(run or spec("reward=x"), key, steps, {ACCURACY: list(accuracy), **curves}, "finished", 1000, 1.0)


def committed() -> dict[Spec, Result]:
    found = {}
    for claim in CLAIMS.values():
        for run in claim.runs():
            path = matrix.RESULTS / f"{key_of(run, resolved(run))}.json"
            assert path.exists(), f"no committed result for {run.title}: run make paper"
            found[run] = matrix.load(path)
    return found


def test_the_page_is_made_from_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    results = committed()
    verdicts = {name: claim.judge(results) for name, claim in CLAIMS.items()}
    page.write(tmp_path, CLAIMS, verdicts, results, matrix.RESULTS)
    assert (tmp_path / "paper.md").read_text() == (ROOT / "docs" / "paper.md").read_text()
    assert {p.name for p in (tmp_path / "paper").iterdir()} == {p.name for p in (ROOT / "docs" / "paper").iterdir()}


def test_every_claim_has_its_seeds_and_the_matrix_is_shared():
    assert SEEDS == (0, 1, 2)
    for name, claim in CLAIMS.items():
        runs = claim.runs()
        groups = {(run.base, run.options) for run in runs}
        assert len(runs) == len(set(runs)), name
        assert all({run.seed for run in runs if (run.base, run.options) == group} == set(SEEDS) for group in groups), name
    shared = [run for claim in CLAIMS.values() for run in claim.runs()]
    assert len(set(shared)) < 0.7 * len(shared)
    assert len(when_to_stop.runs()) >= 40


def test_a_key_covers_what_decides_a_run_and_nothing_else():
    plain = spec("reward=majority_voting")
    assert key_of(plain, resolved(plain)) == key_of(plain, resolved(plain))
    keys = {
        key_of(s, resolved(s)) for s in (plain, spec("reward=majority_voting", seed=1), spec("reward=probability"), spec("trainer.lr=1e-3"))
    }
    assert len(keys) == 4
    stronger = spec("reward=majority_voting", base="arithmetic-800")
    assert key_of(stronger, resolved(stronger)) != key_of(plain, resolved(plain))
    elsewhere = resolved(plain)
    elsewhere.run_dir, elsewhere.model = "somewhere", "/another/path"
    assert key_of(plain, elsewhere) == key_of(plain, resolved(plain))
    assert key_of(plain, resolved(plain, 3)) != key_of(plain, resolved(plain))


@pytest.mark.timeout(1500)
def test_every_claim_runs_for_a_few_steps():
    """All runs of the matrix, two steps each, judged and written."""
    found = subprocess.run([sys.executable, "-m", "experiments", "--steps", "2"], cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert found.returncode == 0, found.stderr[-3000:]
    for name in CLAIMS:
        assert f"\n({name}) " in found.stdout


# ---- judging


def test_course_by_hand():
    c = course(made([0.4, 0.5, 0.6, 0.8, 0.7, 0.1, 0.1, 0.1]))
    assert c.start == 0.4
    assert c.best == pytest.approx(0.7)  # the mean of 0.6, 0.8 and 0.7
    assert c.best_step == 15
    assert c.end == pytest.approx(0.1)
    assert c.collapsed
    assert not course(made([0.5] * 6)).collapsed


def test_collapse_by_accuracy_is_for_good():
    """A dip that is recovered from is none."""
    assert collapse_by_accuracy(made([0.5] * 5 + [0.1] * 3 + [0.5] * 5)) is None
    # Moving averages of three: 0.5, 0.367, …: below 0.4 from the first low evaluation on.
    assert collapse_by_accuracy(made([0.5] * 5 + [0.1] * 5)) == 25
    assert collapse_by_accuracy(made([0.2, 0.3, 0.4, 0.5])) is None


def test_overall():
    assert [overall(o) for o in ([True, True], [True, False], [False])] == ["seen", "mixed", "not seen"]


def rise_and_fall_results(**changed):
    results = {}
    for run in rise_then_fall.runs():
        truth = "reward=ground_truth" in run.options
        accuracy = [0.4, 0.5, 0.6, 0.6, 0.6] if truth else [0.4, 0.5, 0.55, 0.5, 0.3, 0.2, 0.2]
        for name, values in changed.items():
            if f"reward={name}" in run.options and run.seed == 0:
                accuracy = values
        accuracy = [value for value in accuracy for _ in range(5)]
        n = len(accuracy)
        curves = {"reward": [i / n for i in range(n)], "majority_reward_accuracy": [0.5] * n, "actor_entropy": [0.5] * n}
        results[run] = made(accuracy, run, **curves)
    return results


def test_rise_then_fall_needs_every_run():
    assert rise_then_fall.judge(rise_and_fall_results()).verdict == "seen"
    assert rise_then_fall.judge(rise_and_fall_results(probability=[0.4, 0.5, 0.6, 0.6, 0.6])).verdict == "mixed"  # did not fall
    assert rise_then_fall.judge(rise_and_fall_results(ground_truth=[0.4, 0.6, 0.6, 0.2, 0.2, 0.2])).verdict == "mixed"  # the control fell


def stop_result(index, *, collapses, drifts):
    """Accuracy 0.5, then 0.1 when it collapses; anchors agree until `drifts`, an evaluation, and then to 0.6."""
    n = 12
    accuracy = [0.5] * 6 + [0.1 if collapses else 0.5] * 6
    agreement = [1.0 if drifts is None or i < drifts else 0.6 for i in range(n)]
    return made(accuracy, key=f"{index:03d}", **{"eval/anchor_agreement": agreement, "majority_ratio": [None, *[0.5] * (n - 1)]})


def test_the_stop_rule_is_judged_by_what_it_leaves():
    early, late, none = (when_to_stop.Stoppable(stop_result(0, collapses=True, drifts=d)) for d in (5, 9, None))
    assert early.collapsed
    assert early.fired(threshold=0.9) == 30  # the second reading in a row
    assert early.gone_back_to(30) == pytest.approx(0.5)
    assert early.fired(threshold=0.5) is None
    assert when_to_stop.outcome([early], 0.9) == (1.0, 0.0)
    assert when_to_stop.outcome([late], 0.9) == (1.0, 0.0)  # it fires after the fall, and the best reading lies before it
    assert when_to_stop.outcome([none], 0.9) == (0.0, 0.0)  # never fired
    healthy = when_to_stop.Stoppable(stop_result(1, collapses=False, drifts=4))
    assert when_to_stop.outcome([early, healthy], 0.9) == (1.0, 1.0)  # a false alarm


def test_the_fit_keeps_false_alarms_down():
    courses = [when_to_stop.Stoppable(stop_result(i, collapses=True, drifts=5)) for i in range(10)]
    assert when_to_stop.outcome(courses, when_to_stop.fit(courses)) == (1.0, 0.0)
    assert 0.6 < when_to_stop.fit(courses) <= 0.98
    noisy = [*courses, *(when_to_stop.Stoppable(stop_result(i, collapses=False, drifts=4)) for i in range(10))]
    assert when_to_stop.fit(noisy) <= 0.6  # no threshold tells these apart: the quiet ones stop nobody


def test_an_ablation_has_moved_from_a_fifth_on():
    """The default collapses at 100; levels at 79 and 121 have moved, 81 and 119 have not, and one that never collapses has."""
    at = dict(zip(ablations.LEVELS, (100, 79, 121, 81, 119, None, 100, 100), strict=True))
    results = {}
    for name, step in at.items():
        for run in ablations.level(name):
            accuracy = [0.5 if step is None or i < step else 0.0 for i in range(200)]
            results[run] = made(accuracy, run, every=1)
    verdict = ablations.judge(results)
    # Smoothing over three moves all of them by the same step or two.
    assert "moved by a fifth or more at 3 of 7 levels (rollouts 16, temperature 0.6, temperature 1.2)" in verdict.numbers
    assert verdict.verdict == "not seen"  # not all collapsed, and less than half moved


def test_halves_keep_seeds_together():
    results = {run: made([0.5] * 5, run, key=key_of(run, resolved(run))) for run in when_to_stop.runs()}
    a, b = when_to_stop.halves(results)
    groups = [{(c.result.spec.base, c.result.spec.options) for c in half} for half in (a, b)]
    assert not groups[0] & groups[1]
    assert len(a) + len(b) == len(when_to_stop.intrinsic()) == len(when_to_stop.runs()) - 18
    assert abs(len(a) - len(b)) <= 18


def test_ranks_choose_the_threshold_by_their_rule():
    results = {}
    for run in collapse_ranks.runs():
        strength = collapse_ranks.GRADED.index(run.base)
        n = 40
        if "reward=ground_truth" in run.options:
            results[run] = made([0.3] * 3 + [0.35 + 0.05 * strength] * 5, run)
        else:
            accuracy = [0.8 if i < 5 * (strength + 1) else 0.2 for i in range(n)]
            curves = {"reward": [0.5] * n, "reward_accuracy": accuracy}
            results[run] = Result(run, "0", list(range(1, n + 1)), {ACCURACY: [0.3] * n, **curves}, "finished", 1000, 1.0)
    verdict = collapse_ranks.judge(results)
    assert "Threshold by the rule: MCS_0.25; Spearman with the supervised gain 1.00" in verdict.numbers
    assert verdict.verdict == "seen"
    assert len(seeds("reward=x")) == 3
