"""Every loss × KL × clip × correction over random ragged batches: the loss ops against the table written out as loops, against the
reference in float64 with its gradients, and against themselves in other chunks and micro-batches."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.test_ops_policy_loss import BY_SEQUENCE, numeric_gradient, slow_loss
from urlvr_fast import linear_policy_loss, policy_loss, policy_loss_from_logits
from urlvr_fast.ops import LOSS_TYPES, head, reference

DTYPE = torch.float64
FEWER = 1 if torch.get_default_device().type == "cpu" else 10  # draws, where kernels are compiled or interpreted
H, V = 5, 19
NEAR = 1e-4  # draws this near to where a loss has a corner are not differentiable by differences; corners are tested by hand elsewhere


@st.composite
def cases(draw):
    """(lengths, options, seed, what is given): sequences may be empty, masked throughout, or have advantage 0."""
    loss_type = draw(st.sampled_from(LOSS_TYPES))
    options = {
        "loss_type": loss_type,
        "kl": draw(st.sampled_from(["k1", "k2", "k3"])),
        "beta": draw(st.sampled_from([0.0, 0.3])),
        "eps_low": draw(st.sampled_from([0.1, 0.2, 0.5])),
        "eps_high": draw(st.sampled_from([0.1, 0.28, 1.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.2])),
        "self_certainty_coef": draw(st.sampled_from([0.0, 0.1])),
        "ratio_cap": draw(st.sampled_from([1.1, 5.0])),
        "tau_pos": draw(st.sampled_from([0.7, 1.0])),
        "max_length": 8,
        "rollout_correction": draw(st.sampled_from([None, "truncate", "mask"])),
        "rollout_level": draw(st.sampled_from(["token", "sequence"])),
        "rollout_cap": draw(st.sampled_from([1.3, 3.0])),
        "rollout_floor": draw(st.sampled_from([0.0, 0.6])),
        "denominator": draw(st.sampled_from([None, 6.5])),
        "token_denominator": draw(st.sampled_from([None, 11.0])),
    }
    if loss_type not in ("reinforce", "cispo", "sapo"):
        options["delta"] = draw(st.sampled_from([None, 1.4]))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    assume(sum(lengths) != len(lengths))  # one advantage a token or one a sequence? The ops refuse to guess
    return lengths, options, draw(st.integers(0, 2**31)), draw(st.booleans())


class Ragged:
    """What a case describes: hidden states, a head, and log-probs of other policies around those of this one."""

    def __init__(self, case):
        self.lengths, self.options, seed, self.has_old = case
        g = torch.Generator().manual_seed(seed)

        def vector(*shape):
            return torch.randn(*shape, generator=g, dtype=DTYPE)

        self.bounds = [0, *itertools.accumulate(self.lengths)]
        self.n, self.b = self.bounds[-1], len(self.lengths)
        self.hidden, self.weight = vector(self.n, H), vector(V, H)
        self.ids = torch.randint(0, V, (self.n,), generator=g)
        self.mask = torch.rand(self.n, generator=g) < 0.8
        self.advantages = vector(self.b) * (torch.rand(self.b, generator=g) < 0.8)
        logp = self.statistics(self.hidden, self.weight).logp
        self.old, self.ref, self.rollout = (logp + 0.4 * vector(self.n) for _ in range(3))
        self.cu = torch.tensor(self.bounds)

    def statistics(self, hidden, weight):
        return reference.token_stats(hidden @ weight.T, self.ids)

    def arguments(self, first=0, last=None):
        """Those of a loss op for the sequences first … last − 1."""
        last = self.b if last is None else last
        rows = slice(self.bounds[first], self.bounds[last])
        tensors = {"mask": self.mask[rows], "ref_logp": self.ref[rows], "rollout_logp": self.rollout[rows]}
        if self.has_old:
            tensors["old_logp"] = self.old[rows]
        return {
            "advantages": self.advantages[first:last].repeat_interleave(self.cu[first : last + 1].diff()),
            "cu_seqlens": self.cu[first : last + 1] - self.bounds[first],
            **tensors,
            **self.options,
        }

    def expected(self, hidden, weight):
        stats = self.statistics(hidden, weight)
        return policy_loss(stats.logp, entropy=stats.entropy, self_certainty=stats.self_certainty, **self.arguments())

    def slow(self, logp, frozen, entropy, certainty):
        return slow_loss(
            logp.tolist(),
            self.advantages.tolist(),
            self.bounds,
            self.mask.tolist(),
            old=self.old.tolist() if self.has_old else None,
            ref=self.ref.tolist(),
            rollout=self.rollout.tolist(),
            entropy=entropy.tolist(),
            certainty=certainty.tolist(),
            frozen=frozen.tolist(),
            **self.options,
        )

    def away_from_corners(self, logp):
        """Whether no ratio, of a token or of a sequence, lies where a loss bends."""
        gaps = [logp - self.old, self.old - self.rollout, logp - self.rollout]
        ratios = [gap.exp() for gap in gaps]
        for a, b in itertools.pairwise(self.bounds):
            chosen = self.mask[a:b]
            ratios += [f(gap[a:b][chosen]).exp()[None] for gap in gaps for f in (torch.mean, torch.sum) if chosen.any()]
        o = self.options
        corners = [1 - o["eps_low"], 1 + o["eps_high"], o.get("delta") or 1.0, o["ratio_cap"], o["rollout_cap"], o["rollout_floor"]]
        return all(((torch.cat(ratios) - corner).abs() > NEAR).all() for corner in corners)


def gradients(loss, *leaves):
    return [
        torch.zeros_like(x) if g is None else g for g, x in zip(torch.autograd.grad(loss, leaves, allow_unused=True), leaves, strict=True)
    ]


@settings(max_examples=150 // FEWER, deadline=None)
@given(cases())
def test_the_table_over_random_batches(case):
    ragged = Ragged(case)
    stats = ragged.statistics(ragged.hidden, ragged.weight)
    assume(ragged.away_from_corners(stats.logp))
    logp = stats.logp.clone().requires_grad_()
    loss, _ = policy_loss(logp, entropy=stats.entropy, self_certainty=stats.self_certainty, **ragged.arguments())

    def slow(at):
        return ragged.slow(at, stats.logp, stats.entropy, stats.self_certainty)

    assert loss.item() == pytest.approx(slow(stats.logp), rel=1e-9, abs=1e-11)
    torch.testing.assert_close(gradients(loss, logp)[0], numeric_gradient(slow, stats.logp), rtol=1e-4, atol=1e-7)


@settings(max_examples=200 // FEWER, deadline=None)
@given(cases(), st.integers(1, 12), st.sampled_from(["cpp", "torch"] if torch.get_default_device().type == "cpu" else ["torch"]))
def test_fused_losses_equal_the_reference(case, rows, backend):
    """Loss, metrics and gradients of linear_policy_loss in chunks of `rows` rows, and of policy_loss_from_logits."""
    ragged = Ragged(case)
    leaves = [ragged.hidden.clone().requires_grad_(), ragged.weight.clone().requires_grad_()]
    loss, metrics = ragged.expected(*leaves)
    expected = gradients(loss, *leaves)
    chunk_bytes = head.VECTOR_BYTES * ragged.n + rows * (V + 2 * H) * 8
    got, got_metrics = linear_policy_loss(*leaves, ragged.ids, chunk_bytes=chunk_bytes, backend=backend, **ragged.arguments())
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(gradients(got, *leaves), expected)
    logits = ragged.hidden @ ragged.weight.T
    leaf = logits.clone().requires_grad_()
    from_logits, _ = policy_loss_from_logits(leaf, ragged.ids, backend=backend, **ragged.arguments())
    torch.testing.assert_close(from_logits, loss)
    torch.testing.assert_close(gradients(from_logits, leaf)[0].T @ ragged.hidden, expected[1])
    for name in got_metrics:
        torch.testing.assert_close(got_metrics[name], metrics[name], msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=100 // FEWER, deadline=None)
@given(cases(), st.integers(1, 12), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_chunks_and_micro_batches_agree(case, rows, cut, dtype):
    """In norm: 1e-5 in fp32, 5e-3 in 16 bit. The divisors are those of the whole, as for every caller that splits a batch."""
    ragged = Ragged(case)
    tokens = float(ragged.mask.sum())
    sequences = float(sum(bool(ragged.mask[a:b].any()) for a, b in itertools.pairwise(ragged.bounds)))
    kind = ragged.options["loss_type"]
    divisor = sequences if kind in BY_SEQUENCE else sequences * 8 if kind == "dr_grpo" else tokens
    ragged.options |= {"denominator": divisor, "token_denominator": tokens}
    middle = min(cut, ragged.b)
    parts = [(0, middle), (middle, ragged.b)]
    assume(all(ragged.bounds[last] - ragged.bounds[first] != last - first for first, last in parts))
    hidden, weight = (x.to(dtype).requires_grad_() for x in (ragged.hidden, ragged.weight))

    def run(parts, chunk_bytes):
        hidden.grad = weight.grad = None
        for first, last in parts:
            cast = {
                k: v.float() if isinstance(v, torch.Tensor) and v.dtype == DTYPE else v for k, v in ragged.arguments(first, last).items()
            }
            piece = slice(ragged.bounds[first], ragged.bounds[last])
            buffer = torch.zeros(V, H)
            loss, _ = linear_policy_loss(hidden[piece], weight, ragged.ids[piece], chunk_bytes=chunk_bytes, grad_weight_out=buffer, **cast)
            loss.backward()
            by_weight.append(buffer)
        return hidden.grad.clone() if hidden.grad is not None else torch.zeros_like(hidden), sum(by_weight)

    by_weight: list[torch.Tensor] = []
    whole = run([(0, ragged.b)], 1 << 28)
    by_weight = []
    split = run(parts, head.VECTOR_BYTES * ragged.n + V * H * 4 + rows * (V + 2 * H) * 4)
    for a, b in zip(split, whole, strict=True):
        bound = (1e-5 if dtype == torch.float32 else 5e-3) * b.float().norm() + 1e-12
        assert (a.float() - b.float()).norm() <= bound
