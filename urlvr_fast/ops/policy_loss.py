"""policy_loss: the table of policy-gradient losses on log-probabilities, and the arguments that all three loss ops share.

It runs in the kernels of `packed_loss.py`; the torch backend runs `reference.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import Tensor
from torch.autograd import Function

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import first_order
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.layout import Stat
from urlvr_fast.ops.packed_loss import PackedRows, kernel_kinds
from urlvr_fast.ops.reference import (
    SEQUENCE_MEAN,
    SEQUENCE_RATIO,
    LossOptions,
    LossRows,
    TokenStats,
    accumulation_dtype,
    loss_rows,
    policy_objective,
)
from urlvr_fast.ops.spec import LINES, RowSpec, readable

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LossArguments(TypedDict, total=False):
    """The keywords of `policy_loss` that every loss op takes beside `advantages` and `mask`."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    rollout_logp: Tensor | None
    cu_seqlens: Tensor | None
    denominator: float | Tensor | None
    token_denominator: float | Tensor | None
    loss_type: str
    eps_low: float
    eps_high: float
    delta: float | None
    beta: float
    kl: str
    entropy_coef: float
    self_certainty_coef: float
    ratio_cap: float
    tau_pos: float
    tau_neg: float
    max_length: int | None
    rollout_correction: str | None
    rollout_level: str
    rollout_cap: float
    rollout_floor: float


@dataclass(frozen=True)
class PreparedLoss:
    """A checked call: the options, and the rows with what they were made from."""

    options: LossOptions
    rows: LossRows | PackedRows

    @property
    def joined(self) -> bool:
        """Whether a row's gradient waits for the log-probs of other rows."""
        return self.rows.joined if isinstance(self.rows, PackedRows) else self.lives_by_sequence

    @property
    def lives_by_sequence(self) -> bool:
        """Whether a row with advantage 0 may have a gradient, from another row of its sequence."""
        return self.options.joins_rows(self.rows.old_logp is not None)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The statistics of the logits that the loss or its metrics need; entropy costs nothing there."""
        return ("logp", "entropy", *(("self_certainty",) if self.options.self_certainty_coef else ()))

    def objective(self, values: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its metrics; differentiable where the rows are not packed."""
        if isinstance(self.rows, PackedRows):
            return self.rows.evaluate(values, self.options, differentiate=False)[:2]
        assert values.logp is not None
        return policy_objective(values.logp, values.entropy, values.self_certainty, self.rows, self.options)

    def differentiate(self, values: TokenStats) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss, its metrics, and d loss / d statistic of every row, (N,), wherever the loss depends on the statistic."""
        o = self.options
        wanted = ["logp", *(["entropy"] if o.entropy_coef else []), *(["self_certainty"] if o.self_certainty_coef else [])]
        if isinstance(self.rows, PackedRows):
            value, metrics, upstream = self.rows.evaluate(values, o, differentiate=True)
            return value, metrics, {name: upstream[LINES[name]] for name in wanted}
        leaves = [getattr(values, name).detach() for name in wanted]

        def loss(*leaves: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self.objective(values._replace(**dict(zip(wanted, leaves, strict=True))))

        if torch.compiler.is_compiling():  # which can trace this and not torch.autograd.grad; on its own it takes twice the time
            every = tuple(range(len(leaves)))
            found, (value, metrics) = torch.func.grad_and_value(loss, argnums=every, has_aux=True)(*leaves)
        else:
            with torch.enable_grad():
                value, metrics = loss(*(leaf.requires_grad_() for leaf in leaves))
                found = torch.autograd.grad(value, leaves)
        return value.detach(), metrics, dict(zip(wanted, found, strict=True))

    def gradients(self, values: TokenStats) -> dict[str, Tensor]:
        return self.differentiate(values)[2]

    def select(self, rows: Tensor | slice) -> PreparedLoss:
        """These rows alone; only for losses that do not join rows."""
        return replace(self, rows=self.rows.select(rows))


def prepare_loss(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    advantages: Tensor,
    mask: Tensor | None,
    backend: str,
    **arguments: Unpack[LossArguments],
) -> PreparedLoss:
    """Check everything that a loss needs of its rows, which have shape `shape` and are flattened. `backend`: whose kernels weigh them."""
    old_logp, ref_logp, rollout_logp = arguments.pop("old_logp", None), arguments.pop("ref_logp", None), arguments.pop("rollout_logp", None)
    cu_seqlens, denominator = arguments.pop("cu_seqlens", None), arguments.pop("denominator", None)
    token_denominator = arguments.pop("token_denominator", None)
    options = LossOptions(**cast("dict[str, Any]", arguments))
    n = math.prod(shape)
    for name, value in (("old_logp", old_logp), ("ref_logp", ref_logp), ("rollout_logp", rollout_logp)):
        if value is not None:
            checks.check_rows(name, value, shape, device, checks.FLOATS)
    if mask is not None:
        checks.check_mask(mask, shape, device)
    if cu_seqlens is not None:
        checks.check_cu_seqlens(cu_seqlens, n, device)
        cu_seqlens = cu_seqlens.to(device, non_blocking=device.type == "cuda")
    _check_needs(options, ref_logp, rollout_logp, cu_seqlens, denominator)
    _check_advantages(advantages, shape, device, cu_seqlens)
    for name, divisor in (("denominator", denominator), ("token_denominator", token_denominator)):
        _check_denominator(name, divisor)
    advantages, mask = advantages.reshape(-1), None if mask is None else mask.reshape(-1)
    per_row = {"old_logp": old_logp, "ref_logp": ref_logp, "rollout_logp": rollout_logp}
    flat = {name: None if value is None else value.reshape(-1) for name, value in per_row.items()}
    if backend != "torch":
        packed = PackedRows.of(
            options,
            backend,
            n,
            advantages=_dense(advantages, device, dtype),
            mask=None if mask is None else mask.contiguous(),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.long().contiguous(),
            denominator=_dense(denominator, device, dtype) if isinstance(denominator, Tensor) else denominator,
            token_denominator=_dense(token_denominator, device, dtype) if isinstance(token_denominator, Tensor) else token_denominator,
            **{name: None if value is None else _dense(value, device, dtype) for name, value in flat.items()},
        )
        return PreparedLoss(options, packed)
    rows = loss_rows(
        options,
        advantages=advantages,
        mask=torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask,
        dtype=dtype,
        cu_seqlens=cu_seqlens,
        denominator=denominator,
        token_denominator=token_denominator,
        **flat,
    )
    return PreparedLoss(options, rows)


def _dense(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What goes to a GPU makes nobody wait; what comes from one is waited for."""
    return value.detach().to(device=device, dtype=dtype, non_blocking=device.type == "cuda").contiguous()


def _check_needs(
    options: LossOptions,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    kind = options.loss_type
    if cu_seqlens is None:
        if kind in (*SEQUENCE_RATIO, *SEQUENCE_MEAN):
            raise ValueError(f"loss_type={kind!r} needs cu_seqlens, the offsets of the sequences in the rows")
        if kind == "dr_grpo" and denominator is None:
            raise ValueError("loss_type='dr_grpo' needs cu_seqlens to count sequences (or a denominator)")
        if options.rollout_correction is not None and options.rollout_level == "sequence":
            raise ValueError("rollout_level='sequence' needs cu_seqlens, the offsets of the sequences in the rows")
    if kind == "dr_grpo" and denominator is None and options.max_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_length, which divides every sequence (or a denominator)")
    if options.beta != 0 and ref_logp is None:
        raise ValueError(f"beta={options.beta} needs ref_logp, the log-probs of the reference policy")
    if options.rollout_correction is not None and rollout_logp is None:
        raise ValueError(f"rollout_correction={options.rollout_correction!r} needs rollout_logp, the log-probs of the sampler")


def _check_advantages(advantages: Tensor, shape: tuple[int, ...], device: torch.device, cu_seqlens: Tensor | None) -> None:
    if advantages.dtype not in checks.FLOATS:
        raise TypeError(f"advantages must be floating point, not {advantages.dtype}")
    if advantages.device not in (device, torch.device("cpu")):
        raise ValueError(f"advantages are on {advantages.device}, the rest on {device}")
    per_token = tuple(advantages.shape) == shape
    sequences = None if cu_seqlens is None else len(cu_seqlens) - 1
    if not per_token and (sequences is None or advantages.shape != (sequences,)):
        wanted = f"{shape}, one a token" + (
            f", or ({sequences},), one a sequence" if sequences is not None else "; one a sequence needs cu_seqlens"
        )
        raise ValueError(f"advantages must have shape {wanted}, not {tuple(advantages.shape)}")
    if per_token and shape == (sequences,) and cu_seqlens is not None and readable(cu_seqlens) and bool((cu_seqlens.diff() != 1).any()):
        raise ValueError(
            f"advantages of shape {shape} could be one a token or one a sequence: there are as many of both. "
            "Leave the empty sequences out of cu_seqlens"
        )


def _check_denominator(name: str, value: float | Tensor | None) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, not of shape {tuple(value.shape)}")
    elif value is not None and not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a finite number >= 0, not {value}")


def unless_all(rows: Tensor) -> Tensor | None:
    """The mask, or None where it is known without a host read that it masks nothing."""
    return None if readable(rows) and bool(rows.all()) else rows


def in_one_kernel(loss: PreparedLoss, spec: RowSpec) -> bool:
    """Whether one kernel can make statistics, coefficient and gradient of a row: that row's log-prob must be all it takes."""
    return spec.backend != "torch" and spec.shard is None and not loss.joined


def loss_arguments(loss: PreparedLoss, scaled: bool = False) -> tuple:
    """What the op policy_gradient takes behind the backend."""
    assert isinstance(loss.rows, PackedRows)
    return (loss.rows.lines, *kernel_kinds(loss.options, loss.rows.present), scaled)


class _LossOfRows(Function):
    """A loss whose gradient by the statistics of its rows is there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, upstream: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(upstream)
        ctx.op, ctx.single_use = "policy_loss", False
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = ctx.saved_tensors
        lines = (Stat.LOGP, Stat.ENTROPY, Stat.SELF_CERTAINTY)
        wanted = ctx.needs_input_grad[2:]
        return None, None, *(upstream[line] * factor if needed else None for line, needed in zip(lines, wanted, strict=True))


def policy_loss(
    logp: Tensor,
    *,
    advantages: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    rollout_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    self_certainty: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_type: str = "dapo",
    denominator: float | Tensor | None = None,
    token_denominator: float | Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    delta: float | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    self_certainty_coef: float = 0.0,
    ratio_cap: float = 5.0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    max_length: int | None = None,
    rollout_correction: str | None = None,
    rollout_level: str = "token",
    rollout_cap: float = 3.0,
    rollout_floor: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy-gradient loss of N tokens in B sequences, from their log-probabilities.

    loss = policy + beta · KL − entropy_coef · entropy − self_certainty_coef · self-certainty. With r = exp(logp − old_logp), A the
    advantage, clip(r) = r within [1 − eps_low, 1 + eps_high] and L the mask tokens of a sequence, the policy part is

    =========  ========================================================================================  ======================
    loss_type  term                                                                                      divided by
    =========  ========================================================================================  ======================
    reinforce  −A · logp                                                                                 tokens
    grpo       −min(r A, clip(r) A), mean over the tokens of each sequence                               sequences
    dapo       −min(r A, clip(r) A)                                                                      tokens
    bnpo       the same                                                                                  tokens of this call
    dr_grpo    the same                                                                                  sequences · max_length
    gspo       one a sequence, with r = exp(mean log r)                                                  sequences
    luspo      the gspo term · L                                                                         sequences
    gmpo       −r A with r = exp(mean of log r, clipped per token where A makes that pessimistic)        sequences
    cispo      −min(r, ratio_cap) · A · logp, the weight detached                                        tokens
    sapo       −A · 4 σ(τ (r − 1)) / τ, τ = tau_pos for A > 0, else tau_neg; mean over each sequence     sequences
    =========  ========================================================================================  ======================

    KL, entropy and self-certainty are averaged like the policy term of the same type, for gspo, luspo and gmpo over tokens.

    Args:
        logp: (N,) or any shape, log-probability of each sampled token, nats; differentiable. Everything per token has its shape.
        advantages: per token, or (B,) per sequence with `cu_seqlens`. For one-term-a-sequence types a per-token advantage counts by its
            mean. May be on the CPU when the rest is not.
        old_logp: of the policy that took the previous step's weights; None means logp.detach(), that is r = 1 (on-policy).
        ref_logp: of the reference policy; needed where beta != 0, otherwise only the metric `kl` uses it.
        rollout_logp: of the sampler; needed by `rollout_correction`, otherwise only metrics use it.
        entropy, self_certainty: per token; differentiable; needed where their coefficient is not 0, reported in the metrics if given.
        mask: bool, True counts. What a masked token holds never matters, not even NaN.
        cu_seqlens: (B + 1,) int32 or int64 offsets of the sequences in the flattened rows. May be on the CPU when the rest is not.
        denominator: the divisor of the table, number or 0-d tensor, summed by the caller over micro-batches and ranks so that their losses
            add up to the loss of the whole. None: the count of this call (a sequence counts if it has a mask token). 0 gives loss 0.
        token_denominator: the same for the token means of gspo, luspo and gmpo.
        delta: r is at most this (dual clip), for the types with clip(r) and gmpo.
        kl: "k1" −d, "k2" d²/2, "k3" e^d − d − 1 with d = ref_logp − logp, differentiated as they stand.
        ratio_cap: CISPO's, as in ScaleRL (arXiv 2510.13786).  tau_pos, tau_neg: SAPO's (arXiv 2511.20347).
        max_length: of dr_grpo, tokens; part of the divisor, so not needed with a `denominator`.
        rollout_correction: the policy term is multiplied by w = exp(old_logp − rollout_logp), detached; "truncate": min(w, rollout_cap);
            "mask": w within [rollout_floor, rollout_cap], else 0.
        rollout_level: w per "token", or per "sequence" (the product over its mask tokens).
        backend: see `urlvr_fast.ops.backend`.

    Returns:
        (loss, metrics). The loss is 0-d, fp32 (fp64 for fp64 log-probs). Metrics are detached 0-d tensors on the device, each present
        where its input is: `policy_loss` (already divided, so it adds up over micro-batches); the counts `tokens`, `live_tokens`,
        `sequences`; the maxima `ratio_max` and `rollout_gap_max`; and means over the live tokens, to be weighted with `live_tokens`:
        `ratio_mean`, `clip_frac_low`, `clip_frac_high` (ratio outside the range on the side where that stops the gradient; cispo: above
        its cap), `kl`, `entropy`, `self_certainty`, `rollout_weight_mean`, `rollout_gap_mean`. The gap is |logp − rollout_logp|. Live are
        the tokens that count and are not dead, dead being advantage 0 without a KL, entropy or self-certainty term (for types that join
        a sequence: throughout it).

    Raises:
        ValueError: something a loss type needs is missing (it is named), a number out of range, a shape or device that does not fit.
        TypeError: a wrong dtype.
        RuntimeError: a derivative of the gradient, where kernels made it; a backend that this build has not.
    """
    if logp.dtype not in checks.FLOATS:
        raise TypeError(f"logp must be floating point, not {logp.dtype}")
    shape, device, dtype = tuple(logp.shape), logp.device, accumulation_dtype(logp.dtype)
    backend = choose_backend(backend, device, dtype)
    for name, value, coefficient in (("entropy", entropy, entropy_coef), ("self_certainty", self_certainty, self_certainty_coef)):
        if value is not None:
            checks.check_rows(name, value, shape, device, checks.FLOATS)
        elif coefficient != 0:
            raise ValueError(f"{name}_coef={coefficient} needs {name}, one number a token")
    prepared = prepare_loss(
        shape,
        device,
        dtype,
        advantages,
        mask,
        backend,
        old_logp=old_logp,
        ref_logp=ref_logp,
        rollout_logp=rollout_logp,
        cu_seqlens=cu_seqlens,
        denominator=denominator,
        token_denominator=token_denominator,
        loss_type=loss_type,
        eps_low=eps_low,
        eps_high=eps_high,
        delta=delta,
        beta=beta,
        kl=kl,
        entropy_coef=entropy_coef,
        self_certainty_coef=self_certainty_coef,
        ratio_cap=ratio_cap,
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        max_length=max_length,
        rollout_correction=rollout_correction,
        rollout_level=rollout_level,
        rollout_cap=rollout_cap,
        rollout_floor=rollout_floor,
    )

    flat = [None if value is None else value.reshape(-1).to(dtype) for value in (logp, entropy, self_certainty)]
    values = TokenStats(logp=flat[0], entropy=flat[1], self_certainty=flat[2])
    if not isinstance(prepared.rows, PackedRows):
        return prepared.objective(values)
    wanted = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in flat)
    with torch.no_grad():
        loss, metrics, upstream = prepared.rows.evaluate(values, prepared.options, differentiate=wanted)
    if not wanted:
        return loss, metrics
    coefficients = (1.0, entropy_coef, self_certainty_coef)
    inputs = [value if coefficient else None for value, coefficient in zip(flat, coefficients, strict=True)]
    return _LossOfRows.apply(loss, upstream, *inputs), metrics
