"""What the autograd Functions of the ops share: first order only, and a gradient that was made in the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _NoSecondDerivative(Function):
    """The identity on gradients; whoever differentiates through it is told that this is not possible."""

    @staticmethod
    def forward(ctx: Any, op: str, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op} has no second derivative: its gradient cannot be differentiated again (double backward)")


def first_order(backward: Callable) -> Callable:
    """Decorate a Function's backward. It runs without a graph, and differentiating its result is an error that names `ctx.op`.

    With create_graph=True the gradients still come out; only a derivative through them raises. Where `ctx.single_use` is set a second
    backward raises too, retain_graph or not: what it needs is gone by then.
    """

    def run(ctx: Any, *upstream: Tensor | None) -> Any:
        if ctx.single_use:
            if getattr(ctx, "spent", False):
                raise RuntimeError(
                    f"{ctx.op}: a second backward through the same call; its gradient was handed out and released, call it again"
                )
            ctx.spent = True
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        present = [g for g in gradients if g is not None]
        if not torch.is_grad_enabled() or not present:
            return gradients
        anchor = torch.zeros((), requires_grad=True)
        guarded = iter(_NoSecondDerivative.apply(ctx.op, anchor, *present))
        return tuple(None if g is None else next(guarded) for g in gradients)

    return run


class GradientInForward(Function):
    """A loss whose gradient exists already: backward hands it out, multiplied by the upstream gradient on the device."""

    @staticmethod
    def forward(ctx: Any, op: str, loss: Tensor, deliver: Callable[[Tensor], tuple[Tensor | None, ...]], *inputs: Tensor | None) -> Tensor:
        ctx.op, ctx.single_use, ctx.deliver = op, True, deliver
        return loss.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        deliver, ctx.deliver = ctx.deliver, None
        return None, None, None, *deliver(upstream)
