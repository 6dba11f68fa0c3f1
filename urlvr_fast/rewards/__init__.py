"""Rewards: callables `reward(batch, policy) -> (B,) float tensor`, none of which can see an answer but the oracle in `external`.

* `certainty`: from the sampling distribution alone. `ensemble`: from what the rollouts of a prompt agree on. `external`: the truth.
* `answers`: extraction and equivalence. `registry`: a reward from its name, a dotted path or a file; `call_reward`, the checked call.

A reward's attribute `needs` names the fields of the batch that must be there before the call, out of `STATISTICS` (`sampled_logp` always
is). Rewards are plain numbers: detached, and computed from the distribution that was sampled, at its temperature.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from urlvr_fast.errors import ExplainedError

if TYPE_CHECKING:
    from torch import Tensor

    from urlvr_fast.trainer.batch import RolloutBatch

STATISTICS = frozenset({"entropy", "self_certainty", "prob_gap"})


class RewardError(ExplainedError, ValueError):
    """A reward that cannot be built or whose result cannot be used. The message names the function and, where known, prompt and rollout."""


class Policy(Protocol):
    """What a reward may ask of the model that is being trained (self-verification, CoVo …). Both run under no_grad."""

    def generate(self, prompts: list[str], n: int, *, temperature: float, max_tokens: int) -> list[list[str]]:
        """`n` completions of each prompt text, without special tokens, in order."""
        ...

    def score(self, batch: RolloutBatch, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Statistics of the current weights on the response tokens of `batch`: each name of `outputs` (`logp`, `entropy`,
        `self_certainty`, `prob_gap` …) to a (R,) fp32 CPU tensor, at the batch's temperature."""
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
