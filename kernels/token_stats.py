"""Statistics of rows of logits and their gradient: one read forward, one read and one write back.

Many rows: a program each. Few: a program per segment writes the segment's sums and a second kernel merges them, with the same functions in
the same order, hence with the same bits. `urlvr_fast/ops/layout.py` states the calls; absent tensors are None, softcap 0.0 means none.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from urlvr_fast.kernels import targets
from urlvr_fast.kernels.rows import (
    ENTROPY,
    FINITE,
    ID_COUNTS,
    KEEP_LOG_S,
    LOG_S,
    LSE,
    MEAN_LOGIT,
    PARTIALS,
    ROW_MAX,
    SELF_CERTAINTY,
    before_temperature,
    coefficients,
    dense_gradient,
    finish_row,
    gradient_step,
    gradient_term,
    is_live,
    local_id,
    merge,
    no_sums_of_row,
    row_factor,
    row_of,
    row_sums,
    segment_sums,
    store_lines,
    store_zeros,
    whole_vectors,
    zero_step,
)
from urlvr_fast.kernels.targets import RUNTIME, Launch

from urlvr_fast.ops.layout import ENTROPY_ON_KEEP, RAW, Stat

# ---- kernels: statistics ----------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=RUNTIME)
def statistics_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, crow, col,
    factor, scale, softcap, inv_softcap, id_offset, total, flags, stats, stats_stride,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr, RAW_LINES: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SEGMENT: tl.constexpr, KEEP_LANES: tl.constexpr,
):  # fmt: skip
    """A program per row."""
    n = tl.program_id(0)
    live = is_live(mask, n)
    if live:
        row = row_of(logits, n, inner, stride_a, stride_b, 16)
        by = row_factor(n, live, temperatures, factor, scale, FOLDED)
        scaling = (bias, by, scale, softcap, inv_softcap)
        sums = row_sums(
            row, columns, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, DEPTH, LANES, VECTOR, SEGMENT, VECTORS, True,
        )  # fmt: skip
        local, bad_id = local_id(n, live, ids, id_offset, columns, total)
        lines = finish_row(
            sums, row, n, columns, scaling, ids, local, bad_id, crow, col, id_offset, flags,
            FOLDED, SOFTCAP, T, TOTAL, RARE, VECTOR, KEEP_LANES, RAW_LINES,
        )  # fmt: skip
        store_lines(stats, stats_stride, n, lines)
    else:
        store_zeros(stats, stats_stride, n)


@triton.jit(do_not_specialize=RUNTIME)
def segments_kernel(
    logits, stride_a, stride_b, inner, columns, bias, mask, temperatures, factor, scale, softcap, inv_softcap, partial, segments,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """A program per segment of a row: its sums to `partial` (N, segments, PARTIALS)."""
    program = tl.program_id(0)
    n, segment = program // segments, program % segments
    live = is_live(mask, n)
    if live:
        row = row_of(logits, n, inner, stride_a, stride_b, 16)
        by = row_factor(n, live, temperatures, factor, scale, FOLDED)
        scaling = (bias, by, scale, softcap, inv_softcap)
        start = segment * SEGMENT
        end = min(start + SEGMENT, whole_vectors(columns, VECTOR, VECTORS))
        sums = segment_sums(row, start, end, scaling, FOLDED, SOFTCAP, T, TOTAL, RARE, DEPTH, LANES, VECTOR, True)
        place = partial + program.to(tl.int64) * PARTIALS
        for i in tl.static_range(PARTIALS - 1):
            tl.store(place + i, sums[i])
        tl.store(place + PARTIALS - 1, sums[PARTIALS - 1].to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=RUNTIME)
def merge_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, crow, col,
    factor, scale, softcap, inv_softcap, id_offset, total, flags, stats, stats_stride, partial, segments,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, T: tl.constexpr, TOTAL: tl.constexpr, RARE: tl.constexpr, RAW_LINES: tl.constexpr,
    VECTOR: tl.constexpr, KEEP_LANES: tl.constexpr,
):  # fmt: skip
    """A program per row: merge the sums of its segments."""
    n = tl.program_id(0)
    live = is_live(mask, n)
    if live:
        row = row_of(logits, n, inner, stride_a, stride_b, 16)
        by = row_factor(n, live, temperatures, factor, scale, FOLDED)
        scaling = (bias, by, scale, softcap, inv_softcap)
        sums = no_sums_of_row()
        place = partial + n.to(tl.int64) * segments * PARTIALS
        for _ in range(0, segments):
            m, s, t, total_x = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
            finite, s2, second = tl.load(place + 4), tl.load(place + 5), tl.load(place + 6)
            argmax = tl.load(place + 7).to(tl.int32, bitcast=True)
            sums = merge(sums, (m, s, t, total_x, finite, s2, second, argmax))
            place += PARTIALS
        local, bad_id = local_id(n, live, ids, id_offset, columns, total)
        lines = finish_row(
            sums, row, n, columns, scaling, ids, local, bad_id, crow, col, id_offset, flags,
            FOLDED, SOFTCAP, T, TOTAL, RARE, VECTOR, KEEP_LANES, RAW_LINES,
        )  # fmt: skip
        store_lines(stats, stats_stride, n, lines)
    else:
        store_zeros(stats, stats_stride, n)


# ---- kernels: gradient ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _upstream(upstream, stride, n, given, live, LINE: tl.constexpr):
    return tl.load(upstream + LINE * stride.to(tl.int64) + n, mask=live & ((given >> LINE) & 1 != 0), other=0.0)


@triton.jit
def _stat(stats, stride, n, LINE: tl.constexpr):
    return tl.load(stats + LINE * stride.to(tl.int64) + n)


@triton.jit
def _row_coefficients(n, live, stats, stats_stride, upstream, upstream_stride, given, flags, HAS_KEEP: tl.constexpr):
    """(m, log s, keep log s) and what `coefficients` returns. A masked row is dead."""
    m = _stat(stats, stats_stride, n, ROW_MAX)
    a, b, c, d, keep_a, keep_b, dead = coefficients(
        m,
        _stat(stats, stats_stride, n, ENTROPY),
        _stat(stats, stats_stride, n, FINITE),
        _stat(stats, stats_stride, n, ID_COUNTS) != 0,
        _upstream(upstream, upstream_stride, n, given, live, 0),
        _upstream(upstream, upstream_stride, n, given, live, LSE),
        _upstream(upstream, upstream_stride, n, given, live, ENTROPY),
        _upstream(upstream, upstream_stride, n, given, live, SELF_CERTAINTY),
        _upstream(upstream, upstream_stride, n, given, live, MEAN_LOGIT),
        flags,
        HAS_KEEP,
    )
    log_s = _stat(stats, stats_stride, n, LOG_S)
    keep_log_s = log_s
    if HAS_KEEP:
        keep_log_s = _stat(stats, stats_stride, n, KEEP_LOG_S)
    return m, log_s, keep_log_s, a, b, c, d, keep_a, keep_b, dead | (live == 0)


@triton.jit(do_not_specialize=RUNTIME)
def gradient_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, factor, scale, softcap, inv_softcap, id_offset, total, flags,
    stats, stats_stride, upstream, upstream_stride, given, out, out_stride_a, out_stride_b, blocks,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, HAS_D: tl.constexpr, HAS_KEEP: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per block of columns of a row: the gradient without the terms of a keep set."""
    program = tl.program_id(0)
    n, block = program // blocks, program % blocks
    live = is_live(mask, n)
    row = row_of(logits, n, inner, stride_a, stride_b, 16 if VECTORS else 1)
    target = row_of(out, n, inner, out_stride_a, out_stride_b, 16 if VECTORS else 1)
    m, log_s, _, a, b, c, d, _, _, dead = _row_coefficients(n, live, stats, stats_stride, upstream, upstream_stride, given, flags, HAS_KEEP)
    end = whole_vectors(columns, VECTOR, VECTORS)
    cols, rest = block * BLOCK + tl.arange(0, BLOCK), end + tl.arange(0, VECTOR)
    if dead:
        zero_step(target, cols, end)
        if block == blocks - 1:
            zero_step(target, rest, columns)
    else:
        by = row_factor(n, live, temperatures, factor, scale, FOLDED)
        scaling = (bias, by, scale, softcap, inv_softcap)
        to_z = by if FOLDED else by * scale
        co = (m, log_s, a * to_z, b * to_z, c * to_z, d * to_z)
        local = local_id(n, live, ids, id_offset, columns, total)[0]
        gradient_step(row, target, cols, end, local, scaling, co, FOLDED, SOFTCAP, HAS_B, HAS_D)
        if block == blocks - 1:
            gradient_step(row, target, rest, columns, local, scaling, co, FOLDED, SOFTCAP, HAS_B, HAS_D)


@triton.jit(do_not_specialize=RUNTIME)
def keep_gradient_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, crow, col,
    factor, scale, softcap, inv_softcap, id_offset, total, flags,
    stats, stats_stride, upstream, upstream_stride, given, values, bias_values,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, HAS_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per row: the whole gradient at the kept columns to `values` (nnz,), because an in-place gradient is about to overwrite the
    logits there; the keep set's own terms of the bias gradient to `bias_values` (nnz,)."""
    n = tl.program_id(0)
    live = is_live(mask, n)
    m, log_s, keep_log_s, a, b, c, d, keep_a, keep_b, dead = _row_coefficients(
        n, live, stats, stats_stride, upstream, upstream_stride, given, flags, True
    )
    if not dead:
        row = row_of(logits, n, inner, stride_a, stride_b, 1)
        by = row_factor(n, live, temperatures, factor, scale, FOLDED)
        scaling, co = (bias, by, scale, softcap, inv_softcap), (m, log_s, a, b, c, d)
        to_z = 1.0 if FOLDED else scale
        local = local_id(n, live, ids, id_offset, columns, total)[0]
        start, stop = tl.load(crow + n), tl.load(crow + n + 1)
        for at in range(start, stop, BLOCK):
            entry = at + tl.arange(0, BLOCK)
            cols = tl.load(col + entry, mask=entry < stop, other=-1) - id_offset
            inside = (entry < stop) & (cols >= 0) & (cols < columns)
            z = tl.load(row + cols, mask=inside, other=-float("inf"))
            y, slope = before_temperature(z, cols, inside, scaling, FOLDED, SOFTCAP)
            kept = gradient_term(tl.fma(y, by, -m), keep_log_s, keep_a, keep_b, True) * by * slope
            dense = dense_gradient(y, cols, local, by, co, HAS_B, HAS_D) * by * slope
            tl.store(values + entry, ((dense + kept) * to_z).to(values.dtype.element_ty), mask=inside)
            if bias_values is not None:
                tl.store(bias_values + entry, kept, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def keep_scatter_kernel(
    inner, columns, mask, crow, col, id_offset, flags, stats, stats_stride, upstream, upstream_stride, given,
    out, out_stride_a, out_stride_b, values,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per row: `values` to the kept columns of `out`."""
    n = tl.program_id(0)
    live = is_live(mask, n)
    _, _, _, _, _, _, _, _, _, dead = _row_coefficients(n, live, stats, stats_stride, upstream, upstream_stride, given, flags, True)
    if not dead:
        target = row_of(out, n, inner, out_stride_a, out_stride_b, 1)
        start, stop = tl.load(crow + n), tl.load(crow + n + 1)
        for at in range(start, stop, BLOCK):
            entry = at + tl.arange(0, BLOCK)
            cols = tl.load(col + entry, mask=entry < stop, other=-1) - id_offset
            inside = (entry < stop) & (cols >= 0) & (cols < columns)
            tl.store(target + cols, tl.load(values + entry, mask=inside), mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def bias_kernel(
    logits, stride_a, stride_b, inner, columns, bias, ids, mask, temperatures, factor, scale, softcap, inv_softcap, id_offset, total, flags,
    stats, stats_stride, upstream, upstream_stride, given, partial, rows, blocks,
    SOFTCAP: tl.constexpr, HAS_B: tl.constexpr, HAS_D: tl.constexpr, HAS_KEEP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program per block of columns and ROWS rows: the sum over these rows, in order, of dL/d(logit · scale + bias) without the terms of a
    keep set, to `partial` (⌈N / ROWS⌉, V)."""
    program = tl.program_id(0)
    group, block = program // blocks, program % blocks
    cols = block * BLOCK + tl.arange(0, BLOCK)
    inside = cols < columns
    summed = tl.zeros((BLOCK,), tl.float32)
    for n in range(group * ROWS, min(group * ROWS + ROWS, rows)):
        live = is_live(mask, n)
        m, log_s, _, a, b, c, d, _, _, dead = _row_coefficients(
            n, live, stats, stats_stride, upstream, upstream_stride, given, flags, HAS_KEEP
        )
        if not dead:
            row = row_of(logits, n, inner, stride_a, stride_b, 1)
            by = row_factor(n, live, temperatures, factor, scale, False)
            scaling, co = (bias, by, scale, softcap, inv_softcap), (m, log_s, a, b, c, d)
            local = local_id(n, live, ids, id_offset, columns, total)[0]
            z = tl.load(row + cols, mask=inside, other=-float("inf"))
            y, slope = before_temperature(z, cols, inside, scaling, False, SOFTCAP)
            summed += dense_gradient(y, cols, local, by, co, HAS_B, HAS_D) * by * slope
    tl.store(partial + group.to(tl.int64) * columns + cols, summed, mask=inside)


# ---- what a call launches ---------------------------------------------------------------------------------------------------------------


def row_arguments(
    logits: Tensor,  # (A, B, V)
    bias: Tensor | None,  # (V,)
    ids: Tensor | None,  # (N,)
    mask: Tensor | None,  # (N,)
    temperatures: Tensor | None,  # (N,)
    crow: Tensor | None,  # (N + 1,)
    col: Tensor | None,  # (nnz,)
    temperature: float,
    softcap: float,
    scale: float,
    id_offset: int,
    total: int,
) -> dict[str, Any]:
    """The first arguments of all three functions as the kernels take them."""
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"the Triton kernels take float16, bfloat16 and float32 logits, not {logits.dtype}")
    # A scale that is not above 0 turns the order of the logits round or makes them equal, so it is applied before the maximum is taken.
    folded = bias is None and softcap == 0 and scale > 0
    factor = (scale if folded else 1.0) / temperature if temperature > 0 else float("nan")
    a, b, columns = logits.shape
    return {
        "logits": logits,
        "stride_a": logits.stride(0) if a > 1 else 0,
        "stride_b": logits.stride(1) if b > 1 else 0,
        "inner": b,
        "columns": columns,
        "bias": bias,
        "ids": ids,
        "mask": mask,
        "temperatures": temperatures,
        "crow": crow,
        "col": col,
        "factor": factor,
        "scale": float(scale),
        "softcap": float(softcap),
        "inv_softcap": 1 / softcap if softcap else 0.0,
        "id_offset": id_offset,
        "total": total,
        "FOLDED": folded,
        "SOFTCAP": softcap != 0,
        "VECTOR": targets.vector(logits.element_size()),
    }


def wanted_sums(flags: int) -> dict[str, bool]:
    def any_of(*stats: Stat) -> bool:
        return any(flags >> stat & 1 for stat in stats)

    return {
        "T": any_of(Stat.ENTROPY) and not flags & ENTROPY_ON_KEEP,
        "TOTAL": any_of(Stat.SELF_CERTAINTY, Stat.MEAN_LOGIT),
        "RARE": any_of(Stat.PROB_GAP, Stat.SUM_P2, Stat.ARGMAX),
    }


def launch(kernel: Any, grid: int, arguments: dict[str, Any], warps: int, registers: int | None = None) -> Launch:
    """Out of `arguments`, those that the kernel has."""
    return Launch(kernel, grid, {name: arguments[name] for name in kernel.arg_names if name in arguments}, warps, registers)


def plan_statistics(rows: dict[str, Any], flags: int, out: Tensor) -> list[Launch]:
    """What `statistics` launches for `row_arguments(…)`."""
    logits, n = rows["logits"], out.shape[1]
    tiles = targets.STATISTICS[logits.element_size()]
    arguments = rows | wanted_sums(flags)
    arguments |= {
        "flags": flags,
        "stats": out,
        "stats_stride": out.stride(0),
        "RAW_LINES": bool(flags & RAW),
        "VECTORS": targets.aligned(logits),
        "DEPTH": tiles.depth,
        "LANES": tiles.lanes,
        "SEGMENT": tiles.segment,
        "KEEP_LANES": targets.KEEP_LANES,
    }
    registers = targets.MANY_REGISTERS if rows["crow"] is not None or arguments["RARE"] else None
    if not targets.splits_rows(n, rows["columns"], tiles, logits.device):
        return [launch(statistics_kernel, n, arguments, tiles.warps, registers)]
    segments = triton.cdiv(rows["columns"] // rows["VECTOR"] * rows["VECTOR"], tiles.segment)
    arguments |= {"segments": segments, "partial": torch.empty(n, segments, PARTIALS.value, dtype=torch.float32, device=logits.device)}
    # As many warps for both as for a program a row: what a program reduces across its threads then takes the same order.
    return [launch(segments_kernel, n * segments, arguments, tiles.warps, registers), launch(merge_kernel, n, arguments, tiles.warps)]


def plan_gradient(
    rows: dict[str, Any],
    flags: int,
    stats: Tensor,  # (STATS, N)
    upstream: Tensor,  # (GRADS, N)
    given: int,
    out: Tensor,  # (A, B, V)
    bias_grad: Tensor | None,  # (V,)
) -> list[Launch]:
    """What `gradient` launches, in this order: whatever reads logits that `out` may overwrite comes first. The caller adds `partial` and
    `bias_values`, where they are made, to `bias_grad`."""
    n, columns, logits = stats.shape[1], rows["columns"], rows["logits"]
    block = targets.GRADIENT[logits.element_size()]
    has_keep = rows["crow"] is not None
    vectors = targets.aligned(logits, out)
    blocks = max(1, triton.cdiv(columns // rows["VECTOR"] * rows["VECTOR"], block.columns))
    arguments = rows | {
        "flags": flags,
        "stats": stats,
        "stats_stride": stats.stride(0),
        "upstream": upstream,
        "upstream_stride": upstream.stride(0),
        "given": given,
        "out": out,
        "out_stride_a": out.stride(0) if out.shape[0] > 1 else 0,
        "out_stride_b": out.stride(1) if out.shape[1] > 1 else 0,
        "HAS_B": bool(given >> Stat.ENTROPY & 1) and not flags & ENTROPY_ON_KEEP,
        "HAS_D": bool(given >> Stat.SELF_CERTAINTY & 1 or given >> Stat.MEAN_LOGIT & 1),
        "HAS_KEEP": has_keep,
        "VECTORS": vectors,
    }
    launches = []
    if bias_grad is not None:
        groups, bias_blocks = triton.cdiv(n, targets.BIAS_ROWS), triton.cdiv(columns, targets.BIAS.columns)
        partial = torch.empty(groups, columns, dtype=torch.float32, device=logits.device)
        of_bias = {"partial": partial, "rows": n, "blocks": bias_blocks, "BLOCK": targets.BIAS.columns, "ROWS": targets.BIAS_ROWS}
        launches.append(launch(bias_kernel, groups * bias_blocks, arguments | of_bias, targets.BIAS.warps))
    if has_keep:
        col = rows["col"]
        of_keep = {"values": torch.empty(col.shape, dtype=out.dtype, device=out.device), "bias_values": None, "BLOCK": targets.KEEP.columns}
        if bias_grad is not None:
            of_keep["bias_values"] = torch.zeros(col.shape, dtype=torch.float32, device=out.device)
        launches.append(launch(keep_gradient_kernel, n, arguments | of_keep, targets.KEEP.warps))
    launches.append(launch(gradient_kernel, n * blocks, arguments | {"blocks": blocks, "BLOCK": block.columns}, block.warps))
    if has_keep:
        launches.append(launch(keep_scatter_kernel, n, arguments | of_keep, targets.KEEP.warps))
    return launches


# ---- the calls --------------------------------------------------------------------------------------------------------------------------


def statistics(
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
    out: Tensor,  # (STATS, N) fp32
) -> None:
    """Write the packed statistics of every row, or with RAW the packed sums of this vocabulary shard."""
    rows = row_arguments(logits, bias, ids, mask, temperatures, crow, col, temperature, softcap, scale, id_offset, total)
    if out.shape[1] == 0:
        return
    with torch.cuda.device_of(logits):
        for step in plan_statistics(rows, flags, out):
            step.run()


def gradient(
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
    stats: Tensor,  # (STATS, N)
    upstream: Tensor,  # (GRADS, N)
    given: int,
    out: Tensor,  # (A, B, V), may be the logits
    bias_grad: Tensor | None,  # (V,) fp32, added to
) -> None:
    """Write the gradient by the logits; add the one by the bias."""
    if bias_grad is not None and bias is None:
        bias = torch.zeros_like(bias_grad)
    rows = row_arguments(logits, bias, ids, mask, temperatures, crow, col, temperature, softcap, scale, id_offset, total)
    if stats.shape[1] == 0:
        return
    with torch.cuda.device_of(logits):
        for step in plan_gradient(rows, flags, stats, upstream, given, out, bias_grad):
            step.run()
            if step.kernel is bias_kernel:
                assert bias_grad is not None
                bias_grad.add_(step.arguments["partial"].sum(0))
            elif step.kernel is keep_gradient_kernel and bias_grad is not None:
                assert col is not None
                # Entries of other shards and other rows hold 0. Accumulating index_put_ sorts by column, so the order is fixed.
                columns = (col - id_offset).clamp(0, rows["columns"] - 1)
                bias_grad.index_put_((columns,), step.arguments["bias_values"], accumulate=True)
