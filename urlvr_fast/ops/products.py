"""Matrix products: which routine of the libraries that torch brings makes which, and whether 16-bit operands go into them as they are.

CUDA multiplies 16-bit operands into fp32 results. CPUs with bf16 instructions multiply bf16 into bf16, accumulated in fp32: good for the
two products of a gradient, which may be rounded once, not for logits. On a CPU fp32 products go to oneDNN where new memory will do, since
`torch.mm` takes MKL, which uses AVX-512 on Intel's processors only (measured on an AMD EPYC: logits 2.1 and dX 1.9 times as fast).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_CPU_BF16 = _ONEDNN and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def narrow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the products of a gradient take operands of this 16-bit dtype as they are."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return device.type == "cuda" or (device.type == "cpu" and dtype == torch.bfloat16 and _CPU_BF16)


def wide(device: torch.device) -> bool:
    """Whether 16-bit operands have fp32 results."""
    return device.type == "cuda"


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """a (n, k) · b (k, m) into `out` (n, m), or added to it. `out` is of the operands' dtype, or fp32 where these are of 16 bits."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif not wide(out.device):
        out.add_(torch.mm(a, b)) if add else out.copy_(torch.mm(a, b))
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `new_product` is oneDNN's, which makes its own memory."""
    return _ONEDNN and device.type == "cpu" and dtype == torch.float32 and not torch.compiler.is_compiling()


def new_product(a: Tensor, b: Tensor) -> Tensor:
    """a (n, k) · b (k, m) of one dtype in memory of its own."""
    if onednn(a.device, a.dtype) and a.shape[1] > 0:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b
