"""Every op in plain torch, readable as its definition, differentiated by autograd: the oracle that the fast paths are tested against.

Nothing here is chunked, fused or clever. Works in float64 (16-bit and fp32 inputs are computed in fp32). The kernels repeat the terms of
`token_terms` and `sequence_terms` (`loss_terms` in csrc/rows.h and kernels/policy_loss.py), tested against them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------- token statistics


class TokenStats(NamedTuple):
    """Statistics of each row's distribution; the ones that were not asked for are None. See `token_stats` for shapes and formulas."""

    logp: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    mean_logit: Tensor | None = None
    max_prob: Tensor | None = None
    prob_gap: Tensor | None = None
    sum_p2: Tensor | None = None
    argmax: Tensor | None = None


DIFFERENTIABLE = ("logp", "lse", "entropy", "self_certainty", "mean_logit")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an op computes in and returns: float64 for float64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def keep_mask(keep: tuple[Tensor, Tensor], columns: int) -> Tensor:
    """(N, columns) bool from the CSR keep set (crow (N + 1,), col (nnz,))."""
    crow, col = keep
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
    kept = torch.zeros(len(crow) - 1, columns, dtype=torch.bool, device=col.device)
    kept[rows, col] = True
    return kept


def scaled_logits(
    logits: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """x = softcap(logits · scale + bias) / temperature, (N, V), with softcap(z) = c · tanh(z / c)."""
    x = logits.to(accumulation_dtype(logits.dtype)) * scale
    if bias is not None:
        x = x + bias.to(x.dtype)
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / (temperature.to(x.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)


def _log_softmax_parts(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row maximum m (detached), log Σ e^(x − m), E = Σ p · (x − m), and x − m with 0 where a column does not take part, over `kept`."""
    m = x.detach().masked_fill(~kept, -math.inf).amax(-1)
    m = torch.where(m == -math.inf, math.nan, m)  # no column left: there is no distribution
    taking_part = kept & (x != -math.inf)
    shifted = torch.where(taking_part, x - m[:, None], 0)
    e = torch.where(taking_part, shifted.exp(), 0)
    s = e.sum(-1)
    return m, s.log() + (m - m), (e * shifted).sum(-1) / s, shifted


def token_stats(
    logits: Tensor,  # (N, V)
    ids: Tensor | None,  # (N,)
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    entropy_support: str = "full",
    vocab_size: int | None = None,
) -> TokenStats:
    """Every statistic of every row, with autograd. `urlvr_fast.token_stats` documents the arguments."""
    columns = logits.shape[-1] if vocab_size is None else vocab_size
    logits, bias = logits[:, :columns], None if bias is None else bias[:columns]
    if mask is not None:  # before anything is computed: what a masked row holds must not matter, not even a NaN
        logits = torch.where(mask[:, None], logits, 0)
        ids = None if ids is None else torch.where(mask, ids, 0)
        temperature = torch.where(mask, temperature, 1.0) if isinstance(temperature, Tensor) else temperature
    x = scaled_logits(logits, temperature, softcap, scale, bias)
    everything = torch.ones_like(x, dtype=torch.bool)
    m, log_s, mean_shifted, shifted = _log_softmax_parts(x, everything)
    finite = (x != -math.inf).sum(-1)
    mean = shifted.sum(-1) / finite
    p = (shifted - log_s[:, None]).exp().masked_fill((x == -math.inf) & ~m.isnan()[:, None], 0).detach()
    top = p.topk(min(2, columns), dim=-1).values
    stats = TokenStats(
        lse=m + log_s,
        entropy=log_s - mean_shifted,
        self_certainty=log_s - mean - finite.to(x.dtype).log(),
        mean_logit=m + mean,
        max_prob=top[:, 0],
        prob_gap=top[:, 0] - top[:, 1] if columns > 1 else top[:, 0],
        sum_p2=(p * p).sum(-1),
        argmax=torch.where(log_s.isnan(), -1, x.argmax(-1)),
    )
    support = everything if keep is None else keep_mask(keep, columns)
    if keep is not None:
        _, log_s, mean_shifted, shifted = _log_softmax_parts(x, support)
        if entropy_support == "keep":
            stats = stats._replace(entropy=log_s - mean_shifted)
    if ids is not None:
        chosen = ids.long()[:, None]
        possible = (support & (x != -math.inf)).gather(1, chosen)[:, 0]
        logp = torch.where(possible, shifted.gather(1, chosen)[:, 0], -math.inf) - log_s
        stats = stats._replace(logp=logp)
    if mask is None:
        return stats
    return TokenStats(*(None if value is None else torch.where(mask, value, 0) for value in stats))


def linear_token_stats(hidden: Tensor, weight: Tensor, ids: Tensor | None, **options) -> TokenStats:
    """`token_stats` of hidden @ weightᵀ, the product taken in the accumulation dtype."""
    dtype = accumulation_dtype(hidden.dtype)
    mask = options.get("mask")
    hidden = hidden if mask is None else torch.where(mask[:, None], hidden, 0)
    return token_stats(hidden.to(dtype) @ weight.to(dtype).T, ids, **options)


# --------------------------------------------------------------------------------------------------------------- advantages

LARGEST_REWARD = 1e150  # the squares of larger ones leave float64


def no_number(rewards: Tensor) -> Tensor:
    """(B,) bool: NaN, infinite or beyond ±LARGEST_REWARD."""
    return ~(rewards.double().abs() <= LARGEST_REWARD)


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, scale: str = "group", baseline: str = "mean", eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Rewards centred in their group and scaled, (B,). `urlvr_fast.group_advantages` documents the arguments."""
    counts = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    r = torch.where(counts, rewards, 0).double()
    r = torch.where(no_number(r), math.nan, r)  # spoils its group, and the deviation of the batch
    _, group = torch.unique(group_ids, return_inverse=True)
    groups = len(rewards)  # an upper bound of the number of groups that needs no host read

    def total(values: Tensor) -> Tensor:
        return sum_at(values, group, groups)

    n = total(counts.double())
    low = r.new_full((groups,), math.inf).scatter_reduce_(0, group, r.masked_fill(~counts, math.inf), "amin")
    high = r.new_full((groups,), -math.inf).scatter_reduce_(0, group, r.masked_fill(~counts, -math.inf), "amax")
    # From the group's minimum, so that a large common offset costs no digit.
    r_above = torch.where(counts, r - low[group], 0)
    centred = torch.where(counts, r_above - (total(r_above) / n.clamp(min=1))[group], 0)
    advantages = centred * (n / (n - 1).clamp(min=1))[group] if baseline == "leave_one_out" else centred
    if scale == "group":
        std = (total(centred * centred) / (n - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std[group] + eps)
    elif scale == "batch":
        number = counts.sum()
        deviation = torch.where(counts, r - r.sum() / number.clamp(min=1), 0)
        deviation = torch.where(counts, deviation - deviation.sum() / number.clamp(min=1), 0)  # again: the first mean was rounded
        advantages = advantages / (((deviation * deviation).sum() / (number - 1).clamp(min=1)).sqrt() + eps)
    constant = (low == high)[group]  # by its extremes: a rounded mean would leave dust that a tiny std blows up
    return torch.where(counts & ~constant, advantages, 0).to(rewards.dtype)


# --------------------------------------------------------------------------------------------------------------- policy losses

SEQUENCE_RATIO = ("gspo", "luspo", "gmpo")  # one ratio a sequence
SEQUENCE_MEAN = ("grpo", "sapo")  # one ratio a token, averaged over the tokens of each sequence
LOSS_TYPES = ("reinforce", "grpo", "dapo", "bnpo", "dr_grpo", "gspo", "luspo", "gmpo", "cispo", "sapo")
MAX_LOG_RATIO = 60.0  # larger log-ratios count as this: e^60 says it as well as inf does, and 0 · inf never makes a NaN gradient


@dataclass(frozen=True)
class LossOptions:
    """The numbers and names of a policy loss; `urlvr_fast.policy_loss` documents them."""

    loss_type: str = "dapo"
    eps_low: float = 0.2
    eps_high: float = 0.28
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0
    self_certainty_coef: float = 0.0
    ratio_cap: float = 5.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    max_length: int | None = None
    rollout_correction: str | None = None
    rollout_level: str = "token"
    rollout_cap: float = 3.0
    rollout_floor: float = 0.0

    def __post_init__(self) -> None:
        def one_of(name: str, allowed: tuple) -> None:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, allowed))}")

        one_of("loss_type", LOSS_TYPES)
        one_of("kl", ("k1", "k2", "k3"))
        one_of("rollout_correction", (None, "truncate", "mask"))
        one_of("rollout_level", ("token", "sequence"))
        if not 0 <= self.eps_low <= 1 or self.eps_high < 0:
            raise ValueError(f"the clip range needs 0 <= eps_low <= 1 and eps_high >= 0, not {self.eps_low} and {self.eps_high}")
        for name in ("delta", "ratio_cap", "tau_pos", "tau_neg", "rollout_cap", "max_length"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if self.delta is not None and self.loss_type in ("reinforce", "cispo", "sapo"):
            raise ValueError(f"delta caps the ratio of a clipped product, which loss_type={self.loss_type!r} has not; leave it out")
        if not 0 <= self.rollout_floor <= self.rollout_cap:
            raise ValueError(f"rollout_floor={self.rollout_floor} must lie between 0 and rollout_cap={self.rollout_cap}")

    @property
    def regularised(self) -> bool:
        """Whether a row with advantage 0 still has a gradient."""
        return self.beta != 0 or self.entropy_coef != 0 or self.self_certainty_coef != 0

    def joins_rows(self, has_old_logp: bool) -> bool:
        """Whether a row's gradient depends on the log-probs of the other rows of its sequence."""
        own_weight = self.rollout_correction is not None and self.rollout_level == "sequence" and not has_old_logp
        return self.loss_type in SEQUENCE_RATIO or own_weight


@dataclass
class LossRows:
    """What a policy loss knows of its rows before any log-prob: tensors on one device, computed without a host read."""

    advantages: Tensor  # (N,)
    mask: Tensor  # (N,) bool: rows that count
    live: Tensor  # (N,) bool: rows that count and can have a gradient; the others contribute 0 whatever they hold
    weight: Tensor  # (N,) what a token's term is multiplied by in the loss (0 if its sequence's term is)
    regulariser_weight: Tensor  # (N,) the same for KL, entropy and self-certainty
    old_logp: Tensor | None = None  # (N,)
    ref_logp: Tensor | None = None  # (N,)
    rollout_logp: Tensor | None = None  # (N,)
    log_rollout_weight: Tensor | None = None  # (N,) where old_logp is given: log of the correction before its cap
    sequence: Tensor | None = None  # (N,) int64
    lengths: Tensor | None = None  # (B,) mask tokens of each sequence, in the loss's dtype
    sequence_weight: Tensor | None = None  # 0-d: what a sequence's term is multiplied by

    def select(self, rows: Tensor | slice) -> LossRows:
        """These rows alone; only for losses that do not join rows."""
        per_row: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("lengths", "sequence_weight")}
        changes: dict[str, Any] = {name: None if value is None else value[rows] for name, value in per_row.items()}
        return replace(self, **changes)

    def divided(self, power: Tensor) -> LossRows:
        """The rows of a loss that is smaller by `power`, 0-d."""
        sequence = None if self.sequence_weight is None else self.sequence_weight / power
        return replace(self, weight=self.weight / power, regulariser_weight=self.regulariser_weight / power, sequence_weight=sequence)

    def with_live(self, chosen: Tensor) -> LossRows:
        """Only the `chosen` (N,) rows that count are live."""
        return replace(self, live=self.mask & chosen)

    def sequence_sum(self, values: Tensor) -> Tensor:
        assert self.sequence is not None
        assert self.lengths is not None
        return sum_at(values, self.sequence, len(self.lengths))


def sum_at(values: Tensor, places: Tensor, count: int) -> Tensor:
    """(count,) sums of the values (N,) at their places (N,), the same bits from run to run: on CUDA `index_add_` adds in any order, while
    accumulating `index_put_` sorts first."""
    zeros = values.new_zeros(count)
    return zeros.index_put((places,), values, accumulate=True) if values.is_cuda else zeros.index_add(0, places, values)


def _reciprocal(value: Tensor) -> Tensor:
    """1 / value, and 0 for 0: a batch in which nothing counts has loss 0."""
    return value.reciprocal().masked_fill(value == 0, 0)


def sequence_of_rows(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(N,) int64: which sequence each row belongs to."""
    positions = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


def loss_rows(
    options: LossOptions,
    *,
    advantages: Tensor,  # (N,) or (B,)
    mask: Tensor,  # (N,) bool
    dtype: torch.dtype,
    cu_seqlens: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    denominator: float | Tensor | None = None,
    token_denominator: float | Tensor | None = None,
) -> LossRows:
    """Advantages per token, weights and liveness of the rows. Denominators and lengths come from `mask`, never from live rows."""
    n, device = len(mask), mask.device
    sequence = None if cu_seqlens is None else sequence_of_rows(cu_seqlens, n)
    advantages = advantages.detach().to(device=device, dtype=dtype, non_blocking=device.type == "cuda")  # may be on the host
    if sequence is not None and cu_seqlens is not None and len(advantages) != n:
        advantages = advantages[sequence]

    def vector(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(device=device, dtype=dtype)

    count = mask.sum().to(dtype)
    rows = LossRows(
        advantages=advantages,
        mask=mask,
        live=mask,
        weight=mask,
        regulariser_weight=mask,
        old_logp=vector(old_logp),
        ref_logp=vector(ref_logp),
        rollout_logp=vector(rollout_logp),
        sequence=sequence,
    )
    if cu_seqlens is not None and sequence is not None:
        rows.lengths = sum_at(mask.to(dtype), sequence, len(cu_seqlens) - 1)
    rows.live = live_rows(rows, options)

    def divisor(given: float | Tensor | None, otherwise: Tensor | None) -> Tensor:
        if given is None:
            assert otherwise is not None
            return _reciprocal(otherwise)
        if not isinstance(given, Tensor):  # made on the device: a copy to it would be waited for
            return _reciprocal(mask.new_full((), given, dtype=dtype))
        return _reciprocal(given.to(device=device, dtype=dtype, non_blocking=device.type == "cuda"))

    of_tokens = options.loss_type not in (*SEQUENCE_RATIO, *SEQUENCE_MEAN, "dr_grpo")
    sequences = None if rows.lengths is None else (rows.lengths > 0).sum().to(dtype)
    if options.loss_type == "dr_grpo" and sequences is not None:
        sequences = sequences * (options.max_length or math.nan)
    inverse = divisor(denominator, count if of_tokens else sequences)
    rows.weight = inverse.expand(n)
    rows.regulariser_weight = rows.weight
    if options.loss_type in SEQUENCE_MEAN:
        assert rows.lengths is not None
        rows.weight = rows.regulariser_weight = (inverse * _reciprocal(rows.lengths))[sequence]
    elif options.loss_type in SEQUENCE_RATIO:
        rows.sequence_weight = inverse
        rows.weight = torch.zeros_like(rows.weight)
        rows.regulariser_weight = divisor(token_denominator, count).expand(n)
    if options.rollout_correction is not None and rows.old_logp is not None and rows.rollout_logp is not None:
        rows.log_rollout_weight = _log_rollout_weight(rows.old_logp, mask, rows, options)
    return rows


def live_rows(rows: LossRows, options: LossOptions) -> Tensor:
    """(N,) bool: not dead. Dead is mask False, or advantage 0 with no other term; where rows are joined, in all of the sequence."""
    if options.regularised:
        return rows.mask
    live = rows.mask & (rows.advantages != 0)
    if options.joins_rows(rows.old_logp is not None):
        live = rows.mask & (rows.sequence_sum(live.to(torch.float32)) > 0)[rows.sequence]
    return live


def _log_rollout_weight(old: Tensor, counts: Tensor, rows: LossRows, options: LossOptions) -> Tensor:
    """(N,) old − rollout, or its sum over the tokens of the row's sequence."""
    assert rows.rollout_logp is not None
    gap = torch.where(counts, old - rows.rollout_logp, 0)
    return gap if options.rollout_level == "token" else rows.sequence_sum(gap)[rows.sequence]


def rollout_weight(logp: Tensor, rows: LossRows, options: LossOptions) -> Tensor | None:
    """(N,) importance weight between the sampler's probabilities and ours, detached; None without a correction."""
    if options.rollout_correction is None:
        return None
    log_weight = rows.log_rollout_weight
    if log_weight is None:
        log_weight = _log_rollout_weight(logp.detach(), rows.live, rows, options)
    w = log_weight.masked_fill(~rows.live, 0).clamp(max=MAX_LOG_RATIO).exp()
    if options.rollout_correction == "truncate":
        return w.clamp(max=options.rollout_cap)
    outside = (w < options.rollout_floor) | (w > options.rollout_cap)  # written so that a NaN stays one
    return w.masked_fill(outside, 0)


def _log_ratio(logp: Tensor, rows: LossRows) -> Tensor:
    old = logp.detach() if rows.old_logp is None else rows.old_logp.masked_fill(~rows.live, 0)
    return (logp - old).clamp(max=MAX_LOG_RATIO)


class Terms(NamedTuple):
    """What the metrics want to know of the policy term, per token (or per sequence, repeated over its tokens)."""

    policy: Tensor  # before the rollout weight
    ratio: Tensor
    clipped_low: Tensor  # bool: the ratio lies under the range on the side where that stops the gradient
    clipped_high: Tensor


def _clipped(log_ratio: Tensor, advantages: Tensor, options: LossOptions) -> Terms:
    """−min(r·A, clip(r)·A), with r ← min(r, delta)."""
    if options.delta is not None:
        log_ratio = log_ratio.clamp(max=math.log(options.delta))
    low, high = 1 - options.eps_low, 1 + options.eps_high
    r = log_ratio.exp()
    policy = -torch.minimum(r * advantages, r.clamp(low, high) * advantages)
    return Terms(policy, r.detach(), (r < low) & (advantages < 0), (r > high) & (advantages > 0))


def token_terms(logp: Tensor, rows: LossRows, options: LossOptions) -> Terms:
    """The table's rows with one term a token. `logp` (N,) holds 0 in rows that are not live."""
    a, kind = rows.advantages, options.loss_type
    log_ratio = _log_ratio(logp, rows)
    never = torch.zeros_like(rows.live)
    if kind == "reinforce":
        return Terms(-a * logp, log_ratio.detach().exp(), never, never)
    if kind == "cispo":
        r = log_ratio.detach().exp()
        return Terms(-r.clamp(max=options.ratio_cap) * a * logp, r, never, r > options.ratio_cap)
    if kind == "sapo":
        r = log_ratio.exp()
        tau = torch.where(a > 0, a.new_full((), options.tau_pos), a.new_full((), options.tau_neg))
        return Terms(-a * 4 * torch.sigmoid(tau * (r - 1)) / tau, r.detach(), never, never)
    return _clipped(log_ratio, a, options)


def sequence_terms(logp: Tensor, rows: LossRows, options: LossOptions) -> Terms:
    """The table's rows with one term a sequence: (B,). An advantage per token counts by its mean over the sequence."""
    assert rows.lengths is not None
    inverse = _reciprocal(rows.lengths)
    a = rows.sequence_sum(torch.where(rows.live, rows.advantages, 0)) * inverse
    log_ratio = torch.where(rows.live, _log_ratio(logp, rows), 0)
    if options.loss_type != "gmpo":
        terms = _clipped(rows.sequence_sum(log_ratio) * inverse, a, options)
        return terms._replace(policy=terms.policy * rows.lengths) if options.loss_type == "luspo" else terms
    low, high = math.log(1 - options.eps_low) if options.eps_low < 1 else -math.inf, math.log1p(options.eps_high)
    token_a = a[rows.sequence]
    pessimistic = torch.where(token_a >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    log_mean = rows.sequence_sum(pessimistic) * inverse
    if options.delta is not None:
        log_mean = log_mean.clamp(max=math.log(options.delta))
    r = log_mean.exp()
    # Which tokens were clipped is a matter of tokens; `policy_objective` averages these back over each sequence.
    below = rows.sequence_sum(((log_ratio < low) & (token_a < 0) & rows.live).to(r.dtype)) * inverse
    above = rows.sequence_sum(((log_ratio > high) & (token_a > 0) & rows.live).to(r.dtype)) * inverse
    return Terms(-r * a, r.detach(), below, above)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference) with d = ref_logp − logp: k1 = −d, k2 = d²/2, k3 = e^d − d − 1."""
    d = ref_logp - logp
    if kind == "k1":
        return -d
    return d * d / 2 if kind == "k2" else torch.expm1(d) - d


def policy_objective(
    logp: Tensor, entropy: Tensor | None, self_certainty: Tensor | None, rows: LossRows, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of these rows and its metrics, all (N,) in, 0-d out, with autograd through logp, entropy and self_certainty.

    A loss that does not join rows is a sum over rows, so the objectives of parts of the rows add up to that of the whole.
    """
    dead = ~rows.live
    logp = logp.masked_fill(dead, 0)
    weight = rollout_weight(logp, rows, options)
    if options.loss_type in SEQUENCE_RATIO:
        terms = sequence_terms(logp, rows, options)
        live_sequence = rows.sequence_sum(rows.live.to(torch.float32)) > 0
        policy = terms.policy
        if weight is not None:  # a sequence term counts as the mean over its tokens, so a token's weight enters by its mean
            assert rows.lengths is not None
            policy = policy * rows.sequence_sum(weight.masked_fill(dead, 0)) * _reciprocal(rows.lengths)
        assert rows.sequence_weight is not None
        policy_loss = torch.where(live_sequence, policy, 0).sum() * rows.sequence_weight
        terms = Terms(*(value[rows.sequence] for value in terms))
    else:
        terms = token_terms(logp, rows, options)
        policy = terms.policy if weight is None else terms.policy * weight
        policy_loss = (policy.masked_fill(dead, 0) * rows.weight).sum()
    loss = policy_loss
    means = {"ratio_mean": terms.ratio, "clip_frac_low": terms.clipped_low, "clip_frac_high": terms.clipped_high}
    if weight is not None:
        means["rollout_weight_mean"] = weight
    if rows.rollout_logp is not None:
        means["rollout_gap_mean"] = (logp - rows.rollout_logp).abs()
    regularisers = []
    if rows.ref_logp is not None:
        regularisers.append(("kl", kl_estimate(logp, rows.ref_logp.masked_fill(dead, 0), options.kl), options.beta))
    if entropy is not None:
        regularisers.append(("entropy", entropy, -options.entropy_coef))
    if self_certainty is not None:
        regularisers.append(("self_certainty", self_certainty, -options.self_certainty_coef))
    for name, values, coefficient in regularisers:
        means[name] = values
        if coefficient:
            loss = loss + coefficient * (values.masked_fill(dead, 0) * rows.regulariser_weight).sum()
    return loss, _metrics(logp, terms, means, policy_loss, rows, dead)


@torch.no_grad()
def _metrics(logp: Tensor, terms: Terms, means: dict[str, Tensor], policy_loss: Tensor, rows: LossRows, dead: Tensor) -> dict[str, Tensor]:
    """0-d tensors on the device. Means are over live tokens: weight them with `live_tokens` to add up micro-batches. They are taken
    together: a handful of kernels instead of some for each."""
    dtype = logp.dtype
    sums = torch.stack([values.detach().to(dtype) for values in (rows.live, *means.values())]).masked_fill(dead, 0).sum(1)
    live_tokens, *averages = (*sums[:1], *(sums[1:] * _reciprocal(sums[0])))
    largest = {"ratio_max": terms.ratio}
    if rows.rollout_logp is not None:
        largest["rollout_gap_max"] = means["rollout_gap_mean"]
    stacked = torch.stack(list(largest.values())).masked_fill(dead, 0)
    highest = stacked.amax(1) if len(dead) else stacked.sum(1)
    metrics = {"policy_loss": policy_loss.detach().clone(), "tokens": rows.mask.sum().to(dtype), "live_tokens": live_tokens}
    metrics |= zip(means, averages, strict=True)
    metrics |= zip(largest, highest, strict=True)
    if rows.lengths is not None:
        metrics["sequences"] = (rows.lengths > 0).sum().to(dtype)
    return metrics
