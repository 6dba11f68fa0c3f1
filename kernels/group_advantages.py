"""Rewards compared within their group: one launch, no sort, no atomics.

A program takes a few rollouts and walks over all that there are three times, comparing ids: extremes and count, then the sum, then the
squares. Sums are integers: a reward's height above the lowest of its group, as a fraction of a power of two, in units of 2^-62. Integers
add up to the same in any order, so the bits are those of `csrc/cpu/group_advantages.cpp`, wherever a rollout stands.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor
from urlvr_fast.kernels import targets
from urlvr_fast.kernels.targets import RUNTIME, Constant, Launch

from urlvr_fast.ops.reference import LARGEST_REWARD

LARGEST = Constant(LARGEST_REWARD)
TO_UNITS, FROM_UNITS, FROM_UPPER = Constant(2.0**62), Constant(2.0**-62), Constant(2.0**-31)
LOWER_BITS = Constant(2**31 - 1)
INFINITY = Constant(float("inf"))


@triton.jit
def _load(rewards, group_ids, mask, at, rows):
    """Rewards in fp64, +inf where they are no number; their ids, 0 where there are none; whether they count. at: int32."""
    counts = at < rows
    if mask is not None:
        counts &= tl.load(mask + at, mask=counts, other=False)
    r = tl.load(rewards + at, mask=counts, other=0.0).to(tl.float64)
    r = tl.where(tl.abs(r) <= LARGEST, r, INFINITY)
    ids = tl.zeros(at.shape, tl.int64)
    if group_ids is not None:
        ids = tl.load(group_ids + at, mask=counts, other=0).to(tl.int64)
    return r, ids, counts


@triton.jit
def _tile(rewards, group_ids, mask, own, start, rows, BLOCK: tl.constexpr):
    """The rollouts from `start` on, (1, BLOCK), and which of the groups `own` (R, 1) they belong to, (R, BLOCK)."""
    r, ids, counts = _load(rewards, group_ids, mask, start + tl.arange(0, BLOCK), rows)
    return r[None, :], (own == ids[None, :]) & counts[None, :]


@triton.jit
def _units(x, inside):
    """Numbers in [0, 1) as integers, in two halves, of which 2^32 can be added up."""
    units = tl.where(inside, x * TO_UNITS, 0.0).to(tl.int64)
    return units >> 31, units & LOWER_BITS


@triton.jit
def _fixed_sum(upper, lower):
    upper, lower = tl.sum(upper, 1, keep_dims=True), tl.sum(lower, 1, keep_dims=True)
    return upper.to(tl.float64) * FROM_UPPER + lower.to(tl.float64) * FROM_UNITS


@triton.jit
def _measure(rewards, group_ids, mask, own, rows, BLOCK: tl.constexpr):
    """(count, lowest, highest, unit, its inverse, mean height in units, standard deviation) of each of the groups `own`, (R, 1)."""
    R: tl.constexpr = own.shape[0]
    NARROW: tl.constexpr = tl.float64 if rewards.dtype.element_ty == tl.float64 else tl.float32
    count = tl.zeros((R, BLOCK), tl.int32)
    lowest, highest = tl.full((R, BLOCK), INFINITY, NARROW), tl.full((R, BLOCK), -INFINITY, NARROW)
    for start in range(0, rows, BLOCK):
        r, member = _tile(rewards, group_ids, mask, own, start, rows, BLOCK)
        r = r.to(NARROW)  # extremes need no more digits than the rewards have
        count += member.to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(member, r, INFINITY))
        highest = tl.maximum(highest, tl.where(member, r, -INFINITY))
    n = tl.sum(count, 1, keep_dims=True).to(tl.float64)
    low = tl.min(lowest, 1, keep_dims=True).to(tl.float64)
    high = tl.max(highest, 1, keep_dims=True).to(tl.float64)
    # A power of two above the range, of an exponent whose inverse still is a number.
    exponent = tl.maximum(((high - low).to(tl.int64, bitcast=True) >> 52) & 2047, 22)
    unit = ((exponent + 1) << 52).to(tl.float64, bitcast=True)
    inverse = ((2045 - exponent) << 52).to(tl.float64, bitcast=True)

    upper, lower = tl.zeros((R, BLOCK), tl.int64), tl.zeros((R, BLOCK), tl.int64)
    for start in range(0, rows, BLOCK):
        r, member = _tile(rewards, group_ids, mask, own, start, rows, BLOCK)
        if tl.max(member.to(tl.int32)) > 0:  # few tiles have a member, and fp64 is slow on many a GPU
            u, l = _units((r - low) * inverse, member)
            upper += u
            lower += l
    mean = _fixed_sum(upper, lower) / n

    upper, lower = tl.zeros((R, BLOCK), tl.int64), tl.zeros((R, BLOCK), tl.int64)
    for start in range(0, rows, BLOCK):
        r, member = _tile(rewards, group_ids, mask, own, start, rows, BLOCK)
        if tl.max(member.to(tl.int32)) > 0:
            centred = (r - low) * inverse - mean
            u, l = _units(centred * centred, member)
            upper += u
            lower += l
    return n, low, high, unit, inverse, mean, tl.sqrt(_fixed_sum(upper, lower) / (n - 1)) * unit


@triton.jit(do_not_specialize=RUNTIME)
def advantages_kernel(
    rewards, group_ids, mask, out, rows, eps_bits,
    SCALE: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """A program per ROWS rollouts."""
    eps = eps_bits.to(tl.int64).to(tl.float64, bitcast=True)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r, own, counts = _load(rewards, group_ids, mask, at, rows)
    r, own = r[:, None], own[:, None]
    n, low, high, unit, inverse, mean, deviation = _measure(rewards, group_ids, mask, own, rows, BLOCK)
    a = ((r - low) * inverse - mean) * unit
    if LEAVE_ONE_OUT:
        a *= n / (n - 1)
    broken = high == INFINITY  # a reward of the group is no number
    if SCALE == "group":
        a /= deviation + eps
    if SCALE == "batch":
        everyone = tl.zeros((1, 1), tl.int64)
        _, _, highest, _, _, _, deviation = _measure(rewards, None, mask, everyone, rows, BATCH)
        a /= deviation + eps
        broken |= highest == INFINITY
    a = tl.where(broken, float("nan"), a)
    a = tl.where(counts[:, None] & ((low != high) | (high == INFINITY)), a, 0.0)
    # By way of fp32, as torch rounds fp64 to 16 bits.
    a = a if out.dtype.element_ty == tl.float64 else a.to(tl.float32)
    tl.store(out + at[:, None], a.to(out.dtype.element_ty), mask=at[:, None] < rows)


def plan_advantages(rewards: Tensor, group_ids: Tensor, mask: Tensor | None, scale: str, baseline: str, eps: float, out: Tensor) -> Launch:
    """What `advantages` launches."""
    tiles = targets.ADVANTAGES
    arguments = {
        "rewards": rewards,
        "group_ids": group_ids,
        "mask": mask,
        "out": out,
        "rows": len(rewards),
        "eps_bits": struct.unpack("q", struct.pack("d", eps))[0],  # Triton would take a Python float as fp32
        "SCALE": scale,
        "LEAVE_ONE_OUT": baseline == "leave_one_out",
        "ROWS": tiles.rows,
        "BLOCK": tiles.columns,
        "BATCH": tiles.rows * tiles.columns,
    }
    return Launch(advantages_kernel, triton.cdiv(len(rewards), tiles.rows), arguments, tiles.warps)


def advantages(
    rewards: Tensor,  # (B,), contiguous as the rest
    group_ids: Tensor,  # (B,) int32 or int64
    mask: Tensor | None,  # (B,) bool
    scale: str,
    baseline: str,
    eps: float,
    out: Tensor,  # (B,) as the rewards
) -> None:
    """Write the advantages; NaN in a group with a reward that is no number."""
    if rewards.numel():
        with torch.cuda.device_of(rewards):
            plan_advantages(rewards, group_ids, mask, scale, baseline, eps, out).run()
