"""group_advantages against hand-made cases, a slow loop, and its invariances."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from urlvr_fast import group_advantages


def slow(rewards, groups, scale, baseline, eps, mask):
    """One rollout at a time, in Python floats."""
    counted = [i for i in range(len(rewards)) if mask[i]]
    out = [0.0] * len(rewards)
    for i in counted:
        mates = [rewards[j] for j in counted if groups[j] == groups[i]]
        if max(mates) == min(mates):
            continue
        centre = statistics.fmean(mates)
        if baseline == "leave_one_out":
            centre = (math.fsum(mates) - rewards[i]) / (len(mates) - 1)
        spread = {"none": 1.0, "group": statistics.stdev(mates) + eps}.get(scale) or statistics.stdev([rewards[j] for j in counted]) + eps
        out[i] = (rewards[i] - centre) / spread
    return torch.tensor(out, dtype=torch.float64)


def test_two_groups_by_hand():
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0]), torch.tensor([3, 3, 3, 3, -9, -9])
    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    expected = torch.tensor([0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std, -1 / math.sqrt(2), 1 / math.sqrt(2)])
    torch.testing.assert_close(group_advantages(rewards, ids, eps=0.0), expected)
    torch.testing.assert_close(group_advantages(rewards, ids, scale="none"), torch.tensor([0.75, -0.25, -0.25, -0.25, -1.0, 1.0]))
    loo = group_advantages(rewards, ids, scale="none", baseline="leave_one_out")
    torch.testing.assert_close(loo, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, -2.0, 2.0]))
    batch = group_advantages(rewards, ids, scale="batch", eps=0.0)
    torch.testing.assert_close(batch, group_advantages(rewards, ids, scale="none") / rewards.std())


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.floats(-10, 10), st.integers(-(2**62), 2**62) | st.integers(0, 2), st.booleans()), min_size=1, max_size=12),
    scale=st.sampled_from(["group", "batch", "none"]),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
    order=st.randoms(use_true_random=False),
)
def test_equals_the_slow_loop_in_any_order(data, scale, baseline, order):
    rewards = torch.tensor([r for r, _, _ in data], dtype=torch.float64)
    groups, mask = torch.tensor([g for _, g, _ in data]), torch.tensor([m for _, _, m in data])
    options = {"scale": scale, "baseline": baseline, "eps": 1e-2}
    got = group_advantages(rewards, groups, mask=mask, **options)
    torch.testing.assert_close(got, slow(rewards.tolist(), groups.tolist(), mask=mask.tolist(), **options), rtol=1e-7, atol=1e-7)
    permutation = torch.tensor(order.sample(range(len(data)), len(data)))
    shuffled = group_advantages(rewards[permutation], groups[permutation], mask=mask[permutation], **options)
    torch.testing.assert_close(shuffled, got[permutation], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_constant_groups_and_groups_of_one_are_exactly_zero(scale, baseline):
    rewards = torch.tensor([0.1] * 7 + [3.0] + [1.0, 2.0])  # seven 0.1 do not average to 0.1 in fp32
    ids = torch.tensor([1] * 7 + [2] + [3, 3])
    got = group_advantages(rewards, ids, scale=scale, baseline=baseline, eps=0.0)
    assert torch.equal(got[:8], torch.zeros(8))
    assert got[8] < 0 < got[9]


def test_a_large_offset_costs_nothing():
    rewards, ids = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), torch.tensor([0, 0, 0])
    torch.testing.assert_close(group_advantages(rewards + 2.0**40, ids), group_advantages(rewards, ids), rtol=1e-12, atol=0)
    single = torch.tensor([16777216.0, 16777218.0])
    torch.testing.assert_close(group_advantages(single, ids[:2], scale="none"), torch.tensor([-1.0, 1.0]))


def test_masked_rollouts_do_not_count():
    rewards, ids = torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([0, 0, 0, 1])
    mask = torch.tensor([True, False, True, False])
    got = group_advantages(rewards, ids, mask=mask, scale="none")
    assert torch.equal(got, torch.tensor([-1.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_comes_back_and_no_graph(dtype):
    rewards = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    got = group_advantages(rewards, torch.tensor([5, 5], dtype=torch.int32))
    assert got.dtype == dtype
    assert not got.requires_grad


def test_nothing_in_nothing_out():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    got = group_advantages(torch.ones(2), torch.tensor([0, 0]), mask=torch.zeros(2, dtype=torch.bool), scale="batch")
    assert torch.equal(got, torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rewards": torch.tensor([0.0, math.nan])}, ValueError, r"rewards\[1\] is nan \(group 7\)"),
        ({"rewards": torch.tensor([-math.inf, 0.0])}, ValueError, r"rewards\[0\] is -inf"),
        ({"rewards": torch.tensor([0, 1])}, TypeError, "floating point"),
        ({"rewards": torch.zeros(1, 2)}, ValueError, r"rewards must have shape \(B,\)"),
        ({"group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "group_ids must have shape"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids must be int64 or int32"),
        ({"mask": torch.ones(2)}, TypeError, "mask must be bool"),
        ({"scale": "std"}, ValueError, "scale='std'"),
        ({"baseline": "median"}, ValueError, "baseline='median'"),
        ({"eps": -1.0}, ValueError, "eps"),
    ],
)
def test_errors(arguments, error, match):
    call = {"rewards": torch.tensor([0.0, 1.0]), "group_ids": torch.tensor([7, 7]), **arguments}
    with pytest.raises(error, match=match):
        group_advantages(call.pop("rewards"), call.pop("group_ids"), **call)
