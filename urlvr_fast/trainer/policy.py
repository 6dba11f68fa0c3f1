"""What a reward may ask of the policy that is being trained: to write, and to judge tokens. It cannot reach an answer through it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from urlvr_fast.trainer.batch import RolloutBatch
from urlvr_fast.trainer.learner import Learner
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.rollout import Rollout, Sampling


class Policy:
    def __init__(self, loaded: LoadedModel, rollout: Rollout, learner: Learner, seed: int) -> None:
        self._loaded = loaded
        self._rollout = rollout
        self._learner = learner
        self._seed = seed
        self._calls = 0

    def generate(self, prompts: Sequence[str], n: int, *, temperature: float, max_tokens: int) -> list[list[str]]:
        """`n` completions of each prompt, as text. The prompts go in as they are, without a chat template."""
        self._calls += 1
        token_ids = self._loaded.tokenizer(list(prompts)).input_ids
        completions = self._rollout.generate(token_ids, Sampling(n, temperature, max_tokens), self._seed + self._calls)
        return [self._loaded.decode([c.token_ids for c in group]) for group in completions]

    def score(self, batch: RolloutBatch, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Statistics of a batch's response tokens under the present weights, (R,) each: `logp`, `entropy`, `self_certainty` …"""
        return self._learner.score(batch, outputs)
