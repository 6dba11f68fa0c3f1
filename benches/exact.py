"""The float64 values that providers are compared with, written out from their definitions and differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benches.data import Rows


def statistics(logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """logp, entropy and self-certainty of (K, V) float64 logits."""
    log_p = torch.log_softmax(logits, -1)
    return {
        "logp": log_p.gather(1, ids[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "self_certainty": -log_p.mean(-1) - math.log(logits.shape[-1]),
    }


def _checked(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The compared rows of the logits in float64, of the ids, and of the mask as numbers."""
    logits = rows.logits[rows.checked].double()
    mask = torch.ones(len(logits), device=logits.device) if rows.mask is None else rows.mask[rows.checked]
    return logits, rows.ids[rows.checked], mask.double()


def statistics_errors(rows: Rows, names: Sequence[str], values: Sequence[Tensor]) -> dict[str, float]:
    """Largest |difference| per statistic."""
    logits, ids, mask = _checked(rows)
    expected = statistics(logits, ids)
    return {
        name: float((value.detach()[rows.checked].double() - expected[name] * mask).abs().max())
        for name, value in zip(names, values, strict=True)
    }


def _gradient_error(rows: Rows, gradient: Tensor, expected: Tensor) -> dict[str, float]:
    got = gradient.detach().view(rows.logits.shape)[rows.checked].double()
    return {"gradient": float((got - expected).norm() / expected.norm().clamp(min=1e-300))}


def gradient_error(rows: Rows, names: Sequence[str], gradient: Tensor) -> dict[str, float]:
    """‖Δ‖/‖g‖ of the gradient of Σ upstream · statistic."""
    logits, ids, mask = _checked(rows)
    logits.requires_grad_()
    values = statistics(logits, ids)
    total = sum((values[name] * mask * rows.upstream[name][rows.checked].double()).sum() for name in names)
    return _gradient_error(rows, gradient, torch.autograd.grad(total, logits)[0])


def policy_gradient_error(rows: Rows, gradient: Tensor) -> dict[str, float]:
    """‖Δ‖/‖g‖ of the gradient of the on-policy loss, −Σ A · ratio / tokens, whose ratio is 1."""
    logits, ids, mask = _checked(rows)
    logits.requires_grad_()
    loss = -(rows.advantages[rows.checked].double() * mask * statistics(logits, ids)["logp"]).sum() / rows.live
    return _gradient_error(rows, gradient, torch.autograd.grad(loss, logits)[0])
