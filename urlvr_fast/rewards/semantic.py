"""Semantic clusters (paper, Table 2; EMPO): a rollout is worth the share of its group that means the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import answer_classes, checked_share

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch


class SemanticClusters:
    """r(y) = |C(y)| / G, C(y) the rollouts of the group of G whose answers are equivalent to y's (EMPO, arXiv 2504.05812).

    Clusters are classes of answers under `checker.equivalent`; the released code clusters greedily in the order of the rollouts, which ours
    does not depend on. A group gets 0 throughout when no two of its answers agree (there is nothing to prefer; EMPO's condition that the
    entropy of the clusters be below log G) and when its largest share is below `threshold` (EMPO has 0.25 in an option that is off).

    A rollout without an answer is in no cluster and gets 0, and counts in G. Fails as majority voting does, more gently: the larger cluster
    grows whether it is right or wrong.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, checker: AnswerChecker, threshold: float = 0.0) -> None:
        self.checker = checker
        self.threshold = checked_share(threshold, "semantic_clusters")

    def __call__(self, batch: RolloutBatch, policy: Policy | None = None) -> Tensor:
        answers = [self.checker.extract(completion) for completion in batch.completions]
        groups = batch.groups()
        _, members = answer_classes(answers, groups, self.checker)
        rewards = torch.zeros(len(batch))
        for group, rows in groups.items():
            largest = max(map(len, members[group].values()), default=0)
            if largest < 2 or largest / len(rows) < self.threshold:
                continue
            for cluster in members[group].values():
                rewards[cluster] = len(cluster) / len(rows)
        return rewards
