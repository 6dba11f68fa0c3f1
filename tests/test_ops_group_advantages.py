"""group_advantages against exact arithmetic, its invariances, and what torch knows of it, on every backend that runs here.

`TRITON_INTERPRET=1 pytest tests/test_ops_group_advantages.py` runs the Triton kernel (`make test` does both).
"""

import math
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from urlvr_fast import group_advantages
from urlvr_fast.ops import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_HOST = torch.get_default_device().type == "cpu"
BACKENDS = (["triton"] if INTERPRETED else ["cpp", "torch"]) if ON_HOST else ["triton", "torch"]
EXACT_SUMS = ("cpp", "triton")  # the same bits in any order
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SCALES, BASELINES = ["group", "batch", "none"], ["mean", "leave_one_out"]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which interprets: groups of one have no deviation


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton" and INTERPRETED:
        request.getfixturevalue("tiny_triton")
    return request.param


every_option = pytest.mark.parametrize(("scale", "baseline"), [(s, b) for s in SCALES for b in BASELINES])
many_draws = settings(max_examples=12 if INTERPRETED else 80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Ids of few prompts, and any int64; rewards of any size, and on grids, where groups are constant; most of them count.
rollouts = st.lists(
    st.tuples(
        st.floats(-10, 10) | st.integers(0, 2).map(float) | st.floats(-1e6, 1e6, width=32),
        st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 3),
        st.integers(0, 4).map(bool),
    ),
    max_size=30,
)


def exact(rewards, groups, scale, baseline, eps, mask):
    """One rollout at a time, in fractions."""
    rewards = [Fraction(r) if m else None for r, m in zip(rewards, mask, strict=True)]

    def deviation(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    counted = [r for r in rewards if r is not None]
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        mates = [r for r, g in zip(rewards, groups, strict=True) if r is not None and g == group]
        if reward is None or max(mates) == min(mates):
            out.append(0.0)
            continue
        a = reward - sum(mates) / len(mates)
        if baseline == "leave_one_out":
            a = reward - (sum(mates) - reward) / (len(mates) - 1)
        spread = {"none": 1.0, "group": deviation(mates) + eps, "batch": deviation(counted) + eps}[scale]
        out.append(float(a) / spread)
    return torch.tensor(out, dtype=torch.float64)


def tensors(data, dtype=torch.float64):
    rewards = torch.tensor([r for r, _, _ in data], dtype=dtype)
    return rewards, torch.tensor([g for _, g, _ in data], dtype=torch.int64), torch.tensor([m for _, _, m in data], dtype=torch.bool)


def random_batch(rows=24 if INTERPRETED else 60, groups=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, groups, (rows,), generator=g) * (2**59 + 1) - 2**62
    return torch.randn(rows, generator=g) * 3 + 100, ids, torch.rand(rows, generator=g) < 0.8


# ---- values ----------------------------------------------------------------------------------------------------------------------------


def test_two_groups_by_hand(backend):
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 7.0]), torch.tensor([3, 3, 3, 3, -9, -9])

    def of(**options):
        return group_advantages(rewards, ids, backend=backend, **options)

    std = math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    expected = torch.tensor([0.75 / std, -0.25 / std, -0.25 / std, -0.25 / std, -1 / math.sqrt(2), 1 / math.sqrt(2)])
    torch.testing.assert_close(of(eps=0.0), expected)
    torch.testing.assert_close(of(scale="none"), torch.tensor([0.75, -0.25, -0.25, -0.25, -1.0, 1.0]))
    loo = of(scale="none", baseline="leave_one_out")
    torch.testing.assert_close(loo, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, -2.0, 2.0]))
    torch.testing.assert_close(of(scale="batch", eps=0.0), of(scale="none") / rewards.std())


@every_option
@many_draws
@given(data=rollouts, eps=st.sampled_from([1e-6, 1e-2, 1.0]), order=st.randoms(use_true_random=False))
def test_equals_exact_arithmetic_in_any_order(backend, scale, baseline, data, eps, order):
    rewards, ids, mask = tensors(data)
    options = {"scale": scale, "baseline": baseline, "eps": eps}
    got = group_advantages(rewards, ids, mask=mask, backend=backend, **options)
    expected = exact(rewards.tolist(), ids.tolist(), mask=mask.tolist(), **options)
    size = max([1.0, *rewards.abs().tolist()]) if scale == "none" else 1.0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13 * size)
    permutation = torch.tensor(order.sample(range(len(data)), len(data)), dtype=torch.int64)
    shuffled = group_advantages(rewards[permutation], ids[permutation], mask=mask[permutation], backend=backend, **options)
    if backend in EXACT_SUMS:
        assert torch.equal(shuffled, got[permutation])
    torch.testing.assert_close(shuffled, got[permutation], rtol=1e-12, atol=1e-13 * size)


@every_option
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_dtypes(backend, scale, baseline, dtype, ids_dtype):
    rewards, ids, mask = random_batch()
    rewards, ids = rewards.to(dtype), (ids >> 59).to(ids_dtype)
    options = {"scale": scale, "baseline": baseline, "mask": mask}
    got = group_advantages(rewards, ids, backend=backend, **options)
    wide = group_advantages(rewards.double(), ids.long(), backend="torch", **options)
    assert got.dtype == dtype
    if INTERPRETED and backend == "triton" and dtype == torch.bfloat16:  # the interpreter does not round to bf16, it cuts off
        torch.testing.assert_close(got, wide.to(dtype))
    else:
        torch.testing.assert_close(got, wide.to(dtype), rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
    if backend == "triton" and not (INTERPRETED and dtype == torch.bfloat16):
        options["mask"] = mask.cpu()
        assert torch.equal(got.cpu(), group_advantages(rewards.cpu(), ids.cpu(), backend="cpp", **options))


@every_option
def test_constant_groups_and_groups_of_one_are_exactly_zero(backend, scale, baseline):
    rewards = torch.tensor([0.1] * 7 + [3.0] + [1.0, 2.0] + [1e30] * 3)  # seven 0.1 do not average to 0.1 in fp32
    ids = torch.tensor([1] * 7 + [2] + [3, 3] + [-(2**63)] * 3)
    got = group_advantages(rewards, ids, scale=scale, baseline=baseline, eps=0.0, backend=backend)
    assert torch.equal(got[[*range(8), 10, 11, 12]], torch.zeros(11))
    assert got[8] < 0 < got[9]
    assert torch.equal(group_advantages(rewards[:1], ids[:1], scale=scale, baseline=baseline, backend=backend), torch.zeros(1))


def test_a_large_offset_costs_nothing(backend):
    rewards, ids = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64), torch.tensor([0, 0, 0])
    for scale in SCALES:
        near, far = (group_advantages(r, ids, scale=scale, backend=backend) for r in (rewards, rewards + 2.0**40))
        torch.testing.assert_close(far, near, rtol=1e-12, atol=0)
    single = torch.tensor([16777216.0, 16777218.0])
    assert torch.equal(group_advantages(single, ids[:2], scale="none", backend=backend), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-290, 1e-140, 1e150])
def test_rewards_of_any_size(backend, size):
    rewards, ids = torch.tensor([size, 0.0, -size, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    got = group_advantages(rewards, ids, scale="none", backend=backend)
    torch.testing.assert_close(got, rewards, rtol=1e-12, atol=1e-308)
    if size > (1e-300 if backend in EXACT_SUMS else 1e-150):  # the reference squares
        got = group_advantages(rewards, ids, eps=0.0, backend=backend)
        torch.testing.assert_close(got, torch.tensor([1.0, 0, -1, 0], dtype=torch.float64) * math.sqrt(3 / 2), rtol=1e-12, atol=1e-15)


# ---- who counts ------------------------------------------------------------------------------------------------------------------------


def test_masked_rollouts_do_not_count(backend):
    rewards, ids = torch.tensor([1.0, math.nan, 3.0, math.inf]), torch.tensor([0, 0, 0, 1])
    mask = torch.tensor([True, False, True, False])
    got = group_advantages(rewards, ids, mask=mask, scale="none", backend=backend)
    assert torch.equal(got, torch.tensor([-1.0, 0.0, 1.0, 0.0]))


@every_option
def test_masking_is_leaving_out(backend, scale, baseline):
    rewards, ids, mask = random_batch()
    options = {"scale": scale, "baseline": baseline, "backend": backend}
    got = group_advantages(torch.where(mask, rewards, math.nan), ids, mask=mask, **options)
    assert (got[~mask] == 0).all()
    assert torch.equal(got[mask], group_advantages(rewards[mask], ids[mask], **options))


@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("baseline", BASELINES)
def test_a_group_does_not_depend_on_the_others(backend, scale, baseline):
    rewards, ids, mask = random_batch()
    options = {"scale": scale, "baseline": baseline, "backend": backend}
    together = group_advantages(rewards, ids, mask=mask, **options)
    for group in ids.unique():
        mine = ids == group
        assert torch.equal(together[mine], group_advantages(rewards[mine], ids[mine], mask=mask[mine], **options))


def test_any_strides(backend):
    rewards, ids, mask = random_batch()
    apart = [torch.stack([t, t.flip(0)], 1)[:, 0] for t in (rewards, ids, mask)]
    assert not apart[0].is_contiguous()
    got = group_advantages(apart[0], apart[1], mask=apart[2], backend=backend)
    assert torch.equal(got, group_advantages(rewards, ids, mask=mask, backend=backend))
    everyone = group_advantages(rewards, torch.zeros((), dtype=torch.int64).expand(len(rewards)), backend=backend)
    torch.testing.assert_close(everyone, (rewards - rewards.mean()) / (rewards.std() + 1e-6))


@pytest.mark.host
@pytest.mark.skipif(INTERPRETED, reason="the C++ kernel's table of ids")
def test_many_ids():
    """Ids that differ in a few bits only, wherever those are, and as many groups as there are pairs of rollouts."""
    for shift in (0, 1, 13, 31, 47):
        ids = torch.arange(30000).repeat(2) << shift
        rewards = torch.rand(60000, dtype=torch.float64)
        got = group_advantages(rewards, ids, scale="none", backend="cpp")
        torch.testing.assert_close(got[:30000], (rewards[:30000] - rewards[30000:]) / 2, rtol=1e-9, atol=1e-12)
        assert torch.equal(got[:30000], -got[30000:])


# ---- what it takes and what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_comes_back_and_no_graph(backend, dtype):
    rewards = torch.tensor([0.0, 1.0], dtype=dtype, requires_grad=True)
    got = group_advantages(rewards, torch.tensor([5, 5], dtype=torch.int32), backend=backend)
    assert got.dtype == dtype
    assert not got.requires_grad


@every_option
def test_nothing_in_nothing_out(backend, scale, baseline):
    options = {"scale": scale, "baseline": baseline, "backend": backend}
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), **options).shape == (0,)
    got = group_advantages(torch.ones(2), torch.tensor([0, 0]), mask=torch.zeros(2, dtype=torch.bool), **options)
    assert torch.equal(got, torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        pytest.param({"rewards": torch.tensor([0.0, math.nan])}, ValueError, r"rewards\[1\] is nan \(group 7\)", marks=pytest.mark.host),
        pytest.param({"rewards": torch.tensor([-math.inf, 0.0])}, ValueError, r"rewards\[0\] is -inf", marks=pytest.mark.host),
        pytest.param(
            {"rewards": torch.tensor([0.0, 2e150], dtype=torch.float64)},
            ValueError,
            r"rewards\[1\] is 2e\+150 .* of at most 1e\+150",
            marks=pytest.mark.host,
        ),
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
def test_errors(backend, arguments, error, match):
    call = {"rewards": torch.tensor([0.0, 1.0]), "group_ids": torch.tensor([7, 7]), **arguments}
    with pytest.raises(error, match=match):
        group_advantages(call.pop("rewards"), call.pop("group_ids"), backend=backend, **call)


@every_option
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_where_nobody_can_raise_the_group_is_nan(request, scale, baseline, bad):
    """On CUDA. Here: the Triton kernel and the reference, below the check."""
    rewards, ids = torch.tensor([1.0, bad, 2.0, 5.0, 5.0, bad, 3.0, 4.0]), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    mask = torch.ones(8, dtype=torch.bool)
    expected = [True, True, True, False, False, True, *([scale == "batch"] * 2)]
    if not ON_HOST:
        got = group_advantages(rewards, ids, scale=scale, baseline=baseline, mask=mask, backend="triton")
    elif INTERPRETED:
        from urlvr_fast import kernels

        request.getfixturevalue("tiny_triton")
        got = torch.zeros(8)
        kernels.advantages(rewards, ids, mask, scale, baseline, 1e-6, got)
    else:
        got = reference.group_advantages(rewards, ids, scale=scale, baseline=baseline, mask=mask)
    assert got.isnan().tolist() == expected
    assert (got[3:5] == 0).all()


# ---- what torch knows of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(backend, masked, dtype):
    rewards, ids, mask = random_batch(20, 4)
    call = (rewards.to(dtype), ids, mask if masked else None, "group", "mean", 1e-6, backend)
    torch.library.opcheck(torch.ops.urlvr_fast.group_advantages.default, call)


@pytest.mark.skipif(INTERPRETED, reason="nothing of Triton is in it")
@pytest.mark.parametrize("engine", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.real)])
def test_compiled_without_a_graph_break_and_for_any_length(backend, engine):
    torch.compiler.reset()

    def function(r, g, m):
        return group_advantages(r * 2, g, mask=m, scale="batch", baseline="leave_one_out", backend=backend) + 1

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=engine)
    for rows in (5, 8, 60):
        call = random_batch(rows)
        torch.testing.assert_close(compiled(*call), function(*call))
    rewards, ids, mask = random_batch(8)
    rewards[mask.nonzero()[0]] = math.nan
    if not ON_HOST:
        assert compiled(rewards, ids, mask).isnan().any()
        return
    with pytest.raises(ValueError, match="a reward must be a finite number"):
        compiled(rewards, ids, mask)
