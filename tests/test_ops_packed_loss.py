"""The rows of a loss before and after their log-probs: every kernel package that runs here against float64.

`TRITON_INTERPRET=1 pytest tests/test_ops_packed_loss.py` runs the Triton kernels (`make test` does both).
"""

import itertools
import math
import os

import pytest
import torch

from urlvr_fast.ops import reference
from urlvr_fast.ops.layout import CORRECTIONS, KL_KINDS, LossLine, Stat
from urlvr_fast.ops.packed_loss import PackedRows
from urlvr_fast.ops.reference import SEQUENCE_RATIO, LossOptions, TokenStats

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_HOST = torch.get_default_device().type == "cpu"
BACKENDS = ["triton" if INTERPRETED else "cpp"] if ON_HOST else ["triton", "cuda"]
LOSSES = reference.LOSS_TYPES
NAN = math.nan


@pytest.fixture(params=BACKENDS)
def backend(request):
    if INTERPRETED and request.param == "triton":
        request.getfixturevalue("quick_interpreter")
    return request.param


class Case:
    """A call of so many rows in four sequences, one of them empty, with or without everything that a loss may be given."""

    def __init__(self, n: int, seed: int = 0, *, old=True, ref=True, rollout=True, masked=True, sequences=True, per_sequence=False) -> None:
        g = torch.Generator().manual_seed(seed)

        def near(spread):
            return (self.logp + spread * torch.randn(n, generator=g)).clamp(max=0)

        self.n, self.logp = n, -torch.rand(n, generator=g) * 8
        self.cu_seqlens = torch.tensor([0, n // 3, n // 3, n // 2, n]) if sequences else None
        self.advantages = torch.randn(4 if per_sequence else n, generator=g)
        self.advantages[::5] = 0
        self.mask = torch.rand(n, generator=g) < 0.8 if masked else None
        if masked and n > 12:
            self.mask[n // 3 : n // 2] = False  # a sequence of which nothing counts
        self.given = {"old_logp": near(0.3) if old else None, "ref_logp": near(0.5) if ref else None}
        self.given["rollout_logp"] = near(0.7) if rollout else None
        self.entropy, self.self_certainty = torch.rand(n, generator=g) * 3, torch.rand(n, generator=g) * 5

    def packed(self, options: LossOptions, backend: str, denominator=None, token_denominator=None) -> PackedRows:
        divisors = {"denominator": denominator, "token_denominator": token_denominator}
        divisors = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in divisors.items()}
        given = {"advantages": self.advantages, "mask": self.mask, "cu_seqlens": self.cu_seqlens, **self.given}
        return PackedRows.of(options, backend, self.n, **divisors, **given)

    def plain(self, options: LossOptions, denominator=None, token_denominator=None) -> reference.LossRows:
        mask = torch.ones(self.n, dtype=torch.bool) if self.mask is None else self.mask
        given = {"advantages": self.advantages, "mask": mask, "cu_seqlens": self.cu_seqlens, **self.given}
        divisors = {"denominator": denominator, "token_denominator": token_denominator}
        return reference.loss_rows(options, dtype=torch.float64, **divisors, **given)

    def lines(self, options: LossOptions, rows: reference.LossRows) -> list:
        """What the lines hold before any log-prob, in their order; None: nothing that is looked at."""
        advantages, weight = rows.advantages, rows.weight
        if options.loss_type in SEQUENCE_RATIO:  # a term a sequence is, to the kernels, one a token
            share = rows.lengths.reciprocal().masked_fill(rows.lengths == 0, 0)
            if len(self.advantages) == self.n:
                advantages = (rows.sequence_sum(torch.where(rows.mask, advantages.double(), 0)) * share)[rows.sequence]
            weight = rows.sequence_weight.expand(self.n) * (1 if options.loss_type == "luspo" else share[rows.sequence])
        return [advantages, weight, rows.regulariser_weight, rows.old_logp, rows.ref_logp, rows.rollout_logp]

    def values(self, dtype=torch.float32) -> TokenStats:
        return TokenStats(
            *(v.to(dtype) for v in (self.logp,)), entropy=self.entropy.to(dtype), self_certainty=self.self_certainty.to(dtype)
        )

    def spoilt(self, rows: reference.LossRows) -> torch.Tensor:
        """(N,) bool: live rows with a NaN in what their log-prob's gradient is made of."""
        vectors = (self.logp, rows.advantages, rows.old_logp, rows.ref_logp, rows.rollout_logp)
        return torch.stack([v.isnan() for v in vectors if v is not None]).any(0) & rows.live

    def check(self, options: LossOptions, backend: str, *divisors) -> None:
        """Rows, loss, every metric and every gradient."""
        packed, rows = self.packed(options, backend, *divisors), self.plain(options, *divisors)
        for line, value in zip(packed.lines, self.lines(options, rows), strict=False):
            if value is not None:
                close(line, value)
        assert torch.equal(packed.live, rows.live)
        wide = self.values(torch.float64)
        leaves = wide._replace(**{name: getattr(wide, name).clone().requires_grad_() for name in ("logp", "entropy", "self_certainty")})
        loss, metrics = reference.policy_objective(leaves.logp, leaves.entropy, leaves.self_certainty, rows, options)
        got, got_metrics = packed.evaluate(self.values(), options, differentiate=False)[:2]
        assert set(got_metrics) == set(metrics)
        close(got, loss)
        for name, value in metrics.items():
            close(got_metrics[name], value, name)
        inputs = [leaves.logp, leaves.entropy, leaves.self_certainty]
        wanted = torch.autograd.grad(loss, inputs, allow_unused=True)
        upstream = packed.evaluate(self.values(), options, differentiate=True)[2]
        for stat, gradient in zip((Stat.LOGP, Stat.ENTROPY, Stat.SELF_CERTAINTY), wanted, strict=True):
            gradient = torch.zeros(self.n, dtype=torch.float64) if gradient is None else gradient
            spoilt = self.spoilt(rows)  # autograd gives some of them a number: it takes a comparison with NaN for one that is false
            close(upstream[stat][~spoilt], gradient[~spoilt], stat.name)
            assert upstream[stat][spoilt].isnan().all() or stat != Stat.LOGP
        assert not upstream[[Stat.LSE, Stat.MEAN_LOGIT]].any()


def close(got, wanted, name="") -> None:
    """Numbers of the size of the largest; of a sum, in which they cancel, to 2e-6."""
    assert got.dtype == torch.float32
    size = wanted.abs().nan_to_num().max().item() if wanted.numel() else 0.0
    bound = 3e-6 * size + 1e-9 if wanted.dim() else 2e-6
    torch.testing.assert_close(got.double(), wanted.double(), rtol=3e-6, atol=bound, equal_nan=True, msg=lambda m: f"{name}: {m}")


def some(combinations, start: int, step: int = 3) -> list:
    """All of them; of the interpreter, which takes half a second for each, every `step`-th."""
    combinations = list(combinations)
    return combinations[start % step :: step] if INTERPRETED else combinations


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_kl_and_correction(backend, kind):
    for old, correction, kl in some(itertools.product((False, True), CORRECTIONS, KL_KINDS), LOSSES.index(kind)):
        delta = 1.3 if old and kind not in ("reinforce", "cispo", "sapo") else None
        more = {"entropy_coef": 0.2, "self_certainty_coef": -0.1} if correction == "mask" else {}
        options = LossOptions(
            kind, kl=kl or "k3", beta=0.3 if kl else 0.0, rollout_correction=correction, delta=delta, max_length=7, ratio_cap=1.2, **more
        )
        Case(40, old=old, ref=kl is not None or old, rollout=correction is not None or old).check(options, backend)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_how_rows_are_weighed(backend, kind, per_sequence):
    options = LossOptions(kind, max_length=11)
    denominators = (None, 5.0, 0.0, torch.tensor(3.0), torch.tensor(0.0))
    for masked, denominator in some(itertools.product((False, True), denominators), LOSSES.index(kind) + per_sequence):
        Case(31, masked=masked, per_sequence=per_sequence).check(options, backend, denominator)


@pytest.mark.parametrize("kind", LOSSES)
def test_rows_that_a_sequence_joins(backend, kind):
    """Weights of whole sequences, and the divisor of the regularisers where a sequence has one term."""
    choices = itertools.product((False, True), CORRECTIONS, ("token", "sequence"), (False, True), (None, 9.0, torch.tensor(4.0)))
    for old, correction, level, per_sequence, divisor in some(choices, LOSSES.index(kind), 7):
        capped = {"delta": 1.05} if kind in ("gspo", "luspo", "gmpo") and old and correction else {}
        regularised = {"beta": 0.2, "entropy_coef": 0.1} if divisor is not None else {}
        options = LossOptions(
            kind,
            rollout_correction=correction,
            rollout_level=level,
            rollout_cap=1.4,
            rollout_floor=0.2,
            max_length=7,
            **capped,
            **regularised,
        )
        Case(60, old=old, per_sequence=per_sequence, masked=level == "sequence" or old).check(options, backend, None, divisor)


@pytest.mark.parametrize("kind", SEQUENCE_RATIO)
def test_thresholds_of_a_ratio_of_sequences(backend, kind):
    """On all sides of them, for advantages of both signs and of 0, by sequences of one token and of several; and where eps_low is 1."""
    lengths = [1, 1, 1, 1, 4, 4, 4, 4, 3, 3]
    shift = [0.5, 0.5, -0.5, -0.5, 0.4, 0.4, -0.4, -0.4, 0.0, 90.0]
    case = Case(sum(lengths), per_sequence=True, masked=False)
    case.cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    case.advantages = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 0, 1])
    spread = 0.2 * torch.randn(case.n, generator=torch.Generator().manual_seed(7))
    case.given["old_logp"] = case.logp - torch.tensor(shift).repeat_interleave(torch.tensor(lengths)) + spread
    for delta, eps_low in itertools.product((None, 1.35), (0.2, 1.0)):
        case.check(LossOptions(kind, delta=delta, eps_low=eps_low), backend)


@pytest.mark.parametrize("kind", ["reinforce", "dapo", "bnpo", "cispo"])
def test_without_sequences(backend, kind):
    for masked in (False, True):
        Case(31, masked=masked, sequences=False, old=False, ref=False, rollout=False).check(LossOptions(kind), backend)


@pytest.fixture
def block(backend, monkeypatch):
    """How many rows are added up in one go: fewer than usual in the interpreter."""
    if not INTERPRETED:
        return 2048 if backend == "cpp" else 512
    from urlvr_fast.kernels import targets

    for name, columns in {"ROWS": 16, "OBJECTIVE": 16, "LENGTHS": 16, "METRICS": 2}.items():
        monkeypatch.setattr(targets, name, targets.Block(4, columns))
    monkeypatch.setattr(targets, "LENGTHS_PART", 32)
    return 16


@pytest.mark.parametrize(("blocks", "more"), [(0, 0), (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 5), (5, 3)])
def test_any_number_of_rows(backend, block, blocks, more):
    """Blocks of rows are added up, the last one not whole."""
    rows = blocks * block + more
    Case(rows, seed=rows).check(LossOptions("grpo", beta=0.1), backend)
    for masked in (False, True):
        Case(rows, seed=rows, sequences=False, masked=masked).check(LossOptions("dapo"), backend)


def test_many_sequences(backend, block):
    """More than are added up at a time, and of every length."""
    rows = 3 * block if INTERPRETED else 3000
    case, count = Case(rows), rows // 2
    cuts = torch.randint(0, rows + 1, (count - 1,), generator=torch.Generator().manual_seed(1)).sort().values
    case.cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([rows])])
    case.advantages = torch.randn(count, generator=torch.Generator().manual_seed(2))
    case.check(LossOptions("grpo"), backend)


def test_nothing_counts(backend):
    for kind in LOSSES:
        case = Case(20)
        case.mask[:] = False
        case.check(LossOptions(kind, max_length=3), backend)
        assert case.packed(LossOptions(kind, max_length=3), backend).evaluate(case.values(), LossOptions(kind), differentiate=False)[0] == 0


def test_what_rows_that_do_not_count_hold_does_not_matter(backend):
    options = LossOptions("grpo", rollout_correction="truncate")
    case, spoilt = Case(60), Case(60)
    dead = ~case.packed(options, backend).live
    spoilt.advantages[~spoilt.mask] = NAN
    spoilt.given = {name: value.masked_fill(dead, NAN) for name, value in spoilt.given.items()}
    spoilt.logp, spoilt.entropy = spoilt.logp.masked_fill(dead, NAN), spoilt.entropy.masked_fill(dead, NAN)
    clean, other = case.packed(options, backend), spoilt.packed(options, backend)
    assert torch.equal(clean.live, other.live)
    first = clean.evaluate(case.values(), options, differentiate=True)
    second = other.evaluate(spoilt.values(), options, differentiate=True)
    assert first[1] == second[1]
    assert torch.equal(first[2], second[2])


@pytest.mark.parametrize("spoilt", ["logp", "old_logp", "ref_logp", "rollout_logp", "advantages", "entropy"])
def test_a_nan_is_seen(backend, spoilt):
    """In the loss, the metrics and its own gradient, as the reference has it; no other row's gradient is touched."""
    options, case = LossOptions("dapo", beta=0.1, entropy_coef=0.1, rollout_correction="truncate"), Case(30, masked=False)
    vectors = {"logp": case.logp, "advantages": case.advantages, "entropy": case.entropy, **case.given}
    vectors[spoilt][7] = NAN
    case.check(options, backend)
    assert case.packed(options, backend).evaluate(case.values(), options, differentiate=False)[0].isnan()


@pytest.mark.parametrize("kind", SEQUENCE_RATIO)
@pytest.mark.parametrize("spoilt", ["logp", "old_logp", "advantages"])
def test_a_nan_spoils_its_own_sequence(backend, spoilt, kind):
    options, case, clean = LossOptions(kind), Case(30, masked=False), Case(30, masked=False)
    {"logp": case.logp, "advantages": case.advantages, **case.given}[spoilt][12] = NAN
    loss, metrics, got = case.packed(options, backend).evaluate(case.values(), options, differentiate=True)
    want = clean.packed(options, backend).evaluate(clean.values(), options, differentiate=True)[2]
    own = slice(10, 15)
    assert loss.isnan()
    assert metrics["policy_loss"].isnan()
    assert got[Stat.LOGP, own].isnan().all()
    assert torch.equal(got[Stat.LOGP, :10], want[Stat.LOGP, :10])
    assert torch.equal(got[Stat.LOGP, 15:], want[Stat.LOGP, 15:])


@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_runs_and_parts_agree(backend, block, kind):
    """The same bits again, and the objectives of two parts add up to that of the whole."""
    n = 150 if INTERPRETED else 5000
    options, case = LossOptions(kind, beta=0.1), Case(n)
    cut = n // 2 + 7 if kind == "dapo" else n // 2  # joined rows are parted at the end of a sequence
    packed, values = case.packed(options, backend), case.values()
    first, again = (rows.evaluate(values, options, differentiate=False) for rows in (packed, case.packed(options, backend)))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    parts = []
    for rows in (slice(0, cut), slice(cut, n)):
        some = TokenStats(*(None if v is None else v[rows].contiguous() for v in values))
        parts.append(packed.select(rows).evaluate(some, options, differentiate=False)[0])
    close(sum(parts), first[0].double())
    chosen = torch.arange(0, n, 3) if kind == "dapo" else torch.cat([torch.arange(n // 3), torch.arange(n // 2, n)])
    assert torch.equal(packed.select(chosen).lines, packed.lines[:, chosen])
    if kind == "gspo":
        values = TokenStats(*(None if v is None else v[chosen].contiguous() for v in values))
        close(packed.select(chosen).evaluate(values, options, differentiate=False)[0], parts[1].double() + left_out(case, options, backend))


def left_out(case: Case, options: LossOptions, backend: str) -> torch.Tensor:
    """The objective of the first third, which is a sequence."""
    rows = slice(0, case.n // 3)
    some = TokenStats(*(None if v is None else v[rows].contiguous() for v in case.values()))
    return case.packed(options, backend).select(rows).evaluate(some, options, differentiate=False)[0]


BROKEN = {"begins late": [2, 9, 15, 31], "ends early": [0, 9, 15, 20], "falls": [0, 15, 9, 31], "leaves the rows": [0, 9, 1 << 40, 31]}


@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("name", BROKEN)
def test_cu_seqlens_that_do_not_rise_from_0_to_the_rows(backend, name, kind):
    """Where nobody can look at them everything is NaN, and nothing beyond the rows is touched; kernels on the host raise."""
    case = Case(31)
    case.cu_seqlens = torch.tensor(BROKEN[name])
    if backend == "cpp":
        with pytest.raises(RuntimeError, match="must rise from 0 to 31"):
            case.packed(LossOptions(kind), backend)
        return
    packed = case.packed(LossOptions(kind), backend)
    assert packed.lines[: LossLine.REGULARISER + 1].isnan().all()
    assert packed.counts.isnan().all()
    assert packed.evaluate(case.values(), LossOptions(kind), differentiate=False)[0].isnan()
