"""(f) The Model Collapse Step ranks base models as supervised training does, for less (paper, section 5, figure 11 and table 3).

Six base models of graded quality. Each is trained by majority voting at the one setting, for its collapse step, and by the ground truth
for its supervised gain: held-out avg@4 at the end less at the start.

Rule: the threshold is the paper's 1 % where at least half of the models reach it in their median seed, else the first of 0.1, 0.25 and
half of the initial Reward Accuracy that they reach; windowed variant. Seen: Spearman of median collapse step (censored ones tie) and mean
gain is at least 0.6. Not seen: Spearman of 0 or less. The tokens that both take are reported; that the collapse step takes fewer follows
from both kinds of run having the same length here, so it is no part of the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from experiments import plots
from experiments.bases import GRADED
from experiments.matrix import Result, Spec
from experiments.settings import seeds
from experiments.verdict import Verdict, course, figure
from urlvr_fast.monitor.collapse import THRESHOLDS, CollapseStep, collapse_steps, later, reward_accuracy_series, spearman

TITLE = "The Model Collapse Step ranks base models"


def runs() -> list[Spec]:
    return [spec for base in GRADED for reward in ("majority_voting", "ground_truth") for spec in seeds(f"reward={reward}", base=base)]


def steps_of(result: Result) -> dict[str, CollapseStep]:
    return collapse_steps(*reward_accuracy_series(result.lines()))


def judge(results: Mapping[Spec, Result]) -> Verdict:
    collapses = {base: [steps_of(results[s]) for s in seeds("reward=majority_voting", base=base)] for base in GRADED}
    gains = {
        base: fmean(course(results[s]).end - course(results[s]).start for s in seeds("reward=ground_truth", base=base)) for base in GRADED
    }
    medians = {name: {base: median(later(c[name].windowed) for c in of) for base, of in collapses.items()} for name in THRESHOLDS}
    reached = [name for name in THRESHOLDS if sum(step < float("inf") for step in medians[name].values()) * 2 >= len(GRADED)]
    chosen = reached[0] if reached else "MCS_half"
    correlation = {name: spearman(list(of.values()), list(gains.values())) for name, of in medians.items()}
    rho = correlation[chosen]
    rows = []
    for base in GRADED:
        start = fmean(course(results[s]).start for s in seeds("reward=majority_voting", base=base))
        rows.append(
            (
                *(base, figure(start), *(" ".join(shown(c[name].windowed) for c in collapses[base]) for name in THRESHOLDS)),
                f"{gains[base]:+.3f}",
            )
        )
    spent, supervised = tokens(results, collapses, chosen)
    verdict = "not seen" if rho is None or rho <= 0 else "seen" if rho >= 0.6 else "mixed"
    all_rho = ", ".join(f"{name} {figure(value, 2)}" for name, value in correlation.items())
    return Verdict(
        verdict,
        f"Threshold by the rule: {chosen}; Spearman with the supervised gain {figure(rho, 2)} (all: {all_rho}). Tokens sampled up "
        f"to collapse {spent / 1e6:.2f} M, by the supervised runs {supervised / 1e6:.2f} M: {supervised / spent:.1f} times as many.",
        ("base model", "avg@4 at the start", *(f"{name}, seeds" for name in THRESHOLDS), "supervised gain"),
        rows,
        {"collapse_ranks.svg": lambda: draw(results, medians[chosen], gains, chosen)},
    )


def shown(step: int | None) -> str:
    return "–" if step is None else str(step)


def tokens(results: Mapping[Spec, Result], collapses: Mapping[str, list[dict[str, CollapseStep]]], name: str) -> tuple[float, float]:
    """Tokens sampled in the intrinsic runs until they collapsed, and in the whole of the supervised runs."""
    spent = supervised = 0.0
    for base in GRADED:
        for collapse, spec in zip(collapses[base], seeds("reward=majority_voting", base=base), strict=True):
            result = results[spec]
            spent += result.tokens * min(1.0, later(collapse[name].windowed) / result.steps[-1])
        supervised += sum(results[s].tokens for s in seeds("reward=ground_truth", base=base))
    return spent, supervised


def draw(results: Mapping[Spec, Result], steps: Mapping[str, float], gains: Mapping[str, float], name: str) -> Any:
    drawing, axes = plots.panels(2, 2)
    for number, base in enumerate(GRADED):
        for index, spec in enumerate(seeds("reward=majority_voting", base=base)):
            at, values = reward_accuracy_series(results[spec].lines())
            smooth = [fmean(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
            axes[0].plot(at, smooth, color=f"C{number}", linewidth=0.9, label=base if index == 0 else None)
    axes[0].set_title("Reward Accuracy, majority voting", fontsize=9)
    axes[0].legend(fontsize=7, frameon=False)
    last_step = max(results[s].steps[-1] for s in seeds("reward=majority_voting", base=GRADED[0]))
    for number, base in enumerate(GRADED):
        axes[1].scatter(min(steps[base], last_step), gains[base], color=f"C{number}", marker="o" if steps[base] <= last_step else ">")
    axes[1].set_title(f"supervised gain against {name} (▸ not reached)", fontsize=9)
    axes[1].set_xlabel("step", fontsize=8)
    return drawing
