"""RESTRAIN: every answer is a pseudo-label with a weight, prompts without agreement are penalised, and shaky prompts count less."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.ops import group_advantages
from urlvr_fast.rewards import Policy, RewardError, rollout_text
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import Classes, answer_classes

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


class Restrain:
    """Advantages, not rewards: A_i = u_x · Σ_j w_j · Â_i(a_j), or −u_x · δ for all where the majority is too small (arXiv 2510.02172).

        a_j       the distinct answers (classes) of the group, f_j their share of its n rollouts
        Â_i(a)    GRPO's advantage of 1[ans(y_i) = a]: minus the group's mean, by its standard deviation
        w_j       g(f_j) / Σ_k g(f_k),  g(f) = exp(−(f − centre)² / (2 width²))
        majority  max_j n·f_j; below `kappa`, all rewards are 0 and every advantage is lowered by `delta`
        u_x       g(share of the frozen base model's majority answer on prompt x)

    prompt_weights: prompt id -> that share of the base model, drawn beforehand. Without it the share at this object's first visit of the
        prompt stands in: our stand-in, which is the base model's only in the first epoch's first steps, and which a resumed run draws anew.
    centre, width, kappa (rollouts), delta: the constants' values are our choice; we could not confirm the paper's.

    The paper weighs the losses of the pseudo-labels, here their advantages are weighed: the same at the first update of a batch, where
    every ratio is 1, and not quite the same in later ones, where each label's loss would be clipped by itself. A rollout without an answer
    is right under no label. Rollouts with `train_mask` False vote, and the advantages compare the others alone.

    Fails towards the long tail when `width` is large (all answers weigh alike and none is preferred), and as majority voting does when it
    is small. Raises RewardError for a prompt that `prompt_weights` lacks.
    """

    needs: frozenset[str] = frozenset()
    returns_advantages = True

    def __init__(
        self,
        checker: AnswerChecker,
        centre: float = 1.0,
        width: float = 0.5,
        kappa: float = 3.0,
        delta: float = 1.0,
        prompt_weights: Mapping[Any, float] | None = None,
    ) -> None:
        if not (width > 0 and math.isfinite(width) and math.isfinite(centre) and math.isfinite(kappa) and math.isfinite(delta)):
            raise RewardError(f"restrain: width={width} must be above 0, and centre={centre}, kappa={kappa}, delta={delta} finite")
        self.checker, self.kappa, self.delta = checker, kappa, delta
        self.centre, self.width = centre, width
        # JSON has text for keys.
        self.base_shares = None if prompt_weights is None else {int(prompt): float(share) for prompt, share in prompt_weights.items()}
        self.first_shares: dict[int, float] = {}

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        answers = [self.checker.extract(completion) for completion in batch.completions]
        groups = batch.groups()
        _, members = answer_classes(answers, groups, self.checker)
        majority = {group: max(map(len, members[group].values()), default=0) for group in groups}
        shares = self.base_shares if self.base_shares is not None else self.visit(batch, groups, majority)
        advantages = torch.zeros(len(batch), dtype=torch.float64)
        for group, rows in groups.items():
            if majority[group] < self.kappa:
                advantages[rows] = -self.delta
            else:
                mask = None if batch.train_mask is None else batch.train_mask[rows]
                advantages[rows] = self.weighted_advantages(rows, members[group], mask)
            prompt = batch.prompt_ids[rows[0]]
            if prompt not in shares:
                raise RewardError(f"restrain: prompt_weights has no entry for prompt {prompt}; {rollout_text(batch, rows[0])}")
            advantages[rows] *= self.gaussian(shares[prompt])
        if batch.train_mask is not None:
            advantages[~batch.train_mask] = 0.0
        return advantages.float()

    def weighted_advantages(self, rows: list[int], members: Classes, mask: Tensor | None) -> Tensor:
        """Σ_j w_j · Â(a_j) of one group, (rows,) float64."""
        weights = {number: self.gaussian(len(voters) / len(rows)) for number, voters in members.items()}
        # Shares far from the centre of a narrow g can all underflow; then none of them is preferred.
        total = math.fsum(weights.values())
        advantages = torch.zeros(len(rows), dtype=torch.float64)
        if total == 0:
            return advantages
        place = {row: position for position, row in enumerate(rows)}
        one_group = torch.zeros(len(rows), dtype=torch.int64)
        for number, voters in members.items():
            right = torch.zeros(len(rows), dtype=torch.float64)
            right[[place[row] for row in voters]] = 1.0
            advantages += weights[number] / total * group_advantages(right, one_group, mask=mask)
        return advantages

    def gaussian(self, share: float) -> float:
        return math.exp(-((share - self.centre) ** 2) / (2 * self.width**2))

    def visit(self, batch: RolloutBatch, groups: dict[int, list[int]], majority: dict[int, int]) -> dict[int, float]:
        """The majority's share at the first visit of each prompt; of a prompt that comes twice in that batch, the mean."""
        seen: dict[int, list[float]] = {}
        for group, rows in groups.items():
            seen.setdefault(batch.prompt_ids[rows[0]], []).append(majority[group] / len(rows))
        for prompt, shares in seen.items():
            self.first_shares.setdefault(prompt, math.fsum(shares) / len(shares))
        return self.first_shares
