"""Fused ops and the complete method for reinforcement learning without labels. Importing this needs torch alone."""

from urlvr_fast.ops import (
    TokenStats,
    group_advantages,
    linear_policy_loss,
    linear_token_stats,
    policy_loss,
    policy_loss_from_logits,
    token_stats,
)

__all__ = [
    "TokenStats",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "policy_loss_from_logits",
    "token_stats",
]
