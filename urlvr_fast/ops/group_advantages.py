"""group_advantages: rewards compared within the group of rollouts that share a prompt.

`csrc/cpu/group_advantages.cpp` and `kernels/group_advantages.py` do it in one kernel each, to the same bits; `reference.py` defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from urlvr_fast.ops import checks, reference
from urlvr_fast.ops.backend import choose_backend, kernels
from urlvr_fast.ops.registered import define

# ---- the op that torch knows -----------------------------------------------------------------------------------------------------------


def _refuse(rewards: Tensor, group_ids: Tensor, at: int) -> None:
    raise ValueError(
        f"rewards[{at}] is {rewards[at].item()} (group {int(group_ids[at])}): "
        f"a reward must be a finite number of at most {reference.LARGEST_REWARD:g}"
    )


def _run(rewards: Tensor, group_ids: Tensor, mask: Tensor | None, scale: str, baseline: str, eps: float, backend: str) -> Tensor:
    # On the CPU bad rewards raise here, within the op, so that they do under torch.compile too. The C++ kernel finds them as it goes.
    if backend != "cpp" and rewards.device.type == "cpu":
        wrong = reference.no_number(rewards) if mask is None else reference.no_number(rewards) & mask
        if bool(wrong.any()):
            _refuse(rewards, group_ids, int(wrong.nonzero()[0]))
    if backend == "torch":
        return reference.group_advantages(rewards, group_ids, scale=scale, baseline=baseline, eps=eps, mask=mask)
    out = rewards.new_empty(rewards.shape)
    dense = rewards.contiguous(), group_ids.contiguous(), None if mask is None else mask.contiguous()
    at = kernels(backend).advantages(*dense, scale, baseline, eps, out)
    if backend == "cpp" and at >= 0:
        _refuse(rewards, group_ids, at)
    return out


_advantages = define(
    "group_advantages",
    "(Tensor rewards, Tensor group_ids, Tensor? mask, str scale, str baseline, float eps, str backend) -> Tensor",
    _run,
    lambda rewards, *_: rewards.new_empty(rewards.shape),
)


# ---- the function that users see -------------------------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    scale: str = "group",
    baseline: str = "mean",
    eps: float = 1e-6,
    mask: Tensor | None = None,
    backend: str | None = None,
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
        backend: see `backend.py`. There is no CUDA C++ kernel: "cuda" raises. Rewards may be on the CPU while the model is on a GPU, so a
            URLVR_FAST_BACKEND that takes tensors of another device than the rewards' is not meant for them.

    Returns:
        (B,) in the rewards' dtype and device, without a graph; computed in float64. A group of one and a group whose rewards are all equal
        get exactly 0. In the cpp and triton backends an advantage's bits depend on its group's rewards (with "batch", on the batch's) and
        on nothing else, and both give the same. A GPU compares every two rollouts: that is meant for thousands, not for a million.

    Raises:
        ValueError: a reward that counts is NaN, infinite or beyond ±1e150, on the CPU. On CUDA, where nothing waits for the device, its
            group comes out NaN (with "batch" every group that is not constant). Also: wrong shapes; an unknown scale or baseline.
        TypeError: rewards that are not floating point, ids that are not integers, a mask that is not bool.
        RuntimeError: a backend that was named and cannot be had.
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
    backend = choose_backend(backend, rewards.device, off_model=True)
    if backend == "cuda":
        raise RuntimeError("backend='cuda' has no kernel for group_advantages: pass backend='triton' or 'torch'")
    rewards = rewards.detach() if rewards.requires_grad else rewards
    return _advantages(rewards, group_ids, mask, scale, baseline, float(eps), backend)
