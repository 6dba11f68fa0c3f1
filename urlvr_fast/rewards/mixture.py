"""A weighted sum of rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.ops import group_advantages
from urlvr_fast.rewards import Policy, Reward, RewardError
from urlvr_fast.rewards.checked_call import call_reward, reward_needs

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

KEYS = ("reward", "weight", "options", "normalise")


@dataclass(frozen=True)
class Part:
    reward: Reward
    weight: float
    by_group: bool  # whether each group's rewards are put on one scale before they are weighted


class Mixture:
    """r = Σ_k w_k · r_k, or w_k · (r_k − its group's mean) / its group's standard deviation where a part asks for that.

    rewards: one {"reward": name, "weight": number, "options": {…}, "normalise": "none" | "group"} for each part; weight is 1, options are
        empty and normalise is "none" when left out. Rewards differ in scale by orders of magnitude (log-probabilities, 0 or 1,
        shares): "group" makes a weight mean what it says. It is computed over the rollouts that are trained on, and is 0 for the others.

    Fails as its parts do: what is cheapest to raise, weight considered, is what will rise. Raises RewardError for a list that does not
    fit, for parts that return advantages (RESTRAIN: there is nothing left to weigh them against), and whatever a part raises.
    """

    def __init__(self, build: Callable[[str, Mapping[str, Any]], Reward], rewards: Sequence[Mapping[str, Any]]) -> None:
        if isinstance(rewards, (str, Mapping)) or not rewards:
            raise RewardError('mixture: option `rewards` is a list such as [{"reward": "majority_voting", "weight": 1.0}, …], not empty')
        self.parts = [part_of(entry, build) for entry in rewards]
        self.generates = any(getattr(part.reward, "generates", False) for part in self.parts)
        self.needs: frozenset[str] = frozenset().union(*(reward_needs(part.reward) for part in self.parts))

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        total = torch.zeros(len(batch), dtype=torch.float64)
        for part in self.parts:
            rewards = call_reward(part.reward, batch, policy).double()
            if part.by_group:
                rewards = group_advantages(rewards, batch.group_ids, mask=batch.train_mask)
            total += part.weight * rewards
        return total.float()


def part_of(entry: Mapping[str, Any], build: Callable[[str, Mapping[str, Any]], Reward]) -> Part:
    """A part from its entry in the list, checked."""
    if not isinstance(entry, Mapping) or "reward" not in entry or set(entry) - set(KEYS):
        raise RewardError(f"mixture: {entry!r:.200} must have `reward` and may have {', '.join(KEYS[1:])}")
    name, weight, normalise = entry["reward"], entry.get("weight", 1.0), entry.get("normalise", "none")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise RewardError(f"mixture: the weight of {name} is {weight!r}, which is not a finite number")
    if normalise not in ("none", "group"):
        raise RewardError(f"mixture: normalise={normalise!r} of {name}; valid are none, group")
    reward = build(name, entry.get("options") or {})
    if getattr(reward, "returns_advantages", False):
        raise RewardError(f"mixture: {name} returns advantages, which cannot be mixed with rewards; use it alone")
    return Part(reward, float(weight), normalise == "group")
