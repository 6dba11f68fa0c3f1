"""token_stats against closed formulas, torch.distributions and finite differences; the reference against the same."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from urlvr_fast import TokenStats, token_stats
from urlvr_fast.ops import reference
from urlvr_fast.ops.spec import grids

ALL = TokenStats._fields
DIFFERENTIABLE = ("logp", "lse", "entropy", "self_certainty", "mean_logit")


def direct(logits, ids, *, temperature=1.0, softcap=None, scale=1.0, bias=None, kept=None, entropy_on_keep=False, vocab_size=None):
    """The definitions in float64, a row at a time, on Python's terms: nothing shared with the package."""
    out = {name: [] for name in ALL}
    for n in range(len(logits)):
        z = logits[n].double()[:vocab_size] * scale
        if bias is not None:
            z = z + bias.double()[:vocab_size]
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        x = z / (temperature[n].double() if isinstance(temperature, torch.Tensor) else temperature)
        finite = x[x > -math.inf]
        lse = torch.logsumexp(x, 0)
        p = (x - lse).exp()

        def entropy_of(values):
            values = values[values > -math.inf]
            log_p = values - torch.logsumexp(values, 0)
            return -(log_p.exp() * log_p).sum()

        inside = x if kept is None else torch.where(kept[n][: len(x)], x, -math.inf)
        top = p.sort(descending=True).values
        out["logp"].append(inside[ids[n]] - torch.logsumexp(inside, 0))
        out["lse"].append(lse)
        out["entropy"].append(entropy_of(inside if entropy_on_keep else x))
        out["self_certainty"].append(lse - finite.mean() - math.log(len(finite)))
        out["mean_logit"].append(finite.mean())
        out["max_prob"].append(top[0])
        out["prob_gap"].append(top[0] - (top[1] if len(top) > 1 else 0))
        out["sum_p2"].append((p * p).sum())
        out["argmax"].append(x.argmax())
    return TokenStats(**{name: torch.stack(values) for name, values in out.items()})


def csr(kept):
    return torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]), kept.nonzero()[:, 1]


def keep_sets(n, v, ids, generator):
    kept = torch.rand(n, v, generator=generator) < 0.5
    kept[torch.arange(n), ids] = True
    return kept


N, V = 6, 11
G = torch.Generator().manual_seed(0)
IDS = torch.randint(0, 7, (N,), generator=G)
KEPT = keep_sets(N, V, IDS, G)
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "per-token temperature": {"temperature": torch.rand(N, generator=G, dtype=torch.float64) + 0.3},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": -0.3},
    "bias": {"bias": torch.randn(V, generator=G, dtype=torch.float64)},
    "everything": {"temperature": 1.7, "softcap": 2.0, "scale": 1.4, "bias": torch.randn(V, generator=G, dtype=torch.float64)},
    "vocab_size": {"vocab_size": 7, "bias": torch.randn(V, generator=G, dtype=torch.float64)},
    "keep": {"kept": KEPT},
    "entropy on keep": {"kept": KEPT, "entropy_on_keep": True, "temperature": 0.8, "softcap": 2.5},
}


def call_options(options):
    options = dict(options)
    if "kept" in options:
        options["keep"] = csr(options.pop("kept"))
    if options.pop("entropy_on_keep", False):
        options["entropy_support"] = "keep"
    return options


def reference_stats(logits, ids, *, outputs, **options):
    return reference.token_stats(logits, ids, **options)


IMPLEMENTATIONS = {"op": token_stats, "reference": reference_stats}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_output(implementation, case):
    logits = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    expected = direct(logits, IDS, **CASES[case])
    got = IMPLEMENTATIONS[implementation](logits, IDS, outputs=ALL, **call_options(CASES[case]))
    for name in ALL:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_by_finite_differences(implementation, case):
    options = call_options(CASES[case])
    logits = torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    inputs = [logits]
    if "bias" in options:
        inputs.append(options.pop("bias").clone().requires_grad_())

    def differentiable(logits, bias=None):
        stats = IMPLEMENTATIONS[implementation](logits, IDS, outputs=DIFFERENTIABLE, bias=bias, **options)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(differentiable, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_closed_form_of_the_gradient():
    """dx_j = p_j (a + b x_j) + c [j = id] + d with a = −g_lp + g_SC + g_lse + g_H · E, b = −g_H, c = g_lp, d = −g_SC / V."""
    x = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    stats = token_stats(x, IDS, outputs=DIFFERENTIABLE)
    g = {name: torch.randn(N, dtype=torch.float64) for name in ("logp", "entropy", "self_certainty", "lse")}
    (dx,) = torch.autograd.grad(sum((g[name] * getattr(stats, name)).sum() for name in g), x)
    p = x.detach().softmax(-1)
    mean = (p * x.detach()).sum(-1)
    a = -g["logp"] + g["self_certainty"] + g["lse"] + g["entropy"] * mean
    expected = p * (a[:, None] - g["entropy"][:, None] * x.detach()) - g["self_certainty"][:, None] / V
    expected[torch.arange(N), IDS] += g["logp"]
    torch.testing.assert_close(dx, expected, rtol=1e-12, atol=1e-13)


def test_entropy_and_self_certainty_are_those_of_torch_distributions():
    logits = torch.randn(N, V, dtype=torch.float64)
    stats = token_stats(logits, IDS, outputs=("logp", "entropy", "self_certainty"))
    p, uniform = Categorical(logits=logits), Categorical(probs=torch.full((N, V), 1 / V, dtype=torch.float64))
    torch.testing.assert_close(stats.entropy, p.entropy())
    torch.testing.assert_close(stats.self_certainty, kl_divergence(uniform, p))
    torch.testing.assert_close(stats.logp, p.log_prob(IDS))


def test_only_what_was_asked_for():
    stats = token_stats(torch.randn(2, 3), None, outputs="entropy")
    assert stats.entropy is not None
    assert all(getattr(stats, name) is None for name in ALL if name != "entropy")
    ordered = token_stats(torch.randn(2, 3), torch.tensor([0, 1]), outputs=["argmax", "logp"])
    assert ordered.argmax.dtype == torch.int64
    assert ordered.logp.dtype == torch.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_masked_rows_are_zero_whatever_they_hold(implementation):
    logits = torch.randn(5, 7, dtype=torch.float64)
    logits[1], logits[3] = math.nan, -math.inf
    ids, mask = torch.tensor([0, 99, 2, -5, 3]), torch.tensor([True, False, True, False, True])
    temperature = torch.tensor([1.0, math.nan, 0.5, -1.0, 2.0])
    logits.requires_grad_()
    stats = IMPLEMENTATIONS[implementation](logits, ids, outputs=ALL, mask=mask, temperature=temperature, softcap=3.0)
    for value in stats:
        assert torch.equal(value[~mask], torch.zeros_like(value[~mask]))
        assert value[mask].isfinite().all()
    upstream = torch.tensor([1.0, math.nan, 1.0, math.inf, 1.0])
    loss = torch.where(mask, (stats.logp + stats.entropy + stats.self_certainty) * upstream, 0).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient[~mask], torch.zeros(2, 7, dtype=torch.float64))
    alone = logits.detach()[mask].requires_grad_()
    stats = token_stats(alone, ids[mask], outputs=ALL, temperature=temperature[mask], softcap=3.0)
    (expected,) = torch.autograd.grad((stats.logp + stats.entropy + stats.self_certainty).sum(), alone)
    torch.testing.assert_close(gradient[mask], expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_minus_infinity_is_a_column_that_is_not_there(implementation):
    logits = torch.randn(4, 9, dtype=torch.float64)
    gone = torch.rand(4, 9) < 0.4
    ids = (~gone).int().argmax(-1)
    gone[torch.arange(4), ids] = False
    cut = logits.masked_fill(gone, -math.inf).requires_grad_()
    stats = IMPLEMENTATIONS[implementation](cut, ids, outputs=ALL)
    for n in range(4):
        columns = (~gone[n]).nonzero()[:, 0]
        alone = logits[n][columns][None].requires_grad_()
        expected = direct(alone.detach(), (columns == ids[n]).nonzero()[0])
        for name in ALL[:-1]:
            torch.testing.assert_close(getattr(stats, name)[n], getattr(expected, name)[0])
        assert stats.argmax[n] == columns[expected.argmax[0]]
    (gradient,) = torch.autograd.grad(sum(getattr(stats, name).sum() for name in DIFFERENTIABLE), cut)
    assert torch.equal(gradient[gone], torch.zeros_like(gradient[gone]))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_a_distribution_and_nan_stay_alone(implementation):
    logits = torch.randn(4, 5, dtype=torch.float64)
    logits[1], logits[2, 3] = -math.inf, math.nan
    logits.requires_grad_()
    ids = torch.tensor([0, 1, 2, 3])
    stats = IMPLEMENTATIONS[implementation](logits, ids, outputs=ALL)
    for name in ALL[:-1]:
        assert getattr(stats, name).isnan().tolist() == [False, True, True, False], name
    assert stats.argmax[[1, 2]].tolist() == [-1, -1]
    (gradient,) = torch.autograd.grad((stats.logp + stats.entropy + stats.self_certainty).sum(), logits)
    assert torch.equal(gradient[1], torch.zeros(5, dtype=torch.float64))
    assert gradient[2].isnan().any()
    assert gradient[[0, 3]].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_impossible_token_has_log_probability_minus_infinity(implementation):
    logits = torch.zeros(2, 4, dtype=torch.float64)
    logits[0, 1] = -math.inf
    kept = torch.ones(2, 4, dtype=torch.bool)
    kept[1, 2] = False
    logits.requires_grad_()
    stats = IMPLEMENTATIONS[implementation](logits, torch.tensor([1, 2]), outputs=("logp",), keep=csr(kept))
    assert stats.logp.tolist() == [-math.inf, -math.inf]
    (gradient,) = torch.autograd.grad(stats.logp.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 1] == 0


@pytest.mark.parametrize("shift", [0.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_bounds(dtype, shift, same_but_rounded):
    """2e-6 + 2 ulp₃₂(max(|x|max, |result|)) for outputs, 1e-5 in norm for gradients, against float64 on the same numbers."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(16, 20011, generator=generator) * 4 + shift).to(dtype).requires_grad_()
    ids = torch.randint(0, 20011, (16,), generator=generator)
    got = token_stats(logits, ids, outputs=ALL)
    exact_logits = logits.detach().double().requires_grad_()
    p = exact_logits.log_softmax(-1)
    exact = direct(exact_logits.detach(), ids)
    for name in ALL[:-1]:
        result, value = getattr(exact, name), getattr(got, name).double()
        size = torch.maximum(exact_logits.detach().abs().amax(-1), result.abs())
        ulp = torch.tensor(2.0).double() ** (size.log2().floor() - 23)
        assert value.dtype == torch.float64
        assert ((value - result).abs() <= 2e-6 + 2 * ulp).all(), name
    g = torch.randn(4, 16, generator=generator)
    loss = (g[0] * got.logp + g[1] * got.entropy + g[2] * got.self_certainty + g[3] * got.lse).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    entropy = -(p.exp() * p).sum(-1)
    exact_loss = g[0] * p.gather(1, ids[:, None])[:, 0] + g[1] * entropy - g[2] * p.mean(-1) + g[3] * exact_logits.logsumexp(-1)
    (expected,) = torch.autograd.grad(exact_loss.sum(), exact_logits)
    if dtype == torch.float32:
        assert (gradient.double() - expected).norm() / expected.norm() <= 1e-5
    else:
        assert gradient.dtype == dtype
        fp32 = logits.detach().float().requires_grad_()
        stats = token_stats(fp32, ids, outputs=DIFFERENTIABLE)
        loss = (g[0] * stats.logp + g[1] * stats.entropy + g[2] * stats.self_certainty + g[3] * stats.lse).sum()
        same_but_rounded(gradient, torch.autograd.grad(loss, fp32)[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits_of_any_leading_shape(inplace):
    base = torch.randn(3, 6, 2, 10, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 8, (3, 2, 5))
    upstream = torch.randn(3, 2, 5, dtype=torch.float64)

    def strided(base):
        return base[:, :-1].transpose(1, 2)[..., 1:9]

    logits = strided(base * 1.0)
    assert logits.stride(-1) == 1
    stats = token_stats(logits, ids, outputs=("logp", "entropy"), inplace_backward=inplace)
    assert stats.logp.shape == (3, 2, 5)
    p = Categorical(logits=strided(base.detach()))
    torch.testing.assert_close(stats.logp, p.log_prob(ids))
    torch.testing.assert_close(stats.entropy, p.entropy())
    (gradient,) = torch.autograd.grad((upstream * (stats.logp + stats.entropy)).sum(), base)
    (expected,) = torch.autograd.grad(
        (upstream * (Categorical(logits=strided(base)).log_prob(ids) + Categorical(logits=strided(base)).entropy())).sum(), base
    )
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(7, 10), (3, 5, 10), (2, 3, 5, 10), (1, 4, 1, 10)])
def test_logits_are_not_copied_whatever_their_leading_strides(shape):
    logits = torch.randn(*(2 * size for size in shape[:-1]), shape[-1])[tuple(slice(None, None, 2) for _ in shape[:-1])]
    pieces = list(grids(logits))
    assert all(grid.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() for _, grid in pieces)
    rows = [row for _, grid in pieces for row in grid.flatten(0, 1)]
    assert torch.equal(torch.stack(rows), logits.reshape(-1, shape[-1]))
    assert [start for start, _ in pieces] == [sum(g.shape[0] * g.shape[1] for _, g in pieces[:i]) for i in range(len(pieces))]


def test_no_rows_and_one_column():
    for shape in ((0, 5), (0, 3, 5), (2, 0, 5)):
        logits = torch.randn(shape, requires_grad=True)
        stats = token_stats(logits, torch.zeros(shape[:-1], dtype=torch.int64), outputs=ALL)
        assert all(value.shape == shape[:-1] for value in stats)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        assert logits.grad.shape == shape
    single = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    stats = token_stats(single, torch.zeros(4, dtype=torch.int64), outputs=ALL)
    for name in ("logp", "entropy", "self_certainty"):
        assert torch.equal(getattr(stats, name), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(stats.prob_gap, torch.ones(4, dtype=torch.float64))
    assert torch.equal(stats.lse, single.detach()[:, 0])


def test_padding_columns_get_no_gradient():
    logits = torch.randn(3, 8, requires_grad=True)
    token_stats(logits, torch.tensor([0, 1, 2]), outputs="logp", vocab_size=5).logp.sum().backward()
    assert torch.equal(logits.grad[:, 5:], torch.zeros(3, 3))
    assert (logits.grad[:, :5] != 0).all()


def test_rows_do_not_depend_on_their_company_or_on_threads():
    logits, ids = torch.randn(40, 70001) * 3, torch.randint(0, 70001, (40,))
    together = token_stats(logits, ids, outputs=ALL)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for n in (0, 39):
            alone = token_stats(logits[n : n + 1], ids[n : n + 1], outputs=ALL)
            assert all(torch.equal(a[0], b[n]) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_in_place_writes_the_gradient_over_the_logits():
    leaf = torch.randn(4, 6, requires_grad=True)
    expected = torch.autograd.grad(token_stats(leaf, IDS[:4], outputs="logp", vocab_size=7 - 1).logp.sum(), leaf)[0]
    logits = leaf * 1.0
    memory = logits.data_ptr()
    token_stats(logits, IDS[:4].clamp(max=5), outputs="logp", inplace_backward=True).logp.sum().backward()
    assert logits.data_ptr() == memory
    torch.testing.assert_close(logits.detach(), leaf.grad)
    torch.testing.assert_close(leaf.grad, expected)


def test_in_place_second_backward_raises():
    logits = torch.randn(4, 6, requires_grad=True) * 1.0
    loss = token_stats(logits, IDS[:4].clamp(max=5), outputs="logp", inplace_backward=True).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="token_stats: a second backward"):
        loss.backward()


def test_in_place_is_noticed_by_whoever_had_saved_the_logits():
    leaf = torch.randn(4, 6, requires_grad=True)
    logits = leaf.exp()  # saves its output for the backward
    loss = token_stats(logits, IDS[:4].clamp(max=5), outputs="logp", inplace_backward=True).logp.sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_masked_rows_are_written_too():
    logits = torch.randn(3, 5, requires_grad=True) * 1.0
    mask = torch.tensor([True, False, True])
    token_stats(logits, torch.tensor([0, 1, 2]), outputs="logp", mask=mask, inplace_backward=True).logp.sum().backward()
    assert torch.equal(logits.detach()[1], torch.zeros(5))


def test_double_backward_raises():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = token_stats(logits, torch.tensor([0, 1, 2]), outputs="entropy").entropy.sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"token_stats has no second derivative"):
        (gradient.square().sum() + logits.sum()).backward()


def test_a_graph_that_is_kept_gives_the_gradient_again():
    logits = torch.randn(3, 5, requires_grad=True)
    loss = token_stats(logits, torch.tensor([0, 1, 2]), outputs="logp").logp.sum()
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logits)[0])


def test_max_prob_and_its_like_carry_no_gradient():
    stats = token_stats(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2]), outputs=ALL)
    for name in ALL:
        assert getattr(stats, name).requires_grad == (name in DIFFERENTIABLE)


def test_no_graph_under_no_grad():
    with torch.no_grad():
        assert not token_stats(torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2]), outputs="logp").logp.requires_grad


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


@pytest.mark.parametrize("case", ["plain", "everything", "entropy on keep"])
def test_compiled_without_a_graph_break(case):
    options = call_options(CASES[case])
    logits = torch.randn(N, V, dtype=torch.float64)
    results = []
    for op in (token_stats, compiled(token_stats)):
        leaf = logits.clone().requires_grad_()
        stats = op(leaf, IDS, outputs=ALL, **options)
        results.append((*stats, torch.autograd.grad((stats.logp + stats.entropy).sum(), leaf)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_where_contents_cannot_be_read_a_wrong_row_is_nan():
    """Under torch.compile, as on CUDA: an id out of range or a temperature <= 0 spoils its own row."""
    logits, ids = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 5, 2, -1])
    temperature = torch.tensor([1.0, 1.0, -1.0, 1.0])
    stats = compiled(token_stats)(logits, ids, outputs=("logp", "entropy"), temperature=temperature)
    assert stats.logp.isnan().tolist() == stats.entropy.isnan().tolist() == [False, True, True, True]
    stats.logp.sum().backward()
    assert logits.grad[0].isfinite().all()


L = torch.randn(3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"logits": torch.randn(5)}, ValueError, r"shape \(…, V\)"),
        ({"logits": torch.randn(3, 0)}, ValueError, "no column"),
        ({"logits": torch.randn(3, 5).int()}, TypeError, "fp16, bf16, fp32 or fp64"),
        ({"logits": torch.randn(5, 3).T}, ValueError, "last stride of logits must be 1"),
        pytest.param({"ids": torch.tensor([0, 5, 1])}, IndexError, r"ids\[1\] = 5 is not a column of 0..4", marks=pytest.mark.host),
        pytest.param({"ids": torch.tensor([0, -1, 1])}, IndexError, r"ids\[1\] = -1", marks=pytest.mark.host),
        pytest.param({"ids": torch.tensor([0, 4, 1]), "vocab_size": 4}, IndexError, "0..3", marks=pytest.mark.host),
        ({"ids": torch.tensor([0.0, 1.0, 2.0])}, TypeError, "ids must be int64 or int32"),
        ({"ids": torch.tensor([0, 1])}, ValueError, r"ids must have shape \(3,\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, ValueError, "ids is on meta, the rest on c"),
        ({"ids": None}, ValueError, "logp needs ids"),
        ({"outputs": "perplexity"}, ValueError, "choose from logp, lse, entropy"),
        ({"outputs": ()}, ValueError, "choose from"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        pytest.param({"temperature": torch.tensor([1.0, -2.0, 1.0])}, ValueError, r"temperature\[1\] = -2.0", marks=pytest.mark.host),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"scale": math.inf}, ValueError, "scale"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"vocab_size": 6}, ValueError, "vocab_size=6 must lie in 1..5"),
        ({"entropy_support": "keep"}, ValueError, "needs a keep set"),
        ({"entropy_support": "top"}, ValueError, "entropy_support='top'"),
        ({"keep": (torch.tensor([0, 1]), torch.tensor([0]))}, ValueError, "4 offsets for 3 rows"),
        pytest.param(
            {"keep": (torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1]))}, ValueError, "must rise from 0 to 2", marks=pytest.mark.host
        ),
        pytest.param(
            {"keep": (torch.tensor([0, 1, 1, 2]), torch.tensor([0, 9]))}, IndexError, "col must lie in 0..4", marks=pytest.mark.host
        ),
        ({"inplace_backward": True, "logits": torch.randn(3, 5, requires_grad=True)}, ValueError, "leaf that requires grad"),
        ({"inplace_backward": True, "logits": torch.randn(1, 5).expand(3, 5)}, ValueError, "expanded"),
    ],
)
def test_errors(arguments, error, match):
    call = {"logits": L, "ids": torch.tensor([0, 1, 2]), "outputs": ("logp",), **arguments}
    with pytest.raises(error, match=match):
        token_stats(call.pop("logits"), call.pop("ids"), **call)
