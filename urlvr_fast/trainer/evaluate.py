"""Evaluation on fixed prompts: avg@k, unbiased pass@k, maj@k, greedy accuracy and the Majority Voting Reward.

Answers are used here and nowhere in training. Without answers only the Majority Voting Reward is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from urlvr_fast.monitor.alignment import avg_at_k, maj_at_k, pass_at_k
from urlvr_fast.rewards.ensemble import vote
from urlvr_fast.rewards.external import correct
from urlvr_fast.tasks.prompt_set import PromptSet
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.prompts import EncodedPrompts
from urlvr_fast.trainer.rollout import Rollout, Sampling


def sample_batch(
    rollout: Rollout,
    prompt_set: PromptSet,
    encoded: EncodedPrompts,
    positions: Sequence[int],
    sampling: Sampling,
    seed: int,
    decode: Callable[[list[list[int]]], list[str]],
) -> RolloutBatch:
    """Rollouts of the prompts at these positions of `encoded`, one group each."""
    token_ids = [encoded.token_ids[p] for p in positions]
    ids = [encoded.ids[p] for p in positions]
    row = {prompt_id: i for i, prompt_id in enumerate(prompt_set.ids)}
    return build_batch(
        prompt_token_ids=token_ids,
        prompt_texts=[encoded.texts[p] for p in positions],
        prompt_ids=ids,
        completions=rollout.generate(token_ids, sampling, seed),
        decode=decode,
        temperature=sampling.temperature,
        columns={name: [values[row[i]] for i in ids] for name, values in prompt_set.columns.items()},
    )


def evaluate(
    rollout: Rollout,
    prompt_set: PromptSet,
    encoded: EncodedPrompts,
    decode: Callable[[list[list[int]]], list[str]],
    *,
    sampling: Sampling,
    ks: Sequence[int],
    samplings: int = 1,
    seed: int = 0,
    greedy: bool = True,
) -> dict[str, float]:
    """Mean over prompts and over `samplings` samplings of `sampling.n` rollouts a prompt.

    Keys: `majority_voting_reward` and, where the prompts have answers, `avg@k`, `pass@k`, `maj@k` for each k ≤ sampling.n, and
    `greedy_accuracy`. The same seed samples the same way before and after training.
    """
    positions = range(len(encoded.token_ids))
    values: dict[str, list[float]] = {}
    for repeat in range(samplings):
        batch = sample_batch(rollout, prompt_set, encoded, positions, sampling, seed + repeat, decode)
        votes = vote(batch, prompt_set.checker)
        values.setdefault("majority_voting_reward", []).append(votes.majority_ratio.mean().item())
        if prompt_set.answers:
            for name, value in _accuracy_at_k(batch, votes.classes, prompt_set, ks).items():
                values.setdefault(name, []).append(value)
    result = {name: sum(v) / len(v) for name, v in values.items()}
    if greedy and prompt_set.answers:
        once = Sampling(n=1, temperature=0.0, max_tokens=sampling.max_tokens)
        batch = sample_batch(rollout, prompt_set, encoded, positions, once, seed, decode)
        result["greedy_accuracy"] = correct(batch, prompt_set.answers, prompt_set.checker).nanmean().item()
    return result
