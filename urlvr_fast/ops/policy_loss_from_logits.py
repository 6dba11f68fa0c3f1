"""policy_loss_from_logits: a policy loss whose gradient by the logits is made in the forward."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import GradientInForward
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.head import parameter_gradient
from urlvr_fast.ops.policy_loss import LossArguments, PreparedLoss, in_one_kernel, loss_arguments, prepare_loss, unless_all
from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.row_ops import (
    gradient,
    policy_gradient,
    policy_gradient_,
    power_of_two_below,
    scale_rows_,
    statistics,
    unpack,
)
from urlvr_fast.ops.spec import RowSpec

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Gradient(NamedTuple):
    """d loss / d logits, the power of two taken out of each of its rows (fp16), and d loss / d bias."""

    d_logits: Tensor
    row_scale: Tensor | None
    d_bias: Tensor | None


def _loss_and_gradient(
    logits: Tensor, bias: Tensor | None, columns: int, spec: RowSpec, loss: PreparedLoss, inplace: bool, bias_wanted: bool
) -> tuple[Tensor, dict[str, Tensor], _Gradient]:
    scaled = logits.dtype == torch.float16
    if in_one_kernel(loss, spec) and not bias_wanted:
        call = (logits, bias, *spec.arguments(columns), columns, spec.flags, spec.backend, *loss_arguments(loss, scaled))
        if inplace:
            (stats, row_scale), d_logits = policy_gradient_(*call), logits
        else:
            stats, d_logits, row_scale = policy_gradient(*call)
        return *loss.objective(unpack(stats, spec.wanted)), _Gradient(d_logits, row_scale if scaled else None, None)
    stats = statistics(logits, bias, columns, spec)
    value, metrics, upstream = loss.differentiate(unpack(stats, spec.wanted))
    row_scale = None
    if scaled:
        row_scale = power_of_two_below(torch.stack(list(upstream.values())).abs().sum(0) * abs(spec.scale))
        upstream = {name: g / row_scale for name, g in upstream.items()}
    d_logits, d_bias = gradient(logits, bias, columns, spec, stats, upstream, inplace=inplace, bias_wanted=bias_wanted)
    return value, metrics, _Gradient(d_logits, row_scale, d_bias)


def policy_loss_from_logits(
    logits: Tensor,
    ids: Tensor,
    *,
    advantages: Tensor,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    entropy_support: str = "full",
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    shard_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
    **loss: Unpack[LossArguments],
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `token_stats`, with the gradient by the logits made in the forward: one read and one write of the logits.

    Args:
        logits: (…, V); ids: (…). These and the keywords up to `backend` are those of `token_stats`; everything per token has shape (…).
        advantages, mask and the keywords in `loss` are those of `policy_loss`; entropy and self-certainty come from the logits.
        inplace_backward: the gradient takes the place of the logits, and does so in the forward: after this call the logits are gone.

    fp16 logits: a gradient divided by some thousand tokens falls below what fp16 can hold. Until the backward the gradient is therefore
    kept with a power of two per row taken out, which is multiplied back together with the upstream gradient, in fp32, before the one
    rounding to fp16. Under a loss scaler nothing is lost; without one, entries below 6e-8 of the final gradient round to 0 as they must.

    Returns:
        (loss, metrics) as `policy_loss`; the metric `entropy` is always there. Backward multiplies the gradient by the upstream gradient on
        the device and releases it; a second backward raises. Under no_grad no gradient is made. A 16-bit gradient is rounded a second
        time where the upstream gradient is no power of two; 1 touches nothing.

    Raises:
        As `token_stats` and `policy_loss`.
    """
    checks.check_logits(logits)
    shape, device, dtype = tuple(logits.shape[:-1]), logits.device, accumulation_dtype(logits.dtype)
    checks.check_bias(bias, logits.shape[-1], device)
    if inplace_backward:
        checks.check_inplace(logits)
    backend = choose_backend(backend, device, dtype)
    prepared = prepare_loss(shape, device, dtype, advantages, mask, backend, **loss)
    spec, columns = checks.row_spec(
        prepared.outputs,
        ids,
        shape,
        logits.shape[-1],
        device,
        dtype,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        mask=mask,
        keep=keep,
        entropy_support=entropy_support,
        vocab_size=vocab_size,
        shard_group=shard_group,
        backend=backend,
    )
    spec = replace(spec, mask=unless_all(prepared.rows.live))
    wants_logits = torch.is_grad_enabled() and logits.requires_grad
    wants_bias = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    if wants_bias and logits.dtype == torch.float16:
        raise TypeError(
            "fp16 logits with a bias that requires grad: their gradients carry different scales; add the bias to the logits before"
        )
    values_of_bias = None if bias is None else bias.detach()[:columns].to(dtype).contiguous()
    with torch.no_grad():
        rows = logits.detach(), values_of_bias, columns, spec
        if not (wants_logits or wants_bias):
            return prepared.objective(unpack(statistics(*rows), spec.wanted))
        value, metrics, made = _loss_and_gradient(*rows, prepared, inplace_backward and wants_logits, wants_bias)

    def deliver(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        scale_rows_(made.d_logits, factor, made.row_scale, spec.backend)
        return made.d_logits, None if made.d_bias is None else parameter_gradient(made.d_bias * factor, bias)

    return GradientInForward.apply("policy_loss_from_logits", value, deliver, logits, bias), metrics
