"""policy_loss_from_logits: a policy loss whose gradient by the logits is made in the forward."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import GradientInForward
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.head import bias_gradient
from urlvr_fast.ops.policy_loss import LossArguments, prepare_loss, row_gradients, unless_all
from urlvr_fast.ops.reference import accumulation_dtype
from urlvr_fast.ops.rows import blocks, row_statistics
from urlvr_fast.ops.token_stats import bias_buffer, bias_values, logits_gradient

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _power_of_two_below(size: Tensor) -> Tensor:
    """(N,) 2^⌊log2 size⌋, and 1 where that is no number above 0."""
    power = size.log2().floor().exp2()
    return torch.where(power.isfinite() & (power > 0), power, 1)


def _multiply_rows(gradient: Tensor, factor: Tensor) -> None:
    """gradient (…, V) times a number, or one a row, in place; 16-bit gradients in fp32 with one rounding."""
    for a, b, piece in blocks(gradient):
        by = factor if factor.dim() == 0 else factor[a:b, None]
        piece.copy_(piece.to(accumulation_dtype(piece.dtype)).mul_(by))


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
        the device and releases it; a second backward raises. Under no_grad no gradient is made.

    Raises:
        As `token_stats` and `policy_loss`.
    """
    choose_backend(backend)
    checks.check_logits(logits)
    shape, device, dtype = tuple(logits.shape[:-1]), logits.device, accumulation_dtype(logits.dtype)
    checks.check_bias(bias, logits.shape[-1], device)
    if inplace_backward:
        checks.check_inplace(logits)
    prepared = prepare_loss(shape, device, dtype, advantages, mask, **loss)
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
    )
    spec = replace(spec, mask=unless_all(prepared.rows.live))
    wants_logits = torch.is_grad_enabled() and logits.requires_grad
    wants_bias = torch.is_grad_enabled() and bias is not None and bias.requires_grad
    if wants_bias and logits.dtype == torch.float16:
        raise TypeError(
            "fp16 logits with a bias that requires grad: their gradients carry different scales; add the bias to the logits before"
        )
    with torch.no_grad():
        stats = row_statistics(logits.detach()[..., :columns], bias_values(bias, logits, columns), spec)
        value, metrics = prepared.objective(stats.values)
        if not (wants_logits or wants_bias):
            return value, metrics
        upstream = row_gradients(prepared, stats.values)
        row_scale = None
        if logits.dtype == torch.float16:
            row_scale = _power_of_two_below(torch.stack(list(upstream.values())).abs().sum(0) * scale)
            upstream = {name: g / row_scale for name, g in upstream.items()}
        bias_grad = bias_buffer(bias, logits, columns) if wants_bias else None
        inplace = inplace_backward and wants_logits
        gradient = logits_gradient(logits, bias, spec, columns, stats, upstream, inplace, bias_grad)

    def deliver(factor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        _multiply_rows(gradient, factor if row_scale is None else factor * row_scale)
        return gradient, None if bias_grad is None else bias_gradient(bias_grad * factor, bias)

    return GradientInForward.apply("policy_loss_from_logits", value, deliver, logits, bias), metrics
