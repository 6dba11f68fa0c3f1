"""(a) Every intrinsic reward first helps and then hurts, while the reward itself keeps rising (paper, section 4.1, figures 2 and 3).

Rule, per run: held-out accuracy (avg@4, moving average of three evaluations) rises by at least 0.02 above its start, and at the end lies
at least 0.05 below its best, while the proxy reward's last ten steps are above its first ten. Control: under the ground truth accuracy
rises and does not fall. Seen: every reward, every seed, and the control.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import REWARDS, seeds
from experiments.verdict import ACCURACY, Verdict, course, figure, first, last, overall

TITLE = "Rise, then fall, under each intrinsic reward"
RISE, FALL = 0.02, 0.05


def runs() -> list[Spec]:
    return [spec for reward in (*REWARDS, "ground_truth") for spec in seeds(f"reward={reward}")]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, outcomes, rises, falls = [], [], 0, 0
    for reward in (*REWARDS, "ground_truth"):
        for seed, spec in enumerate(seeds(f"reward={reward}")):
            result = results[spec]
            c = course(result)
            proxy = result.values("reward")
            rose, fell = c.best >= c.start + RISE, c.end <= c.best - FALL
            as_claimed = rose and not fell if reward == "ground_truth" else rose and fell and last(proxy) > first(proxy)
            outcomes.append(as_claimed)
            if reward != "ground_truth":
                rises, falls = rises + rose, falls + fell
            rows.append(
                (
                    *(reward, str(seed), figure(c.start), f"{c.best:.3f} at {c.best_step}", figure(c.end)),
                    *(f"{first(proxy):.3f} → {last(proxy):.3f}", "yes" if as_claimed else "no"),
                )
            )
    groups = {reward: [results[s] for s in seeds(f"reward={reward}")] for reward in (*REWARDS, "ground_truth")}
    metrics = {
        ACCURACY: "held-out accuracy (avg@4)",
        "majority_reward_accuracy": "Reward Accuracy of the vote",
        "actor_entropy": "entropy, nats",
    }
    intrinsic = 3 * len(REWARDS)
    return Verdict(
        overall(outcomes),
        f"{sum(outcomes)} of {len(outcomes)} runs as claimed; of {intrinsic} intrinsic ones {rises} rose by 0.02 and {falls} fell by 0.05.",
        ("reward", "seed", "start", "best", "end", "proxy reward", "as claimed"),
        rows,
        {"rise_then_fall.svg": lambda: plots.curves(groups, metrics)},
    )
