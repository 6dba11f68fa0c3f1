"""(e) Test-time training is safe (paper, section 4.6, figure 8): trained by majority voting on 40 prompts of the test split, without
answers, a model gets better on them and stays so.

Rule, per run: avg@4 on the 40 prompts rises by at least 0.05, and ends no more than 0.05 below its best. The control is the run on the
whole training split, claim (d). `urlvr ttt` is this as a command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import seeds
from experiments.verdict import ACCURACY, Verdict, course, figure, last, overall

TITLE = "Test-time training"
RISE, FALL = 0.05, 0.05
PROMPTS = Path("experiments") / "prompts" / "test40.jsonl"


def runs() -> list[Spec]:
    return seeds(
        "reward=majority_voting", f"data={PROMPTS}", f"eval.data={PROMPTS}", "answers.kind=exact", "eval.prompts=40", "eval.split=train"
    )


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, outcomes = [], []
    for seed, spec in enumerate(runs()):
        c = course(results[spec])
        as_claimed = c.best >= c.start + RISE and c.end >= c.best - FALL
        outcomes.append(as_claimed)
        rows.append(
            (
                str(seed),
                figure(c.start),
                f"{c.best:.3f} at {c.best_step}",
                figure(c.end),
                figure(last(results[spec].values("reward"))),
                "yes" if as_claimed else "no",
            )
        )
    metrics = {ACCURACY: "avg@4 on the 40 prompts", "reward_accuracy": "Reward Accuracy", "reward": "Majority Voting Reward"}
    return Verdict(
        overall(outcomes),
        f"{sum(outcomes)} of {len(outcomes)} seeds rose and stayed.",
        ("seed", "avg@4 before", "best", "after", "Majority Voting Reward", "as claimed"),
        rows,
        {"test_time.svg": lambda: plots.curves({f"seed {i}": [results[s]] for i, s in enumerate(runs())}, metrics)},
    )
