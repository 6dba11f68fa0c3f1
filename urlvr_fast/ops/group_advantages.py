"""group_advantages: rewards compared within the group of rollouts that share a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from urlvr_fast.ops import checks, reference


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "group", baseline: str = "mean", eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Advantages of B rollouts: (reward − baseline of its group) / scale.

    Args:
        rewards: (B,) floating point, one a rollout.
        group_ids: (B,) int64 or int32; any values in any order, groups of any sizes. Equal ids are one group.
        scale: "group" divides by the group's standard deviation + eps (GRPO), "batch" by that of all unmasked raw rewards + eps, "none" not
            at all (Dr. GRPO). Standard deviations are unbiased (n − 1).
        baseline: "mean" of the group; "leave_one_out" the mean of the others, i.e. n / (n − 1) · (r − mean) (RLOO).
        eps: added to the standard deviation.
        mask: (B,) bool, True counts. A masked rollout gets 0 and is in nobody's baseline or deviation; its reward may be anything.

    Returns:
        (B,) in the rewards' dtype and device, without a graph; computed in float64. A group of one and a group whose rewards are all equal
        get exactly 0.

    Raises:
        ValueError: a reward that counts is NaN or infinite; wrong shapes; an unknown scale or baseline.
        TypeError: rewards that are not floating point, ids that are not integers, a mask that is not bool.
    """
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (B,), not {tuple(rewards.shape)}")
    if rewards.dtype not in checks.FLOATS:
        raise TypeError(f"rewards must be floating point, not {rewards.dtype}")
    checks.check_rows("group_ids", group_ids, tuple(rewards.shape), rewards.device, (torch.int64, torch.int32))
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale={scale!r} must be 'group', 'batch' or 'none'")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"baseline={baseline!r} must be 'mean' or 'leave_one_out'")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    if mask is not None:
        checks.check_mask(mask, tuple(rewards.shape), rewards.device)
    rewards = rewards.detach()
    wrong = ~rewards.isfinite() if mask is None else ~rewards.isfinite() & mask
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"rewards[{at}] is {rewards[at].item()} (group {int(group_ids[at])}): a reward must be a finite number")
    return reference.group_advantages(rewards, group_ids, scale=scale, baseline=baseline, eps=eps, mask=mask)
