"""(b) Each reward fails in its own way (paper, figure 3): probability in short responses, the entropies in repetition, self-certainty and
majority voting gradually.

Rules, per run of claim (a), last ten steps against first ten. `probability`: the mean response shrinks to 0.75 of its length or less.
`token_entropy`, `trajectory_entropy`: rep-4 rises by 0.1 or more. `self_certainty`, `majority_voting`: neither of the two, and held-out
accuracy at the end is above that of the three others of the same seed. Responses here are numbers of one to five characters, so there is
little room for repetition; the rules were not softened for that.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments import plots, rise_then_fall
from experiments.matrix import Result, Spec
from experiments.settings import REWARDS, SEEDS, spec
from experiments.verdict import Verdict, course, figure, first, last, overall

TITLE = "The failure mode of each reward"
SHRUNK, REPEATS = 0.75, 0.1
EXPECTED = {
    "majority_voting": "gradual",
    "self_certainty": "gradual",
    "token_entropy": "repetition",
    "trajectory_entropy": "repetition",
    "probability": "length",
}


def runs() -> list[Spec]:
    return [s for s in rise_then_fall.runs() if "reward=ground_truth" not in s.options]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, outcomes = [], []
    for reward in REWARDS:
        for seed in SEEDS:
            result = results[spec(f"reward={reward}", seed=seed)]
            length, repetition = result.values("response_length"), result.values("repetition")
            shrunk = last(length) <= SHRUNK * first(length)
            repeats = last(repetition) >= first(repetition) + REPEATS
            abrupt = [course(results[spec(f"reward={other}", seed=seed)]).end for other, mode in EXPECTED.items() if mode != "gradual"]
            gentle = not shrunk and not repeats and course(result).end > max(abrupt)
            seen = {"length": shrunk, "repetition": repeats, "gradual": gentle}[EXPECTED[reward]]
            outcomes.append(seen)
            rows.append(
                (
                    *(reward, EXPECTED[reward], str(seed), f"{first(length):.2f} → {last(length):.2f}"),
                    *(f"{first(repetition):.3f} → {last(repetition):.3f}", figure(course(result).end), "yes" if seen else "no"),
                )
            )
    groups = {reward: [results[spec(f"reward={reward}", seed=seed)] for seed in SEEDS] for reward in REWARDS}
    metrics = {"response_length": "response length, tokens", "repetition": "rep-4", "label_accuracy": "Label Accuracy"}
    per_mode = {
        mode: f"{sum(o for row, o in zip(rows, outcomes, strict=True) if row[1] == mode)} of {sum(row[1] == mode for row in rows)}"
        for mode in ("length", "repetition", "gradual")
    }
    return Verdict(
        overall(outcomes),
        "As claimed: " + ", ".join(f"{mode} {count}" for mode, count in per_mode.items()) + ".",
        ("reward", "expected", "seed", "length", "rep-4", "accuracy at the end", "as claimed"),
        rows,
        {"failure_modes.svg": lambda: plots.curves(groups, metrics)},
    )
