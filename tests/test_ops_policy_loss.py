"""policy_loss and policy_loss_from_logits against the table of losses written out as slow loops, and the rules around it."""

import inspect
import itertools
import math

import pytest
import torch

from urlvr_fast import linear_policy_loss, policy_loss, policy_loss_from_logits
from urlvr_fast.ops import LOSS_TYPES
from urlvr_fast.ops.policy_loss import LossArguments

DTYPE = torch.float64
JOINED = ("gspo", "luspo", "gmpo")
BY_SEQUENCE = (*JOINED, "grpo", "sapo")


def clamp(value, low, high):
    return min(max(value, low), high)


def slow_loss(
    logp,
    advantages,  # per sequence
    bounds,
    mask,
    *,
    loss_type="dapo",
    old=None,
    ref=None,
    rollout=None,
    entropy=None,
    certainty=None,
    eps_low=0.2,
    eps_high=0.28,
    delta=None,
    beta=0.0,
    kl="k3",
    entropy_coef=0.0,
    self_certainty_coef=0.0,
    ratio_cap=5.0,
    tau_pos=1.0,
    tau_neg=1.05,
    max_length=None,
    rollout_correction=None,
    rollout_level="token",
    rollout_cap=3.0,
    rollout_floor=0.0,
    denominator=None,
    token_denominator=None,
    frozen=None,
):
    """The loss as a Python float from lists of floats, one token at a time. `frozen` holds the log-probs behind every detach."""
    frozen = logp if frozen is None else frozen
    old = frozen if old is None else old
    rows = [[t for t in range(a, b) if mask[t]] for a, b in itertools.pairwise(bounds)]
    tokens, sequences = sum(map(len, rows)), sum(1 for row in rows if row)

    def ratio(log_ratio):
        r = math.exp(log_ratio)
        return r if delta is None else min(r, delta)

    def clipped(r, a):
        return -min(r * a, clamp(r, 1 - eps_low, 1 + eps_high) * a)

    def weight(log_weight):
        w = math.exp(log_weight)
        if rollout_correction == "truncate":
            return min(w, rollout_cap)
        return w if rollout_floor <= w <= rollout_cap else 0.0

    policy, regulariser, token_regulariser = 0.0, 0.0, 0.0
    for row, a in zip(rows, advantages, strict=True):
        if not row:
            continue
        log_ratios = [logp[t] - old[t] for t in row]
        weights = [1.0] * len(row)
        if rollout_correction is not None:
            gaps = [old[t] - rollout[t] for t in row]
            weights = [weight(sum(gaps) if rollout_level == "sequence" else gap) for gap in gaps]
        extra = []
        for t in row:
            d = 0.0 if ref is None else ref[t] - logp[t]
            estimate = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl]
            bonus = (entropy_coef * entropy[t] if entropy else 0.0) + (self_certainty_coef * certainty[t] if certainty else 0.0)
            extra.append(beta * estimate - bonus)
        if loss_type in JOINED:
            if loss_type == "gmpo":
                low, high = math.log(1 - eps_low), math.log(1 + eps_high)
                log_ratios = [min(x, high) if a > 0 else max(x, low) for x in log_ratios]
                term = -ratio(sum(log_ratios) / len(row)) * a
            else:
                term = clipped(ratio(sum(log_ratios) / len(row)), a) * (len(row) if loss_type == "luspo" else 1)
            policy += term * sum(weights) / len(row)
            token_regulariser += sum(extra)
            continue
        terms = []
        for t, x in zip(row, log_ratios, strict=True):
            if loss_type == "reinforce":
                terms.append(-a * logp[t])
            elif loss_type == "cispo":
                terms.append(-min(math.exp(frozen[t] - old[t]), ratio_cap) * a * logp[t])
            elif loss_type == "sapo":
                tau = tau_pos if a > 0 else tau_neg
                terms.append(-a * 4 / (1 + math.exp(-tau * (math.exp(x) - 1))) / tau)
            else:
                terms.append(clipped(ratio(x), a))
        share = 1 / len(row) if loss_type in BY_SEQUENCE else 1.0
        policy += share * sum(w * term for w, term in zip(weights, terms, strict=True))
        regulariser += share * sum(extra)
    count = sequences if loss_type in BY_SEQUENCE else sequences * (max_length or 0) if loss_type == "dr_grpo" else tokens
    divisor = count if denominator is None else denominator
    token_divisor = tokens if token_denominator is None else token_denominator
    if loss_type in JOINED:
        return (policy / divisor if divisor else 0.0) + (token_regulariser / token_divisor if token_divisor else 0.0)
    return (policy + regulariser) / divisor if divisor else 0.0


class Batch:
    """Five sequences, one of them empty and one masked throughout, with every vector a loss may want."""

    def __init__(self, seed=0, spread=0.6):
        g = torch.Generator().manual_seed(seed)

        def vector():
            return torch.randn(self.n, generator=g, dtype=DTYPE) * spread

        self.bounds = [0, 4, 4, 9, 11, 17]
        self.n, self.b = 17, 5
        self.cu = torch.tensor(self.bounds)
        self.logp = vector() - 2
        self.old, self.ref, self.rollout = self.logp + vector(), self.logp + vector(), self.logp + vector() * 2
        self.entropy, self.certainty = vector().abs(), vector().abs()
        self.advantages = torch.tensor([1.3, 0.4, -0.8, 0.9, 0.0], dtype=DTYPE)
        self.mask = torch.rand(self.n, generator=g) < 0.75
        self.mask[0], self.mask[9:11] = True, False

    def call(self, logp=None, entropy=None, certainty=None, **options):
        tensors = {"old_logp": self.old, "ref_logp": self.ref, "rollout_logp": self.rollout, "cu_seqlens": self.cu, "mask": self.mask}
        chosen = {name: tensors[name] for name in options.pop("tensors", tensors)}
        return policy_loss(
            self.logp if logp is None else logp,
            advantages=options.pop("advantages", self.advantages),
            entropy=self.entropy if entropy is None else entropy,
            self_certainty=self.certainty if certainty is None else certainty,
            **chosen,
            **options,
        )

    def slow(self, logp=None, entropy=None, certainty=None, **options):
        old = None if options.pop("on_policy", False) else self.old.tolist()
        return slow_loss(
            (self.logp if logp is None else logp).tolist(),
            self.advantages.tolist(),
            self.bounds,
            self.mask.tolist(),
            old=old,
            ref=self.ref.tolist(),
            rollout=self.rollout.tolist(),
            entropy=(self.entropy if entropy is None else entropy).tolist(),
            certainty=(self.certainty if certainty is None else certainty).tolist(),
            frozen=self.logp.tolist(),
            **options,
        )


def numeric_gradient(function, at, step=1e-6):
    """Central differences of a Python function of a vector."""
    out = torch.zeros_like(at)
    for i in range(len(at)):
        shift = torch.zeros_like(at)
        shift[i] = step
        out[i] = (function(at + shift) - function(at - shift)) / (2 * step)
    return out


EXTRAS = {
    "plain": {},
    "delta": {"delta": 1.5},
    "k1": {"beta": 0.3, "kl": "k1"},
    "k2": {"beta": 0.3, "kl": "k2"},
    "k3": {"beta": 0.3},
    "entropy": {"entropy_coef": 0.2},
    "self_certainty": {"self_certainty_coef": 0.1},
    "truncate": {"rollout_correction": "truncate", "rollout_cap": 1.4},
    "mask": {"rollout_correction": "mask", "rollout_cap": 2.0, "rollout_floor": 0.5},
    "truncate sequence": {"rollout_correction": "truncate", "rollout_level": "sequence"},
    "mask sequence": {"rollout_correction": "mask", "rollout_level": "sequence", "rollout_cap": 2.5, "rollout_floor": 0.2},
    "all": {"beta": 0.2, "entropy_coef": 0.1, "self_certainty_coef": 0.05, "rollout_correction": "truncate", "denominator": 7.5},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_table(loss_type, extra, on_policy):
    options = {"loss_type": loss_type, "max_length": 8, "ratio_cap": 1.2, "tau_pos": 0.7, **EXTRAS[extra]}
    if "delta" in options and loss_type in ("reinforce", "cispo", "sapo"):
        with pytest.raises(ValueError, match="delta caps the ratio"):
            Batch().call(**options)
        return
    batch = Batch()
    leaves = [value.clone().requires_grad_() for value in (batch.logp, batch.entropy, batch.certainty)]
    tensors = ("ref_logp", "rollout_logp", "cu_seqlens", "mask") + (() if on_policy else ("old_logp",))
    loss, metrics = batch.call(*leaves, tensors=tensors, **options)
    assert loss.item() == pytest.approx(batch.slow(on_policy=on_policy, **options), rel=1e-10, abs=1e-12)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    by_logp = numeric_gradient(lambda at: batch.slow(at, on_policy=on_policy, **options), batch.logp)
    torch.testing.assert_close(gradients[0], by_logp, rtol=1e-5, atol=1e-8)
    for gradient, name, value in zip(gradients[1:], ("entropy", "certainty"), (batch.entropy, batch.certainty), strict=True):
        expected = numeric_gradient(lambda at, name=name: batch.slow(**{name: at}, on_policy=on_policy, **options), value)
        torch.testing.assert_close(torch.zeros_like(value) if gradient is None else gradient, expected, rtol=1e-5, atol=1e-8)
    assert metrics["tokens"] == batch.mask.sum()
    assert metrics["sequences"] == sum(1 for a, b in itertools.pairwise(batch.bounds) if batch.mask[a:b].any())


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_per_token_are_those_per_sequence_repeated(loss_type):
    batch = Batch(1)
    repeated = batch.advantages.repeat_interleave(batch.cu.diff())
    options = {"loss_type": loss_type, "max_length": 4}
    assert torch.equal(batch.call(**options)[0], batch.call(advantages=repeated, **options)[0])


def test_shapes_other_than_flat():
    logp, old, advantages = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.rand(3, 4) < 0.7
    shaped, _ = policy_loss(logp, advantages=advantages, old_logp=old, mask=mask)
    flat, _ = policy_loss(logp.flatten(), advantages=advantages.flatten(), old_logp=old.flatten(), mask=mask.flatten())
    assert torch.equal(shaped, flat)


@pytest.mark.parametrize("extra", ["plain", "all", "truncate sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up_to_the_whole(loss_type, extra):
    batch = Batch(2)
    options = {"loss_type": loss_type, "max_length": 8, **EXTRAS[extra]}
    tokens = int(batch.mask.sum())
    sequences = sum(1 for a, b in itertools.pairwise(batch.bounds) if batch.mask[a:b].any())
    divisor = sequences if loss_type in BY_SEQUENCE else sequences * 8 if loss_type == "dr_grpo" else tokens
    options.update(denominator=divisor, token_denominator=torch.tensor(float(tokens)))
    whole = batch.logp.clone().requires_grad_()
    loss, metrics = batch.call(whole, **options)
    loss.backward()
    parts = batch.logp.clone().requires_grad_()
    total, summed, live, ratio = 0.0, 0.0, 0.0, 0.0
    for first, last in ((0, 2), (2, 3), (3, 5)):
        cut = slice(batch.bounds[first], batch.bounds[last])
        part, part_metrics = policy_loss(
            parts[cut],
            advantages=batch.advantages[first:last],
            old_logp=batch.old[cut],
            ref_logp=batch.ref[cut],
            rollout_logp=batch.rollout[cut],
            entropy=batch.entropy[cut],
            self_certainty=batch.certainty[cut],
            mask=batch.mask[cut],
            cu_seqlens=batch.cu[first : last + 1] - batch.bounds[first],
            **options,
        )
        part.backward()
        total += part.item()
        summed += part_metrics["policy_loss"].item()
        live += part_metrics["live_tokens"].item()
        ratio += (part_metrics["ratio_mean"] * part_metrics["live_tokens"]).item()
    assert total == pytest.approx(loss.item(), rel=1e-12)
    assert summed == pytest.approx(metrics["policy_loss"].item(), rel=1e-12)
    assert live == metrics["live_tokens"]
    assert ratio / live == pytest.approx(metrics["ratio_mean"].item())
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_what_masked_and_dead_tokens_hold_never_matters(loss_type):
    batch, spoiled = Batch(3), Batch(3)
    dead = ~batch.mask | (torch.arange(batch.n) >= 11)  # the last sequence has advantage 0
    for name in ("logp", "old", "ref", "rollout", "entropy", "certainty"):
        getattr(spoiled, name)[dead] = math.nan
    options = {"loss_type": loss_type, "max_length": 8, "rollout_correction": "truncate"}
    clean, leaf = batch.logp.clone().requires_grad_(), spoiled.logp.clone().requires_grad_()
    loss, metrics = batch.call(clean, **options)
    spoiled_loss, spoiled_metrics = spoiled.call(leaf, **options)
    assert torch.equal(loss, spoiled_loss)
    for name, value in metrics.items():
        assert torch.equal(value, spoiled_metrics[name]), name
    loss.backward()
    spoiled_loss.backward()
    assert torch.equal(clean.grad, leaf.grad)
    assert torch.equal(leaf.grad[dead], torch.zeros(int(dead.sum()), dtype=DTYPE))
    assert metrics["live_tokens"] == (~dead).sum() < metrics["tokens"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_nothing_that_counts_gives_zero(loss_type):
    batch = Batch()
    batch.mask = torch.zeros_like(batch.mask)
    leaf = batch.logp.clone().requires_grad_()
    loss, metrics = batch.call(leaf, loss_type=loss_type, max_length=8, beta=0.1, entropy_coef=0.1)
    loss.backward()
    assert loss == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert all(value == 0 for value in metrics.values())
    for zero in (0, torch.tensor(0.0)):
        assert Batch().call(loss_type=loss_type, denominator=zero, max_length=8)[0] == 0
    empty, none = torch.zeros(0, requires_grad=True), torch.zeros(1, dtype=torch.int64)
    loss, _ = policy_loss(empty, advantages=torch.zeros(0), cu_seqlens=none, loss_type=loss_type, max_length=8)
    assert loss == 0


def test_metrics_by_hand():
    logp = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    old = torch.log(torch.tensor([0.5, 0.25, 0.8, 0.5]))  # ratios 1, 2, 0.625, 1
    loss, metrics = policy_loss(
        logp,
        advantages=torch.tensor([1.0, 1.0, -1.0, 0.0]),
        old_logp=old,
        rollout_logp=logp + torch.tensor([0.0, -0.3, 0.1, 9.0]),
        entropy=torch.tensor([1.0, 2.0, 3.0, 100.0]),
        rollout_correction="truncate",
        rollout_cap=1.5,
    )
    weights = torch.exp(old - logp - torch.tensor([0.0, -0.3, 0.1, 9.0])).clamp(max=1.5)[:3]
    expected = {"tokens": 4, "live_tokens": 3, "ratio_mean": 3.625 / 3, "ratio_max": 2.0, "clip_frac_low": 1 / 3, "clip_frac_high": 1 / 3}
    expected |= {"entropy": 2.0, "rollout_gap_max": 0.3, "rollout_gap_mean": 0.4 / 3}
    expected |= {"rollout_weight_mean": weights.mean().item(), "policy_loss": loss.item()}
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].dim() == 0
        assert not metrics[name].requires_grad
        assert metrics[name].item() == pytest.approx(value, abs=1e-6), name
    assert loss.item() == pytest.approx(-(weights[0] * 1 + weights[1] * 1.28 - weights[2] * 0.8).item() / 4, abs=1e-6)


def test_the_gap_to_the_sampler_is_measured_without_a_correction():
    _, metrics = policy_loss(torch.tensor([-1.0, -2.0]), advantages=torch.ones(2), rollout_logp=torch.tensor([-1.5, -2.1]))
    assert metrics["rollout_gap_max"].item() == pytest.approx(0.5)
    assert metrics["rollout_gap_mean"].item() == pytest.approx(0.3)
    assert "rollout_weight_mean" not in metrics


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_absurd_ratios_never_make_a_nan(loss_type, sign):
    logp = torch.tensor([-1.0, -300.0, -1.0], requires_grad=True)
    loss, _ = policy_loss(
        logp,
        advantages=torch.tensor([sign]),
        old_logp=torch.tensor([-400.0, -1.0, -1.0]),
        cu_seqlens=torch.tensor([0, 3]),
        loss_type=loss_type,
        max_length=3,
    )
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_log_probs_are_computed_in_fp32(dtype):
    logp = torch.randn(50).to(dtype).requires_grad_()
    loss, _ = policy_loss(logp, advantages=torch.ones(50), loss_type="reinforce")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -logp.detach().float().mean())


Z = torch.zeros(4)
CU = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"loss_type": "ppo"}, ValueError, "loss_type='ppo' is not one of reinforce, grpo, dapo"),
        *[({"loss_type": kind}, ValueError, f"loss_type='{kind}' needs cu_seqlens") for kind in BY_SEQUENCE],
        ({"loss_type": "dr_grpo"}, ValueError, "dr_grpo' needs cu_seqlens"),
        ({"loss_type": "dr_grpo", "cu_seqlens": CU}, ValueError, "needs max_length"),
        ({"beta": 0.1}, ValueError, "beta=0.1 needs ref_logp"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef=0.1 needs entropy"),
        ({"self_certainty_coef": 0.1}, ValueError, "needs self_certainty"),
        ({"rollout_correction": "mask"}, ValueError, "needs rollout_logp"),
        ({"rollout_correction": "clip"}, ValueError, "rollout_correction='clip' is not one of None, truncate, mask"),
        ({"rollout_correction": "mask", "rollout_logp": Z, "rollout_level": "sequence"}, ValueError, "rollout_level='sequence' needs cu"),
        ({"rollout_level": "batch"}, ValueError, "rollout_level='batch'"),
        ({"rollout_floor": 4.0}, ValueError, "rollout_floor=4.0"),
        ({"kl": "k4"}, ValueError, "kl='k4'"),
        ({"eps_low": 1.5}, ValueError, "0 <= eps_low <= 1"),
        ({"delta": 0.0}, ValueError, "delta must be above 0"),
        ({"ratio_cap": -1.0}, ValueError, "ratio_cap must be above 0"),
        ({"advantages": torch.ones(2)}, ValueError, r"shape \(4,\), one a token; one a sequence needs cu_seqlens"),
        ({"advantages": torch.ones(3), "cu_seqlens": CU}, ValueError, r"\(4,\), one a token, or \(2,\), one a sequence"),
        pytest.param(
            {"advantages": torch.ones(4), "cu_seqlens": torch.tensor([0, 0, 0, 2, 4])},
            ValueError,
            "as many of both",
            marks=pytest.mark.host,
        ),
        ({"advantages": torch.ones(4, dtype=torch.int64)}, TypeError, "advantages must be floating point"),
        pytest.param({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens must rise from 0 to 4", marks=pytest.mark.host),
        pytest.param({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, "cu_seqlens must rise", marks=pytest.mark.host),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens must be a 1-D int32 or int64"),
        ({"old_logp": torch.zeros(3)}, ValueError, r"old_logp must have shape \(4,\)"),
        ({"ref_logp": torch.zeros(4, device="meta")}, ValueError, "ref_logp is on meta, the rest on c"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be bool"),
        ({"entropy": torch.zeros(2)}, ValueError, "entropy must have shape"),
        ({"denominator": -1}, ValueError, "denominator must be a finite number"),
        ({"denominator": math.nan}, ValueError, "denominator must be a finite number"),
        ({"token_denominator": torch.ones(2)}, ValueError, "token_denominator must be a number or a 0-d tensor"),
        ({"temperature": 1.0}, TypeError, "temperature"),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        policy_loss(Z, **{"advantages": torch.ones(4), **arguments})


def test_the_three_loss_ops_take_the_same_keywords():
    own = set(inspect.signature(policy_loss).parameters) - {"logp", "advantages", "mask", "entropy", "self_certainty", "backend"}
    assert own == set(LossArguments.__annotations__)
    with pytest.raises(TypeError, match="epsilon"):
        policy_loss_from_logits(torch.zeros(2, 3), torch.tensor([0, 1]), advantages=torch.ones(2), epsilon=0.1)
    with pytest.raises(TypeError, match="epsilon"):
        linear_policy_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), advantages=torch.ones(2), epsilon=0.1)


# --------------------------------------------------------------------------------------------------------------- from logits


def from_log_softmax(logits, ids, batch, mask, **options):
    """The same loss through torch's own log_softmax and autograd."""
    logits = torch.where(mask[:, None], logits, 0)
    log_p = (logits / 0.8).log_softmax(-1)
    return policy_loss(
        log_p.gather(1, ids[:, None])[:, 0],
        advantages=batch.advantages,
        old_logp=batch.old,
        ref_logp=batch.ref,
        rollout_logp=batch.rollout,
        entropy=-(log_p.exp() * log_p).sum(-1),
        self_certainty=-log_p.mean(-1) - math.log(logits.shape[-1]),
        mask=mask,
        cu_seqlens=batch.cu,
        **options,
    )


def batch_with_logits(seed=5):
    batch = Batch(seed)
    logits = torch.randn(batch.n, 13, dtype=DTYPE, generator=torch.Generator().manual_seed(seed)) * 2
    ids = torch.randint(0, 13, (batch.n,), generator=torch.Generator().manual_seed(seed))
    batch.old = (logits / 0.8).log_softmax(-1).gather(1, ids[:, None])[:, 0] + batch.old - batch.logp
    return batch, logits, ids


def fused(logits, ids, batch, mask, **options):
    tensors = {"old_logp": batch.old, "ref_logp": batch.ref, "rollout_logp": batch.rollout, "cu_seqlens": batch.cu}
    return policy_loss_from_logits(logits, ids, advantages=batch.advantages, mask=mask, temperature=0.8, **tensors, **options)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("extra", ["plain", "all", "mask sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_from_logits(loss_type, extra, inplace):
    batch, logits, ids = batch_with_logits()
    options = {"loss_type": loss_type, "max_length": 8, **EXTRAS[extra]}
    leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, metrics = fused(leaf * 1.0, ids, batch, batch.mask, inplace_backward=inplace, **options)
    expected, expected_metrics = from_log_softmax(plain, ids, batch, batch.mask, **options)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(leaf.grad, plain.grad)
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected_metrics[name])
    assert "entropy" in metrics


def test_from_logits_in_place_leaves_the_gradient_in_the_logits():
    batch, values, ids = batch_with_logits()
    leaf = values.clone().requires_grad_()
    logits = leaf * 1.0
    loss, _ = fused(logits, ids, batch, batch.mask, inplace_backward=True)
    made = logits.detach().clone()
    assert torch.equal(made[~batch.mask], torch.zeros_like(made[~batch.mask]))
    assert leaf.grad is None
    loss.backward()
    torch.testing.assert_close(leaf.grad, made)
    with pytest.raises(ValueError, match="leaf that requires grad"):
        fused(leaf, ids, batch, batch.mask, inplace_backward=True)


def test_from_logits_with_nan_in_masked_and_dead_rows():
    batch, values, ids = batch_with_logits()
    dead = ~batch.mask | (torch.arange(batch.n) >= 11)
    spoiled, spoiled_ids = values.clone(), ids.clone()
    spoiled[dead], spoiled_ids[~batch.mask] = math.nan, 10**9
    clean, leaf = values.requires_grad_(), spoiled.requires_grad_()
    loss, _ = fused(clean, ids, batch, batch.mask)
    spoiled_loss, _ = fused(leaf, spoiled_ids, batch, batch.mask)
    loss.backward()
    spoiled_loss.backward()
    assert torch.equal(loss, spoiled_loss)
    assert torch.equal(clean.grad, leaf.grad)


def test_from_logits_upstream_second_and_double_backward():
    batch, values, ids = batch_with_logits()
    leaf = values.clone().requires_grad_()
    (once,) = torch.autograd.grad(fused(leaf, ids, batch, batch.mask)[0], leaf)
    (half,) = torch.autograd.grad(0.5 * fused(leaf, ids, batch, batch.mask)[0], leaf)
    torch.testing.assert_close(half, 0.5 * once)
    loss, _ = fused(leaf, ids, batch, batch.mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss_from_logits: a second backward"):
        loss.backward()
    loss, _ = fused(leaf, ids, batch, batch.mask)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss_from_logits has no second derivative"):
        gradient.square().sum().backward()


def test_from_logits_without_grad_makes_none_and_leaves_the_logits_alone():
    batch, values, ids = batch_with_logits()
    logits = values.clone().requires_grad_() * 1.0
    with torch.no_grad():
        loss, _ = fused(logits, ids, batch, batch.mask, inplace_backward=True)
    assert not loss.requires_grad
    assert torch.equal(logits.detach(), values)


def test_from_logits_bias_gradient_and_leading_shape():
    g = torch.Generator().manual_seed(0)
    logits, bias = (
        torch.randn(2, 5, 7, dtype=DTYPE, generator=g).requires_grad_(),
        torch.randn(7, dtype=DTYPE, generator=g).requires_grad_(),
    )
    ids, advantages = torch.randint(0, 7, (2, 5), generator=g), torch.randn(2, 5, dtype=DTYPE, generator=g)
    loss, _ = policy_loss_from_logits(logits, ids, advantages=advantages, bias=bias)
    got = torch.autograd.grad(0.3 * loss, [logits, bias])
    logp = (logits + bias).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = torch.autograd.grad(-0.3 * (advantages * logp).mean(), [logits, bias])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_fp16_gradients_survive_a_large_denominator(inplace):
    """Divided by 8192 most of dlogits lies below fp16's smallest number; a loss scale must bring it back."""
    g = torch.Generator().manual_seed(0)
    values, ids = (torch.randn(32, 4000, generator=g) * 2).half(), torch.randint(0, 4000, (32,), generator=g)
    advantages = torch.randn(32, generator=g)
    leaf, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    loss, _ = policy_loss_from_logits(leaf * 1, ids, advantages=advantages, denominator=8192 * 16, inplace_backward=inplace)
    (loss * 65536.0).backward()
    logp = exact.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    (-(advantages * logp).sum() / 2).backward()
    assert leaf.grad.dtype == torch.float16
    assert (leaf.grad.double() - exact.grad).norm() / exact.grad.norm() < 1e-3
    assert (leaf.grad != 0)[exact.grad.abs() > 1e-6].all()
    assert (exact.grad.abs() < 1e-6 * 2**16 / 8192)[leaf.grad == 0].all()
    with pytest.raises(TypeError, match="fp16 logits with a bias that requires grad"):
        policy_loss_from_logits(leaf, ids, advantages=advantages, bias=torch.zeros(4000, requires_grad=True))


def test_bf16_gradient_is_rounded_once(same_but_rounded):
    g = torch.Generator().manual_seed(0)
    values, ids, advantages = (
        torch.randn(8, 50, generator=g).bfloat16(),
        torch.randint(0, 50, (8,), generator=g),
        torch.randn(8, generator=g),
    )
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = values.clone().to(dtype).requires_grad_()
        policy_loss_from_logits(leaf, ids, advantages=advantages)[0].backward()
        gradients.append(leaf.grad)
    same_but_rounded(*gradients)


def test_an_in_place_gradient_is_noticed_by_whoever_had_saved_the_logits():
    leaf = torch.randn(3, 5, requires_grad=True)
    logits = leaf.exp()  # saves its output for the backward
    loss, _ = policy_loss_from_logits(logits, torch.tensor([0, 1, 2]), advantages=torch.ones(3), inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
