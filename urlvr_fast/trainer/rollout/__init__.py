"""Rollouts: one protocol, two engines.

An engine samples completions of token ids and says with what log-probability it drew every token. It holds its own copy of the weights
(`vllm`) or shares the trainer's (`hf`); `sync` is called after every optimiser step either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from urlvr_fast.errors import ExplainedError


class RolloutError(ExplainedError, RuntimeError):
    """The engine cannot be used, or what it returned cannot be trusted. The message says what to do."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of torch and numpy under `seed`, and as they were afterwards. Engines sample from them: vLLM's newer model
    runner gives every request a seed out of numpy's."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    state = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)


@dataclass(frozen=True)
class Sampling:
    n: int  # completions per prompt
    temperature: float  # 0 is greedy
    max_tokens: int
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    # Out of entropy, self_certainty and prob_gap: taken for every token while it is sampled.
    statistics: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Raises ValueError when statistics are asked of sampling that is not from the whole tempered distribution, whose they are."""
        if self.statistics and (self.temperature == 0 or self.top_p < 1 or self.top_k):
            raise ValueError(
                f"{', '.join(sorted(self.statistics))} while sampling would be of the tempered distribution over the whole vocabulary, "
                f"which is not what temperature={self.temperature}, top_p={self.top_p}, top_k={self.top_k} draws from: ask for none"
            )


@dataclass
class Completion:
    token_ids: list[int]  # with the end-of-sequence token, when it was sampled
    logp: list[float]  # of each token, under the distribution it was drawn from: after temperature, top-p and top-k
    finish_reason: str  # "stop" or "length"
    statistics: dict[str, Tensor] = field(default_factory=dict)  # each of Sampling.statistics, (tokens,) fp32 on the CPU


class Rollout(Protocol):
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, in order. The same weights, prompts and seed give the same tokens."""

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the trainer's weights, under their `transformers` names (a tied one under each of its names), and forget whatever was
        cached with the old ones."""

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""


def mixed_seed(seed: int, index: int) -> int:
    """The seed of the index-th draw under `seed`: neither neighbouring seeds nor neighbouring draws have streams in common."""
    # splitmix64's finaliser: neighbouring (seed, index) pairs land far apart.
    x = (seed * 0x9E3779B97F4A7C15 + index + 1) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (x ^ (x >> 31)) & 0x7FFFFFFF
