"""(g) Self-verification on Countdown outlasts trajectory entropy (paper, section 7, figures 13 and 14).

The base model was pre-trained to solve Countdown badly and to judge proposals better. Its rewards: its own P(True) of one token, cut at
0.5; the mean log-probability of what it sampled; the exact scorer.

Rule, seed by seed: held-out accuracy (avg@4) at the end is higher under self-verification than under trajectory entropy by 0.05 or more,
and lies no more than 0.05 below its own best. Seen: every seed. Reported: Reward Accuracy of the self-verification, and the oracle.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import SEEDS, seeds
from experiments.verdict import ACCURACY, Verdict, course, figure, first, last, overall

TITLE = "Self-verification on Countdown outlasts trajectory entropy"
ARMS = ("self_verification", "trajectory_entropy", "ground_truth")
AHEAD, FALL = 0.05, 0.05


def arm(reward: str) -> list[Spec]:
    return seeds(
        *(f"reward={reward}", "data=countdown", "data_options={numbers: 3, largest: 20, operators: +-}", "rollout.max_tokens=16"),
        base="countdown",
    )


def runs() -> list[Spec]:
    return [spec for reward in ARMS for spec in arm(reward)]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, outcomes = [], []
    of = {reward: [results[s] for s in arm(reward)] for reward in ARMS}
    for seed in SEEDS:
        own, entropy = (course(of[reward][seed]) for reward in ARMS[:2])
        outcomes.append(own.end >= entropy.end + AHEAD and own.end >= own.best - FALL)
    for reward in ARMS:
        for seed, result in enumerate(of[reward]):
            c = course(result)
            accuracy = result.values("reward_accuracy")
            agreement = f"{first(accuracy):.3f} → {last(accuracy):.3f}" if accuracy else "–"
            rows.append((reward, str(seed), figure(c.start), f"{c.best:.3f} at {c.best_step}", figure(c.end), agreement))
    metrics = {ACCURACY: "held-out accuracy (avg@4)", "ground_truth_reward": "Ground Truth Reward", "reward": "proxy reward"}
    return Verdict(
        overall(outcomes),
        f"Self-verification ended ahead and near its best in {sum(outcomes)} of {len(outcomes)} seeds.",
        ("reward", "seed", "start", "best", "end", "Reward Accuracy"),
        rows,
        {"self_verification.svg": lambda: plots.curves(of, metrics)},
    )
