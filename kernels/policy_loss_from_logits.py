"""The gradient of a policy loss whose rows are not joined, made in the forward: statistics, coefficient and gradient of a row in turn.

A persistent grid has one row per processor in flight, so that the way back over a row, which starts at its end, finds it in L2: one
read and one write of memory. With a keep set the three steps are kernels of their own, because kept columns are scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from urlvr_fast.kernels import targets
from urlvr_fast.kernels.policy_loss import NUMBERS, row_upstream
from urlvr_fast.kernels.rows import (
    ENTROPY,
    FINITE,
    ID_COUNTS,
    LOG_S,
    LOGP,
    ROW_MAX,
    SELF_CERTAINTY,
    coefficients,
    finish_row,
    gradient_at_id,
    gradient_step,
    is_live,
    local_id,
    row_factor,
    row_of,
    row_sums,
    store_lines,
    store_zeros,
    whole_vectors,
    zero_step,
)
from urlvr_fast.kernels.targets import RUNTIME, Launch
from urlvr_fast.kernels.token_stats import launch, plan_gradient, plan_statistics, row_arguments, wanted_sums

from urlvr_fast.ops.layout import GRADS, Stat

# ---- kernels ----------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def policy_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, factor, scale, softcap, inv_softcap, id_offset, total, flags,
    loss, loss_stride, present, loss_kind, kl_kind, correction,
    low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    stats, stats_stride, out, out_stride_a, out_stride_b, row_scale, rows,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    HAS_B: tl.constexpr, HAS_D: tl.constexpr, VECTORS: tl.constexpr, VECTOR: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program, program + programs, …: each is read twice, the second time from L2."""
    end = whole_vectors(columns, VECTOR, VECTORS)
    rest = end + tl.arange(0, VECTOR)
    blocks = tl.cdiv(end, BLOCK)
    for n in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = row_of(logits, n, inner, stride_a, stride_b, 16)
        live = is_live(mask, n)
        dead = live == 0
        by = tl.zeros((), tl.float32)
        local, bad_id = local_id(n, live, ids, id_offset, columns, total)
        m, log_s, a, b, c, d, at_id, power = by, by, by, by, by, by, by, by + 1
        if live:
            by = row_factor(n, live, temperatures, factor, scale, FOLDED)
            scaling = (bias, by, scale, softcap, inv_softcap)
            sums = row_sums(
                row, columns, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, DEPTH, LANES, VECTOR, SEGMENT, VECTORS, False,
            )  # fmt: skip
            lines = finish_row(
                sums, row, n, columns, scaling, ids, local, bad_id, None, None, id_offset, flags,
                FOLDED, SOFTCAP, T, TOTAL, RARE, VECTOR, 1, False,
            )  # fmt: skip
            store_lines(stats, stats_stride, n, lines)
            g_logp, g_h, g_sc, power = row_upstream(
                lines[LOGP], loss, loss_stride, n, live, present, loss_kind, kl_kind, correction, scale,
                low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
                row_scale is not None,
            )  # fmt: skip
            m, log_s, zero = lines[ROW_MAX], lines[LOG_S], tl.zeros((), tl.float32)
            a, b, c, d, _, _, dead = coefficients(
                m, lines[ENTROPY], lines[FINITE], lines[ID_COUNTS] != 0, g_logp, zero, g_h, g_sc, zero, flags, False
            )
            to_z = by if FOLDED else by * scale
            a, b, c, d = a * to_z, b * to_z, c * to_z, d * to_z
            at_id = gradient_at_id(row, local, scaling, (m, log_s, a, b, c, d), FOLDED, SOFTCAP, HAS_B, HAS_D)
        else:
            store_zeros(stats, stats_stride, n)
        if row_scale is not None:
            tl.store(row_scale + n, power)
        tl.debug_barrier()  # every thread has read what it needs of the row before one writes to it
        target = row_of(out, n, inner, out_stride_a, out_stride_b, 16 if VECTORS else 1)
        if dead:
            for block in range(0, blocks):
                zero_step(target, block * BLOCK + tl.arange(0, BLOCK), end)
            zero_step(target, rest, columns)
        else:
            scaling, co = (bias, by, scale, softcap, inv_softcap), (m, log_s, a, b, c, d)
            row = row_of(logits, n, inner, stride_a, stride_b, 16 if VECTORS else 1)
            gradient_step(row, target, rest, columns, local, scaling, co, FOLDED, SOFTCAP, HAS_B, HAS_D, False)
            for back in range(0, blocks):
                cols = (blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK)
                gradient_step(row, target, cols, end, local, scaling, co, FOLDED, SOFTCAP, HAS_B, HAS_D, False)
            tl.debug_barrier()  # the number that stands there is without the id's term
            if local >= 0:
                tl.store(target + local, at_id.to(target.dtype.element_ty))


@triton.jit(do_not_specialize=RUNTIME)
def upstream_kernel(
    mask, scale, loss, loss_stride, present, loss_kind, kl_kind, correction,
    low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
    stats, stats_stride, upstream, upstream_stride, row_scale, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From statistics and loss rows to the upstream gradient that `gradient` takes."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    live = inside
    if mask is not None:
        live = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    logp = tl.load(stats + LOGP * stats_stride.to(tl.int64) + n, mask=live, other=0.0)
    g_logp, g_h, g_sc, power = row_upstream(
        logp, loss, loss_stride, n, live, present, loss_kind, kl_kind, correction, scale,
        low, high, log_delta, beta, entropy_coef, self_certainty_coef, ratio_cap, tau_pos, tau_neg, rollout_cap, rollout_floor,
        row_scale is not None,
    )  # fmt: skip
    stride = upstream_stride.to(tl.int64)
    tl.store(upstream + LOGP * stride + n, g_logp, mask=inside)
    tl.store(upstream + ENTROPY * stride + n, g_h, mask=inside)
    tl.store(upstream + SELF_CERTAINTY * stride + n, g_sc, mask=inside)
    if row_scale is not None:
        tl.store(row_scale + n, tl.where(live, power, 1.0), mask=inside)


# ---- the call ---------------------------------------------------------------------------------------------------------------------------


def plan_policy(
    rows: dict[str, Any],
    flags: int,
    loss: Tensor,
    present: int,
    loss_kind: int,
    kl_kind: int,
    correction: int,
    numbers: Sequence[float],
    stats: Tensor,
    out: Tensor,
    row_scale: Tensor | None,
) -> list[Launch]:
    """What `policy` launches for `row_arguments(…)`, in this order."""
    n, logits, device = stats.shape[1], rows["logits"], stats.device
    named = dict(zip(NUMBERS, map(float, numbers), strict=True))
    arguments = rows | named
    arguments |= {
        "flags": flags,
        "loss": loss,
        "loss_stride": loss.stride(0),
        "present": present,
        "loss_kind": loss_kind,
        "kl_kind": kl_kind,
        "correction": correction,
        "stats": stats,
        "stats_stride": stats.stride(0),
        "row_scale": row_scale,
        "rows": n,
    }
    if rows["crow"] is not None:
        upstream = torch.empty(GRADS, n, dtype=torch.float32, device=device)
        arguments |= {"upstream": upstream, "upstream_stride": upstream.stride(0), "BLOCK": targets.ROWS.columns}
        given = 1 << Stat.LOGP | (named["entropy_coef"] != 0) << Stat.ENTROPY | (named["self_certainty_coef"] != 0) << Stat.SELF_CERTAINTY
        return [
            *plan_statistics(rows, flags, stats),
            launch(upstream_kernel, triton.cdiv(n, targets.ROWS.columns), arguments, targets.ROWS.warps),
            *plan_gradient(rows, flags, stats, upstream, given, out, None),
        ]
    arguments |= wanted_sums(flags)
    tiles = targets.POLICY[logits.element_size()]
    arguments |= {
        "out": out,
        "out_stride_a": out.stride(0) if out.shape[0] > 1 else 0,
        "out_stride_b": out.stride(1) if out.shape[1] > 1 else 0,
        "HAS_B": named["entropy_coef"] != 0,
        "HAS_D": named["self_certainty_coef"] != 0,
        "VECTORS": targets.aligned(logits, out),
        "DEPTH": tiles.depth,
        "LANES": tiles.lanes,
        "SEGMENT": tiles.segment,
        "BLOCK": targets.POLICY_GRADIENT,
    }
    return [launch(policy_kernel, min(n, targets.processors(device)), arguments, tiles.warps, tiles.registers)]


def policy(
    logits: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    temperature: float,
    softcap: float,
    scale: float,
    id_offset: int,
    total: int,
    flags: int,
    loss: Tensor,  # (LOSS_LINES, N)
    present: int,
    loss_kind: int,
    kl_kind: int,
    correction: int,
    numbers: Sequence[float],  # LossNumbers of csrc/rows.h, in order
    stats: Tensor,  # (STATS, N)
    out: Tensor,  # (A, B, V), may be the logits
    row_scale: Tensor | None,  # (N,)
) -> None:
    """Write the packed statistics of every row and the gradient of the loss by its logits."""
    rows = row_arguments(logits, bias, ids, mask, temperatures, crow, col, temperature, softcap, scale, id_offset, total)
    if stats.shape[1] == 0:
        return
    with torch.cuda.device_of(logits):
        for step in plan_policy(rows, flags, loss, present, loss_kind, kl_kind, correction, numbers, stats, out, row_scale):
            step.run()
