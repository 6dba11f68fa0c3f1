"""The Triton kernels, interpreted on the CPU, against the float64 reference: `TRITON_INTERPRET=1 pytest tests/test_kernels_triton.py`.

The variable has to be set before Triton is imported, so these tests skip without it. Tiles are made tiny, so that rows of 139 columns
have several segments, several tiles a segment, and a tail; what the real sizes compile to is tests/test_kernels_triton_compile.py.
"""

import itertools
import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in the environment, before Triton is imported", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from urlvr_fast.kernels import policy_loss, policy_loss_from_logits, scale_rows, targets, token_stats

from urlvr_fast.ops import reference
from urlvr_fast.ops.layout import (
    CORRECTIONS,
    ENTROPY_ON_KEEP,
    GRADS,
    HAS_OLD,
    HAS_REF,
    HAS_ROLLOUT,
    KL_KINDS,
    LOSS_KINDS,
    LOSS_LINES,
    RAW,
    STATS,
    Stat,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy: NaN and −inf are what some rows are made of

INF, NAN = math.inf, math.nan
EVERYTHING = (1 << 9) - 1
A, B, V = 2, 3, 139
N = A * B
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def interpreter(tiny_triton, monkeypatch):
    split_rows(monkeypatch, False)


def split_rows(monkeypatch, always):
    monkeypatch.setattr(targets, "ROWS_PER_PROCESSOR", 10**6 if always else 0)


def random_logits(dtype=torch.float32, seed=1, size=3.0, shape=(A, B, V)):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def strided(logits):
    """The same numbers with strides that do not merge, every row off the 16-byte boundaries."""
    a, b, v = logits.shape
    base = torch.full((a, b + 1, v + 12), NAN, dtype=logits.dtype)
    view = base[:, 1:, 1 : v + 1]
    view.copy_(logits)
    return view


G = torch.Generator().manual_seed(0)
IDS = torch.randint(0, V, (N,), generator=G)
KEPT = torch.rand(N, V, generator=G) < 0.2
KEPT[torch.arange(N), IDS] = True
BIAS = torch.randn(V, generator=G)
TEMPERATURES = torch.rand(N, generator=G) + 0.4
MASK = torch.tensor([True, False, True, True, False, True])


def csr(kept, shift=0):
    """CSR whose `crow` begins at `shift`: the entries before belong to nobody."""
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]) + shift
    return crow, torch.cat([torch.full((shift,), -7), kept.nonzero()[:, 1]])


CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per-row temperature": {"temperatures": TEMPERATURES},
    "scale": {"scale": 1.3, "temperatures": TEMPERATURES},
    "negative scale": {"scale": -0.4},
    "softcap": {"softcap": 30.0},
    "tight softcap": {"softcap": 2.5, "temperature": 0.6},
    "bias": {"bias": BIAS},
    "mask": {"mask": MASK},
    "keep": {"kept": KEPT},
    "entropy on keep": {"kept": KEPT, "entropy_on_keep": True, "temperature": 1.3},
    "everything": {"bias": BIAS, "scale": 1.3, "softcap": 5.0, "temperatures": TEMPERATURES, "mask": MASK, "kept": KEPT},
}


def row_arguments(logits, ids=IDS, id_offset=0, total=None, *, temperature=1.0, softcap=0.0, scale=1.0, **tensors):
    kept = tensors.get("kept")
    crow, col = (None, None) if kept is None else csr(kept, shift=3)
    return (
        *(logits, tensors.get("bias"), ids, tensors.get("mask"), tensors.get("temperatures"), crow, col),
        *(temperature, softcap, scale, id_offset, logits.shape[-1] if total is None else total),
    )


def flags_of(case, flags=EVERYTHING):
    return flags | (ENTROPY_ON_KEEP if case.get("entropy_on_keep") else 0)


def statistics(logits, case=None, flags=EVERYTHING, **row_options):
    case = case or {}
    out = torch.full((STATS, logits.shape[0] * logits.shape[1]), 77.0)
    token_stats.statistics(*row_arguments(logits, **{k: v for k, v in case.items() if k != "entropy_on_keep"}, **row_options), flags, out)
    return out


def gradient(logits, stats, upstream, case=None, flags=EVERYTHING, given=31, out=None, bias_grad=None, **row_options):
    case = case or {}
    out = torch.full_like(logits, 77.0) if out is None else out
    rows = row_arguments(logits, **{k: v for k, v in case.items() if k != "entropy_on_keep"}, **row_options)
    token_stats.gradient(*rows, flags, stats, upstream, given, out, bias_grad)
    return out


def reference_stats(logits, case, ids=IDS, bias=None):
    """In float64 (with autograd by logits and bias)."""
    options = {"temperature": case.get("temperatures", case.get("temperature", 1.0)), "scale": case.get("scale", 1.0)}
    return reference.token_stats(
        logits.reshape(-1, logits.shape[-1]).double(),
        ids,
        softcap=case.get("softcap"),
        bias=case.get("bias") if bias is None else bias,
        mask=case.get("mask"),
        keep=None if "kept" not in case else csr(case["kept"]),
        entropy_support="keep" if case.get("entropy_on_keep") else "full",
        **options,
    )


def largest_x(logits, case):
    """(N,) max |x| over the finite x."""
    temperature = case.get("temperatures", case.get("temperature", 1.0))
    flat = logits.reshape(-1, logits.shape[-1]).double()
    x = reference.scaled_logits(flat, temperature, case.get("softcap"), case.get("scale", 1.0), case.get("bias"))
    return torch.where(x.isfinite(), x, 0).abs().amax(-1)


def assert_stats(out, expected, logits, case):
    """Within 2e-6 + 2 ulp₃₂(max(|x|max, |result|)) of float64, NaN and −inf where the reference has them."""
    size = largest_x(logits, case)
    for i, (name, value) in enumerate(expected._asdict().items()):
        if value is None:
            continue
        got, value = out[i].double(), value.detach().double()
        same = (got == value) | (got.isnan() & value.isnan())
        largest = torch.maximum(size, value.abs().nan_to_num(0, 0, 0)).float()
        bound = 2e-6 + 2 * (torch.nextafter(largest, torch.tensor(INF)) - largest).double()
        assert (same | ((got - value).abs() <= bound)).all(), f"{name}: {(got - value).abs().tolist()} above {bound.tolist()}"


def assert_gradient(got, expected):
    """fp32: 1e-5 in norm. fp16: the fp32 gradient rounded once, so a neighbour where that lies close to a tie. bf16 is rounded towards 0
    by the interpreter (to nearest on a GPU), so only the next number towards 0 is as good."""
    expected = expected.reshape(got.shape)
    error = (got.double() - expected).abs()
    assert (got[expected == 0] == 0).all()
    if got.dtype == torch.float32:
        assert error.norm() <= 1e-5 * expected.norm() + 1e-30
    elif got.dtype == torch.float16:
        assert (got == expected.to(got.dtype)).float().mean() > 0.99
        assert (error <= 2**-10 * expected.abs() + 6e-8).all()
    else:
        assert (error <= 2**-7 * expected.abs() + 1e-37).all()


def expected_gradient(logits, case, upstream, ids=IDS):
    """Float64 gradients of Σ upstream · statistics by the logits and by the bias."""
    leaf = logits.double().requires_grad_()
    bias = None if "bias" not in case else case["bias"].double().requires_grad_()
    stats = reference_stats(leaf, case, ids, bias)
    terms = [u.double() * value for u, value in zip(upstream, stats[:GRADS], strict=True)]
    mask = case.get("mask")
    loss = sum((term if mask is None else term[mask]).sum() for term in terms)
    leaves = [leaf] if bias is None else [leaf, bias]
    gradients = torch.autograd.grad(loss, leaves)
    return gradients[0], None if bias is None else gradients[1]


# --------------------------------------------------------------------------------------------------------------- statistics and gradient


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_statistic(case, split, monkeypatch):
    split_rows(monkeypatch, split)
    logits, case = random_logits(), CASES[case]
    out = statistics(logits, case, flags_of(case))
    assert_stats(out, reference_stats(logits, case), logits, case)
    if "mask" in case:
        assert (out[:, ~MASK] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_every_gradient(case):
    logits, case = random_logits(), CASES[case]
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    expected, expected_bias = expected_gradient(logits, case, upstream)
    stats = statistics(logits, case, flags_of(case))
    bias_grad = torch.ones(V) if "bias" in case else None
    if "mask" in case:
        upstream[:, ~MASK] = NAN  # is not read
    assert_gradient(gradient(logits, stats, upstream, case, flags_of(case), bias_grad=bias_grad), expected)
    if bias_grad is not None:
        assert (bias_grad - 1 - expected_bias).norm() <= 1e-5 * expected_bias.norm() + 1e-6  # it was added to ones


@pytest.mark.parametrize("case", ["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_dtypes_and_layouts_in_place(case, dtype, layout):
    logits, case = random_logits(dtype), CASES[case]
    mine = logits.clone() if layout == "contiguous" else strided(logits)
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    expected, _ = expected_gradient(logits, case, upstream)
    stats = statistics(mine, case)
    assert_stats(stats, reference_stats(logits, case), logits, case)
    outside = gradient(mine, stats, upstream, case)
    assert_gradient(outside, expected)
    gradient(mine, stats, upstream, case, out=mine)
    assert torch.equal(mine, outside)
    if layout == "strided":  # nothing beside the rows was written
        assert mine._base.isnan().sum() == mine._base.numel() - mine.numel()


@pytest.mark.parametrize("flags", [1 << stat for stat in range(9)])
def test_statistics_alone(flags):
    """What is not wanted may be anything, but what is wanted needs no other flag."""
    logits = random_logits(shape=(1, 2, V))
    wanted = Stat(flags.bit_length() - 1)
    out, full = statistics(logits, flags=flags, ids=IDS[:2]), statistics(logits, ids=IDS[:2])
    assert torch.equal(out[wanted], full[wanted])


@pytest.mark.parametrize("given", [1 << stat for stat in range(GRADS)])
def test_gradient_of_one_statistic(given):
    """Lines of `upstream` that are not given are not read."""
    logits, line = random_logits(), given.bit_length() - 1
    upstream = torch.zeros(GRADS, N)
    upstream[line] = torch.randn(N, generator=torch.Generator().manual_seed(2))
    expected, _ = expected_gradient(logits, {}, upstream)
    upstream[torch.arange(GRADS) != line] = NAN
    assert_gradient(gradient(logits, statistics(logits, flags=given | 1), upstream, given=given), expected)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 31, 32, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_columns(columns, dtype, monkeypatch):
    """Fewer than a vector, a tile, a segment; exactly one; one more."""
    logits, ids = random_logits(dtype, shape=(1, 3, columns)), torch.tensor([0, columns - 1, columns // 2])
    upstream = torch.randn(GRADS, 3, generator=torch.Generator().manual_seed(2))
    stats = statistics(logits, ids=ids)
    assert_stats(stats, reference_stats(logits, {}, ids), logits, {})
    assert_gradient(gradient(logits, stats, upstream, ids=ids), expected_gradient(logits, {}, upstream, ids)[0])
    split_rows(monkeypatch, True)
    assert torch.equal(statistics(logits, ids=ids), stats)


def test_no_rows():
    logits = torch.empty(1, 0, V)
    stats = statistics(logits, ids=IDS[:0])
    assert stats.shape == (STATS, 0)
    assert gradient(logits, stats, torch.empty(GRADS, 0), ids=IDS[:0]).shape == logits.shape


@pytest.mark.parametrize("offset", [5000.0, -5000.0])
def test_a_common_offset_costs_nothing(offset):
    logits = (random_logits() * 64).round() / 64 + offset  # the sum is exact
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    for case in ({}, {"temperature": 0.7}, {"bias": (BIAS * 64).round() / 64}):
        stats = statistics(logits, case)
        assert_stats(stats, reference_stats(logits, case), logits, case)
        if "temperature" not in case:  # else x itself is rounded
            assert_gradient(gradient(logits, stats, upstream, case), expected_gradient(logits, case, upstream)[0])


def test_minus_infinity(monkeypatch):
    """A lane, a tile, a segment, half of the row, all but one column, all of the row."""
    logits = random_logits()
    rows = logits.view(N, V)
    rows[0, 8:16] = -INF
    rows[1, 64:128] = -INF
    rows[2, :130] = -INF
    rows[3, torch.arange(V) != 17] = -INF
    rows[4] = -INF
    rows[5, 70:] = -INF
    ids = torch.tensor([8, 3, 135, 17, 5, 7])
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    upstream[0, 0] = upstream[:, 4] = 0  # log-prob −inf; no distribution
    stats = statistics(logits, ids=ids)
    assert_stats(stats, reference_stats(logits, {}, ids), logits, {})
    assert stats[Stat.LOGP, 0] == -INF
    assert stats[Stat.LSE : Stat.ARGMAX, 4].isnan().all()
    assert stats[Stat.ARGMAX, 4] == -1
    live = torch.arange(N) != 4
    expected, _ = expected_gradient(logits.view(1, N, V)[:, live], {}, upstream[:, live], ids[live])
    got = gradient(logits, stats, upstream + (~live) * 0.5, ids=ids).view(N, V)
    assert_gradient(got[live], expected)
    assert (got[rows == -INF] == 0).all()
    split_rows(monkeypatch, True)
    assert torch.equal(statistics(logits, ids=ids).nan_to_num(55), stats.nan_to_num(55))


def test_minus_infinity_under_a_softcap_is_finite():
    logits, case = random_logits(), {"softcap": 3.0}
    logits[..., 5:9] = -INF
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    stats = statistics(logits, case)
    assert_stats(stats, reference_stats(logits, case), logits, case)
    finite = logits.clamp(min=-500)
    assert_gradient(gradient(logits, stats, upstream, case), expected_gradient(finite, case, upstream)[0])


@pytest.mark.parametrize("split", [False, True])
def test_a_bad_row_spoils_itself_only(split, monkeypatch):
    """NaN logits, nothing but NaN and −inf, ids out of range, temperatures that are none."""
    split_rows(monkeypatch, split)
    good = random_logits()
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    base = {"temperatures": torch.ones(N)}
    clean = statistics(good, base)
    clean_gradient = gradient(good, clean, upstream, base).view(N, V)

    def check(bad, logits=good, ids=IDS, temperatures=base["temperatures"]):
        case = {"temperatures": temperatures}
        stats = statistics(logits, case, ids=ids)
        got = gradient(logits, stats, upstream, case, ids=ids).view(N, V)
        fine = ~torch.tensor(bad)
        assert torch.equal(stats[:, fine], clean[:, fine])
        assert torch.equal(got[fine], clean_gradient[fine])
        assert stats[: Stat.ARGMAX, ~fine].isnan().all()
        assert (stats[Stat.ARGMAX, ~fine] == -1).all()
        assert got[~fine].isnan().all()

    logits = good.clone()
    logits.view(N, V)[2, 100] = NAN
    logits.view(N, V)[4] = NAN
    check([False, False, True, False, True, False], logits=logits)
    logits = good.clone()
    logits.view(N, V)[1] = -INF
    logits.view(N, V)[1, 9] = NAN
    check([False, True, False, False, False, False], logits=logits)
    check([True, False, True, False, False, False], ids=IDS.index_put((torch.tensor([0, 2]),), torch.tensor([-1, V])))
    temperatures = torch.tensor([1.0, 0.0, 1.0, -1.0, NAN, 1.0])
    check([False, True, False, True, True, False], temperatures=temperatures)


def test_masked_rows_are_not_read():
    logits, ids, temperatures = random_logits(), IDS.clone(), TEMPERATURES.clone()
    logits.view(N, V)[~MASK] = NAN
    ids[~MASK] = 10**12
    temperatures[~MASK] = -1
    case = {"mask": MASK, "temperatures": temperatures, "bias": BIAS}
    stats = statistics(logits, case, ids=ids)
    assert (stats[:, ~MASK] == 0).all()
    assert not stats.isnan().any()
    bias_grad = torch.zeros(V)
    got = gradient(logits, stats, torch.full((GRADS, N), NAN).where(~MASK, torch.ones(GRADS, N)), case, ids=ids, bias_grad=bias_grad)
    assert (got.view(N, V)[~MASK] == 0).all()
    assert not got.isnan().any()
    assert not bias_grad.isnan().any()


def test_dead_rows_get_zeros():
    """Rows without an upstream gradient are written without being read, whatever their statistics are."""
    logits = random_logits()
    stats = statistics(logits)
    upstream = torch.ones(GRADS, N)
    upstream[:, 1] = 0
    logits.view(N, V)[1] = NAN
    got = gradient(logits, stats, upstream).view(N, V)
    assert (got[1] == 0).all()
    assert not got.isnan().any()


def test_ties():
    logits = torch.zeros(1, 2, V)
    logits[0, 0, 70] = logits[0, 0, 130] = 2.0
    logits[0, 1, 3] = logits[0, 1, 5] = 1.0
    stats = statistics(logits, ids=IDS[:2])
    assert stats[Stat.ARGMAX].tolist() == [70, 3]
    assert (stats[Stat.PROB_GAP] == 0).all()


def test_keep_sets_that_are_empty_or_lack_the_id():
    logits, kept = random_logits(), KEPT.clone()
    kept[0] = False
    kept[1, IDS[1]] = False
    case = {"kept": kept}
    stats = statistics(logits, case)
    assert_stats(stats, reference_stats(logits, case), logits, case)
    assert stats[Stat.LOGP, 0].isnan()
    assert stats[Stat.LOGP, 1] == -INF


# --------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("case", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_the_row_alone(case, dtype, monkeypatch):
    """Split or not, aligned or not, alone or among others: the same bits."""
    logits, case = random_logits(dtype), CASES[case]
    stats = statistics(logits, case)
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    whole = gradient(logits, stats, upstream, case)
    assert torch.equal(statistics(strided(logits), case), stats)
    for n in (0, 3):
        alone = {k: v if k == "bias" or not isinstance(v, torch.Tensor) else v[n : n + 1] for k, v in case.items()}
        row = logits.view(1, N, V)[:, n : n + 1]
        got = statistics(row, alone, ids=IDS[n : n + 1])
        assert torch.equal(got[:, 0], stats[:, n])
        one = gradient(row, got, upstream[:, n : n + 1], alone, ids=IDS[n : n + 1])
        assert torch.equal(one[0, 0], whole.view(N, V)[n])
    split_rows(monkeypatch, True)
    assert torch.equal(statistics(logits, case), stats)


# --------------------------------------------------------------------------------------------------------------- vocabulary shards


def merged(raw, case, flags):
    """(STATS, N) statistics from the (ranks, STATS, N) sums, by the definitions, in float64."""
    m, s, t, total, finite, x_id, bad_id, s2, second, argmax, keep_m, keep_s, keep_t, keep_id = raw.double().unbind(1)

    def shifted(m, *sums):
        top = m.amax(0)
        shift = (m - top).clamp(min=-1e20)
        return top, shift, shift.exp(), *sums

    top, shift, w, *_ = shifted(m)
    log_s = (w * s).sum(0).log()
    out = torch.zeros(STATS, raw.shape[2], dtype=torch.float64)
    base, base_log_s = top, log_s
    out[Stat.ENTROPY] = log_s - (w * (t + shift * s)).sum(0) / (w * s).sum(0)
    counts = x_id.amax(0) > -INF
    if "kept" in case:
        base, keep_shift, keep_w, *_ = shifted(keep_m)
        base_log_s = (keep_w * keep_s).sum(0).log()
        counts &= keep_id.sum(0) > 0
        if flags & ENTROPY_ON_KEEP:
            out[Stat.ENTROPY] = base_log_s - (keep_w * (keep_t + keep_shift * keep_s)).sum(0) / (keep_w * keep_s).sum(0)
    mean = (total + shift * finite).sum(0) / finite.sum(0)
    out[Stat.LOGP] = torch.where(counts, x_id.amax(0) - base, -INF) - base_log_s
    out[Stat.LSE] = top + log_s
    out[Stat.SELF_CERTAINTY] = log_s - mean - finite.sum(0).log()
    out[Stat.MEAN_LOGIT] = top + mean
    out[Stat.MAX_PROB] = (-log_s).exp()
    out[Stat.PROB_GAP] = (1 - (torch.cat([m, second]).topk(2, dim=0).values[1] - top).exp()) * (-log_s).exp()
    out[Stat.SUM_P2] = (w * w * s2).sum(0) / (w * s).sum(0) ** 2
    out[Stat.ARGMAX] = argmax.gather(0, m.argmax(0, keepdim=True))[0]
    out[Stat.ROW_MAX], out[Stat.LOG_S], out[Stat.FINITE] = top, log_s, finite.sum(0)
    out[Stat.KEEP_LOG_S], out[Stat.ID_COUNTS] = base - top + base_log_s, counts.double()
    assert (bad_id == 0).all()
    return out.float()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", ["plain", "temperature", "softcap", "bias", "keep", "entropy on keep"])
def test_two_shards(case, split, monkeypatch):
    """Raw sums of unequal shards, merged, give the statistics; each shard writes its columns of the gradient."""
    split_rows(monkeypatch, split)
    logits, case = random_logits(), CASES[case]
    flags, cut = flags_of(case), 77
    logits.view(N, V)[0, cut:] = -INF
    ids = IDS.clone()
    ids[0] = 5
    kept = KEPT.clone()
    kept[0, 5] = True
    kept[1, :cut] = False  # a shard that keeps nothing of a row
    kept[1, ids[1]] = True
    case = case | ({"kept": kept} if "kept" in case else {})
    upstream = torch.randn(GRADS, N, generator=torch.Generator().manual_seed(2))
    shards = []
    for start, end in ((0, cut), (cut, V)):
        part = case | ({"bias": case["bias"][start:end]} if "bias" in case else {})
        options = {"ids": ids, "id_offset": start, "total": V}
        shards.append((start, end, part, options, logits[..., start:end]))
    raw = torch.stack([statistics(local, part, flags | RAW, **options) for _, _, part, options, local in shards])
    stats = merged(raw, case, flags)
    assert_stats(stats, reference_stats(logits, case, ids), logits, case)
    expected, _ = expected_gradient(logits, case, upstream, ids)
    got = [gradient(local, stats, upstream, part, flags, **options) for _, _, part, options, local in shards]
    assert_gradient(torch.cat(got, -1), expected)


# --------------------------------------------------------------------------------------------------------------- policy

LOSSES = {
    "reinforce": {"loss_type": "reinforce"},
    "dapo": {"loss_type": "dapo"},
    "dapo with delta": {"loss_type": "dapo", "delta": 1.1},
    "cispo": {"loss_type": "cispo", "ratio_cap": 1.05},
    "sapo": {"loss_type": "sapo"},
}


def numbers_of(o):
    log_delta = INF if o.delta is None else math.log(o.delta)
    first = [1 - o.eps_low, 1 + o.eps_high, log_delta, o.beta, o.entropy_coef, o.self_certainty_coef]
    return [*first, o.ratio_cap, o.tau_pos, o.tau_neg, o.rollout_cap, o.rollout_floor]


def loss_case(options, logp, *, old, ref, rollout, mask=None, seed=3):
    """Reference rows around these log-probs, and the packed (LOSS_LINES, N) with NaN in the lines that are absent."""
    g, n = torch.Generator().manual_seed(seed), len(logp)

    def near(spread):
        return (logp.detach() + spread * torch.randn(n, generator=g, dtype=torch.float64)).float().double()

    advantages = torch.randn(n, generator=g).double()
    mask = torch.ones(n, dtype=torch.bool) if mask is None else mask
    cu_seqlens = torch.tensor([0, n // 3, n // 3, n])
    given = {"old_logp": near(0.3) if old else None, "ref_logp": near(0.5) if ref else None, "rollout_logp": near(0.7) if rollout else None}
    rows = reference.loss_rows(options, advantages=advantages, mask=mask, dtype=torch.float64, cu_seqlens=cu_seqlens, **given)
    lines = [rows.advantages, rows.weight, rows.regulariser_weight, rows.old_logp, rows.ref_logp, rows.rollout_logp, None, None]
    packed = torch.stack([torch.full((n,), NAN) if line is None else line.float() for line in lines])
    assert len(packed) == LOSS_LINES
    return rows, packed


def present_of(rows):
    optional = {HAS_OLD: rows.old_logp, HAS_REF: rows.ref_logp, HAS_ROLLOUT: rows.rollout_logp}
    return sum(bit for bit, value in optional.items() if value is not None)


def kinds(options, rows):
    kl = KL_KINDS[options.kl if rows.ref_logp is not None else None]
    return LOSS_KINDS[options.loss_type], kl, CORRECTIONS[options.rollout_correction]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_coefficient_of_every_loss(loss, old):
    """Every KL and every rollout correction: the inline coefficient against autograd through the reference."""
    n = 60
    logp = -torch.rand(n, generator=torch.Generator().manual_seed(4)).double() * 8
    logp = logp.float().double()
    for kl, correction in itertools.product(KL_KINDS, CORRECTIONS):
        options = reference.LossOptions(
            **LOSSES[loss], kl=kl or "k3", beta=0.3 if kl else 0.0, rollout_correction=correction, rollout_floor=0.5
        )
        rows, packed = loss_case(options, logp, old=old, ref=kl is not None, rollout=correction is not None)
        leaf = logp.clone().requires_grad_()
        value, _ = reference.policy_objective(leaf, None, None, rows, options)
        (expected,) = torch.autograd.grad(value, leaf)
        stats, upstream = torch.zeros(STATS, n), torch.full((GRADS, n), NAN)
        stats[Stat.LOGP] = logp.float()
        names = dict(zip(policy_loss.NUMBERS, numbers_of(options), strict=True))
        loss_kind, kl_kind, correction_kind = kinds(options, rows)
        kind = {"loss_kind": loss_kind, "kl_kind": kl_kind, "correction": correction_kind, "present": present_of(rows)}
        tensors = {"mask": None, "loss": packed, "stats": stats, "upstream": upstream, "row_scale": None}
        strides = {"loss_stride": n, "stats_stride": n, "upstream_stride": n, "rows": n, "scale": 1.0}
        arguments = names | kind | tensors | strides
        policy_loss_from_logits.upstream_kernel[(-(-n // 16),)](**arguments, BLOCK=16)
        error = (upstream[Stat.LOGP].double() - expected).norm() / expected.norm()
        assert error < 3e-6, (kl, correction, error.item())
        assert (upstream[Stat.ENTROPY] == 0).all()


POLICIES = {
    "dapo": ({"loss_type": "dapo"}, {}, {}),
    "regularised": (
        {"loss_type": "dapo", "beta": 0.1, "kl": "k3", "entropy_coef": 0.05, "self_certainty_coef": 0.02},
        {"temperatures": TEMPERATURES, "scale": 1.3},
        {"old": True, "ref": True},
    ),
    "transformed": (
        {"loss_type": "cispo", "entropy_coef": 0.1},
        {"bias": BIAS, "softcap": 5.0, "mask": MASK, "scale": -1.2},
        {"old": True},
    ),
    "corrected": ({"loss_type": "sapo", "rollout_correction": "truncate"}, {"mask": MASK}, {"rollout": True}),
    "keep": ({"loss_type": "reinforce", "entropy_coef": 0.1}, {"kept": KEPT, "entropy_on_keep": True, "mask": MASK}, {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", POLICIES)
def test_policy(name, dtype):
    """Statistics and the gradient of the loss by the logits, against autograd through everything; in place as well."""
    loss_options, case, present = POLICIES[name]
    options = reference.LossOptions(**loss_options)
    logits = random_logits(dtype)
    leaf = logits.double().requires_grad_()
    expected_stats = reference_stats(leaf, case)
    present = {"old": False, "ref": False, "rollout": False} | present
    rows, packed = loss_case(options, expected_stats.logp, **present, mask=case.get("mask"))
    value, _ = reference.policy_objective(expected_stats.logp, expected_stats.entropy, expected_stats.self_certainty, rows, options)
    (expected,) = torch.autograd.grad(value, leaf)

    mine, stats, row_scale = strided(logits), torch.full((STATS, N), 77.0), torch.full((N,), 77.0) if dtype == torch.float16 else None
    tensors = {k: v for k, v in case.items() if k != "entropy_on_keep"}
    flags = flags_of(case)
    tail = (*kinds(options, rows), numbers_of(options), stats)
    out = torch.full_like(logits, 77.0)
    policy_loss_from_logits.policy(*row_arguments(mine, **tensors), flags, packed, present_of(rows), *tail, out, row_scale)
    assert_stats(stats, reference_stats(logits, case), logits, case)
    if row_scale is None:
        assert_gradient(out, expected)
    else:
        assert (row_scale.log2() == row_scale.log2().round()).all()
        assert (row_scale < 1).any()
        assert_gradient(out, expected / row_scale.view(A, B, 1))
    if "mask" in case:
        assert (out.view(N, V)[~MASK] == 0).all()
        assert (stats[:, ~MASK] == 0).all()
        assert row_scale is None or (row_scale[~MASK] == 1).all()
    policy_loss_from_logits.policy(*row_arguments(mine, **tensors), flags, packed, present_of(rows), *tail, mine, row_scale)
    assert torch.equal(mine, out)


def test_policy_of_bad_and_dead_rows():
    """Advantage 0: zeros, the row is not read again. NaN, a bad id, a bad temperature: NaN in that row alone."""
    logits, ids, temperatures = random_logits(), IDS.clone(), torch.ones(N)
    logits.view(N, V)[1, 50] = NAN
    ids[2] = V
    temperatures[3] = 0
    packed = torch.full((LOSS_LINES, N), NAN)
    packed[0] = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, -1.0])
    packed[1] = 0.25
    stats, out, options = torch.empty(STATS, N), torch.empty(A, B, V), reference.LossOptions("dapo")
    rows = row_arguments(logits, ids=ids, temperatures=temperatures)
    policy_loss_from_logits.policy(*rows, 1, packed, 0, 1, 0, 0, numbers_of(options), stats, out, None)
    got = out.view(N, V)
    assert got[1:4].isnan().all()
    assert not got[[0, 4, 5]].isnan().any()
    assert (got[4] == 0).all()
    assert stats[Stat.LOGP].isnan().tolist() == [False, True, True, True, False, False]


def test_policy_alone_and_in_a_batch(monkeypatch):
    """A row's bits do not depend on the others, nor on how many programs share the rows."""
    logits, options = random_logits(), reference.LossOptions("dapo", entropy_coef=0.1)
    packed = torch.rand(LOSS_LINES, N, generator=torch.Generator().manual_seed(3))

    def run(rows):
        some = logits.view(1, N, V)[:, rows]
        out, stats = torch.empty_like(some), torch.empty(STATS, some.shape[1])
        arguments = row_arguments(some, ids=IDS[rows])
        policy_loss_from_logits.policy(*arguments, 5, packed[:, rows].contiguous(), 1, 1, 0, 0, numbers_of(options), stats, out, None)
        return out[0], stats

    out, stats = run(slice(None))
    for n in (0, 3):
        one, its_stats = run(slice(n, n + 1))
        assert torch.equal(one[0], out[n])
        assert torch.equal(its_stats[:, 0], stats[:, n])
    monkeypatch.setattr(targets, "PROCESSORS_ON_HOST", 4)
    assert torch.equal(run(slice(None))[0], out)


def test_float64_is_refused():
    with pytest.raises(TypeError, match="float16, bfloat16 and float32"):
        statistics(torch.zeros(1, 1, 3, dtype=torch.float64), ids=IDS[:1])


# ---- scale ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("columns", [1, 33, V])
def test_scaling_a_gradient(dtype, columns):
    row_scale = torch.tensor([1.0, 0.5, 2.0, 2.0, 4.0, 1.0])
    for factor, by_row in ((0.3, None), (2.0, row_scale), (1.0, None), (NAN, None)):
        for gradient in (random_logits(dtype, shape=(A, B, columns)), strided(random_logits(dtype, shape=(A, B, columns)))):
            by = torch.tensor(factor) * (torch.ones(N) if by_row is None else by_row)
            expected = (gradient.float() * by.view(A, B, 1)).to(dtype)
            scale_rows.scale(gradient, torch.tensor(factor), by_row)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
