"""linear_token_stats and linear_policy_loss against the ops on logits and float64 products."""

import math

import pytest
import torch

from urlvr_fast import linear_policy_loss, linear_token_stats, policy_loss, policy_loss_from_logits, token_stats
from urlvr_fast.ops import LOSS_TYPES, head, products
from urlvr_fast.ops.backend import choose_backend

DTYPE = torch.float64
DEVICE = torch.get_default_device().type
BACKENDS = ["cpp", "torch"] if DEVICE == "cpu" else ["triton", "cuda", "torch"]
N, H, V, B = 23, 6, 17, 4
CU = torch.tensor([0, 5, 5, 14, 23])
DIFFERENTIABLE = ("logp", "lse", "entropy", "self_certainty", "mean_logit")


def budget(rows, dtype=DTYPE):
    """The chunk_bytes that `rows` rows fit."""
    return head.VECTOR_BYTES * N + rows * (V + 2 * H) * dtype.itemsize


TINY, SMALL, LARGE = 1, budget(4), 1 << 28  # one row, four rows, everything
TILE = 4 * V * 8  # bytes of four rows of logits


def problem(seed=0, dtype=DTYPE):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, H, generator=g, dtype=DTYPE).to(dtype), torch.randn(V, H, generator=g, dtype=DTYPE).to(dtype)
    ids = torch.randint(0, 12, (N,), generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), ids, g


def csr_keep(ids, g):
    kept = torch.rand(N, V, generator=g) < 0.5
    kept[torch.arange(N), ids] = True
    kept[:, 12:] = False
    return torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]), kept.nonzero()[:, 1]


def row_options(kind, ids, g):
    return {
        "plain": lambda: {},
        "all": lambda: {"temperature": torch.rand(N, generator=g, dtype=DTYPE) + 0.5, "softcap": 3.0, "scale": 0.7},
        "vocab_size": lambda: {"vocab_size": 12, "temperature": 0.7},
        "keep": lambda: {"keep": csr_keep(ids, g), "entropy_support": "keep"},
    }[kind]()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("chunk_bytes", [TINY, SMALL, LARGE])
@pytest.mark.parametrize("save", ["auto", "logits", "recompute"])
@pytest.mark.parametrize("kind", ["plain", "all", "vocab_size", "keep"])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_are_those_of_the_product(kind, save, chunk_bytes, masked):
    hidden, weight, ids, g = problem()
    options, bias = row_options(kind, ids, g), torch.randn(V, generator=g, dtype=DTYPE).requires_grad_()
    options["mask"] = torch.rand(N, generator=g) < 0.6 if masked else None
    outputs = (*DIFFERENTIABLE, "argmax", "prob_gap")
    upstream = torch.randn(len(DIFFERENTIABLE), N, generator=g, dtype=DTYPE)
    got = linear_token_stats(
        hidden, weight, ids, outputs=outputs, bias=bias, save=save, save_bytes=TILE * 2, chunk_bytes=chunk_bytes, **options
    )
    expected = token_stats(hidden @ weight.T, ids, outputs=outputs, bias=bias, **options)
    gradients = []
    for stats in (got, expected):
        loss = sum((u * getattr(stats, name)).sum() for u, name in zip(upstream, DIFFERENTIABLE, strict=True))
        gradients.append(torch.autograd.grad(loss, [hidden, weight, bias]))
    for name in outputs:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("save", ["logits", "recompute"])
def test_statistics_by_finite_differences(save):
    hidden, weight, ids, _ = problem(1)
    hidden, ids = hidden.detach()[:6].requires_grad_(), ids[:6]

    def differentiable(hidden, weight):
        stats = linear_token_stats(hidden, weight, ids, outputs=DIFFERENTIABLE, save=save, chunk_bytes=SMALL)
        return tuple(getattr(stats, name) for name in DIFFERENTIABLE)

    assert torch.autograd.gradcheck(differentiable, (hidden, weight))


def test_what_is_saved(monkeypatch):
    """Tiles that fit the budget are kept, the others computed again: counted in products."""
    products = []
    original = head.Head.logits
    monkeypatch.setattr(head.Head, "logits", lambda self, operand, *out: products.append(len(operand)) or original(self, operand, *out))
    chunks = math.ceil(N / 4)
    for save, again in (("logits", 0), ("recompute", chunks), ("auto", chunks - 2)):
        hidden, weight, ids, _ = problem()
        products.clear()
        stats = linear_token_stats(hidden, weight, ids, outputs="logp", save=save, save_bytes=2 * TILE, chunk_bytes=SMALL)
        assert len(products) == chunks
        stats.logp.sum().backward()
        assert len(products) == chunks + again
    with torch.no_grad():
        assert not linear_token_stats(hidden, weight, ids, outputs="logp").logp.requires_grad


def test_leading_shape_and_no_rows():
    hidden, weight = torch.randn(3, 4, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    ids = torch.randint(0, V, (3, 4))
    stats = linear_token_stats(hidden, weight, ids, outputs="logp", mask=torch.rand(3, 4) < 0.5)
    assert stats.logp.shape == (3, 4)
    stats.logp.sum().backward()
    assert hidden.grad.shape == hidden.shape
    empty = torch.zeros(0, H, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    assert linear_token_stats(empty, weight, none, outputs=("logp", "argmax")).argmax.dtype == torch.int64
    loss, _ = linear_policy_loss(empty, weight, none, advantages=torch.zeros(0))
    weight.grad = None
    loss.backward()
    assert loss == 0
    assert torch.equal(weight.grad, torch.zeros(V, H))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """logp within 1e-5; dX and dW within 1e-5 (fp32) and 5e-3 (16-bit) of float64 on the same numbers, in their tensors' dtype."""
    g = torch.Generator().manual_seed(4)
    n, h, v = 96, 64, 3001
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.3).to(dtype).requires_grad_()
    ids, advantages = torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g)
    exact_h, exact_w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    log_p = (exact_h @ exact_w.T).log_softmax(-1)
    logp, entropy = log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    expected = torch.autograd.grad(-(advantages * logp).sum() / 1e6 - 0.01 * entropy.sum() / 1e6, [exact_h, exact_w])
    stats = linear_token_stats(hidden, weight, ids, outputs=("logp", "entropy"), chunk_bytes=4 * v * 10)
    assert (stats.logp.double() - logp).abs().max() < 1e-5
    loss, _ = linear_policy_loss(
        hidden,
        weight,
        ids,
        advantages=advantages,
        denominator=1e6 if dtype != torch.float16 else 1,
        entropy_coef=0.01,
        chunk_bytes=4 * v * 10,
    )
    got = torch.autograd.grad(loss if dtype != torch.float16 else loss / 16, [hidden, weight])
    scale = 1 if dtype != torch.float16 else 1e6 / 16
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b * scale) < (1e-5 if dtype == torch.float32 else 5e-3)
    from_stats = torch.autograd.grad((stats.logp * advantages).sum(), [hidden, weight])
    exact = torch.autograd.grad(
        (exact_h @ exact_w.T).log_softmax(-1).gather(1, ids[:, None])[:, 0] @ advantages.double(), [exact_h, exact_w]
    )
    for a, b in zip(from_stats, exact, strict=True):
        assert relative(a, b) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_fp16_gradients_do_not_flush_under_a_large_denominator():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 16, generator=g).half().requires_grad_(), torch.randn(500, 16, generator=g).half().requires_grad_()
    ids, advantages = torch.randint(0, 500, (40,), generator=g), torch.randn(40, generator=g)
    gradients = []
    for denominator, upstream in ((8192 * 64, 65536.0), (8, 1.0)):
        loss, _ = linear_policy_loss(hidden, weight, ids, advantages=advantages, denominator=denominator)
        gradients.append(torch.autograd.grad(loss * upstream, [hidden, weight]))
    for a, b in zip(*gradients, strict=True):
        assert relative(a, b) < 1e-6


def test_autocast_is_followed():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(30, 16, generator=g).requires_grad_(), torch.randn(90, 16, generator=g).requires_grad_()
    ids, advantages = torch.randint(0, 90, (30,), generator=g), torch.randn(30, generator=g)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        stats = linear_token_stats(hidden, weight, ids, outputs="logp")
        loss, _ = linear_policy_loss(hidden.bfloat16(), weight, ids, advantages=advantages)
    rounded = hidden.detach().bfloat16().double() @ weight.detach().bfloat16().double().T
    expected = rounded.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert (stats.logp.double() - expected).abs().max() < 1e-5
    (d_weight,) = torch.autograd.grad(loss, weight)
    assert d_weight.dtype == torch.float32
    exact = weight.detach().bfloat16().double().requires_grad_()
    logp = (hidden.detach().bfloat16().double() @ exact.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (expected_weight,) = torch.autograd.grad(-(advantages * logp).mean(), exact)
    assert relative(d_weight, expected_weight) < 5e-3


# --------------------------------------------------------------------------------------------------------------- policy loss


def loss_inputs(hidden, weight, ids, g, on_policy=False):
    logp = (hidden @ weight.T).detach().log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def near():
        return logp + torch.randn(N, generator=g, dtype=DTYPE) * 0.4

    tensors = {"ref_logp": near(), "rollout_logp": near(), "cu_seqlens": CU}
    return tensors if on_policy else {**tensors, "old_logp": near()}


LOSSES = {
    "plain": {},
    "regularised": {"beta": 0.2, "entropy_coef": 0.1, "self_certainty_coef": 0.05, "rollout_correction": "truncate"},
    "sequence weight": {"rollout_correction": "mask", "rollout_level": "sequence", "rollout_cap": 20.0},
}


@pytest.mark.parametrize("chunk_bytes", [TINY, SMALL, LARGE])
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_loss_is_that_of_the_logits(loss_type, losses, chunk_bytes, on_policy):
    hidden, weight, ids, g = problem(2)
    bias = torch.randn(V, generator=g, dtype=DTYPE).requires_grad_()
    tensors, mask = loss_inputs(hidden, weight, ids, g, on_policy), torch.rand(N, generator=g) < 0.7
    options = {"loss_type": loss_type, "max_length": 9, **LOSSES[losses], **tensors, "mask": mask, "bias": bias, "temperature": 0.9}
    advantages = torch.tensor([1.0, 0.3, -0.7, 0.0], dtype=DTYPE)
    loss, metrics = linear_policy_loss(hidden, weight, ids, advantages=advantages, chunk_bytes=chunk_bytes, **options)
    expected, expected_metrics = policy_loss_from_logits(hidden @ weight.T, ids, advantages=advantages, **options)
    torch.testing.assert_close(loss, expected)
    assert set(metrics) == set(expected_metrics)
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[name])
    got = torch.autograd.grad(0.5 * loss, [hidden, weight, bias])
    torch.testing.assert_close(got, torch.autograd.grad(0.5 * expected, [hidden, weight, bias]))


@pytest.mark.parametrize("kind", ["all", "vocab_size", "keep"])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_loss_with_every_reading_of_the_logits(kind, loss_type):
    hidden, weight, ids, g = problem(3)
    options, advantages = row_options(kind, ids, g), torch.tensor([1.0, 0.3, 0.0, -0.5], dtype=DTYPE)
    options.update(loss_type=loss_type, cu_seqlens=CU)
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages=advantages, chunk_bytes=SMALL, **options)
    expected, _ = policy_loss_from_logits(hidden @ weight.T, ids, advantages=advantages, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]))


@pytest.mark.host  # what is dead on a device is not known here; test_gpu.py has this for kernels there
@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("loss_type", ["gspo", "luspo", "gmpo"])
def test_on_policy_a_ratio_of_sequences_joins_nothing(loss_type, backend, monkeypatch):
    """It is 1: three products however short the chunks, though a token's advantage of 0 does not make it dead."""
    counts = product_rows(monkeypatch)
    hidden, weight, ids, g = problem(4)
    advantages = torch.randn(N, generator=g, dtype=DTYPE) * (torch.rand(N, generator=g) < 0.6)
    mask = torch.rand(N, generator=g) < 0.8
    advantages[5:14] = 0  # a sequence that is dead
    call = {"advantages": advantages, "mask": mask, "cu_seqlens": CU, "loss_type": loss_type, "backend": backend}
    loss, metrics = linear_policy_loss(hidden, weight, ids, chunk_bytes=TINY, **call)
    live = int(mask.sum() - mask[5:14].sum())
    if choose_backend(backend, dtype=DTYPE) != "torch":
        assert list(counts.values()) == [live] * 3
    assert metrics["live_tokens"] == live
    logits = hidden @ weight.T
    expected, _ = policy_loss(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], **call | {"backend": "torch"})
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, [hidden, weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), wanted)
    from_logits, _ = policy_loss_from_logits(logits, ids, **call)
    torch.testing.assert_close(torch.autograd.grad(from_logits, [hidden, weight]), wanted)


def product_rows(monkeypatch):
    """Rows that go through each product of a call: forward, dX, dW."""
    counts = {"logits": 0, "hidden_gradient": 0, "weight_gradient": 0}
    for name in counts:
        original = getattr(head.Head, name)

        def counted(self, first, *rest, name=name, original=original, **options):
            counts[name] += len(first)
            return original(self, first, *rest, **options)

        monkeypatch.setattr(head.Head, name, counted)
    return counts


def test_three_products_at_any_chunk_size_and_one_without_grad(monkeypatch):
    counts = product_rows(monkeypatch)
    hidden, weight, ids, _ = problem()
    for chunk_bytes in (TINY, SMALL, LARGE):
        for name in counts:
            counts[name] = 0
        linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE), chunk_bytes=chunk_bytes)
        assert list(counts.values()) == [N, N, N]
    with torch.no_grad():
        linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE))
    assert list(counts.values()) == [2 * N, N, N]


@pytest.mark.parametrize(("rows", "again"), [(23, 0), (9, 0), (5, 18), (1, 23)])
def test_sequences_are_whole_in_a_chunk_or_cost_a_fourth_product(rows, again, monkeypatch):
    """Sequences of 5, 0, 9 and 9 tokens: chunks are cut where they end, and only a longer one is run through the head again."""
    counts = product_rows(monkeypatch)
    hidden, weight, ids, _ = problem()
    advantages, old = torch.tensor([1.0, 0.0, -1.0, 0.5]).double(), torch.full((N,), -3.0).double()
    call = {"advantages": advantages, "old_logp": old, "cu_seqlens": CU.cpu(), "loss_type": "gspo", "eps_low": 0.9, "eps_high": 50.0}
    loss, _ = linear_policy_loss(hidden, weight, ids, chunk_bytes=budget(rows), **call)
    assert list(counts.values()) == [N + again, N, N]
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    expected, _ = policy_loss(logp, **call)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]))


@pytest.fixture
def narrow_products(monkeypatch):
    """The way of 16-bit operands on CUDA, on a CPU: the products, which CPUs do not have, are fp32 products of the same numbers."""
    seen = []

    def product(a, b, out, *, add=False):
        seen.append((a.dtype, b.dtype, out.dtype))
        result = a.float() @ b.float()
        out.add_(result) if add else out.copy_(result)

    monkeypatch.setattr(products, "narrow", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(products, "wide", lambda device: True)
    monkeypatch.setattr(products, "product", product)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_narrow_products(dtype, loss_type, backend, narrow_products):
    """Logits of 16-bit operands are fp32-accurate, gradients within 5e-3, under a divisor that fp16 could not stand and with a
    self-certainty term whose share in each column is far below what fp16 can hold."""
    g = torch.Generator().manual_seed(11)
    n, h, v = 40, 32, 5003
    hidden = torch.randn(n, h, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.3).to(dtype).requires_grad_()
    ids, cu = torch.randint(0, v, (n,), generator=g), torch.tensor([0, 13, 40])
    advantages, upstream = torch.tensor([1.0, -0.7]), 2.0**19
    call = {"cu_seqlens": cu, "loss_type": loss_type, "denominator": 8192.0 * 64, "token_denominator": 8192.0 * 64, "entropy_coef": 0.01}
    call["self_certainty_coef"] = 0.02
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    stats = token_stats(leaves[0] @ leaves[1].T, ids, outputs=("logp", "entropy", "self_certainty"))
    expected, _ = policy_loss(
        stats.logp, advantages=advantages.double(), entropy=stats.entropy, self_certainty=stats.self_certainty, **call
    )
    exact = torch.autograd.grad(expected * upstream, leaves)
    loss, metrics = linear_policy_loss(hidden, weight, ids, advantages=advantages, chunk_bytes=1 << 20, backend=backend, **call)
    assert metrics["entropy"].item() == pytest.approx(stats.entropy.mean().item(), rel=1e-5)
    for got, want in zip(torch.autograd.grad(loss * upstream, [hidden, weight]), exact, strict=True):
        assert got.dtype == dtype
        assert relative(got, want) < 5e-3
    assert set(narrow_products) == {(dtype, dtype, torch.float32)}
    values = linear_token_stats(hidden, weight, ids, outputs=("logp", "self_certainty"), backend=backend)
    assert (values.logp.double() - stats.logp).abs().max() < 1e-5


@pytest.mark.parametrize("op", [linear_policy_loss, linear_token_stats])
def test_narrow_products_of_small_gradients(op, narrow_products):
    """fp16 cannot hold the entries of this tile's gradient, 1e-7 each, though their sums over rows are fine."""
    g = torch.Generator().manual_seed(12)
    n, h, v = 64, 16, 5003
    hidden = (torch.randn(n, h, generator=g) * 30).half().requires_grad_()
    weight = (torch.randn(v, h, generator=g) * 0.005).half().requires_grad_()
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = token_stats(leaves[0] @ leaves[1].T, None, outputs="self_certainty").self_certainty
    ids = torch.zeros(n, dtype=torch.int64)
    if op is linear_policy_loss:
        got = -n * op(hidden, weight, ids, advantages=torch.zeros(n), self_certainty_coef=2**-10)[0]
    else:
        got = op(hidden, weight, None, outputs="self_certainty").self_certainty.sum() * 2**-10
    assert relative(torch.autograd.grad(got, weight)[0], torch.autograd.grad(exact.sum() * 2**-10, leaves[1])[0]) < 5e-3


def test_frozen_weight_and_detached_hidden_cost_no_product(monkeypatch):
    counts = product_rows(monkeypatch)
    hidden, weight, ids, _ = problem()
    linear_policy_loss(hidden, weight.detach(), ids, advantages=torch.ones(N, dtype=DTYPE))[0].backward()
    assert (counts["hidden_gradient"], counts["weight_gradient"]) == (N, 0)
    linear_policy_loss(hidden.detach(), weight, ids, advantages=torch.ones(N, dtype=DTYPE))[0].backward()
    assert (counts["hidden_gradient"], counts["weight_gradient"]) == (N, N)


@pytest.mark.host
def test_dead_rows_never_reach_the_head(monkeypatch):
    """Dead rows may hold anything, cost nothing, and leave denominators alone."""
    counts = product_rows(monkeypatch)
    hidden, weight, ids, g = problem(5)
    mask, advantages = torch.rand(N, generator=g) < 0.8, torch.randn(N, generator=g, dtype=DTYPE)
    advantages[::3] = 0
    alive = mask & (advantages != 0)
    spoiled = hidden.detach().clone()
    spoiled[~alive] = math.nan
    spoiled.requires_grad_()
    loss, metrics = linear_policy_loss(spoiled, weight, ids, advantages=advantages, mask=mask)
    assert list(counts.values()) == [int(alive.sum())] * 3
    assert (metrics["tokens"], metrics["live_tokens"]) == (mask.sum(), alive.sum())
    got = torch.autograd.grad(loss, [spoiled, weight])
    logp = (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    expected = -(advantages * logp)[mask].sum() / mask.sum()
    torch.testing.assert_close(loss, (-advantages * mask * (1 + 0 * logp)).sum() / mask.sum())  # on-policy: the ratio is 1
    torch.testing.assert_close(got, torch.autograd.grad(expected, [hidden, weight]))
    assert torch.equal(got[0][~alive], torch.zeros_like(got[0][~alive]))


@pytest.mark.host
def test_clipped_rows_skip_the_backward_products(monkeypatch):
    counts = product_rows(monkeypatch)
    hidden, weight, ids, _ = problem()
    logp = (hidden @ weight.T).detach().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    old = logp - torch.where(torch.arange(N) < 10, 1.0, 0.0).double()  # ratio e, clipped for a positive advantage
    loss, metrics = linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE), old_logp=old)
    assert list(counts.values()) == [N, N - 10, N - 10]
    assert metrics["clip_frac_high"].item() == pytest.approx(10 / N)
    plain = policy_loss(
        (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0], advantages=torch.ones(N, dtype=DTYPE), old_logp=old
    )
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(plain[0], [hidden, weight]))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "gspo"])
def test_live_rows_that_the_caller_knows(loss_type):
    hidden, weight, ids, g = problem(6)
    advantages = torch.tensor([1.0, 0.3, 0.0, -0.5], dtype=DTYPE)
    options = {"advantages": advantages, "cu_seqlens": CU, "loss_type": loss_type}
    live = torch.cat([torch.arange(0, 5), torch.arange(14, 23)])
    shuffled = live[torch.randperm(len(live), generator=g)]
    expected, expected_metrics = linear_policy_loss(hidden, weight, ids, **options)
    loss, metrics = linear_policy_loss(hidden, weight, ids, live=shuffled.int(), chunk_bytes=SMALL, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]))
    everything, all_metrics = linear_policy_loss(hidden, weight, ids, live=torch.arange(N), **options)
    torch.testing.assert_close(everything, expected)
    assert all_metrics["live_tokens"] == N  # dead ones that were run all the same are in the metrics


@pytest.mark.parametrize(
    ("live", "options", "error", "match"),
    [
        pytest.param(torch.arange(1, N), {}, ValueError, "live leaves out row 0, which counts", marks=pytest.mark.host),
        pytest.param(torch.arange(0, 14), {"entropy_coef": 0.1}, ValueError, "live leaves out row 14", marks=pytest.mark.host),
        pytest.param(torch.tensor([0, 0]), {}, ValueError, "live names a row twice", marks=pytest.mark.host),
        pytest.param(torch.tensor([0, N]), {}, IndexError, "live must lie in 0..22", marks=pytest.mark.host),
        (torch.ones(N, dtype=torch.bool), {}, TypeError, "live must be a 1-D int64"),
    ],
)
def test_live_errors(live, options, error, match):
    hidden, weight, ids, _ = problem()
    advantages = torch.tensor([1.0, 0.3, 0.7, 0.0], dtype=DTYPE)
    with pytest.raises(error, match=match):
        linear_policy_loss(hidden, weight, ids, advantages=advantages, cu_seqlens=CU, live=live, **options)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("live", [None, torch.zeros(0, dtype=torch.int64)])
def test_all_rows_dead(loss_type, live):
    hidden, weight, ids, _ = problem()
    options = {"advantages": torch.zeros(B, dtype=DTYPE), "cu_seqlens": CU, "loss_type": loss_type, "max_length": 9, "live": live}
    loss, metrics = linear_policy_loss(hidden, weight, ids, **options)
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert (metrics["tokens"], metrics["live_tokens"]) == (N, 0)


def test_grad_weight_out_is_added_to_in_backward():
    hidden, weight, ids, _ = problem(7, torch.bfloat16)
    advantages = torch.randn(N)
    buffer = torch.zeros(V, H)
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages=advantages, grad_weight_out=buffer)
    assert torch.equal(buffer, torch.zeros(V, H))
    (0.5 * loss).backward()
    assert weight.grad is None
    plain, _ = linear_policy_loss(hidden, weight, ids, advantages=advantages)
    (d_weight,) = torch.autograd.grad(plain, weight)
    assert d_weight.dtype == torch.bfloat16
    assert torch.equal(d_weight, (2 * buffer).bfloat16())  # accumulated in fp32, rounded once
    fp32 = weight.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(linear_policy_loss(hidden.float(), fp32, ids, advantages=advantages)[0], fp32)
    assert relative(buffer, 0.5 * exact) < 5e-3
    before = buffer.clone()
    linear_policy_loss(hidden, weight, ids, advantages=advantages, grad_weight_out=buffer)[0].backward()
    torch.testing.assert_close(buffer, 3 * before)
    for wrong, match in (
        (torch.ones(V, H, dtype=torch.bfloat16), "grad_weight_out must be"),
        (torch.ones(V + 1, H), "grad_weight_out must be"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_policy_loss(hidden, weight, ids, advantages=advantages, grad_weight_out=wrong)
    with pytest.raises(ValueError, match="weight does not require grad"):
        linear_policy_loss(hidden, weight.detach(), ids, advantages=advantages, grad_weight_out=buffer)


def test_gradients_reach_grad_in_backward_only_and_accumulate():
    hidden, weight, ids, _ = problem()
    for step in (1, 2):
        loss, _ = linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE))
        before = None if weight.grad is None else weight.grad.clone()
        assert (before is None) == (step == 1)
        loss.backward()
        torch.testing.assert_close(weight.grad, weight.grad if before is None else 2 * before)


def test_a_tied_weight_gets_both_gradients():
    _, weight, ids, _ = problem()
    other = weight.detach().clone().requires_grad_()
    loss, _ = linear_policy_loss(weight[ids], weight, ids, advantages=torch.ones(N, dtype=DTYPE))
    logits = other[ids] @ other.T
    expected = -(logits.log_softmax(-1).gather(1, ids[:, None])).mean()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(weight.grad, other.grad)


def test_second_and_double_backward_raise():
    hidden, weight, ids, _ = problem()
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss: a second backward"):
        loss.backward()
    loss, _ = linear_policy_loss(hidden, weight, ids, advantages=torch.ones(N, dtype=DTYPE))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_policy_loss has no second derivative"):
        gradient.square().sum().backward()
    stats = linear_token_stats(hidden, weight, ids, outputs="entropy")
    (gradient,) = torch.autograd.grad(stats.entropy.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_token_stats has no second derivative"):
        gradient.square().sum().backward()


def test_same_call_same_bits():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=g).requires_grad_(), torch.randn(500, 32, generator=g).requires_grad_()
    ids, advantages = torch.randint(0, 500, (64,), generator=g), torch.randn(64, generator=g)
    results = []
    for _ in range(2):
        loss, _ = linear_policy_loss(hidden, weight, ids, advantages=advantages, chunk_bytes=4 * 500 * 7)
        results.append((loss.detach(), *torch.autograd.grad(loss, [hidden, weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_statistics_compile_without_a_graph_break():
    hidden, weight, ids, g = problem()
    mask = torch.rand(N, generator=g) < 0.6
    torch.compiler.reset()
    compiled = torch.compile(linear_token_stats, fullgraph=True, backend="eager")
    results = []
    for op in (linear_token_stats, compiled):
        stats = op(hidden, weight, ids, outputs=("logp", "entropy"), mask=mask, chunk_bytes=SMALL, save="recompute")
        results.append((*stats[:3:2], *torch.autograd.grad((stats.logp + stats.entropy).sum(), [hidden, weight])))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("options", [{}, {"old": True, "beta": 0.1, "kl": "k2", "entropy_coef": 0.01}])
def test_loss_compiles_without_a_graph_break(options):
    hidden, weight, ids, g = problem(dtype=torch.float32)
    advantages, old, ref = (torch.randn(N, generator=g) for _ in range(3))
    options = dict(options)
    tensors = {"old_logp": old - 3, "ref_logp": ref - 3} if options.pop("old", False) else {}

    def loss(hidden, weight, ids, advantages, tensors):
        call = {"advantages": advantages, "chunk_bytes": budget(5, torch.float32), **tensors, **options}
        return linear_policy_loss(hidden, weight, ids, **call)[0]

    expected = loss(hidden, weight, ids, advantages, tensors)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, ids, advantages, tensors)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]))


@pytest.mark.parametrize("op", [linear_token_stats, linear_policy_loss])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"weight": torch.randn(V, H + 1, dtype=DTYPE)}, ValueError, "do not fit"),
        ({"weight": torch.randn(V, H)}, TypeError, "hidden is torch.float64 and weight torch.float32: cast one, or run under autocast"),
        ({"weight": torch.randn(V, H, dtype=DTYPE, device="meta")}, ValueError, "weight on meta"),
        ({"weight": torch.zeros(0, H, dtype=DTYPE)}, ValueError, "weight has no row"),
        ({"hidden": torch.zeros(N, H, dtype=torch.int64)}, TypeError, "hidden must be fp16"),
        ({"bias": torch.zeros(V + 1)}, ValueError, "bias must have shape"),
        pytest.param({"ids": torch.full((N,), V)}, IndexError, r"ids\[0\] = 17", marks=pytest.mark.host),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes"),
        ({"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_errors(op, arguments, error, match):
    hidden, weight, ids, _ = problem()
    call = {"hidden": hidden, "weight": weight, "ids": ids, **arguments}
    call["outputs" if op is linear_token_stats else "advantages"] = "logp" if op is linear_token_stats else torch.ones(N)
    with pytest.raises(error, match=match):
        op(call.pop("hidden"), call.pop("weight"), call.pop("ids"), **call)
    if op is linear_token_stats:
        with pytest.raises(ValueError, match="save='all'"):
            op(hidden, weight, ids, outputs="logp", save="all")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [torch.linspace(-1, 1, 14).view(7, 2)[:, 0], torch.tensor([0.5]).expand(7)], ids=["strided", "expanded"])
def test_a_bias_may_have_any_stride(bias, backend):
    hidden, weight, ids = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 6, 3, 1, 2])
    logits, advantages = hidden @ weight.T, torch.linspace(-1, 1, 5)
    calls = {
        "token_stats": lambda b: token_stats(logits, ids, outputs="logp", bias=b, backend=backend).logp.sum(),
        "linear_token_stats": lambda b: linear_token_stats(hidden, weight, ids, outputs="logp", bias=b, backend=backend).logp.sum(),
        "policy_loss_from_logits": lambda b: policy_loss_from_logits(logits, ids, advantages=advantages, bias=b, backend=backend)[0],
        "linear_policy_loss": lambda b: linear_policy_loss(hidden, weight, ids, advantages=advantages, bias=b, backend=backend)[0],
    }
    for name, call in calls.items():
        values = [b.detach().requires_grad_() for b in (bias, bias.contiguous())]
        results = [call(b) for b in values]
        torch.testing.assert_close(results[0], results[1], msg=name)
        gradients = [torch.autograd.grad(result, b)[0] for result, b in zip(results, values, strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1], msg=name)
