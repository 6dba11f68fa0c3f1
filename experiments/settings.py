"""The one setting that all claims share, and how a claim's runs differ from it.

It is the paper's (GRPO, one optimiser step a batch, temperature 1, no KL, N = 8) at a size that two cores can repeat a hundred times: a
Qwen3 of 0.95 M parameters over characters that was pre-trained here on two-digit arithmetic, 16 prompts of 8 rollouts a step, and a
learning rate at which 150 steps are a long run (ten of warm-up, or Adam's first steps alone would ruin it). It was chosen by looking at
runs of majority voting, trajectory entropy and the ground truth on seed 100, which no claim uses; the claims' rules of judgement stand in
their files and were written before their runs were made.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from experiments.bases import path_of
from experiments.matrix import Spec

SEEDS = (0, 1, 2)
STEPS = 150
COMMON = (
    "data=arithmetic",
    "rollout.engine=hf",
    "rollout.max_tokens=12",
    "rollout.batch_prompts=512",
    "rollout.group_size=8",
    "trainer.prompts_per_step=16",
    f"trainer.steps={STEPS}",
    "trainer.lr=5e-4",
    "trainer.warmup_steps=10",
    "trainer.threads=1",
    "trainer.eval_every=5",
    "trainer.save_every=0",
    "trainer.samples_every=0",
    "eval.prompts=128",
    "eval.samplings=1",
    "eval.group_size=4",
    "monitor.kl_every=5",
    "log.live=off",
)
REWARDS = ("majority_voting", "self_certainty", "token_entropy", "trajectory_entropy", "probability")  # the paper's five, intrinsic all


def spec(*options: str, base: str = "arithmetic", seed: int = 0) -> Spec:
    return Spec(base, tuple(sorted(options)), seed)


def seeds(*options: str, base: str = "arithmetic") -> list[Spec]:
    """The same run under each of `SEEDS`."""
    return [spec(*options, base=base, seed=seed) for seed in SEEDS]


@cache
def _config(base: str, options: tuple[str, ...], seed: int, steps: int | None) -> Any:
    from urlvr_fast.trainer import config as configuration

    short = [] if steps is None else [f"trainer.steps={steps}", "eval.prompts=16", f"trainer.eval_every={max(1, steps // 2)}"]
    return configuration.load(None, [f"model={path_of(base)}", *COMMON, *options, f"seed={seed}", *short])


def resolved(spec: Spec, steps: int | None = None) -> Any:
    """The configuration of a run; a copy, for its caller to change."""
    import copy

    return copy.deepcopy(_config(spec.base, spec.options, spec.seed, steps))
