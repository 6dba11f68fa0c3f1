"""Rewards: callables `reward(batch, policy) -> (B,) float tensor`, none of which can see an answer but the oracle in `external`.

* From the sampling distribution alone: `certainty`; `disparity`, on the answer's tokens.
* From what the rollouts of a prompt agree on: `ensemble` (majority voting, and voting over several models), `cross_view`, `semantic`
  (EMPO), `covo`, `restrain`.
* From outside: `self_verification` (the policy judges), `procedural` (a program judges), `next_token` (the text itself), `external` (the
  truth).
* `mixture`: a weighted sum of others.
* `answers`: extraction and equivalence. `registry`: a reward from its name, a dotted path or a file. `checked_call`: the call that a
  training loop makes, which lets nothing through but B finite numbers.

A reward's attribute `needs` names the fields of the batch that must be there before the call, out of `STATISTICS` (`sampled_logp` always
is). One whose attribute `returns_advantages` is true has normalised already: its numbers are the advantages. Rewards are plain numbers:
detached, and the certainty ones computed from the distribution that was sampled, at its temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from urlvr_fast.errors import ExplainedError

if TYPE_CHECKING:
    from torch import Tensor

    from urlvr_fast.trainer.batch import RolloutBatch

STATISTICS = frozenset({"entropy", "self_certainty", "prob_gap"})


class RewardError(ExplainedError, ValueError):
    """A reward that cannot be built or whose result cannot be used. The message names the function and, where known, prompt and rollout."""


class Policy(Protocol):
    """What a reward may ask of the model that is being trained (self-verification, CoVo …). Everything runs under no_grad."""

    def generate(self, prompts: Sequence[str], n: int, *, temperature: float, max_tokens: int) -> list[list[str]]:
        """`n` completions of each prompt text, without special tokens, in order."""
        ...

    def score(self, batch: RolloutBatch, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Statistics of the current weights on the response tokens of `batch`: each name of `outputs` (`logp`, `entropy`,
        `self_certainty`, `prob_gap` …) to a (R,) fp32 CPU tensor, at the batch's temperature."""
        ...

    def likelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n,) float64 log-probability of continuation i after context i under the current weights at temperature 1, the sum over its
        tokens, and (n,) int64 how many tokens those are. The two are tokenised apart, so the boundary does not move. Raises RewardError
        for an empty continuation."""
        ...

    def render(self, message: str) -> str:
        """What the user says, as the run presents prompts: through its chat template when it uses one, else as it is."""
        ...

    def token_span(self, batch: RolloutBatch, index: int, start: int, end: int) -> tuple[int, int]:
        """The tokens `first` up to and without `last` of rollout `index`'s response, counted from 0, whose text overlaps the characters
        `start:end` of its completion."""
        ...


class Reward(Protocol):
    """A reward. A plain function is one as well: `needs` is optional and then empty."""

    needs: frozenset[str]

    def __call__(self, batch: RolloutBatch, policy: Policy | None) -> Tensor:
        """The reward of each rollout, (B,) floating point, larger is better."""
        ...


def reward_name(reward: Any) -> str:
    """What messages and logs call a reward."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def rollout_text(batch: RolloutBatch, index: int, width: int = 80) -> str:
    """Rollout and prompt of an error message: indices, and the beginning of both texts."""

    def shortened(text: str) -> str:
        return repr(text if len(text) <= width else text[:width] + "…")

    return (
        f"rollout {index} of {len(batch)}, {shortened(batch.completions[index])}, "
        f"of prompt {batch.prompt_ids[index]}, {shortened(batch.prompts[index])}"
    )
