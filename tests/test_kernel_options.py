"""Every statistic and every pair of options against the float64 reference, at the error bounds, on every kernel package that runs here.

The C++ kernels run with each instruction set that the processor has, and plain PyTorch beside them. `TRITON_INTERPRET=1 pytest
tests/test_kernel_options.py` runs the Triton kernels as well (`make test` does both), and on a GPU (see conftest.py) the Triton and CUDA
kernels run there.
"""

import itertools
import math
import os

import pytest
import torch

from urlvr_fast import TokenStats, policy_loss_from_logits, token_stats
from urlvr_fast.ops import reference
from urlvr_fast.ops.reference import LOSS_TYPES, LossOptions

ALL = TokenStats._fields
DIFFERENTIABLE = reference.DIFFERENTIABLE
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_HOST = torch.get_default_device().type == "cpu"
N = 6
BACKENDS = (["triton"] if INTERPRETED else ["portable", "avx2", "avx512", "torch"]) if ON_HOST else ["triton", "cuda"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16] + ([] if INTERPRETED or not ON_HOST else [torch.float64])


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of a backend; with `cpp` the instruction set of the parameter is in use."""
    if INTERPRETED and request.param == "triton":
        request.getfixturevalue("tiny_triton")
    if not ON_HOST or INTERPRETED or request.param == "torch":
        yield request.param
        return
    before = torch.ops.urlvr_fast.cpp_instruction_set("")
    try:
        torch.ops.urlvr_fast.cpp_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield "cpp"
    torch.ops.urlvr_fast.cpp_instruction_set(before)


def columns() -> int:
    """Three segments, the last one neither whole nor a multiple of a vector."""
    return 2 * 64 + 43 if INTERPRETED else 2 * (4096 if ON_HOST else 16384) + 1003


OPTIONS = (
    "temperature",
    "temperatures",
    "softcap",
    "scale",
    "bias",
    "mask",
    "keep",
    "entropy on keep",
    "vocab_size",
    "strided",
    "leading",
    "in place",
    "shifted",
    "minus infinity",
    "int32 ids",
)
EXCLUSIVE = [{"temperature", "temperatures"}, {"keep", "entropy on keep"}, {"strided", "leading"}]
# With a bias or a softcap x is made in fp32 before its maximum is taken off, and 5000 rounds it; without, x − m is rounded once.
EXCLUSIVE += [{"shifted", other} for other in ("softcap", "bias")]
PAIRS = [
    pair for pair in [(), *((o,) for o in OPTIONS), *itertools.combinations(OPTIONS, 2)] if not any(both <= set(pair) for both in EXCLUSIVE)
]


def widen(value):
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


class Case:
    """Logits and a call with some options on."""

    def __init__(self, names: tuple[str, ...], dtype: torch.dtype, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        v, self.wide = columns(), reference.accumulation_dtype(dtype)
        self.names, self.options = names, {}
        values = torch.randn(N, v, generator=g) * 3
        count = v - 37 if "vocab_size" in names else v
        self.ids = torch.randint(0, count, (N,), generator=g)
        if "shifted" in names:
            values += 5000
        if "minus infinity" in names:
            gone = torch.rand(N, v, generator=g) < 0.2
            gone[:, v // 3 : 2 * v // 3] = True  # whole segments, and a whole vector of each width
            gone[torch.arange(N), self.ids] = False
            values.masked_fill_(gone, -math.inf)
        options = self.options
        if "temperature" in names:
            options["temperature"] = 0.6
        if "temperatures" in names:
            options["temperature"] = torch.rand(N, generator=g).to(self.wide) + 0.4
        if "softcap" in names:
            options["softcap"] = 4.0
        if "scale" in names:
            options["scale"] = 0.7
        if "bias" in names:
            options["bias"] = torch.randn(v, generator=g).to(self.wide)
        if "mask" in names:
            options["mask"] = torch.tensor([True, False, True, True, False, True])
            values[~options["mask"]] = math.nan
        if "vocab_size" in names:
            options["vocab_size"] = count
        if {"keep", "entropy on keep"} & set(names):
            kept = torch.rand(N, v, generator=g) < 0.1
            kept[:, count:] = False
            kept[torch.arange(N), self.ids] = True
            options["keep"] = (torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]), kept.nonzero()[:, 1])
        if "entropy on keep" in names:
            options["entropy_support"] = "keep"
        self.values = values.to(dtype)
        self.upstream = torch.randn(len(DIFFERENTIABLE), N, generator=g).to(self.wide)

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """The values as the op gets them, through differentiable operations."""
        if "strided" in self.names:  # rows that begin at odd places, far from each other
            return torch.nn.functional.pad(values[:, None], (1, 2, 0, 1))[:, 0, 1 : 1 + values.shape[1]]
        if "leading" in self.names:  # leading dimensions that do not merge
            return torch.nn.functional.pad(values.view(2, 3, -1), (0, 0, 0, 1))[:, :-1]
        return values * 1

    def run(self, values: torch.Tensor, backend: str) -> tuple[TokenStats, list[torch.Tensor]]:
        """Statistics and gradients by the values (and the bias)."""
        values = values.detach().clone().requires_grad_()
        options = dict(self.options)
        inputs = [values]
        if "bias" in options:
            options["bias"] = options["bias"].to(reference.accumulation_dtype(values.dtype)).requires_grad_()
            inputs.append(options["bias"])
        logits = self.logits(values)
        shape = logits.shape[:-1]
        for name in ("temperature", "mask"):
            if isinstance(options.get(name), torch.Tensor):
                options[name] = options[name].view(shape)
        ids = self.ids.view(shape).to(torch.int32 if "int32 ids" in self.names else torch.int64)
        stats = token_stats(logits, ids, outputs=ALL, inplace_backward="in place" in self.names, backend=backend, **options)
        loss = sum((g * getattr(stats, name).flatten()).sum() for g, name in zip(self.upstream, DIFFERENTIABLE, strict=True))
        gradients = torch.autograd.grad(loss, inputs)
        return TokenStats(*(value.detach().flatten() for value in stats)), [gradient.detach() for gradient in gradients]

    def exact(self) -> tuple[TokenStats, list[torch.Tensor], torch.Tensor]:
        """The same by the definitions in float64, and the largest |x| of each row."""
        values = self.values.double().requires_grad_()
        options = {
            name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value for name, value in self.options.items()
        }
        inputs = [values]
        if "bias" in options:
            inputs.append(options["bias"].requires_grad_())
        stats = reference.token_stats(values, self.ids, **options)
        loss = sum((g.double() * getattr(stats, name)).sum() for g, name in zip(self.upstream, DIFFERENTIABLE, strict=True))
        gradients = torch.autograd.grad(loss, inputs)
        scaling = {name: options[name] for name in ("temperature", "softcap", "scale", "bias") if name in options}
        x = reference.scaled_logits(values.detach(), **scaling).detach()
        largest = torch.where(x.isfinite(), x.abs(), 0).amax(-1)
        return stats, list(gradients), largest


def check_statistics(got: TokenStats, exact: TokenStats, largest: torch.Tensor, dtype: torch.dtype) -> None:
    for name in ALL[:-1]:
        value, result = getattr(got, name).double(), getattr(exact, name).detach()
        size = torch.maximum(largest, result.abs()).clamp(min=1e-30)
        bound = 2e-6 + 2 * torch.exp2(size.log2().floor() - 23) if dtype != torch.float64 else 1e-11 * size.clamp(min=1)
        error = (value - result).abs()
        assert (error <= bound).all(), f"{name}: {error.tolist()} above {bound.tolist()}"
    assert torch.equal(got.argmax, exact.argmax)


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_pairs_of_options(names, dtype, backend):
    case = Case(names, dtype, seed=PAIRS.index(names))
    got, gradients = case.run(case.values, backend)
    exact, exact_gradients, largest = case.exact()
    check_statistics(got, exact, largest, dtype)
    wide = gradients if case.wide == dtype else case.run(case.values.to(case.wide), backend)[1]
    for gradient, wanted in zip(wide, exact_gradients, strict=True):
        assert relative(gradient, wanted) <= (1e-5 if dtype != torch.float64 else 1e-12)
    assert gradients[0].dtype == dtype
    if dtype != case.wide and (
        INTERPRETED or not ON_HOST
    ):  # the interpreter cuts fp32 to bf16 off, and lanes hold other columns of 16-bit rows
        torch.testing.assert_close(gradients[0], wide[0].to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-7)
    elif dtype != case.wide:
        assert torch.equal(gradients[0], wide[0].to(dtype)), "a 16-bit gradient is the fp32 gradient, rounded once"


def test_a_row_does_not_depend_on_its_company(backend):
    """One row alone is shared out over threads (or programs), forty are not: the bits must be those of the row."""
    v = columns()
    rows = 5 if INTERPRETED else 40 if ON_HOST else 600
    logits, ids = torch.randn(rows, v) * 3, torch.randint(0, v, (rows,))
    upstream = torch.randn(rows)
    together = logits.clone().requires_grad_()
    stats = token_stats(together, ids, outputs=ALL, backend=backend)
    (d_together,) = torch.autograd.grad((upstream * (stats.logp + stats.entropy + stats.self_certainty)).sum(), together)
    threads = torch.get_num_threads()
    try:
        for n, count in ((0, 1), (rows - 1, 2), (rows // 2, threads)):
            torch.set_num_threads(count)
            alone = logits[n : n + 1].clone().requires_grad_()
            one = token_stats(alone, ids[n : n + 1], outputs=ALL, backend=backend)
            (d_alone,) = torch.autograd.grad((upstream[n] * (one.logp + one.entropy + one.self_certainty)).sum(), alone)
            assert all(torch.equal(a[0], b[n]) for a, b in zip(one, stats, strict=True))
            assert torch.equal(d_alone[0], d_together[n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_distribution(dtype, backend):
    """NaN, −inf throughout, +inf, an impossible id: each has its outcome and leaves its neighbours alone."""
    v = columns()
    logits = (torch.randn(6, v) * 2).to(dtype)
    logits[1], logits[2, v // 2], logits[3, 7], logits[4, 3] = -math.inf, math.nan, math.inf, -math.inf
    ids = torch.tensor([1, 1, 1, 1, 3, 5])
    logits.requires_grad_()
    stats = token_stats(logits, ids, outputs=ALL, backend=backend)
    for name in ALL[:-1]:
        assert getattr(stats, name).isnan().tolist() == [False, True, True, True, False, False], name
    assert stats.argmax[1:4].tolist() == [-1, -1, -1]
    assert stats.logp[4] == -math.inf
    (gradient,) = torch.autograd.grad((stats.logp + stats.entropy + stats.self_certainty)[torch.arange(6) != 4].sum(), logits)
    assert torch.equal(gradient[1], torch.zeros(v, dtype=dtype))
    assert gradient[2].isnan().all()
    assert gradient[[0, 5]].isfinite().all()
    assert torch.equal(gradient[4], torch.zeros(v, dtype=dtype))  # nothing came from upstream: 0, not 0 · −inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 1000])
def test_any_number_of_columns(v, dtype, backend):
    logits, ids = (torch.randn(3, v) * 3).to(dtype).requires_grad_(), torch.randint(0, v, (3,))
    stats = token_stats(logits, ids, outputs=ALL, backend=backend)
    exact_logits = logits.detach().double().requires_grad_()
    exact = reference.token_stats(exact_logits, ids)
    check_statistics(TokenStats(*(s.detach() for s in stats)), exact, logits.detach().double().abs().amax(-1), dtype)
    (gradient,) = torch.autograd.grad((stats.logp - 2 * stats.entropy + stats.self_certainty).sum(), logits)
    (wanted,) = torch.autograd.grad((exact.logp - 2 * exact.entropy + exact.self_certainty).sum(), exact_logits)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_by_the_lowest_number(dtype, temperature, backend):
    """Columns at finfo.min, as models mask them: their distance to the others may be −inf, and is of no weight."""
    v = columns()
    logits = (torch.randn(3, v) * 3).to(dtype)
    logits[0, v // 4 :] = torch.finfo(dtype).min  # whole segments
    logits[1, ::3] = torch.finfo(dtype).min
    ids = torch.tensor([1, 1, 2])
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats = token_stats(leaf, ids, outputs=("logp", "lse", "entropy"), temperature=temperature, backend=backend)
    exact = reference.token_stats(exact_leaf, ids, temperature=temperature)
    for name in ("logp", "lse", "entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), rtol=1e-6, atol=5e-6)
    (gradient,) = torch.autograd.grad((stats.logp - 2 * stats.entropy).sum(), leaf)
    (wanted,) = torch.autograd.grad((exact.logp - 2 * exact.entropy).sum(), exact_leaf)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=5e-6)


def test_exponentials_are_right_everywhere(backend):
    """e^(x − m) from 1 down to where fp32 ends, through max_prob and the gradient of a two-column row."""
    gaps = torch.cat(
        [torch.linspace(0, 100, 103 if INTERPRETED else 2003), torch.tensor([87.0, 87.3, 87.34, 88.0, 103.0, 104.0, 1e4, 1e30])]
    )
    logits = torch.stack([torch.zeros_like(gaps), -gaps], 1).requires_grad_()
    stats = token_stats(logits, torch.ones(len(gaps), dtype=torch.int64), outputs=("lse", "sum_p2", "prob_gap"), backend=backend)
    (gradient,) = torch.autograd.grad(stats.lse.sum(), logits)
    p = torch.softmax(logits.detach().double(), -1)
    normal = p[:, 1] > 2e-38
    relative_error = ((gradient[:, 1].double() - p[:, 1]) / p[:, 1]).abs()
    # The exponent's rounding grows with it; Triton and CUDA multiply by log2 e before they take the whole part off, and a GPU's own
    # exponential is right to 2 ulp.
    constant, growing = (3e-7, 3e-8) if ON_HOST and not INTERPRETED else (3e-7 if INTERPRETED else 5e-7, 8e-8)
    assert (relative_error <= constant + growing * gaps)[normal].all()
    assert (gradient[~normal, 1] <= 2e-38).all()
    torch.testing.assert_close(stats.prob_gap.double(), p[:, 0] - p[:, 1], rtol=0, atol=1e-6)


NUMBERS_OF = {"dr_grpo": {"max_length": 5}}


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("correction", [None, "truncate", "mask"])
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_losses(loss_type, old, kl, correction, dtype, backend):
    """The loss, its metrics and its gradient, made in the forward, against autograd through the definitions in float64."""
    g = torch.Generator().manual_seed(LOSS_TYPES.index(loss_type))
    n, v = 12, 40
    logits, ids = (torch.randn(n, v, generator=g) * 2).to(dtype), torch.randint(0, v, (n,), generator=g)
    mask = torch.rand(n, generator=g) < 0.8
    near = reference.token_stats(logits.double(), ids).logp.float()
    call = {
        "advantages": torch.randn(n, generator=g),
        "cu_seqlens": torch.tensor([0, 4, 7, 12]),
        "mask": mask,
        "ref_logp": near + 0.3 * torch.randn(n, generator=g) if kl else None,
        "rollout_logp": near + 0.8 * torch.randn(n, generator=g) if correction else None,
        "old_logp": near + 0.5 * torch.randn(n, generator=g) if old else None,
    }
    numbers = {"loss_type": loss_type, "beta": 0.3 if kl else 0.0, "kl": kl or "k3", "entropy_coef": 0.02, "self_certainty_coef": -0.01}
    numbers |= {"rollout_correction": correction, "rollout_floor": 0.3, "rollout_cap": 1.5, **NUMBERS_OF.get(loss_type, {})}
    if loss_type not in ("reinforce", "cispo", "sapo"):
        numbers["delta"] = 1.9
    leaf = logits.clone().requires_grad_()
    given = {name: value for name, value in call.items() if value is not None}
    loss, metrics = policy_loss_from_logits(leaf, ids, temperature=0.8, backend=backend, **given, **numbers)
    (0.5 * loss).backward()

    exact_logits = logits.double().requires_grad_()
    options = LossOptions(**numbers)
    exact = reference.token_stats(exact_logits, ids, temperature=0.8)
    wide = {name: widen(value) for name, value in given.items()}
    rows = reference.loss_rows(options, dtype=torch.float64, **wide)
    wanted, wanted_metrics = reference.policy_objective(exact.logp, exact.entropy, exact.self_certainty, rows, options)
    (exact_gradient,) = torch.autograd.grad(0.5 * wanted, exact_logits)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-5, atol=2e-6)
    for name, value in metrics.items():
        torch.testing.assert_close(value.double(), wanted_metrics[name].double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    if dtype == torch.float32:
        assert relative(leaf.grad, exact_gradient) <= 1e-5
    else:
        torch.testing.assert_close(leaf.grad.double(), exact_gradient, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize(
    "names", [(), ("keep",), ("entropy on keep", "softcap"), ("mask", "temperatures"), ("strided",), ("leading", "vocab_size")]
)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_gradients_are_those_of_the_statistics(names, inplace, dtype, backend):
    """One kernel that makes everything, against statistics, torch and the gradient kernel one after the other."""
    case = Case(names, dtype)
    options = {name: value for name, value in case.options.items() if name != "mask"}
    mask = case.options.get("mask", torch.ones(N, dtype=torch.bool))
    advantages = torch.randn(N).to(case.wide)
    old = torch.randn(N).to(case.wide) - 8
    fused = case.values.clone().requires_grad_()
    logits = case.logits(fused)
    shape = logits.shape[:-1]
    if isinstance(options.get("temperature"), torch.Tensor):
        options["temperature"] = options["temperature"].view(shape)
    loss, _ = policy_loss_from_logits(
        logits,
        case.ids.view(shape),
        advantages=advantages.view(shape),
        old_logp=old.view(shape),
        mask=mask.view(shape),
        entropy_coef=0.1,
        denominator=3.0,
        inplace_backward=inplace,
        backend=backend,
        **options,
    )
    (d_fused,) = torch.autograd.grad(3.0 * loss, fused)
    apart = case.values.to(case.wide).requires_grad_()
    call = {"outputs": ("logp", "entropy"), "mask": mask.view(shape), "backend": backend, **options}
    stats = token_stats(case.logits(apart), case.ids.view(shape), **call)
    terms = LossOptions(entropy_coef=0.1)
    rows = reference.loss_rows(terms, advantages=advantages, mask=mask, dtype=case.wide, old_logp=old, denominator=3.0)
    value, _ = reference.policy_objective(stats.logp.flatten(), stats.entropy.flatten(), None, rows, terms)
    (d_apart,) = torch.autograd.grad(3.0 * value, apart)
    torch.testing.assert_close(3.0 * loss, 3.0 * value)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]  # 16 bits: · 3 rounds again
    assert relative(d_fused, d_apart.double()) <= bound


@pytest.mark.skipif(INTERPRETED, reason="the interpreter would need hours")
def test_more_than_two_to_the_31_elements():
    """The last row lies beyond what 32 bits can address; the rest is masked, and must come out as zeros."""
    v = 151936
    n = 2**31 // v + 2
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if ON_HOST else torch.cuda.mem_get_info()[0]
    if available < 3 * n * v:
        pytest.skip(f"needs {3 * n * v / 2**30:.0f} GiB of free memory")
    leaf = torch.zeros(n, v, dtype=torch.bfloat16, requires_grad=True)
    logits = leaf.view(n, v)  # some operation produced it, and no second copy exists
    with torch.no_grad():
        logits[-1] = torch.randn(v)
        logits[0, 5] = 1.0
    mask = torch.zeros(n, dtype=torch.bool)
    mask[-1] = True
    alone = logits.detach()[-1:].clone().requires_grad_()
    ids = torch.full((n,), v - 1)
    stats = token_stats(logits, ids, outputs=("logp", "entropy"), mask=mask, inplace_backward=True)
    expected = token_stats(alone, ids[:1], outputs=("logp", "entropy"))
    assert torch.equal(stats.logp[-1:], expected.logp)
    (stats.logp.sum() + stats.entropy.sum()).backward()
    (wanted,) = torch.autograd.grad(expected.logp.sum() + expected.entropy.sum(), alone)
    assert torch.equal(logits.detach()[-1], wanted[0])
    assert logits.detach()[0, 5] == 0
    assert int(torch.count_nonzero(logits.detach()[:-1].view(torch.int16)[::97])) == 0
