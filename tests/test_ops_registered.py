"""The ops as torch knows them: opcheck, torch.compile without a graph break, and what autograd may and may not do with them."""

import math

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from urlvr_fast import group_advantages, linear_policy_loss, linear_token_stats, policy_loss, policy_loss_from_logits, token_stats
from urlvr_fast.ops import row_ops  # noqa: F401  (registers the ops)
from urlvr_fast.ops.layout import HAS_CORRECTION, HAS_OLD, HAS_RATIO, HAS_REF, HAS_ROLLOUT, LOSS_LINES, METRICS, Stat
from urlvr_fast.ops.reference import LOSS_TYPES
from urlvr_fast.ops.spec import RowSpec

ops = torch.ops.urlvr_fast
N, V, COLUMNS = 3, 7, 6
ON_HOST = torch.get_default_device().type == "cpu"
FUSED = ["cpp"] if ON_HOST else ["triton", "cuda"]
DTYPE = torch.float64 if ON_HOST else torch.float32
NUMBERS = [0.8, 1.28, math.inf, 0.0, 0.0, 0.0, 5.0, 1.0, 1.05, 3.0, 0.0]
SPECS = {
    "plain": {},
    "everything": {
        "temperature": torch.tensor([0.5, 1.0, 2.0], dtype=DTYPE),
        "softcap": 3.0,
        "scale": 0.7,
        "mask": torch.tensor([True, False, True]),
        "keep": (torch.tensor([0, 2, 3, 5]), torch.tensor([0, 1, 1, 2, 3])),
    },
}


def arguments(backend: str, spec: str, *, grad: bool):
    rows = RowSpec(wanted=frozenset(["logp", "entropy", "self_certainty"]), ids=torch.tensor([0, 1, 2]), backend=backend, **SPECS[spec])
    logits = torch.randn(N, V, dtype=DTYPE, requires_grad=grad)
    bias = torch.randn(COLUMNS, dtype=DTYPE, requires_grad=grad)
    return logits, bias, *rows.arguments(COLUMNS), COLUMNS, rows.flags, backend


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", [*FUSED, "torch"])
def test_opcheck_token_stats(backend, spec):
    torch.library.opcheck(ops.token_stats.default, arguments(backend, spec, grad=True))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", [*FUSED, "torch"])
@pytest.mark.parametrize("op", ["token_stats_backward", "token_stats_backward_"])
@pytest.mark.parametrize("bias_wanted", [False, True])
def test_opcheck_backward(backend, spec, op, bias_wanted):
    call = arguments(backend, spec, grad=False)
    stats, upstream = ops.token_stats(*call), torch.randn(5, N, dtype=DTYPE)
    torch.library.opcheck(getattr(ops, op).default, (*call, stats, upstream, 0b1101, bias_wanted))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("op", ["policy_gradient", "policy_gradient_"])
@pytest.mark.parametrize("scaled", [False, True])
def test_opcheck_policy_gradient(spec, backend, op, scaled):
    loss = (torch.rand(LOSS_LINES, N, dtype=DTYPE), 0, 1, 0, 0, NUMBERS, scaled)
    torch.library.opcheck(getattr(ops, op).default, (*arguments(backend, spec, grad=False), *loss))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_loss_rows_and_objective(backend, given):
    def vector():
        return -torch.rand(N, dtype=DTYPE) if given else None

    mask, cu_seqlens = (torch.tensor([True, False, True]), torch.tensor([0, 2, 3])) if given else (None, None)
    denominator = torch.tensor(2.0, dtype=DTYPE) if given else None
    call = (torch.randn(N, dtype=DTYPE), mask, cu_seqlens, vector(), vector(), vector(), denominator, 1.0, denominator, 1.0, 2, N, backend)
    torch.library.opcheck(ops.loss_rows.default, call)
    values = (-torch.rand(N, dtype=DTYPE), vector(), vector())
    present = HAS_OLD | HAS_REF | HAS_ROLLOUT if given else 0
    kinds = (present, 1, 3 * given, 0, NUMBERS)
    torch.library.opcheck(ops.policy_objective.default, (*values, *ops.loss_rows(*call), *kinds, given, METRICS, backend))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_join_rows(backend, given):
    values = (torch.rand(N, dtype=DTYPE), torch.tensor([True, False, True])) if given else (None, None)
    present = (HAS_RATIO if given else 0) | HAS_CORRECTION | HAS_OLD | HAS_ROLLOUT
    call = (torch.rand(LOSS_LINES, N, dtype=DTYPE), values[0], torch.tensor([0, 2, 3]), values[1], present, 1, 1, given, NUMBERS, backend)
    torch.library.opcheck(ops.join_rows_.default, call)


@pytest.mark.parametrize("backend", [*FUSED, "torch"])
@pytest.mark.parametrize("row_scale", [None, torch.tensor([1.0, 0.5, 4.0])])
def test_opcheck_scale_rows(backend, row_scale):
    torch.library.opcheck(ops.scale_rows_.default, (torch.randn(N, V).half(), torch.tensor(0.5), row_scale, backend))


IDS, ADVANTAGES = torch.tensor([0, 1, 2]), torch.tensor([1.0, -1.0, 0.5])
WEIGHTS = {dtype: torch.randn(5, V).to(dtype) for dtype in (torch.float32, torch.float16)}
COMPILED = {
    "token_stats": lambda x: token_stats(x * 1, IDS, outputs=("logp", "entropy", "self_certainty"), temperature=0.7, softcap=3.0),
    "token_stats in place": lambda x: token_stats(x * 1, IDS, outputs=("logp", "argmax"), inplace_backward=True),
    "linear_token_stats": lambda x: linear_token_stats(x, WEIGHTS[x.dtype], IDS, outputs=("logp", "entropy")),
    "policy_loss_from_logits": lambda x: policy_loss_from_logits(x * 1, IDS, advantages=ADVANTAGES, entropy_coef=0.1),
    "policy_loss_from_logits in place": lambda x: policy_loss_from_logits(x * 1, IDS, advantages=ADVANTAGES, inplace_backward=True),
}


def total(result) -> torch.Tensor:
    values = [result[0]] if isinstance(result[1], dict) else [v for v in result if v is not None and v.requires_grad]
    return sum((0.5 * value.sum() for value in values), torch.zeros(()))


@pytest.mark.parametrize("engine", ["eager", "aot_eager", pytest.param("inductor", marks=[pytest.mark.real, pytest.mark.timeout(120)])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_graph_break(name, dtype, engine):
    function = COMPILED[name]
    values = torch.randn(N, V).to(dtype)
    eager = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(function(eager)), eager)
    torch.compiler.reset()
    leaf = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.compile(lambda x: total(function(x)), fullgraph=True, backend=engine)(leaf), leaf)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", [*FUSED, "torch"])
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_loss_compiles_without_a_graph_break(kind, backend):
    """Those that join rows too, in all three ops."""
    loss = {"advantages": ADVANTAGES, "cu_seqlens": torch.tensor([0, 2, 3]), "loss_type": kind, "max_length": 2, "backend": backend}
    loss |= {"old_logp": torch.tensor([-1.0, -2.0, -1.5]), "entropy_coef": 0.1}
    calls = {
        "policy_loss": lambda x: policy_loss(x[:, 0], entropy=x[:, 1], **loss),
        "policy_loss_from_logits": lambda x: policy_loss_from_logits(x * 1, IDS, **loss),
        "linear_policy_loss": lambda x: linear_policy_loss(x, WEIGHTS[torch.float32], IDS, **loss),
    }
    for function in calls.values():
        leaf = torch.randn(N, V).requires_grad_()
        torch.compiler.reset()
        value, metrics = function(leaf)
        got, its_metrics = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
        torch.testing.assert_close((got, its_metrics), (value, metrics))
        torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(value, leaf))


def test_lengths_do_not_compile_anew():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    function = torch.compile(
        lambda x, ids: token_stats(x, ids, outputs=("logp", "entropy")).logp, fullgraph=True, dynamic=True, backend=counter
    )
    for n in (3, 5, 8, 13):
        logits, ids = torch.randn(n, V), torch.randint(0, V, (n,))
        torch.testing.assert_close(function(logits, ids), logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_upstream_gradient_multiplies_the_one_made_in_the_forward(dtype, factor):
    values = torch.randn(N, V).to(dtype)
    first, second = values.clone().requires_grad_(), values.clone().requires_grad_()
    (policy_loss_from_logits(first, IDS, advantages=ADVANTAGES)[0] * factor).backward()
    policy_loss_from_logits(second, IDS, advantages=factor * ADVANTAGES, eps_low=1.0, eps_high=1e9)[0].backward()
    torch.testing.assert_close(first.grad, second.grad)


class Seen(TorchDispatchMode):
    """Notes the ops of ours that go through torch's dispatcher, and their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "urlvr_fast":
            self.calls[op.overloadpacket.__name__] = args
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", FUSED)
def test_whoever_watches_sees_the_ops_and_the_bits_are_those_of_the_short_way(backend):
    logits = torch.randn(N, V).requires_grad_()

    def run():
        loss, metrics = policy_loss_from_logits(logits, IDS, advantages=ADVANTAGES, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits)
        values = token_stats(logits.detach(), IDS, outputs=("logp", "entropy"), backend=backend)
        return loss, *metrics.values(), gradient, values.logp, values.entropy, group_advantages(ADVANTAGES, IDS)

    with Seen() as seen:
        watched = run()
    assert {"loss_rows", "policy_gradient", "policy_objective", "scale_rows_", "token_stats", "group_advantages"} <= seen.calls.keys()
    for a, b in zip(watched, run(), strict=True):
        assert torch.equal(a, b)


def test_plain_eager_calls_go_past_the_dispatcher():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        leaf = torch.randn(N, V).requires_grad_()
        token_stats(leaf, IDS, outputs=("logp", "entropy")).logp.sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert leaf.grad is not None
    assert not {"urlvr_fast::token_stats", "urlvr_fast::token_stats_backward"} & seen


def test_what_nobody_differentiates_takes_no_part_in_the_gradient():
    leaf = torch.randn(N, V).requires_grad_()
    stats = token_stats(leaf, IDS, outputs=("logp", "entropy", "self_certainty", "argmax", "max_prob"))
    assert not stats.argmax.requires_grad
    assert not stats.max_prob.requires_grad
    with Seen() as seen:
        (alone,) = torch.autograd.grad(stats.logp.sum(), leaf)
    *_, given, _ = seen.calls["token_stats_backward"]
    assert given == 1 << Stat.LOGP
    (expected,) = torch.autograd.grad(token_stats(leaf, IDS, outputs="logp").logp.sum(), leaf)
    torch.testing.assert_close(alone, expected)


@pytest.mark.parametrize("name", ["logp", "entropy", "max_prob"])
def test_statistics_that_a_gradient_needs_are_not_changed_in_place_unnoticed(name):
    leaf = torch.randn(N, V).requires_grad_()
    stats = token_stats(leaf, IDS, outputs=("logp", "entropy", "max_prob"))

    def change_and_differentiate():
        getattr(stats, name).mul_(2)
        (stats.logp.sum() + stats.entropy.sum()).backward()

    with pytest.raises(RuntimeError, match="inplace"):
        change_and_differentiate()
