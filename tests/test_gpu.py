"""What only a GPU can break: `URLVR_FAST_TEST_DEVICE=cuda pytest tests/test_gpu.py`, or `simulated`, which has no graphs and no streams.

Reads that make the host wait, CUDA graphs, streams, memory that nobody wrote, bits from run to run, rows beyond a grid's and an integer's
reach, a hundred random shapes against float64, and the memory that the linear ops promise. The other tests of the ops run there as well.
"""

import contextlib
import functools
import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from urlvr_fast import group_advantages, linear_policy_loss, linear_token_stats, policy_loss_from_logits, token_stats
from urlvr_fast.ops import LOSS_TYPES, reference
from urlvr_fast.ops.backend import kernels
from urlvr_fast.ops.layout import GRADS, LOSS_LINES, STATS
from urlvr_fast.ops.spec import RowSpec

if torch.get_default_device().type != "cuda":
    pytest.skip("URLVR_FAST_TEST_DEVICE says on what: cuda or simulated", allow_module_level=True)

SIMULATED = torch.cuda.get_device_name() == "simulated"
FUSED = ["triton", "cuda"]
BACKENDS = [*FUSED, "torch"]
# Of tests with many cases about the host's side, which is the same for all kernels: interpreted ones are slow.
QUICK = ["cuda", "torch"] if SIMULATED else BACKENDS
SEEDS = 12 if SIMULATED else 100
STATISTICS = ("logp", "entropy", "self_certainty")


@pytest.fixture(autouse=True)
def small_tiles(request):
    if SIMULATED:
        request.getfixturevalue("tiny_triton")


@contextlib.contextmanager
def nobody_waits():
    """Fails where the host reads a number of the device's."""
    if SIMULATED:
        import simulated_gpu

        before = simulated_gpu.host_reads()
        yield
        assert simulated_gpu.host_reads() == before, "the host waited for the device"
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """Two sequences' tokens with everything that a loss may want, and hidden states and a head that give such logits."""

    def __init__(self, n: int = 24, v: int = 301, h: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        g = generator(seed)
        self.n, self.v = n, v
        self.logits = (torch.randn(n, v, generator=g) * 2).to(dtype)
        self.hidden = torch.randn(n, h, generator=g).to(dtype)
        self.weight = (torch.randn(v, h, generator=g) * 0.4).to(dtype)
        self.ids = torch.randint(v, (n,), generator=g)
        self.mask = torch.rand(n, generator=g) < 0.8
        self.advantages = torch.randn(2, generator=g)
        self.bounds = torch.tensor([0, n // 3, n])
        self.old, self.ref, self.rollout = (-6 + 0.3 * torch.randn(n, generator=g) for _ in range(3))
        self.temperature = torch.rand(n, generator=g) + 0.5

    def loss(self, loss_type: str, **more: object) -> dict:
        call = {"advantages": self.advantages, "cu_seqlens": self.bounds, "mask": self.mask, "loss_type": loss_type}
        call |= {"old_logp": self.old, "ref_logp": self.ref, "rollout_logp": self.rollout, "rollout_correction": "truncate"}
        call |= {"beta": 0.1, "entropy_coef": 0.02, "temperature": self.temperature}
        return call | ({"max_length": 9} if loss_type == "dr_grpo" else {}) | more


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


# ---- nobody waits, and graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("backend", QUICK)
def test_losses_make_nobody_wait(backend, loss_type, dtype):
    p = Problem(dtype=dtype)
    half = torch.tensor(0.5)
    (logits, hidden, weight), call = leaves(p.logits, p.hidden, p.weight), p.loss(loss_type, backend=backend)
    with nobody_waits():
        (half * policy_loss_from_logits(logits, p.ids, **call)[0]).backward()
        (half * linear_policy_loss(hidden, weight, p.ids, chunk_bytes=40_000, **call)[0]).backward()
        with torch.no_grad():
            linear_policy_loss(hidden, weight, p.ids, **call)
    for leaf in (logits, hidden, weight):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_make_nobody_wait(backend):
    p = Problem(dtype=torch.bfloat16)
    logits, hidden, weight = leaves(p.logits, p.hidden, p.weight)
    keep = (torch.arange(p.n + 1) * 2, torch.stack([p.ids, (p.ids + 1) % p.v], 1).flatten())
    bias = torch.randn(p.v).requires_grad_()
    call = {"outputs": (*STATISTICS, "argmax", "prob_gap"), "mask": p.mask, "temperature": p.temperature, "backend": backend}
    with nobody_waits():
        for more in ({}, {"keep": keep, "entropy_support": "keep"}, {"bias": bias, "softcap": 9.0}, {"vocab_size": 299}):
            stats = token_stats(logits, p.ids, **call, **more)
            (stats.logp + stats.entropy + stats.self_certainty).sum().backward()
        for save in ("auto", "logits", "recompute"):
            stats = linear_token_stats(hidden, weight, p.ids, save=save, chunk_bytes=40_000, **call)
            (stats.logp + stats.entropy + stats.self_certainty).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (logits, hidden, weight, bias))


def test_advantages_make_nobody_wait():
    """With the kernel: plain PyTorch has to ask how many groups there are."""
    rewards, groups = torch.rand(40), torch.arange(40) // 8
    with nobody_waits():
        for scale, baseline in itertools.product(("group", "batch", "none"), ("mean", "leave_one_out")):
            group_advantages(rewards, groups, scale=scale, baseline=baseline, mask=rewards > 0.1, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_rows_that_the_host_knows_cost_nobody_a_wait(backend):
    """`live` on the host, or per-token advantages there: fewer rows in the products, the same loss and gradients."""
    p = Problem(n=32)
    advantages = torch.where(torch.arange(32, device="cpu") % 2 == 0, 0.0, torch.linspace(-1, 1, 32, device="cpu"))
    alive = advantages.nonzero()[:, 0]
    results = []
    for options in (
        {"advantages": advantages.to("cuda")},
        {"advantages": advantages},
        {"advantages": advantages.to("cuda"), "live": alive},
    ):
        hidden, weight = leaves(p.hidden, p.weight)
        with nobody_waits():
            loss, metrics = linear_policy_loss(hidden, weight, p.ids, backend=backend, **options)
            loss.backward()
        results.append((loss.detach(), metrics["tokens"].double(), hidden.grad, weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["gspo", "gmpo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_advantage_of_0_that_the_host_knows_is_not_dead_in_a_sequence_that_is_alive(backend, loss_type):
    p = Problem(n=32)
    advantages = torch.where(torch.arange(32, device="cpu") % 2 == 0, 0.0, torch.linspace(-1, 1, 32, device="cpu"))
    results = []
    for given in (advantages, advantages.to("cuda")):
        hidden, weight = leaves(p.hidden, p.weight)
        with nobody_waits():
            call = {"loss_type": loss_type, "cu_seqlens": p.bounds, "backend": backend}
            loss, metrics = linear_policy_loss(hidden, weight, p.ids, advantages=given, **call)
            loss.backward()
        assert (hidden.grad != 0).any(1).all()
        results.append((loss.detach(), metrics["live_tokens"].double(), hidden.grad, weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("backend", QUICK)
def test_what_the_host_knows_of_sequences_may_stay_there(backend, loss_type):
    """One advantage a sequence, and where sequences end."""
    p = Problem()
    call = p.loss(loss_type, backend=backend, chunk_bytes=60_000)
    results = []
    for options in ({}, {"cu_seqlens": p.bounds.cpu()}, {"advantages": p.advantages.cpu(), "cu_seqlens": p.bounds.cpu()}):
        hidden, weight, logits = leaves(p.hidden, p.weight, p.logits)
        with nobody_waits():
            linear_policy_loss(hidden, weight, p.ids, **call | options)[0].backward()
            from_logits = {name: value for name, value in (call | options).items() if name != "chunk_bytes"}
            policy_loss_from_logits(logits, p.ids, **from_logits)[0].backward()
        results.append([hidden.grad, weight.grad, logits.grad])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def steps(p: Problem, backend: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Whole losses, forward and backward, on tensors that stay where they are."""
    logits, hidden, weight = leaves(p.logits, p.hidden, p.weight)

    def gradients(loss: Tensor, *by: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(0.5 * loss, by)]

    def from_logits(inplace: bool) -> list[Tensor]:
        return gradients(policy_loss_from_logits(logits * 1, p.ids, inplace_backward=inplace, **p.loss("dapo", backend=backend))[0], logits)

    def linear(loss_type: str) -> list[Tensor]:
        call = p.loss(loss_type, backend=backend, chunk_bytes=60_000)
        return gradients(linear_policy_loss(hidden, weight, p.ids, **call)[0], hidden, weight)

    def statistics() -> list[Tensor]:
        stats = token_stats(logits * 1, p.ids, outputs=STATISTICS, mask=p.mask, temperature=p.temperature, backend=backend)
        return gradients((stats.logp + stats.entropy - stats.self_certainty).sum(), logits)

    return {
        "statistics": statistics,
        "from logits": lambda: from_logits(False),
        "from logits, in place": lambda: from_logits(True),
        "linear": lambda: linear("dapo"),
        "linear, by sequence": lambda: linear("gspo"),
    }


STEPS = ["statistics", "from logits", "from logits, in place", "linear", "linear, by sequence"]


@pytest.mark.real
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_the_whole_loss(backend, name, dtype):
    """Captured once, replayed on new numbers."""
    p = Problem(dtype=dtype)
    step = steps(p, backend)[name]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        other = Problem(dtype=dtype, seed=seed)
        for mine in ("ids", "mask", "advantages", "old", "ref", "rollout", "temperature"):
            getattr(p, mine).copy_(getattr(other, mine))
        graph.replay()
        for got, want in zip(captured, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.real
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_current_stream_is_the_one_that_is_used(backend, name):
    """What comes before on a side stream is late: who runs elsewhere reads too soon."""
    p, late = Problem(), Problem(seed=5)
    expected = steps(late, backend)[name]()
    step = steps(p, backend)[name]
    step()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for mine in ("ids", "mask", "advantages", "old", "ref", "rollout", "temperature"):
            getattr(p, mine).copy_(getattr(late, mine))
        got = steps_on(p, late, backend, name)
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def steps_on(p: Problem, late: Problem, backend: str, name: str) -> list[Tensor]:
    for mine in ("logits", "hidden", "weight"):
        getattr(p, mine).copy_(getattr(late, mine))
    return steps(p, backend)[name]()


@pytest.mark.skipif(
    not SIMULATED, reason="counted by the simulated device: transformers itself waits, which a real one would not let through"
)
def test_the_learner_waits_once_a_batch(tiny_model_dir, monkeypatch):
    """For the sums of all micro-batches; what the model's body waits for is not counted."""
    import simulated_gpu
    from transformers import AutoConfig, AutoModelForCausalLM

    from urlvr_fast.trainer.batch import RolloutBatch
    from urlvr_fast.trainer.config import LossConfig, TrainerConfig
    from urlvr_fast.trainer.learner import Learner

    monkeypatch.setenv("URLVR_FAST_BACKEND", "torch")
    # Not from_pretrained: where another device than the host is the default, that asks for `accelerate`.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir))
    learner = Learner(model, trainer=TrainerConfig(micro_batch_tokens=64), loss=LossConfig(), dtype="float32", max_response_tokens=16)
    rollouts, prompt, response = 16, 4, 6
    tokens = rollouts * (prompt + response)
    with torch.device("cpu"):
        batch = RolloutBatch(
            tokens=torch.arange(tokens) % 20,
            cu_seqlens=torch.arange(0, tokens + 1, prompt + response),
            prompt_lens=torch.full((rollouts,), prompt),
            group_ids=torch.arange(rollouts) // 4,
            sampled_logp=torch.full((rollouts * response,), -2.0),
            temperature=1.0,
            prompt_ids=["a"] * rollouts,
            prompts=["?"] * rollouts,
            completions=["!"] * rollouts,
            finish_reasons=["stop"] * rollouts,
        )
        advantages = torch.arange(rollouts) - 7.5
        in_body = 0

        def begins(*_):
            nonlocal in_body
            in_body -= simulated_gpu.host_reads()

        def ends(*_):
            nonlocal in_body
            in_body += simulated_gpu.host_reads()

        model.base_model.register_forward_pre_hook(begins)
        model.base_model.register_forward_hook(ends)
        before = simulated_gpu.host_reads()
        learner.accumulate(batch, advantages)
    assert simulated_gpu.host_reads() - before - in_body == 1


# ---- the same bits ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_from_run_to_run(backend, name):
    p = Problem(n=24 if SIMULATED else 300, v=301 if SIMULATED else 40_003, h=16 if SIMULATED else 256, dtype=torch.bfloat16)
    first = steps(p, backend)[name]()
    for _ in range(2 if SIMULATED else 5):
        torch.full((1 << 16,), math.nan)  # what the next one finds in its memory
        assert all(torch.equal(a, b) for a, b in zip(steps(p, backend)[name](), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_bits_of_a_row_at_any_batch_size(backend, dtype):
    """By any way of splitting a row: programs a segment, a program a row, clusters, passes over memory."""
    rows, v = (9, 299) if SIMULATED else (1500, 151936)
    logits = (torch.randn(rows, v) * 3).to(dtype)
    ids = torch.randint(v, (rows,))
    advantages = torch.randn(rows)

    def run(chosen: slice) -> tuple[Tensor, Tensor, Tensor]:
        leaf, policy = leaves(logits[chosen], logits[chosen])
        stats = token_stats(leaf, ids[chosen], outputs=(*STATISTICS, "prob_gap", "sum_p2"), backend=backend)
        (by_stats,) = torch.autograd.grad((stats.logp + stats.entropy + stats.self_certainty).sum(), leaf)
        call = {"advantages": advantages[chosen], "denominator": 1.0, "entropy_coef": 0.1, "backend": backend}
        (by_policy,) = torch.autograd.grad(policy_loss_from_logits(policy, ids[chosen], **call)[0], policy)
        return torch.stack([s.detach() for s in stats if s is not None]), by_stats, by_policy

    values, by_stats, by_policy = run(slice(0, rows))
    for size in (1, 3) if SIMULATED else (1, 3, 40, 500):
        a = rows - size
        got = run(slice(a, rows))
        assert torch.equal(got[0], values[:, a:])
        assert torch.equal(got[1], by_stats[a:])
        assert torch.equal(got[2], by_policy[a:])


# ---- memory that nobody wrote ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, -7.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("v", [1, 7, *([] if SIMULATED else [301, 4099, 40_001])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", FUSED)
def test_every_number_is_written(backend, dtype, v, masked, garbage):
    """The kernels themselves, into memory that holds garbage."""
    n = 5
    g = generator(v)
    logits, ids = (torch.randn(1, n, v, generator=g) * 2).to(dtype), torch.randint(v, (n,), generator=g)
    mask = torch.tensor([True, False, True, True, False]) if masked else None
    spec = RowSpec(frozenset(STATISTICS), ids=ids, mask=mask, backend=backend)
    rows, package = (logits, None, *spec.arguments(v)), kernels(backend)
    upstream, loss = torch.randn(GRADS, n, generator=g), torch.randn(LOSS_LINES, n, generator=g)
    numbers = [0.8, 1.28, math.inf, 0.0, 0.1, 0.0, 5.0, 1.0, 1.05, 3.0, 0.0]
    results = []
    for fill in (0.0, garbage):
        stats, policy_stats = torch.full((STATS, n), fill), torch.full((STATS, n), fill)
        by_stats, by_policy = torch.full_like(logits, fill), torch.full_like(logits, fill)
        row_scale = torch.full((n,), fill) if dtype == torch.float16 else None
        package.statistics(*rows, spec.flags, stats)
        package.gradient(*rows, spec.flags, stats, upstream, 0b1101, by_stats, None)
        package.policy(*rows, spec.flags, loss, 0, 1, 0, 0, numbers, policy_stats, by_policy, row_scale)
        results.append([stats, by_stats, policy_stats, by_policy, *([] if row_scale is None else [row_scale])])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert dirty.isfinite().all()
    if masked:
        assert not results[1][1][0, ~mask].any()
        assert not results[1][3][0, ~mask].any()


# ---- sizes -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_grid_has_in_its_second_dimension(backend):
    n, v = (300, 5) if SIMULATED else (70_001, 33)
    logits, ids = torch.randn(n, v), torch.randint(v, (n,))
    leaf = logits.clone().requires_grad_()
    stats = token_stats(leaf, ids, outputs=STATISTICS, backend=backend)
    expected = reference.token_stats(logits.double(), ids)
    torch.testing.assert_close(stats.logp.double(), expected.logp, rtol=0, atol=5e-6)
    torch.testing.assert_close(stats.entropy.double(), expected.entropy, rtol=0, atol=5e-6)
    (gradient,) = torch.autograd.grad(stats.logp.sum(), leaf)
    wanted = torch.nn.functional.one_hot(ids, v) - logits.double().softmax(-1)
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.real
@pytest.mark.parametrize("backend", FUSED)
def test_all_rows_of_more_than_two_to_the_31_logits(backend):
    """Every row counts; three of them, the last among them, are looked at."""
    v = 151936
    n = 2**31 // v + 5
    if torch.cuda.mem_get_info()[0] < 5 * n * v:
        pytest.skip(f"needs {5 * n * v / 2**30:.0f} GiB of free memory")
    logits = torch.empty(n, v, dtype=torch.bfloat16)
    for a in range(0, n, 1024):
        logits[a : a + 1024] = torch.randn(len(logits[a : a + 1024]), v) * 3
    ids, advantages = torch.randint(v, (n,)), torch.randn(n)
    looked_at = torch.tensor([0, n // 2, n - 1])
    before = logits[looked_at].double()
    seed = torch.zeros((), requires_grad=True)
    stats = token_stats(logits, ids, outputs=STATISTICS, backend=backend)
    exact = reference.token_stats(before, ids[looked_at])
    torch.testing.assert_close(stats.logp[looked_at].double(), exact.logp, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.self_certainty[looked_at].double(), exact.self_certainty, rtol=0, atol=1e-5)
    produced = logits.requires_grad_(False) + 0 * seed.to(torch.bfloat16)  # the output of an operation, as a model's logits are
    del logits
    call = {"advantages": advantages, "denominator": 1.0, "inplace_backward": True, "backend": backend}
    loss, _ = policy_loss_from_logits(produced, ids, **call)
    (gradient,) = torch.autograd.grad(loss, produced)
    assert gradient.data_ptr() == produced.data_ptr()
    wanted = before.softmax(-1) * advantages[looked_at].double()[:, None]
    wanted[torch.arange(3), ids[looked_at]] -= advantages[looked_at].double()
    error = (gradient[looked_at].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (error < 5e-3).all()


def random_case(seed: int) -> tuple[dict, dict]:
    """A shape and a call that nobody would think of."""
    r = random.Random(seed)
    v = r.choice([r.randint(1, 70), r.randint(1, 5000), r.randint(5000, 260_000), 8 * r.randint(1, 4000)])
    n = r.randint(1, max(1, min(700, (1 << 22) // v)))
    if SIMULATED:
        v, n = min(v, r.randint(1, 400)), min(n, 6)
    shape = {"n": n, "v": v, "dtype": r.choice([torch.float32, torch.bfloat16, torch.float16]), "size": r.choice([0.1, 3.0, 20.0])}
    shape |= {"gap": r.choice([0, 0, 1, 8, 13]), "offset": r.choice([0, 0, 1, 8])}
    names = ("softcap", "scale", "temperature", "mask", "vocab_size")
    return shape, {name: r.random() < 0.3 for name in names}


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("backend", FUSED)
def test_random_shapes_against_float64(backend, seed):
    shape, options = random_case(seed)
    n, v, dtype = shape["n"], shape["v"], shape["dtype"]
    g = generator(seed)
    memory = torch.full((n * (v + shape["gap"]) + shape["offset"] + 16,), math.nan, dtype=dtype)
    logits = memory.as_strided((n, v), (v + shape["gap"], 1), shape["offset"])
    logits.copy_(torch.randn(n, v, generator=g) * shape["size"])
    count = max(1, v - 3) if options["vocab_size"] else v
    ids = torch.randint(count, (n,), generator=g)
    call: dict = {"vocab_size": count if options["vocab_size"] else None, "softcap": 7.0 if options["softcap"] else None}
    call |= {"scale": 0.6 if options["scale"] else 1.0, "mask": torch.rand(n, generator=g) < 0.7 if options["mask"] else None}
    call["temperature"] = torch.rand(n, generator=g) + 0.4 if options["temperature"] else 1.0
    upstream = torch.randn(3, n, generator=g)

    leaf = logits.detach().requires_grad_()
    stats = token_stats(leaf, ids, outputs=(*STATISTICS, "argmax"), backend=backend, **call)
    (gradient,) = torch.autograd.grad(sum((u * getattr(stats, name)).sum() for u, name in zip(upstream, STATISTICS, strict=True)), leaf)
    exact_leaf = logits.detach().double().requires_grad_()
    wide = {name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value for name, value in call.items()}
    exact = reference.token_stats(exact_leaf, ids, **wide)
    total = sum((u.double() * getattr(exact, name)).sum() for u, name in zip(upstream, STATISTICS, strict=True))
    (wanted,) = torch.autograd.grad(total, exact_leaf)
    largest = float(logits.double().abs().amax()) / 0.4
    for name in STATISTICS:
        got, want = getattr(stats, name).detach().double(), getattr(exact, name).detach()
        assert (got - want).abs().max() <= 2e-6 + 2e-7 * max(largest, float(want.abs().max())), name
    if options["softcap"]:  # which saturates: in fp32 the largest few may be the same number, of which the first is meant
        got, want = ((0.6 if options["scale"] else 1.0) * logits.double().gather(1, i[:, None]) / 7 for i in (stats.argmax, exact.argmax))
        torch.testing.assert_close(got.tanh(), want.tanh(), rtol=0, atol=3e-7)
    else:
        assert torch.equal(stats.argmax, exact.argmax)
    error = (gradient.double() - wanted).norm()
    assert error <= (2e-5 if dtype == torch.float32 else 8e-3) * wanted.norm() + 1e-6 * upstream.norm()  # of one column the gradient is 0
    assert gradient.shape == (n, v)


# ---- memory ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [100, 800])
@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_linear_losses_stay_within_their_budget(loss_type, rows, dtype):
    """Beyond dX and an fp32 dW, `chunk_bytes` and no more, at any number of rows."""
    h, v, budget = 64, 3001, 2 << 20
    hidden, weight = leaves(torch.randn(rows, h).to(dtype), torch.randn(v, h).to(dtype))
    ids, bounds = torch.randint(v, (rows,)), torch.arange(0, rows + 1, 50, device="cpu")
    call = {"advantages": torch.randn(len(bounds) - 1), "cu_seqlens": bounds, "loss_type": loss_type, "chunk_bytes": budget}
    run = functools.partial(linear_policy_loss, hidden, weight, ids, backend="cuda" if SIMULATED else None, **call)
    run()[0].backward()  # whatever is made at the first call is made
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = run()
    held = torch.cuda.max_memory_allocated() - before
    gradients = hidden.nbytes + 4 * v * h
    rounding = 0 if SIMULATED else 64 << 10  # a GPU's memory comes in blocks of 512 bytes, and sorting takes some that torch does not tell
    assert held - gradients <= budget + rounding
    loss.backward()
