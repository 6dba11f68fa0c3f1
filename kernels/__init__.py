"""Triton kernels, one file per op. `urlvr_fast.ops.backend` is the only importer; without Triton nobody imports this."""

from urlvr_fast.kernels.group_advantages import advantages
from urlvr_fast.kernels.policy_loss import join, loss_rows, objective
from urlvr_fast.kernels.policy_loss_from_logits import policy
from urlvr_fast.kernels.scale_rows import scale
from urlvr_fast.kernels.token_stats import gradient, statistics

__all__ = ["advantages", "gradient", "join", "loss_rows", "objective", "policy", "scale", "statistics"]
