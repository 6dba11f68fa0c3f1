"""(d) Few prompts stay stable where many collapse (paper, section 4.6): majority voting on 32 to 4,096 prompts, all with the same number
of steps, so the fewer the prompts the more epochs.

Rule: with 32 prompts held-out accuracy (avg@4) at the end is at least what it was at the start, in every seed; with 4,096 it ends below
0.8 of its best, in every seed; and the KL to the start model at the end is smaller with 32 than with 4,096, seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import SEEDS, seeds
from experiments.verdict import ACCURACY, Verdict, course, figure, last, overall

TITLE = "32 prompts stay stable where thousands collapse"
SIZES = (32, 128, 512, 4096)


def of_size(size: int) -> list[Spec]:
    # 4096 is what the task draws when nothing is said: the run of claim (a).
    return seeds("reward=majority_voting", *([] if size == max(SIZES) else [f"prompts.limit={size}"]))


def runs() -> list[Spec]:
    return [spec for size in SIZES for spec in of_size(size)]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows = []
    ends: dict[int, list[Result]] = {size: [results[s] for s in of_size(size)] for size in SIZES}
    for size, of in ends.items():
        for seed, result in enumerate(of):
            c = course(result)
            rows.append(
                (
                    *(str(size), str(seed), figure(c.start), f"{c.best:.3f} at {c.best_step}", figure(c.end)),
                    *(
                        figure(last(result.values("kl_start"), 3)),
                        figure(last(result.values("reward"))),
                        figure(last(result.values("ground_truth_reward"))),
                    ),
                )
            )
    outcomes = []
    for seed in SEEDS:
        few, many = ends[min(SIZES)][seed], ends[max(SIZES)][seed]
        stable = course(few).end >= course(few).start
        closer = last(few.values("kl_start"), 3) < last(many.values("kl_start"), 3)
        outcomes += [stable, course(many).collapsed, closer]
    metrics = {
        ACCURACY: "held-out accuracy (avg@4)",
        "ground_truth_reward": "Ground Truth Reward in training",
        "kl_start": "KL to start, nats/token",
    }
    few_kl, many_kl = (last(ends[size][0].values("kl_start"), 3) for size in (min(SIZES), max(SIZES)))
    return Verdict(
        overall(outcomes),
        f"32 prompts ended at or above their start in {sum(outcomes[::3])} of 3 seeds, 4,096 collapsed in {sum(outcomes[1::3])} of 3; KL "
        f"at the end (seed 0) {few_kl:.2f} against {many_kl:.2f}.",
        ("prompts", "seed", "start", "best", "end", "KL at the end", "Majority Voting Reward", "Ground Truth Reward"),
        rows,
        {"small_data.svg": lambda: plots.curves({f"{size} prompts": of for size, of in ends.items()}, metrics)},
    )
