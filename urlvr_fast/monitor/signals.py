"""What a batch of rollouts says about the run's health without a single label: the numbers that the detectors watch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from urlvr_fast.rewards.ensemble import Votes
    from urlvr_fast.trainer.batch import RolloutBatch

NGRAM = 4
MIN_PROMPTS = 4  # fewer say nothing about one answer dominating


def signals(batch: RolloutBatch, rewards: Tensor, votes: Votes) -> dict[str, float]:
    """Label-free figures of one batch.

    reward, reward_std   of the proxy reward over all rollouts
    flat_groups          share of groups whose rewards are all alike: they have no gradient
    response_length      mean, in tokens, the end-of-sequence token included (the paper's Mean Response Length)
    truncated_rate       share of rollouts that did not end by themselves
    repetition           mean over the rollouts of the share of 4-grams of tokens that came before in the same response (rep-4)
    top_answer_share     share of prompts whose winning answer is the one that wins most prompts, compared by spelling; absent with fewer
                         than 4 prompts that have a winner
    """
    groups = batch.groups()
    figures = {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "flat_groups": sum(bool((rewards[rows] == rewards[rows[0]]).all()) for rows in groups.values()) / len(groups),
        "response_length": batch.response_lens.double().mean().item(),
        "truncated_rate": sum(reason == "length" for reason in batch.finish_reasons) / len(batch),
        "repetition": sum(repetition(tokens) for tokens in response_tokens(batch)) / len(batch),
    }
    winners = {batch.prompt_ids[rows[0]]: votes.labels[group] for group, rows in groups.items()}  # a prompt drawn twice counts once
    elected = Counter(label for label in winners.values() if label is not None)
    if elected.total() >= MIN_PROMPTS:
        figures["top_answer_share"] = max(elected.values()) / elected.total()
    return figures


def response_tokens(batch: RolloutBatch) -> list[list[int]]:
    """The token ids of each response."""
    tokens = batch.tokens.tolist()
    ends, lengths = batch.cu_seqlens[1:].tolist(), batch.response_lens.tolist()
    return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """rep-n of one response: 1 − distinct n-grams / n-grams (Welleck et al. 2020); 0 for a response shorter than n."""
    ngrams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
