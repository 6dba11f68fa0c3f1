"""A gradient that was made in the forward times what the backward brings: a number, and a power of two a row.

Nobody on the host knows that the number is 1, as it nearly always is, so the kernel finds out, and then touches nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from urlvr_fast.kernels import targets
from urlvr_fast.kernels.rows import row_of, whole_vectors
from urlvr_fast.kernels.targets import RUNTIME, Launch


@triton.jit
def _scale_step(row, cols, end, by):
    inside = cols < end
    values = tl.load(row + cols, mask=inside, other=0.0, eviction_policy="evict_first")
    tl.store(row + cols, (values.to(tl.float32) * by).to(row.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@triton.jit(do_not_specialize=RUNTIME)
def scale_kernel(
    out, out_stride_a, out_stride_b, inner, columns, factor, row_scale, blocks,
    VECTORS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per block of columns of a row."""
    program = tl.program_id(0)
    n, block = program // blocks, program % blocks
    by = tl.load(factor)
    if row_scale is not None:
        by *= tl.load(row_scale + n)
    if by != 1.0:
        row = row_of(out, n, inner, out_stride_a, out_stride_b, 16 if VECTORS else 1)
        end = whole_vectors(columns, VECTOR, VECTORS)
        _scale_step(row, block * BLOCK + tl.arange(0, BLOCK), end, by)
        if block == blocks - 1:
            _scale_step(row, end + tl.arange(0, VECTOR), columns, by)


def plan_scale(gradient: Tensor, factor: Tensor, row_scale: Tensor | None) -> Launch:
    """What `scale` launches."""
    a, b, columns = gradient.shape
    width, vector = targets.GRADIENT[gradient.element_size()], targets.vector(gradient.element_size())
    blocks = max(1, triton.cdiv(columns // vector * vector, width.columns))
    arguments = {
        "out": gradient,
        "out_stride_a": gradient.stride(0) if a > 1 else 0,
        "out_stride_b": gradient.stride(1) if b > 1 else 0,
        "inner": b,
        "columns": columns,
        "factor": factor,
        "row_scale": row_scale,
        "blocks": blocks,
        "VECTORS": targets.aligned(gradient),
        "VECTOR": vector,
        "BLOCK": width.columns,
    }
    return Launch(scale_kernel, a * b * blocks, arguments, width.warps)


def scale(
    gradient: Tensor,  # (A, B, V)
    factor: Tensor,  # 0-d fp32
    row_scale: Tensor | None,  # (N,) fp32
) -> None:
    """Multiply in fp32, in place, with one rounding."""
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            plan_scale(gradient, factor, row_scale).run()
