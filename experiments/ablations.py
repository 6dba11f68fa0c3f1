"""(h) Temperature, mini-batch, rollouts and KL move when a run collapses, not whether (paper, section 4.4): majority voting, one factor at
a time.

Collapse: the step from which held-out accuracy (avg@4, moving average of three evaluations) stays below 0.8 of its best so far. Rule: every
run of every level collapses within its steps (not whether), and the median collapse step of at least half of the levels differs from the
default's by a fifth or more (when). Seen: both; mixed: one; not seen: neither. A level that outlives its steps counts against the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import seeds
from experiments.verdict import ACCURACY, Verdict, collapse_by_accuracy, course, figure
from urlvr_fast.monitor.collapse import later

MOVED = 0.2
TITLE = "Temperature, mini-batch, rollouts and KL move when, not whether"
LEVELS: dict[str, tuple[str, ...]] = {
    "default": (),
    "temperature 0.6": ("rollout.temperature=0.6",),
    "temperature 1.2": ("rollout.temperature=1.2",),
    "mini-batch 4 of 16": ("trainer.mini_batch_prompts=4",),
    "rollouts 4": ("rollout.group_size=4",),
    "rollouts 16": ("rollout.group_size=16",),
    "KL 0.005": ("loss.kl_coef=0.005",),
    "KL 0.1": ("loss.kl_coef=0.1",),
}


def level(name: str) -> list[Spec]:
    return seeds("reward=majority_voting", *LEVELS[name])


def runs() -> list[Spec]:
    return [spec for name in LEVELS for spec in level(name)]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, medians, survivors = [], {}, 0
    for name in LEVELS:
        collapses = [collapse_by_accuracy(results[s]) for s in level(name)]
        medians[name] = median(map(later, collapses))
        survivors += sum(step is None for step in collapses)
        courses = [course(results[s]) for s in level(name)]
        rows.append(
            (
                *(name, " ".join("–" if step is None else str(step) for step in collapses)),
                *(" ".join(figure(c.best) for c in courses), " ".join(figure(c.end) for c in courses)),
            )
        )
    default = medians.pop("default")
    # Two that were not reached are equal, whatever their difference is.
    moved = {name for name, step in medians.items() if step != default and not abs(step - default) < MOVED * default}
    not_whether, when = survivors == 0, 2 * len(moved) >= len(medians)
    total = 3 * len(LEVELS)
    return Verdict(
        "seen" if not_whether and when else "mixed" if not_whether or when else "not seen",
        f"{total - survivors} of {total} runs collapsed within their steps; the median step moved by a fifth or more at "
        f"{len(moved)} of {len(medians)} levels ({', '.join(sorted(moved)) or 'none'}).",
        ("level", "collapse step, seeds", "best accuracy, seeds", "accuracy at the end, seeds"),
        rows,
        {
            "ablations.svg": lambda: plots.curves(
                {name: [results[s] for s in level(name)] for name in LEVELS}, {ACCURACY: "held-out accuracy (avg@4)"}
            )
        },
    )
