"""(c) Sharpening helps where the model's preferred answer is right and hurts where it is wrong (paper, section 4.2 and the condition of
Theorem 1).

Two sets of 32 training prompts, fixed beforehand by 64 samples of the base model each: `aligned`, whose commonest answer is right, and
`misaligned`, whose commonest answer is wrong although the right one was sampled too; prompts with a share of 0.9 or more are in neither
(`experiments/choose_prompts.py` made them). Majority voting is trained on one set alone, and evaluated on that set.

Rule, per run: on aligned prompts avg@4 rises by at least 0.1, on misaligned ones it falls. Seen: all seeds of both. Also counted: maj@4.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments import plots
from experiments.matrix import Result, Spec
from experiments.settings import seeds
from experiments.verdict import ACCURACY, Verdict, course, figure, last, overall

TITLE = "Sharpening helps aligned prompts and hurts misaligned ones"
SETS = ("aligned", "misaligned")
RISE = 0.1


def on(name: str) -> list[Spec]:
    path = Path(__file__).parent / "prompts" / f"{name}.jsonl"
    relative = path.relative_to(Path(__file__).parents[1])
    return seeds(
        "reward=majority_voting", f"data={relative}", f"eval.data={relative}", "answers.kind=exact", "eval.prompts=32", "eval.split=train"
    )


def runs() -> list[Spec]:
    return [spec for name in SETS for spec in on(name)]


def judge(results: Mapping[Spec, Result]) -> Verdict:
    rows, outcomes = [], []
    for name in SETS:
        for seed, spec in enumerate(on(name)):
            result = results[spec]
            c = course(result)
            votes = result.values("eval/maj@4")
            as_claimed = c.end >= c.start + RISE if name == "aligned" else c.end < c.start
            outcomes.append(as_claimed)
            rows.append(
                (name, str(seed), figure(c.start), figure(c.end), f"{votes[0]:.3f} → {last(votes, 3):.3f}", "yes" if as_claimed else "no")
            )
    metrics = {ACCURACY: "avg@4 on the trained prompts", "majority_ratio": "majority ratio", "reward_accuracy": "Reward Accuracy"}
    return Verdict(
        overall(outcomes),
        f"Aligned prompts gained in {sum(outcomes[:3])} of 3 seeds, misaligned ones lost in {sum(outcomes[3:])} of 3.",
        ("prompts", "seed", "avg@4 before", "after", "maj@4", "as claimed"),
        rows,
        {"alignment_decides.svg": lambda: plots.curves({name: [results[s] for s in on(name)] for name in SETS}, metrics)},
    )
