"""Which charts there are, and what each shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from urlvr_fast.report.run import Point, Run


@dataclass(frozen=True)
class Spec:
    title: str
    metrics: tuple[tuple[str, str], ...]  # (metric, label); those that a run lacks are left out
    note: str = ""
    scale: str = "linear"  # "linear", "log", or "spiky": log when the largest value dwarfs the median
    points: bool = False  # few measurements: marked and not smoothed


def sections_of(runs: list[Run]) -> list[tuple[str, list[Spec]]]:
    """Sections of the page and their charts."""
    names = {name for run in runs for name in run.metrics}
    reward = " / ".join(dict.fromkeys(run.reward for run in runs))
    proxy: tuple[tuple[str, str], ...] = (("reward", reward),)
    votes = () if reward == "majority_voting" else (("majority_voting_reward", "majority voting reward"),)
    others = (("ground_truth_reward", "ground truth"), ("majority_ratio", "majority ratio"), *votes)
    unseen = "ground_truth_reward" in names and reward != "ground_truth"
    note = "The proxy that is trained on, beside the truth that it never sees." if unseen else ""
    # A proxy on another scale than shares (nats, log-probs) gets a chart of its own: two axes in one would suggest crossings that are none.
    shares = all(is_share(run.metrics.get("reward", [])) for run in runs)
    rewards = (
        [Spec("Reward", proxy + others, note)]
        if shares
        else [Spec(f"Proxy reward: {reward}", proxy, "What is trained on."), Spec("Other rewards of the same rollouts", others, note)]
    )
    passes = tuple((name, name) for name in sorted(names) if name.startswith("pass@"))
    evaluations = tuple(
        (name, name.removeprefix("eval/").replace("_", " ")) for name in _in_order(names, "eval/", runs) if "anchor" not in name
    )
    return [
        (
            "Is it learning?",
            [
                *rewards,
                Spec(
                    "Accuracy of the reward",
                    (
                        ("reward_accuracy", "Reward Accuracy"),
                        ("majority_reward_accuracy", "that of the majority vote"),
                        ("label_accuracy", "Label Accuracy"),
                        ("pseudo_label_accuracy", "pseudo-label"),
                    ),
                    "Share of rewards, and of voted labels, that agree with the truth. The majority vote's, whatever is trained on.",
                ),
                Spec("Evaluation", evaluations, "On fixed prompts.", points=True),
                Spec("Entropy", (("actor_entropy", "nats per token"),), "Falls as the model grows sure, right or wrong."),
                Spec("Correlation of reward and correctness", (("point_biserial", "point-biserial"),)),
            ],
        ),
        (
            "Is it healthy?",
            [
                Spec("Response length", (("response_length", "tokens"),)),
                Spec(
                    "KL to the start model",
                    (("kl_start", "k3, nats per token"),),
                    "How far the policy has gone from the model that it started as; taken every few steps.",
                    points=True,
                ),
                Spec(
                    "Anchor agreement",
                    (("eval/anchor_agreement", "share"),),
                    "Share of the base model's clear votes that greedy answers still give; sharpening keeps them. Needs no answers.",
                    points=True,
                ),
                Spec(
                    "Anchored majority",
                    (("eval/anchored_majority", "share"),),
                    "Anchor agreement times majority ratio: follows accuracy without answers. What the default stop rule reads.",
                    points=True,
                ),
                Spec(
                    "Most common answer",
                    (("top_answer_share", "share of prompts"),),
                    "Share of prompts that one and the same answer wins; 1 is one answer to everything.",
                ),
                Spec("Repetition", (("repetition", "rep-4"),), "Share of 4-grams of tokens that came before in the same response."),
                Spec("Flat groups", (("flat_groups", "share of groups"),), "Groups whose rewards are all alike teach nothing."),
                Spec("Rollouts", (("parse_rate", "answer parses"), ("truncated_rate", "cut off"), *passes), "Shares."),
                Spec(
                    "Log-prob gap",
                    (("logp_gap_max", "largest, nats"), ("logp_gap_mean", "mean")),
                    "Between the engine that samples and the model that trains; log scale.",
                    scale="log",
                ),
                Spec("Gradient norm", (("grad_norm", "before clipping"),), scale="spiky"),
                Spec("Rollouts that carry a gradient", (("live_rollouts", "rollouts"),)),
                Spec("Clipped tokens", (("clip_frac_low", "low side"), ("clip_frac_high", "high side")), "Shares."),
            ],
        ),
        (
            "How fast?",
            [
                Spec("Tokens per second", (("rollout_tokens_per_s", "rollout"), ("train_tokens_per_s", "training"))),
                Spec("Seconds a step", (("step_s", "whole step"), ("rollout_s", "rollout"), ("train_s", "training"), ("sync_s", "sync"))),
            ],
        ),
    ]


def _in_order(names: set[str], prefix: str, runs: list[Run]) -> list[str]:
    """The metrics with this prefix in the order in which the runs logged them."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics if name.startswith(prefix) and name in names))


def is_share(points: Iterable[Point]) -> bool:
    return all(-1e-9 <= value <= 1 + 1e-9 for _, value in points)
