"""token_stats: statistics of the distributions that rows of logits stand for, with their gradient in closed form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from urlvr_fast.ops import checks
from urlvr_fast.ops.autograd import first_order
from urlvr_fast.ops.reference import DIFFERENTIABLE, TokenStats, accumulation_dtype
from urlvr_fast.ops.row_ops import gradient, statistics, unpack
from urlvr_fast.ops.spec import RowSpec


class _TokenStats(Function):
    """The statistics that were asked for, in the order of `TokenStats`, where the registered op does not do: shards talk to each other, and
    a gradient in place changes an input. Outside a compiled graph it always is the one: what nobody differentiates takes no part in the
    gradient, and torch takes longer to find the registered op's gradient than a small kernel runs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, spec: RowSpec, columns: int, inplace: bool) -> tuple[Tensor, ...]:
        stats = statistics(logits, bias, columns, spec)
        ctx.save_for_backward(logits, bias, stats)
        ctx.op, ctx.single_use, ctx.spec, ctx.columns = "token_stats", inplace, spec, columns
        values = unpack(stats, spec.wanted)
        ctx.names = [name for name, value in values._asdict().items() if value is not None]
        ctx.mark_non_differentiable(*(getattr(values, name) for name in ctx.names if name not in DIFFERENTIABLE))
        ctx.set_materialize_grads(False)
        return tuple(value for value in values if value is not None)

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, bias, stats = ctx.saved_tensors
        given = {name: g for name, g in zip(ctx.names, upstream, strict=True) if g is not None and name in DIFFERENTIABLE}
        # detach() shares the version counter: autograd notices when someone else had saved these logits
        d_logits, d_bias = gradient(
            logits.detach(), bias, ctx.columns, ctx.spec, stats, given, inplace=ctx.single_use, bias_wanted=ctx.needs_input_grad[1]
        )
        return d_logits, d_bias, None, None, None


def token_stats(
    logits: Tensor,
    ids: Tensor | None,
    *,
    outputs: str | Iterable[str],
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    keep: tuple[Tensor, Tensor] | None = None,
    entropy_support: str = "full",
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    shard_group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-probability, entropy, self-certainty and more of every row of logits, without a softmax in memory.

    With x = softcap(logits · scale + bias) / temperature, softcap(z) = c · tanh(z / c), and p = softmax(x), each in nats:

    ==============  =====================================================================  ================
    logp            x[id] − lse; over the keep set where one is given                      differentiable
    lse             log Σ_j exp x_j                                                        differentiable
    entropy         lse − Σ_j p_j x_j                                                      differentiable
    self_certainty  KL(U ‖ p) = lse − mean_j x_j − log V_f over the V_f finite x_j         differentiable
    mean_logit      mean of the finite x_j                                                 differentiable
    max_prob        largest p_j
    prob_gap        largest p_j − second largest; 1 where V = 1
    sum_p2          Σ_j p_j²
    argmax          int64 column of the largest logit (the first of several), global
    ==============  =====================================================================  ================

    Args:
        logits: (…, V) fp16, bf16, fp32 or fp64 with any leading strides (no copy is made); the last stride is 1. Rows are tokens.
        ids: (…) int64 or int32, the column that `logp` is of; None where `logp` is not asked for.
        outputs: names of the statistics wanted, one or several.
        temperature: number, or one a row (…); not differentiated.
        softcap: c; None leaves the logits uncapped. A −inf logit under a softcap is −c, as the formula says.
        bias: (V,), added before the softcap; differentiable.
        mask: (…) bool, True counts. A masked row returns 0, has gradient 0, and neither its logits nor its id matter.
        keep: top-p/top-k keep set as CSR (crow (N + 1,), col (nnz,)) over the N = prod(…) rows, each column at most once a row. `logp` is
            renormalised on it (−inf for an id outside), and so is `entropy` with entropy_support="keep"; the rest stays full. On CUDA
            nobody checks crow: it must rise from 0 to nnz.
        vocab_size: only the first so many columns exist (a padded vocabulary); the others get gradient 0.
        inplace_backward: the backward writes the gradient over the logits. Whoever reads that tensor afterwards sees gradients, and
            autograd raises where another operation had saved it. Only for logits that some operation produced; one backward only.
        shard_group: the columns are this rank's slice of the vocabulary, slices contiguous in rank order, sizes may differ; ids, keep and
            vocab_size are global. All ranks call alike and get the same statistics; each gets the gradient of its own columns.
        backend: see `urlvr_fast.ops.backend`.

    Returns:
        `TokenStats` with the leading shape of the logits: fp32 (fp64 for fp64 logits), `argmax` int64; None where not asked for.
        A row with a NaN logit is NaN, alone, and so is a row that is −inf throughout: it has no distribution (argmax −1, gradient 0).
        −inf logits are columns of probability 0 and have gradient exactly 0.

    Raises:
        IndexError, ValueError: an id out of range or a temperature <= 0 (tensors: on the CPU; elsewhere that row is NaN), wrong shapes or
            strides, tensors on different devices, an in-place request on a leaf or on expanded logits.
        TypeError: a dtype that is not listed above.
        RuntimeError: a derivative of the gradient; a backend that this build has not.
    """
    names = checks.requested(outputs)
    checks.check_logits(logits)
    shape, columns = tuple(logits.shape[:-1]), logits.shape[-1]
    checks.check_bias(bias, columns, logits.device)
    if inplace_backward:
        checks.check_inplace(logits)
    dtype = accumulation_dtype(logits.dtype)
    spec, columns = checks.row_spec(
        names,
        ids,
        shape,
        columns,
        logits.device,
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
    bias = None if bias is None else bias[:columns].to(dtype).contiguous()
    wants_gradient = torch.is_grad_enabled() and (logits.requires_grad or (bias is not None and bias.requires_grad))
    if inplace_backward or spec.shard is not None or (wants_gradient and not torch.compiler.is_compiling()):
        given = _TokenStats.apply(logits, bias, spec, columns, inplace_backward)
        values = TokenStats(**dict(zip(names, given, strict=True)))
    else:
        values = unpack(statistics(logits, bias, columns, spec), spec.wanted)
    return values if len(shape) == 1 else TokenStats(*(None if value is None else value.view(shape) for value in values))
