"""The CUDA kernels without a GPU: nvcc compiles them for sm_80 and sm_90a with nothing spilled, and g++ compiles the very same bodies for
the emulated machine of tests/cuda_on_cpu, where they are held against the float64 reference.

`python tests/test_kernels_cuda.py` prints registers and compile seconds of every kernel.
"""

import itertools
import math
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import DTYPES, EVERYTHING, Kernels, Settings, build_harness, machine, rows_of

from urlvr_fast.ops import packed_loss, reference
from urlvr_fast.ops.layout import (
    CORRECTIONS,
    ENTROPY_ON_KEEP,
    GRADS,
    HAS_CORRECTION,
    HAS_OLD,
    HAS_REF,
    HAS_ROLLOUT,
    KL_KINDS,
    LOSS_LINES,
    METRICS,
    RAW,
    STATS,
    LossLine,
    Metric,
    Stat,
)

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
INF, NAN = math.inf, math.nan
DIFFERENTIABLE = ("logp", "lse", "entropy", "self_certainty", "mean_logit")

# --------------------------------------------------------------------------------------------------------------- compiled by nvcc

ARCHITECTURES = ("sm_80", "sm_90a")
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]


def ptxas_report(source, out):
    """(stderr, [(kernel, architecture, registers, bytes of stack, bytes of spills)]) of one .cu."""
    code = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", *NVCC_FLAGS, *code, f"-I{include}", "-Xcompiler", "-fPIC,-Wall", "-Xptxas", "-v", "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    entry = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'\n(?:.*\n)*?.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    log = done.stdout + done.stderr
    return log, [(m[1], m[2], int(m[6]), int(m[3]), int(m[4]) + int(m[5])) for m in entry.finditer(log)]


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH: kernels are compiled where there is a CUDA toolkit")
def test_every_kernel_compiles_without_spills(tmp_path):
    sources = sorted(CUDA.glob("*.cu"))
    assert sources
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda s: ptxas_report(s, tmp_path / (s.stem + ".o")), sources))
    for source, (log, kernels) in zip(sources, reports, strict=True):
        assert "warning" not in log, log
        assert {k[1] for k in kernels} == set(ARCHITECTURES), source
        for name, architecture, _, stack, spilled in kernels:
            assert stack == 0, (name, architecture)
            assert spilled == 0, (name, architecture)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")
def test_the_registration_compiles(tmp_path):
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-Wall", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{include}"]
    subprocess.run(["g++", *flags, "-c", str(CUDA / "register.cpp"), "-o", str(tmp_path / "register.o")], check=True)


# --------------------------------------------------------------------------------------------------------------- the emulated machine


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH: the emulated machine cannot be built")
    return build_harness(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def kernels(library):
    return Kernels(library)


def random_logits(a, b, v, dtype=torch.float32, seed=1, size=3.0):
    return (torch.randn(a, b, v, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def placed(logits, offset, gap, fill=NAN):
    """The same numbers `offset` elements behind a 16-byte boundary, rows `gap` elements apart; returns the memory too."""
    a, b, v = logits.shape
    memory = torch.full(((a + 1) * (b + 1) * (v + gap) + offset + 64,), fill, dtype=logits.dtype)
    view = memory.as_strided(logits.shape, ((b + 1) * (v + gap), v + gap, 1), offset)
    view.copy_(logits)
    return view, memory


def random_ids(n, v, seed=2):
    return torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))


def keep_sets(n, v, ids, share=0.3, seed=3, first=0):
    """Random CSR keep sets, each with its row's id and in no order; `crow` begins at `first`."""
    g = torch.Generator().manual_seed(seed)
    columns, lengths = [], []
    for row in range(n):
        kept = torch.rand(v, generator=g) < share
        kept[ids[row]] = True
        entries = kept.nonzero()[:, 0]
        columns.append(entries[torch.randperm(len(entries), generator=g)])
        lengths.append(len(entries))
    crow = torch.tensor([0, *itertools.accumulate(lengths)]) + first
    return crow, torch.cat([torch.zeros(first, dtype=torch.int64), *columns])


def options_of(rows):
    """The same options for the reference."""
    temperature = rows["temperatures"] if rows["temperatures"] is not None else rows["temperature"]
    options = {"temperature": temperature.double() if isinstance(temperature, torch.Tensor) else temperature}
    options.update(softcap=rows["softcap"] or None, scale=rows["scale"], mask=rows["mask"])
    options["bias"] = None if rows["bias"] is None else rows["bias"].double()
    if rows["crow"] is not None:
        first = int(rows["crow"][0])
        options["keep"] = rows["crow"] - first, rows["col"][first : int(rows["crow"][-1])]
    return options


def expected_stats(rows, flags=EVERYTHING, logits=None):
    flat = rows["logits"].reshape(-1, rows["logits"].shape[-1]).double() if logits is None else logits
    support = "keep" if flags & ENTROPY_ON_KEEP else "full"
    return reference.token_stats(flat, rows["ids"], entropy_support=support, **options_of(rows))


def largest_x(rows):
    """(N,) |x|max of each row, 0 where there is none."""
    options = {k: v for k, v in options_of(rows).items() if k in ("temperature", "softcap", "scale", "bias")}
    x = reference.scaled_logits(rows["logits"].reshape(-1, rows["logits"].shape[-1]).double(), **options)
    return torch.where(x.isfinite(), x.abs(), 0).amax(-1)


def ulp(x):
    _, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 24)


def assert_stats(got, rows, flags=EVERYTHING):
    want, size = expected_stats(rows, flags), largest_x(rows)
    for line, name in enumerate(reference.TokenStats._fields):
        expected = getattr(want, name)
        if expected is None:
            continue
        actual, expected = got[line].double(), expected.double()
        if rows["mask"] is not None:
            expected = torch.where(rows["mask"], expected, 0)
        bound = 2e-6 + 2 * ulp(torch.maximum(size, torch.where(expected.isfinite(), expected.abs(), 0)))
        same = (actual == expected) | (actual.isnan() & expected.isnan())
        wrong = ~(same | ((actual - expected).abs() <= bound))
        assert not wrong.any(), (name, actual[wrong], expected[wrong], bound[wrong])


# --------------------------------------------------------------------------------------------------------------- statistics

A, B = 2, 3
N = A * B


def option_cases(v):
    ids = random_ids(N, v)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(5))
    temperatures = torch.linspace(0.6, 1.7, N)
    crow, col = keep_sets(N, v, ids, first=7)
    mask = torch.tensor([True, False, True, True, False, True])
    cases = {
        "plain": {},
        "temperature": {"temperature": 0.7, "scale": 1.3},
        "temperatures": {"temperatures": temperatures},
        "bias": {"bias": bias, "temperature": 1.2},
        "softcap": {"softcap": 5.0},
        "negative_scale": {"scale": -0.8},
        "mask": {"mask": mask},
        "keep": {"crow": crow, "col": col},
        "everything": {
            "bias": bias, "temperatures": temperatures, "softcap": 7.0, "scale": 0.9, "mask": mask, "crow": crow, "col": col,
        },
    }  # fmt: skip
    return {name: {"ids": ids, **case} for name, case in cases.items()}


CASES = list(option_cases(4))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_match_the_reference(kernels, dtype, case):
    v = 2500 if case != "everything" else 1300
    rows = rows_of(random_logits(A, B, v, dtype), **option_cases(v)[case])
    assert_stats(kernels.statistics(rows), rows)
    if rows["crow"] is not None:
        flags = EVERYTHING | ENTROPY_ON_KEEP
        assert_stats(kernels.statistics(rows, flags), rows, flags)


@pytest.mark.parametrize("v", [1, 2, 7, 8, 31, 1023, 1024, 1025, 2047, 2048, 2049, 4099, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_columns(kernels, dtype, v):
    rows = rows_of(random_logits(1, 2, v, dtype), ids=random_ids(2, v))
    assert_stats(kernels.statistics(rows), rows)


def test_no_rows(kernels):
    assert kernels.statistics(rows_of(random_logits(0, 3, 9), ids=torch.zeros(0, dtype=torch.int64))).shape == (STATS, 0)


@pytest.mark.parametrize("wanted", [("logp",), ("logp", "entropy"), ("self_certainty", "mean_logit"), ("prob_gap", "sum_p2", "argmax")])
def test_only_what_is_asked_for(kernels, wanted):
    """A line that was asked for has the bits that it has among all the others."""
    rows = rows_of(random_logits(A, B, 3000), ids=random_ids(N, 3000))
    everything = kernels.statistics(rows)
    lines = [Stat[name.upper()] for name in wanted]
    got = kernels.statistics(rows, sum(1 << line for line in lines))
    for line in (*lines, Stat.LSE, Stat.ROW_MAX, Stat.LOG_S):
        assert torch.equal(got[line], everything[line])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_alignment_strides_or_batch(kernels, dtype):
    v = 4500
    logits = random_logits(A, B, v, dtype)
    ids = random_ids(N, v)
    want = kernels.statistics(rows_of(logits, ids=ids))
    for offset, gap in ((0, 0), (1, 0), (3, 5), (6, 3), (7, 16), (5, 1)):
        view, _ = placed(logits, offset, gap)
        assert torch.equal(kernels.statistics(rows_of(view, ids=ids)), want), (offset, gap)
    for n in range(N):
        one = logits.reshape(N, 1, v)[n : n + 1]
        assert torch.equal(kernels.statistics(rows_of(one, ids=ids[n : n + 1]))[:, 0], want[:, n])


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splitting_a_row_over_blocks_does_not_change_its_bits(kernels, dtype, general):
    v = 33 * (2048 if dtype == torch.bfloat16 and not general else 1024) + 5
    ids = random_ids(2, v)
    crow, col = keep_sets(2, v, ids, share=0.02)
    rows = rows_of(random_logits(1, 2, v, dtype), ids=ids, crow=crow, col=col, softcap=20.0 * general)
    whole = kernels.statistics(rows)
    kernels.settings = machine(multiprocessors=100)
    assert torch.equal(kernels.statistics(rows), whole)
    kernels.settings = machine(multiprocessors=1, seed=5)
    assert torch.equal(kernels.statistics(rows), whole)
    assert_stats(whole, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity_nan_and_what_is_no_number(kernels, dtype):
    v = 5000
    logits = random_logits(2, 4, v, dtype)
    flat = logits.view(8, v)
    flat[0, ::2] = -INF
    flat[1, :4200] = -INF  # whole segments
    flat[2, 1:] = -INF  # one column left
    flat[3] = -INF
    flat[4, 17] = NAN
    flat[5, 4999] = NAN
    flat[5, :4999] = -INF
    ids = random_ids(8, v)
    ids[1], ids[2] = 4500, 0
    ids[0] = 4  # a column of −inf
    rows = rows_of(logits, ids=ids)
    got = kernels.statistics(rows)
    assert_stats(got, rows)
    assert got[Stat.LOGP, 0] == -INF
    assert got[Stat.LOGP, 4].isnan()


def test_ids_and_temperatures_that_do_not_exist(kernels):
    v = 300
    logits = random_logits(2, 3, v)
    ids = torch.tensor([5, -1, v, 5, 5, 10**12])
    mask = torch.tensor([True, True, True, True, True, False])
    temperatures = torch.tensor([1.0, 1.0, 1.0, 0.0, -2.0, NAN])
    got = kernels.statistics(rows_of(logits, ids=ids, mask=mask, temperatures=temperatures))
    assert got[: Stat.ARGMAX, 1:5].isnan().all()
    assert (got[Stat.ARGMAX, 1:5] == -1).all()
    assert got[:9, 0].isfinite().all()
    assert (got[:, 5] == 0).all()


def test_ties_and_offsets(kernels):
    v = 3000
    logits = random_logits(1, 3, v).to(torch.float32)
    logits[0, 0, [1500, 40, 2999]] = 50.0
    logits[0, 1] = 0.0
    logits[0, 2] += 5000
    rows = rows_of(logits, ids=random_ids(3, v))
    got = kernels.statistics(rows)
    assert_stats(got, rows)
    assert got[Stat.ARGMAX].tolist()[:2] == [40, 0]
    assert got[Stat.PROB_GAP].tolist()[:2] == [0, 0]


# --------------------------------------------------------------------------------------------------------------- gradient


def upstream_of(n, names, seed=9):
    g = torch.full((GRADS, n), NAN)
    given = 0
    for name in names:
        g[Stat[name.upper()]] = torch.randn(n, generator=torch.Generator().manual_seed(seed + Stat[name.upper()]))
        given |= 1 << Stat[name.upper()]
    return g, given


def expected_gradient(rows, upstream, given, flags=EVERYTHING):
    """d Σ g · statistic / d logits in float64, and by the bias."""
    v = rows["logits"].shape[-1]
    logits = rows["logits"].reshape(-1, v).double().requires_grad_()
    bias = None if rows["bias"] is None else rows["bias"].double().requires_grad_()
    stats = expected_stats({**rows, "bias": bias}, flags, logits)
    loss = logits.sum() * 0 if not given else 0
    for name in DIFFERENTIABLE:
        if given >> Stat[name.upper()] & 1:
            loss = loss + (upstream[Stat[name.upper()]].double() * getattr(stats, name)).sum()
    loss.backward()
    return logits.grad.view(rows["logits"].shape), None if bias is None else bias.grad


def assert_gradient(got, want):
    bound = 1e-5 if got.dtype == torch.float32 else 5e-3
    got = got.double()
    assert (got[want == 0] == 0).all()
    assert (got - want).norm() <= bound * want.norm() + 1e-30, (got - want).norm() / want.norm()


def run_gradient(kernels, rows, names, flags=EVERYTHING, out=None, bias=False):
    upstream, given = upstream_of(rows["logits"].shape[:2].numel(), names)
    stats = kernels.statistics(rows, flags)
    out = torch.full(rows["logits"].shape, NAN, dtype=rows["logits"].dtype) if out is None else out
    bias_grad = torch.ones(rows["logits"].shape[-1]) if bias else None
    kernels.gradient(rows, stats, upstream, given, out, flags, bias_grad)
    return out, upstream, given, bias_grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_the_reference(kernels, dtype, case):
    v = 1300
    rows = rows_of(random_logits(A, B, v, dtype), **option_cases(v)[case])
    for flags in (EVERYTHING, EVERYTHING | ENTROPY_ON_KEEP) if rows["crow"] is not None else (EVERYTHING,):
        for names in (("logp",), ("entropy",), DIFFERENTIABLE):
            out, upstream, given, bias_grad = run_gradient(kernels, rows, names, flags, bias=rows["bias"] is not None)
            want, want_bias = expected_gradient(rows, upstream, given, flags)
            assert_gradient(out.float() if dtype == torch.float32 else out, want) if dtype == torch.float32 else assert_rounded(out, want)
            if bias_grad is not None:
                assert (bias_grad.double() - 1 - want_bias).norm() <= 1e-5 * want_bias.norm()


def assert_rounded(got, want):
    """16-bit gradients: the float64 ones but for one rounding and fp32's errors; 0 where they are."""
    assert (got[want == 0] == 0).all()
    _, exponent = torch.frexp(want)
    if got.dtype == torch.bfloat16:
        half = torch.ldexp(torch.ones_like(want), exponent - 9)
    else:
        half = torch.ldexp(torch.ones_like(want), (exponent - 12).clamp(min=-25))
    error = (got.double() - want).abs()
    assert (error <= half + 1e-5 * want.abs() + 1e-7 * want.abs().amax()).all(), (error - half).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_gradients_are_the_fp32_gradient_rounded_once(kernels, dtype):
    v = 2100
    ids = random_ids(N, v)
    crow, col = keep_sets(N, v, ids)
    rows = rows_of(random_logits(A, B, v, dtype), ids=ids, crow=crow, col=col)
    stats = kernels.statistics(rows)
    upstream, given = upstream_of(N, DIFFERENTIABLE)
    out = kernels.gradient(rows, stats, upstream, given, torch.empty_like(rows["logits"]))
    wide = {**rows, "logits": rows["logits"].float()}
    assert torch.equal(out, kernels.gradient(wide, stats, upstream, given, torch.empty_like(wide["logits"])).to(dtype))


@pytest.mark.parametrize("case", ["keep", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_and_strided_gradients_have_the_same_bits(kernels, dtype, case):
    v = 1301
    options = option_cases(v)[case]
    logits = random_logits(A, B, v, dtype)
    want, upstream, given, _ = run_gradient(kernels, rows_of(logits, **options), DIFFERENTIABLE)
    for offset, gap, out_offset, out_gap in ((0, 0, 1, 3), (5, 1, 0, 0), (3, 2, 3, 2), (2, 0, 7, 8)):
        view, _ = placed(logits, offset, gap)
        rows = rows_of(view, **options)
        out, memory = placed(torch.zeros_like(logits), out_offset, out_gap, fill=777.0)
        run_gradient(kernels, rows, DIFFERENTIABLE, out=out)
        assert torch.equal(out, want)
        out.fill_(777.0)
        assert (memory == 777.0).all()  # nothing beside the rows was written
        inside, memory = placed(logits, offset, gap, fill=777.0)
        stats = kernels.statistics(rows)
        kernels.gradient({**rows, "logits": inside}, stats, upstream, given, inside)
        assert torch.equal(inside, want)
        inside.fill_(777.0)
        assert (memory == 777.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_split_over_blocks_has_the_same_bits(kernels, dtype):
    v = 33 * (2048 if dtype == torch.bfloat16 else 1024) + 5
    ids = random_ids(2, v)
    crow, col = keep_sets(2, v, ids, share=0.02)
    rows = rows_of(random_logits(1, 2, v, dtype), ids=ids, crow=crow, col=col)
    whole, upstream, given, _ = run_gradient(kernels, rows, DIFFERENTIABLE)
    kernels.settings = machine(multiprocessors=100)
    assert torch.equal(run_gradient(kernels, rows, DIFFERENTIABLE)[0], whole)
    want, _ = expected_gradient(rows, upstream, given)
    assert_gradient(whole, want) if dtype == torch.float32 else assert_rounded(whole, want)


def test_gradient_of_minus_infinity_nan_and_dead_rows(kernels):
    v = 2500
    logits = random_logits(2, 4, v)
    flat = logits.view(8, v)
    flat[0, ::2] = -INF
    flat[1] = -INF
    flat[2, 5] = NAN
    flat[3, 5] = NAN
    mask = torch.tensor([True, True, True, False, True, True, True, True])
    ids = random_ids(8, v) | 1
    ids[7] = -3
    upstream, given = upstream_of(8, DIFFERENTIABLE)
    upstream[:, 4] = 0
    rows = rows_of(logits, ids=ids, mask=mask)
    stats = kernels.statistics(rows)
    stats[:, 3] = NAN  # of a masked row nothing is read
    upstream[:, 3] = NAN
    out = kernels.gradient(rows, stats, upstream, given, torch.full_like(logits, NAN)).view(8, v)
    assert (out[0, ::2] == 0).all()
    assert (out[[1, 3, 4]] == 0).all()
    assert out[[2, 7]].isnan().any(1).all()
    assert out[[0, 5, 6]].isfinite().all()
    kept = torch.tensor([0, 5, 6])
    some = rows_of(logits.view(8, 1, v)[kept], ids=ids[kept])
    want, _ = expected_gradient(some, upstream[:, kept], given)
    finite = out[kept].view(want.shape)
    assert (finite.double() - want.nan_to_num(0)).norm() <= 1e-5 * want.nan_to_num(0).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_by_the_bias_over_many_rows(kernels, dtype):
    """More rows than are staged at a time; more columns than a block has."""
    n, v = 150, 270
    ids = random_ids(n, v)
    crow, col = keep_sets(n, v, ids)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(5))
    rows = rows_of(random_logits(n, 1, v, dtype), ids=ids, crow=crow, col=col, bias=bias, softcap=6.0, mask=ids % 5 != 0, scale=0.7)
    _, upstream, given, bias_grad = run_gradient(kernels, rows, DIFFERENTIABLE, bias=True)
    _, want = expected_gradient(rows, upstream, given)
    assert (bias_grad.double() - 1 - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_with_a_large_common_offset(kernels, temperature):
    v = 3000
    logits = random_logits(1, 2, v) + 5000
    rows = rows_of(logits, ids=random_ids(2, v), temperature=temperature)
    out, upstream, given, _ = run_gradient(kernels, rows, ("logp", "lse", "entropy", "self_certainty"))
    assert_gradient(out, expected_gradient(rows, upstream, given)[0])


# --------------------------------------------------------------------------------------------------------------- vocabulary shards


def merged(parts):
    """What the shards' sums amount to, in float64: (m, s, t, total, finite, x_id, s2, second, argmax, keep m, s, t, count)."""
    p = torch.stack(parts).double()
    m, keep_m = p[:, 0].amax(0), p[:, 10].amax(0)
    w, shift = (p[:, 0] - m).exp(), (p[:, 0] - m).clamp(min=-1e20)
    kw, keep_shift = (p[:, 10] - keep_m).exp(), (p[:, 10] - keep_m).clamp(min=-1e20)
    out = {"m": m, "s": (w * p[:, 1]).sum(0), "t": (w * (p[:, 2] + shift * p[:, 1])).sum(0)}
    out["total"], out["finite"] = (p[:, 3] + shift * p[:, 4]).sum(0), p[:, 4].sum(0)
    out["x_id"], out["bad_id"], out["s2"] = p[:, 5].amax(0), p[:, 6].amax(0), (w * w * p[:, 7]).sum(0)
    out["second"] = torch.cat([p[:, 0], p[:, 8]]).topk(2, dim=0).values[1]
    out["argmax"] = p[:, 9].gather(0, p[:, 0].argmax(0, keepdim=True))[0]
    out["keep_m"], out["keep_s"] = keep_m, (kw * p[:, 11]).sum(0)
    out["keep_t"], out["keep_id"] = (kw * (p[:, 12] + keep_shift * p[:, 11])).sum(0), p[:, 13].sum(0)
    return out


def packed_stats(x, want):
    """The packed statistics that the merged sums stand for, as the gradient wants them."""
    stats = torch.full((STATS, len(x["m"])), NAN, dtype=torch.float64)
    log_s, keep_log_s = x["s"].log(), x["keep_s"].log()
    stats[Stat.LOGP] = x["x_id"] - x["keep_m"] - keep_log_s
    stats[Stat.ENTROPY], stats[Stat.ROW_MAX], stats[Stat.LOG_S] = log_s - x["t"] / x["s"], x["m"], log_s
    stats[Stat.FINITE], stats[Stat.KEEP_LOG_S] = x["finite"], x["keep_m"] - x["m"] + keep_log_s
    stats[Stat.ID_COUNTS] = 1
    for line, value in ((Stat.LOGP, want.logp), (Stat.ENTROPY, want.entropy)):
        assert torch.allclose(stats[line], value, atol=1e-5)
    return stats.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_hand_out_sums_and_take_their_own_columns_of_the_gradient(kernels, dtype):
    v, cuts = 5000, (0, 1200, 1201, 5000)
    ids = random_ids(N, v)
    crow, col = keep_sets(N, v, ids, share=0.1)
    logits = random_logits(A, B, v, dtype)
    logits[0, 0, :1300] = -INF
    ids[0] = int(col[(col[: crow[1]] > 1300).nonzero()[0, 0]])
    whole = rows_of(logits, ids=ids, crow=crow, col=col, temperature=0.8)
    want = expected_stats(whole)
    shards = [{**whole, "logits": logits[..., a:b], "id_offset": a} for a, b in itertools.pairwise(cuts)]
    x = merged([kernels.statistics(shard, EVERYTHING | RAW) for shard in shards])
    assert (x["bad_id"] == 0).all()
    assert torch.equal(x["argmax"].long(), want.argmax)
    assert torch.allclose(x["m"] + x["s"].log(), want.lse, atol=1e-5)
    assert torch.allclose(x["s2"] / x["s"] ** 2, want.sum_p2, atol=1e-6)
    assert torch.allclose((1 - (x["second"] - x["m"]).exp()) / x["s"], want.prob_gap, atol=1e-6)
    assert torch.allclose(x["m"] + x["total"] / x["finite"], want.mean_logit, atol=1e-5)
    assert torch.equal(x["keep_id"], torch.ones(N, dtype=torch.float64))
    stats = packed_stats(x, want)
    upstream, given = upstream_of(N, DIFFERENTIABLE)
    parts = [kernels.gradient(shard, stats, upstream, given, torch.full_like(shard["logits"], NAN)) for shard in shards]
    gradient, expected = torch.cat(parts, -1), expected_gradient(whole, upstream, given)[0]
    expected = torch.where(logits == -INF, 0, expected)
    assert_gradient(gradient, expected) if dtype == torch.float32 else assert_rounded(gradient, expected)


# --------------------------------------------------------------------------------------------------------------- policy

LOSSES = {"reinforce": 0, "dapo": 1, "cispo": 2, "sapo": 3}
WAYS = {"cluster": machine(clusters=1, slice_bytes=15 * 1024), "twice": machine(), "one after the other": machine(multiprocessors=1000)}


def loss_case(rows, options, kl, correction, has_old, seed=11):
    """Loss lines whose ratios lie on all sides of every threshold, which are there, and the loss as a function of float64 logits."""
    g = torch.Generator().manual_seed(seed)
    stats = expected_stats(rows)
    n = len(stats.logp)
    logp = torch.where(stats.logp.isfinite(), stats.logp, -1)
    lines = torch.full((LOSS_LINES, n), NAN)  # of a sequence nothing is there
    lines[LossLine.ADVANTAGE] = torch.randn(n, generator=g)
    lines[LossLine.WEIGHT] = torch.rand(n, generator=g) / 100
    lines[LossLine.REGULARISER] = torch.rand(n, generator=g) / 100
    old = (logp + torch.randn(n, generator=g) * 0.7).float()
    ref = (logp + torch.randn(n, generator=g)).float()
    rollout = (logp + torch.randn(n, generator=g)).float()
    if has_old:
        lines[LossLine.OLD] = old
    if kl is not None:
        lines[LossLine.REF] = ref
    if correction is not None:
        lines[LossLine.ROLLOUT] = rollout
    present = HAS_OLD * has_old | HAS_REF * (kl is not None) | HAS_ROLLOUT * (correction is not None)
    live = torch.ones(n, dtype=torch.bool) if rows["mask"] is None else rows["mask"]
    loss_rows = reference.LossRows(
        advantages=lines[LossLine.ADVANTAGE].double(),
        mask=live,
        live=live,
        weight=lines[LossLine.WEIGHT].double(),
        regulariser_weight=lines[LossLine.REGULARISER].double(),
        old_logp=old.double() if has_old else None,
        ref_logp=ref.double() if kl is not None else None,
        rollout_logp=rollout.double() if correction is not None else None,
        log_rollout_weight=(old - rollout).double() if correction is not None and has_old else None,
    )

    def loss(logits):
        stats = expected_stats(rows, logits=logits)
        return reference.policy_objective(stats.logp, stats.entropy, stats.self_certainty, loss_rows, options)[0]

    return lines, present, loss


def policy_flags(options):
    flags = 1 << Stat.LOGP
    flags |= (1 << Stat.ENTROPY) * (options.entropy_coef != 0)
    return flags | (1 << Stat.SELF_CERTAINTY) * (options.self_certainty_coef != 0)


def run_policy(kernels, rows, options, kl, correction, has_old, out=None, row_scale=None, seed=11):
    lines, present, loss = loss_case(rows, options, kl, correction, has_old, seed)
    kinds = (LOSSES[options.loss_type], KL_KINDS[kl], CORRECTIONS[correction])
    out = torch.full(rows["logits"].shape, NAN, dtype=rows["logits"].dtype) if out is None else out
    numbers = packed_loss.loss_numbers(options)
    stats, way = kernels.policy(rows, lines, out, policy_flags(options), present, kinds, numbers, row_scale)
    return out, stats, way, loss


def expected_policy_gradient(rows, loss):
    logits = rows["logits"].reshape(-1, rows["logits"].shape[-1]).double().requires_grad_()
    loss(logits).backward()
    return logits.grad.view(rows["logits"].shape)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_policy_loss(kernels, loss_type):
    v = 70
    rows = rows_of(random_logits(4, 12, v, size=1.5), ids=random_ids(48, v))
    for kl, correction, has_old in itertools.product(KL_KINDS, CORRECTIONS, (False, True)):
        delta = 2.0 if loss_type == "dapo" and has_old else None
        more = {"kl": kl, "beta": 0.3} if kl else {}
        more |= {"entropy_coef": 0.2, "self_certainty_coef": -0.1} if correction == "mask" else {}
        options = reference.LossOptions(
            loss_type=loss_type, delta=delta, ratio_cap=1.5, rollout_correction=correction, rollout_floor=0.3, rollout_cap=1.6, **more
        )
        out, _, _, loss = run_policy(kernels, rows, options, kl, correction, has_old)
        assert_gradient(out, expected_policy_gradient(rows, loss))


@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_a_correction_that_is_known_beforehand(kernels, correction):
    """In a line of its own, as that of a sequence is."""
    rows = rows_of(random_logits(4, 12, 70, size=1.5), ids=random_ids(48, 70))
    options = reference.LossOptions(rollout_correction=correction, rollout_floor=0.3, rollout_cap=1.6)
    want, _, _, _ = run_policy(kernels, rows, options, None, correction, True)
    lines, present, _ = loss_case(rows, options, None, correction, True)
    weight = (lines[LossLine.OLD] - lines[LossLine.ROLLOUT]).exp()
    outside = (weight < 0.3) | (weight > 1.6)
    lines[LossLine.CORRECTION] = weight.clamp(max=1.6) if correction == "truncate" else weight.masked_fill(outside, 0)
    lines[LossLine.ROLLOUT] = NAN
    kinds, numbers = (LOSSES[options.loss_type], 0, CORRECTIONS[correction]), packed_loss.loss_numbers(options)
    out = torch.full_like(want, NAN)
    kernels.policy(rows, lines, out, policy_flags(options), present | HAS_CORRECTION, kinds, numbers)
    assert_gradient(out, want.double())


REGULARISED = reference.LossOptions(kl="k3", beta=0.1, entropy_coef=0.3, self_certainty_coef=0.2, rollout_correction="truncate")


@pytest.mark.parametrize("case", ["plain", "keep", "everything", "temperatures"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ways_of_the_policy_loss_have_the_same_bits(kernels, dtype, case):
    general = case == "everything"
    v = 8 * (2048 if dtype != torch.float32 and not general else 1024) + 813
    rows = rows_of(random_logits(A, B, v, dtype), **option_cases(v)[case])
    results = {}
    for name, settings in WAYS.items():
        kernels.settings = settings
        scale = torch.full((N,), NAN) if dtype == torch.float16 else None
        out, stats, way, loss = run_policy(kernels, rows, REGULARISED, "k3", "truncate", True, row_scale=scale)
        assert way == {"twice": 1, "one after the other": 2}.get(name, way)
        assert name != "cluster" or way >= 20, way
        results[name] = out, stats, torch.zeros(0) if scale is None else scale
    for other in ("twice", "one after the other"):
        for a, b in zip(results["cluster"], results[other], strict=True):
            assert torch.equal(a, b), other
    out, stats, scale = results["cluster"]
    want = expected_policy_gradient(rows, loss)
    if dtype == torch.float16:
        live = torch.ones(N, dtype=torch.bool) if rows["mask"] is None else rows["mask"]
        assert (scale[~live] == 1).all()
        assert torch.equal(scale.log2(), scale.log2().round())
        want = want / scale.double().view(A, B, 1)
    assert_gradient(out, want) if dtype == torch.float32 else assert_rounded(out, want)
    assert torch.equal(stats, kernels.statistics(rows, policy_flags(REGULARISED)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_policy_loss_in_place_and_at_any_alignment(kernels, dtype, way):
    kernels.settings = WAYS[way]
    v = 8 * (2048 if dtype != torch.float32 else 1024) + 3
    ids = random_ids(4, v)
    crow, col = keep_sets(4, v, ids, share=0.05)
    options = {"ids": ids, "crow": crow, "col": col, "mask": torch.tensor([True, True, False, True])}
    logits = random_logits(2, 2, v, dtype)
    want, stats, _, _ = run_policy(kernels, rows_of(logits, **options), REGULARISED, "k3", "truncate", True)
    for offset, gap in ((1, 0), (3, 2), (6, 1)):
        inside, memory = placed(logits, offset, gap, fill=777.0)
        out, _ = placed(torch.zeros_like(logits), 5, 3)
        again = run_policy(kernels, rows_of(inside, **options), REGULARISED, "k3", "truncate", True, out=out)
        assert torch.equal(again[0], want)
        assert torch.equal(again[1], stats)
        again = run_policy(kernels, rows_of(inside, **options), REGULARISED, "k3", "truncate", True, out=inside)
        assert torch.equal(inside, want)
        assert torch.equal(again[1], stats)
        inside.fill_(777.0)
        assert (memory == 777.0).all()


@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_the_order_in_which_threads_run_does_not_matter(kernels, way, seed):
    v = 8 * 1024 + 100
    ids = random_ids(2, v)
    crow, col = keep_sets(2, v, ids, share=0.05)
    results = []
    for chance in (0, seed):  # 0: the youngest first
        kernels.settings = Settings.from_buffer_copy(WAYS[way])
        kernels.settings.seed = chance
        logits = random_logits(1, 2, v)  # anew, for the gradient takes its place
        rows = rows_of(logits, ids=ids, crow=crow, col=col)
        out, stats, _, _ = run_policy(kernels, rows, REGULARISED, "k3", "truncate", True, out=logits)
        results.append((out, stats))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("way", WAYS)
def test_policy_rows_that_are_dead_or_no_numbers(kernels, way):
    kernels.settings = WAYS[way]
    v = 8 * 1024 + 9
    logits = random_logits(1, 5, v)
    logits[0, 0, ::3] = -INF
    logits[0, 1] = -INF
    logits[0, 2, 8000] = NAN
    ids = torch.tensor([1, 1, 1, 1, v])
    rows = rows_of(logits, ids=ids)
    lines = torch.ones(LOSS_LINES, 5)
    lines[LossLine.ADVANTAGE, 3] = 0
    out = torch.full_like(logits, NAN)
    options = reference.LossOptions()
    stats, _ = kernels.policy(rows, lines, out, 1 << Stat.LOGP, 0, (1, 0, 0), packed_loss.loss_numbers(options))
    assert (out[0, 0, ::3] == 0).all()
    assert out[0, 0].isfinite().all()
    assert (out[0, [1, 3]] == 0).all()
    assert out[0, 2].isnan().all()
    assert out[0, 4].isnan().all()
    assert stats[Stat.LOGP].isfinite().tolist() == [True, False, False, True, False]


def test_a_cluster_takes_as_many_blocks_as_the_row_needs(kernels):
    v = 9000
    rows = rows_of(random_logits(1, 1, v), ids=random_ids(1, v))
    seen = []
    for slice_bytes in (72, 25, 14, 8):
        kernels.settings = machine(clusters=1, slice_bytes=slice_bytes * 1024)
        out, _, way, loss = run_policy(kernels, rows, REGULARISED, "k3", "truncate", True)
        assert_gradient(out, expected_policy_gradient(rows, loss))
        seen.append(way // 10)
    assert seen == [1, 2, 4, 8]


if __name__ == "__main__":
    for path in sorted(CUDA.glob("*.cu")):
        start = time.time()
        _, found = ptxas_report(path, Path("/dev/null"))
        print(f"{path.name}: {time.time() - start:.0f} s", file=sys.stderr)
        for name, architecture, registers, stack, spilled in found:
            readable = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.split("(")[0].replace("urlvr::cuda::", "")
            print(f"{readable.removeprefix('void '):40} {architecture:7} {registers:4} registers, stack {stack}, spilled {spilled}")


# --------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 7, 33, 4096, 9001])
@pytest.mark.parametrize("offset", [0, 3])
def test_scaling_a_gradient(kernels, dtype, v, offset):
    values = random_logits(2, 2, v, dtype)
    row_scale = torch.tensor([1.0, 0.5, 2.0, 2.0])
    for factor, by_row in ((0.3, None), (2.0, row_scale), (1.0, None), (NAN, None)):
        gradient, memory = placed(values, offset, 5, fill=7.0)
        around = memory.clone()
        kernels.scale(gradient, factor, by_row)
        by = factor * (torch.ones(4) if by_row is None else by_row)
        expected = (values.float() * by.float().view(2, 2, 1)).to(dtype)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
        gradient.copy_(values)
        assert torch.equal(memory, around), "what lies around the gradient was written to"


def test_a_factor_of_one_touches_nothing(kernels):
    """A signalling NaN would come back quiet if it had been read and written."""
    gradient = torch.full((1, 1, 40), 0x7F81, dtype=torch.int16).view(torch.bfloat16)
    kernels.scale(gradient, 1.0)
    assert (gradient.view(torch.int16) == 0x7F81).all()


# --------------------------------------------------------------------------------------------------------------- rows of a policy loss


@pytest.fixture
def packed(kernels, monkeypatch):
    """`PackedRows.of` for the reference's arguments, by these kernels. What they are given to write in holds NaN, and True as a bool."""

    def after_filling(function, outputs):
        def run(*arguments):
            for out in arguments[-outputs:]:
                if out is not None:
                    out.fill_(NAN)
            function(*arguments)

        return run

    filled = {"loss_rows": after_filling(kernels.loss_rows, 3), "objective": after_filling(kernels.objective, 2)}
    package = SimpleNamespace(**filled, join=kernels.join)
    monkeypatch.setattr(packed_loss, "kernels", lambda backend: package)
    optional = dict.fromkeys(("mask", "cu_seqlens", "old_logp", "ref_logp", "rollout_logp", "denominator"))

    def make(options, rows, **given):
        return packed_loss.PackedRows.of(options, "cuda", rows, **{**optional, **given})

    return make


def exact_rows(options, rows, advantages, mask=None, **given):
    mask = torch.ones(rows, dtype=torch.bool) if mask is None else mask
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for name, value in given.items()
    }
    return reference.loss_rows(options, advantages=advantages.double(), mask=mask, dtype=torch.float64, **wide)


def assert_rows(got, want, options, per_sequence=False):
    n, advantages, weight = len(want.mask), want.advantages, want.weight
    some = bool(want.mask.any())
    sequences = int(some) if want.lengths is None else int((want.lengths > 0).sum())
    assert got.counts.tolist() == [int(want.mask.sum()), sequences]
    assert torch.equal(got.live, want.live)
    if options.loss_type in reference.SEQUENCE_RATIO:  # a term a sequence is, to the kernels, one a token
        share = want.lengths.reciprocal().masked_fill(want.lengths == 0, 0)
        if not per_sequence:
            advantages = (want.sequence_sum(torch.where(want.mask, advantages, 0)) * share)[want.sequence]
        weight = want.sequence_weight * (1 if options.loss_type == "luspo" else share[want.sequence])
        torch.testing.assert_close(got.lines[LossLine.ADVANTAGE].double(), advantages, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(got.lines[LossLine.ADVANTAGE], advantages.float())
    torch.testing.assert_close(got.lines[LossLine.WEIGHT].double(), weight.expand(n), rtol=3e-7, atol=0)
    torch.testing.assert_close(got.lines[LossLine.REGULARISER].double(), want.regulariser_weight.expand(n), rtol=3e-7, atol=0)
    for line, value in ((LossLine.OLD, want.old_logp), (LossLine.REF, want.ref_logp), (LossLine.ROLLOUT, want.rollout_logp)):
        assert torch.equal(got.lines[line], torch.zeros(n) if value is None else value.float())


def random_mask(n, share=0.7, offset=0, seed=21):
    """`offset` bytes behind a multiple of 16."""
    memory = torch.rand(n + offset, generator=torch.Generator().manual_seed(seed)) < share
    return memory[offset:]


def random_advantages(n, seed=22):
    """Some of them 0."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.8)


LENGTHS = {  # of the sequences
    "one row": [1],
    "one": [100],
    "some": [0, 3, 0, 0, 17, 250, 30, 0, 400, 1, 0],
    "many": [0, 1, 2, 0] * 300,
    "long": [5, 8500, 0, 60],
    "no rows": [0, 0],
    "none": [],
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("loss_type", reference.LOSS_TYPES)
def test_the_rows_of_a_loss(packed, loss_type, lengths):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS[lengths])])
    n, sequences = int(cu_seqlens[-1]), len(cu_seqlens) - 1
    options = reference.LossOptions(loss_type=loss_type, max_length=77 if loss_type == "dr_grpo" else None)
    old, ref, rollout = -torch.rand(3, n, generator=torch.Generator().manual_seed(23))
    masks = {None: None, "some": random_mask(n, offset=3), "none": torch.zeros(n, dtype=torch.bool)}
    if lengths == "some":
        masks["but a sequence"] = random_mask(n).clone()
        masks["but a sequence"][20:270] = False
    for mask, per_sequence, denominator in itertools.product(masks.values(), (False, True), (None, 12.5, torch.tensor(40.0))):
        given = {"mask": mask, "cu_seqlens": cu_seqlens, "denominator": denominator, "old_logp": old}
        given |= {"advantages": random_advantages(sequences if per_sequence else n)}
        given |= {"ref_logp": ref} if per_sequence else {"rollout_logp": rollout}
        if loss_type in reference.SEQUENCE_RATIO:
            given |= {"token_denominator": denominator if per_sequence else torch.tensor(9.0)}
        assert_rows(packed(options, n, **given), exact_rows(options, n, **given), options, len(given["advantages"]) != n)


@pytest.mark.parametrize("n", [0, 1, 300, 9001])
@pytest.mark.parametrize("loss_type", ["reinforce", "dapo", "bnpo", "cispo", "dr_grpo"])
def test_rows_without_sequences(packed, loss_type, n):
    options = reference.LossOptions(loss_type=loss_type, entropy_coef=0.1 if loss_type == "bnpo" else 0.0)
    masks = [None, random_mask(n), random_mask(n, offset=5), torch.zeros(n, dtype=torch.bool)]
    for mask, denominator in itertools.product(masks, (None, 3.0, 0.0, torch.tensor(7.0))):
        if loss_type == "dr_grpo" and denominator is None:
            continue
        given = {"mask": mask, "advantages": random_advantages(n), "denominator": denominator}
        assert_rows(packed(options, n, **given), exact_rows(options, n, **given), options)


@pytest.mark.parametrize("cu_seqlens", [
    [0, 6, 4, 10], [0, 4, 9], [0, 4, 11], [1, 10], [0, -5, 10], [0, 1 << 40, 10], [-(1 << 40), 10], [0, 10, 0, 10], [10, 0], [0, 0], [3, 3],
])  # fmt: skip
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_sequences_that_cannot_be_leave_no_row_a_weight(packed, loss_type, cu_seqlens):
    n, cu_seqlens = 10, torch.tensor(cu_seqlens)
    for mask, per_sequence in itertools.product((None, random_mask(n)), (False, True)):
        advantages = torch.ones(len(cu_seqlens) - 1 if per_sequence else n)
        got = packed(reference.LossOptions(loss_type=loss_type), n, advantages=advantages, cu_seqlens=cu_seqlens, mask=mask)
        assert got.lines[: LossLine.REGULARISER + 1].isnan().all()
        assert got.counts.isnan().all()
        assert torch.equal(got.live, torch.ones(n, dtype=torch.bool) if mask is None else mask)
        loss, _, gradients = got.evaluate(statistics_of(-torch.ones(n), None, None), reference.LossOptions(loss_type), differentiate=True)
        assert loss.isnan()
        assert gradients[Stat.LOGP, got.live].isnan().all()


def objective_case(n, has_old=True, has_ref=True, has_rollout=True, masked=True, seed=31):
    """Arguments of `loss_rows` whose ratios lie on all sides of every threshold, and statistics of the rows."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(n, generator=g) * 3
    old, ref, rollout = logp + torch.randn(3, n, generator=g) * 0.7
    cuts = torch.randint(n + 1, (3,), generator=g).sort().values
    cu_seqlens = torch.tensor([0, *cuts.tolist(), n])
    given = {"advantages": random_advantages(n), "cu_seqlens": cu_seqlens, "mask": random_mask(n) if masked else None}
    given |= {"old_logp": old} if has_old else {}
    given |= {"ref_logp": ref} if has_ref else {}
    given |= {"rollout_logp": rollout} if has_rollout else {}
    return given, logp, torch.rand(n, generator=g) * 5, torch.rand(n, generator=g) * 2


def exact_objective(options, given, logp, entropy, self_certainty):
    """Loss and metrics in float64, and (GRADS, N) gradients by autograd."""
    rows = exact_rows(options, len(logp), **given)
    leaves = [None if value is None else value.double().requires_grad_() for value in (logp, entropy, self_certainty)]
    loss, metrics = reference.policy_objective(*leaves, rows, options)
    gradients = torch.zeros(GRADS, len(logp), dtype=torch.float64)
    lines = [line for line, leaf in zip((Stat.LOGP, Stat.ENTROPY, Stat.SELF_CERTAINTY), leaves, strict=True) if leaf is not None]
    found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], allow_unused=True)
    for line, gradient in zip(lines, found, strict=True):
        if gradient is not None:
            gradients[line] = gradient
    return loss.detach(), metrics, gradients


def statistics_of(logp, entropy, self_certainty):
    absent = reference.TokenStats(*[None] * len(reference.TokenStats._fields))
    return absent._replace(logp=logp, entropy=entropy, self_certainty=self_certainty)


def assert_objective(packed, options, given, *statistics):
    n = len(statistics[0])
    rows, values = packed(options, n, **given), statistics_of(*statistics)
    loss, metrics, gradients = rows.evaluate(values, options, differentiate=True)
    alone, metrics_alone, _ = rows.evaluate(values, options, differentiate=False)
    for one, other in zip((loss, *metrics.values()), (alone, *metrics_alone.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    want, want_metrics, want_gradients = exact_objective(options, given, *statistics)
    assert metrics.keys() == want_metrics.keys()
    for name, value in {"loss": want, **want_metrics}.items():
        got = loss if name == "loss" else metrics[name]
        torch.testing.assert_close(
            got.double(), value.double(), rtol=1e-5, atol=2e-6, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert (gradients[want_gradients == 0] == 0).all()
    torch.testing.assert_close(gradients.double(), want_gradients, rtol=2e-5, atol=1e-6 / max(n, 1), equal_nan=True)
    return loss, metrics, gradients


@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("loss_type", reference.LOSS_TYPES)
def test_every_objective(packed, loss_type, kl):
    for correction, has_old, plain in itertools.product(CORRECTIONS, (False, True), (False, True)):
        more = {} if plain else {"entropy_coef": 0.2, "self_certainty_coef": -0.1}
        more |= {"delta": 2.0} if loss_type not in ("reinforce", "cispo", "sapo") and has_old else {}
        more |= {"rollout_level": "sequence"} if has_old != plain else {}
        more |= {"kl": kl, "beta": 0.0 if plain else 0.3} if kl else {}
        more |= {"max_length": 50} if loss_type == "dr_grpo" else {}
        options = reference.LossOptions(
            loss_type=loss_type, ratio_cap=1.5, rollout_correction=correction, rollout_floor=0.3, rollout_cap=1.6, **more
        )
        given, *statistics = objective_case(300, has_old, kl is not None, correction is not None or has_old, masked=not plain)
        if correction == "mask":
            statistics[2] = None if plain else statistics[2]
            statistics[1] = None if plain else statistics[1]
        assert_objective(packed, options, given, *statistics)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 700, 256 * 257 + 3])
def test_any_number_of_rows_of_an_objective(packed, n):
    assert_objective(packed, REGULARISED, *objective_case(n))


def test_an_objective_of_no_rows_is_0(packed):
    given, *statistics = objective_case(0)
    loss, metrics, gradients = assert_objective(packed, REGULARISED, given, *statistics)
    assert [float(loss), *map(float, metrics.values())] == [0.0] * (1 + len(metrics))
    assert gradients.shape == (GRADS, 0)
    given, *statistics = objective_case(300)
    given["mask"] = torch.zeros(300, dtype=torch.bool)
    loss, metrics, gradients = assert_objective(packed, REGULARISED, given, *statistics)
    assert [float(loss), *map(float, metrics.values())] == [0.0] * (1 + len(metrics))
    assert (gradients == 0).all()


@pytest.mark.parametrize("loss_type", reference.LOSS_TYPES)
def test_an_objective_of_rows_that_are_dead_or_no_numbers(packed, loss_type):
    options = reference.LossOptions(loss_type=loss_type, beta=0.1, kl="k2", entropy_coef=0.1, max_length=9, rollout_correction="truncate")
    given, *statistics = objective_case(300)
    given["mask"][100:200] = False
    for vector in (*statistics, given["old_logp"], given["ref_logp"], given["rollout_logp"], given["advantages"]):
        vector[100:200] = torch.tensor([NAN, INF, -INF, 1e38]).repeat(25)
    _, metrics, gradients = assert_objective(packed, options, given, *statistics)
    assert all(value.isfinite() for value in metrics.values())
    assert gradients.isfinite().all()
    row = int(given["mask"].nonzero()[5])
    for vector in (statistics[0], given["old_logp"], given["rollout_logp"]):
        before = vector[row].clone()
        for value in (-INF, -80.0, 80.0):
            vector[row] = value
            assert_objective(packed, options, given, *statistics)
        vector[row] = NAN
        rows, values = packed(options, 300, **given), statistics_of(*statistics)
        loss, _, gradients = rows.evaluate(values, options, differentiate=True)
        assert loss.isnan()
        spoilt = torch.arange(300) == row
        if loss_type in reference.SEQUENCE_RATIO:
            sequence = reference.sequence_of_rows(given["cu_seqlens"], 300)
            spoilt = (sequence == sequence[row]) & given["mask"]
        assert torch.equal(gradients[Stat.LOGP].isnan(), spoilt)
        vector[row] = before


def test_a_coefficient_of_0_is_no_term(packed):
    """Whatever the values that it is a coefficient of, and whatever the weight."""
    given, *statistics = objective_case(300, masked=False)
    for vector in (statistics[1], statistics[2], given["ref_logp"]):
        vector[7] = NAN
    loss, metrics, _ = assert_objective(packed, reference.LossOptions(), given, *statistics)
    assert loss.isfinite()
    assert metrics["entropy"].isnan()
    assert metrics["kl"].isnan()
    given["denominator"] = NAN
    rows = packed(reference.LossOptions(), 300, **given)
    values = statistics_of(statistics[0], statistics[1], None)
    _, _, gradients = rows.evaluate(values, reference.LossOptions(), differentiate=True)
    assert gradients[0, rows.live].isnan().all()
    assert (gradients[1:] == 0).all()
    assert not torch.signbit(gradients[1:]).any()


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_order_of_threads_does_not_change_an_objective(kernels, packed, seed):
    results = []
    for chance in (0, seed):  # 0: the youngest first
        kernels.settings = machine(seed=chance)
        given, *statistics = objective_case(700)
        rows = packed(REGULARISED, 700, **given)
        values = statistics_of(*statistics)
        loss, metrics, gradients = rows.evaluate(values, REGULARISED, differentiate=True)
        results.append([rows.lines, rows.live, rows.counts, loss, *metrics.values(), gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_metrics_have_their_lines(kernels):
    """Those of `Metric`, whose order is also that of rows.h."""
    lines = torch.ones(LOSS_LINES, 1)
    metrics = torch.full((METRICS,), NAN)
    counts = torch.tensor([5.0, 3.0])
    given = (torch.tensor([1.0]), torch.tensor([2.5]), torch.tensor([3.5]), lines, torch.ones(1, dtype=torch.bool), counts)
    numbers = packed_loss.loss_numbers(reference.LossOptions())
    kernels.objective(*given, HAS_OLD | HAS_REF | HAS_ROLLOUT, 1, KL_KINDS["k1"], CORRECTIONS["truncate"], numbers, metrics, None)
    found = {metric.name.lower(): float(metrics[metric]) for metric in Metric}
    assert found == {
        "loss": -1.0, "policy_loss": -1.0, "tokens": 5.0, "live_tokens": 1.0, "sequences": 3.0, "ratio_mean": 1.0, "clip_frac_low": 0.0,
        "clip_frac_high": 0.0, "rollout_weight_mean": 1.0, "kl": 0.0, "entropy": 2.5, "self_certainty": 3.5, "ratio_max": 1.0,
        "rollout_gap_mean": 0.0, "rollout_gap_max": 0.0,
    }  # fmt: skip
