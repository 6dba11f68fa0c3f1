"""What every op refuses, in one place.

Range checks of tensor contents run on the CPU only: on CUDA they would cost a host read, and under torch.compile they would break the
graph. There the rows concerned come out as NaN instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.ops.reference import DIFFERENTIABLE, TokenStats
from urlvr_fast.ops.shards import Shard
from urlvr_fast.ops.spec import Keep, RowSpec, readable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_logits(logits: Tensor, name: str = "logits") -> None:
    if logits.dim() < 2:
        raise ValueError(f"{name} must have shape (…, V) with at least one leading dimension, not {tuple(logits.shape)}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, not {logits.dtype}")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has no column: shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"the last stride of {name} must be 1, not {logits.stride(-1)}: pass {name}.contiguous() if a copy is acceptable")


def check_inplace(logits: Tensor) -> None:
    """In place means that the logits' memory ends up holding their gradient."""
    if logits.requires_grad and logits.is_leaf:
        raise ValueError(
            "inplace_backward=True would overwrite a leaf that requires grad; pass the output of an operation, or leave it out"
        )
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError("inplace_backward=True needs logits of which every element has its own memory; these are expanded (stride 0)")


def check_rows(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device, dtypes: Iterable[torch.dtype] | None = None) -> None:
    """A per-row tensor: its shape, its device, its dtype."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, one number a row, not {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, the rest on {device}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in dtypes)}, not {value.dtype}")


def check_mask(mask: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check_rows("mask", mask, shape, device, (torch.bool,))


def _check_ids(ids: Tensor, mask: Tensor | None, columns: int) -> None:
    if not readable(ids) or len(ids) == 0:
        return
    low, high = ids.aminmax()
    if int(low) >= 0 and int(high) < columns:
        return
    outside = (ids < 0) | (ids >= columns)
    if mask is not None:
        outside &= mask
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise IndexError(f"ids[{where}] = {int(ids[where])} is not a column of 0..{columns - 1}")


def _temperature(temperature: float | Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, mask: Tensor | None):
    if not isinstance(temperature, Tensor):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {temperature}")
        return float(temperature)
    if temperature.dim() == 0:
        temperature = temperature.to(device, non_blocking=device.type == "cuda").expand(shape)
    check_rows("temperature", temperature, shape, device, FLOATS)
    flat = temperature.detach().reshape(-1).to(dtype).contiguous()
    if readable(flat):
        wrong = ~((flat > 0) & (flat < math.inf))
        wrong = wrong if mask is None else wrong & mask
        if bool(wrong.any()):
            raise ValueError(f"temperature[{int(wrong.nonzero()[0])}] = {flat[wrong][0].item()} must be above 0 and finite")
    return flat


def _check_keep(keep: Keep, rows: int, columns: int, device: torch.device) -> None:
    crow, col = keep
    for name, part in (("crow", crow), ("col", col)):
        if part.dim() != 1 or part.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"keep is CSR: its {name} must be a 1-D int32 or int64 tensor, not {tuple(part.shape)} {part.dtype}")
        if part.device != device:
            raise ValueError(f"keep's {name} is on {part.device}, the rest on {device}")
    if len(crow) != rows + 1:
        raise ValueError(f"keep's crow must have {rows + 1} offsets for {rows} rows, not {len(crow)}")
    if readable(crow):
        if int(crow[0]) != 0 or int(crow[-1]) != len(col) or bool((crow.diff() < 0).any()):
            raise ValueError(f"keep's crow must rise from 0 to {len(col)}, the length of its col")
        if len(col) and not 0 <= int(col.min()) <= int(col.max()) < columns:
            raise IndexError(f"keep's col must lie in 0..{columns - 1}; it has {int(col.min())}..{int(col.max())}")


def requested(outputs: str | Iterable[str]) -> tuple[str, ...]:
    """Names of statistics, in the order of `TokenStats`."""
    names = {outputs} if isinstance(outputs, str) else set(outputs)
    found = tuple(name for name in TokenStats._fields if name in names)
    if len(found) != len(names) or not found:
        raise ValueError(f"outputs={outputs!r}: choose from {', '.join(TokenStats._fields)}")
    return found


def differentiable(names: Iterable[str]) -> list[str]:
    return [name for name in names if name in DIFFERENTIABLE]


def row_spec(
    names: tuple[str, ...],
    ids: Tensor | None,
    shape: tuple[int, ...],  # leading shape of the logits or hidden states
    columns: int,  # of this rank's weight or logits
    device: torch.device,
    dtype: torch.dtype,  # that the statistics are computed in
    *,
    temperature: float | Tensor,
    softcap: float | None,
    scale: float,
    mask: Tensor | None,
    keep: Keep | None,
    entropy_support: str,
    vocab_size: int | None,
    shard_group: torch.distributed.ProcessGroup | None,
    backend: str | None,
) -> tuple[RowSpec, int]:
    """Check the arguments that all ops on rows share and flatten them. Returns the spec and how many of the columns count here."""
    backend = choose_backend(backend, device, dtype)
    shard = None if shard_group is None else Shard.of(shard_group, columns, device, vocab_size)
    if shard is None and vocab_size is not None and not 0 < vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} must lie in 1..{columns}, the number of columns")
    total = shard.total if shard is not None else vocab_size or columns
    if mask is not None:
        check_mask(mask, shape, device)
        mask = mask.reshape(-1).contiguous()
    if "logp" not in names:
        ids = None
    elif ids is None:
        raise ValueError("logp needs ids")
    else:
        check_rows("ids", ids, shape, device, (torch.int64, torch.int32))
        ids = ids.reshape(-1).long().contiguous()
        _check_ids(ids, mask, total)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, not {scale}")
    if entropy_support not in ("full", "keep"):
        raise ValueError(f"entropy_support={entropy_support!r} must be 'full' or 'keep'")
    if entropy_support == "keep" and keep is None:
        raise ValueError("entropy_support='keep' needs a keep set")
    if keep is not None:
        _check_keep(keep, math.prod(shape), total, device)
    spec = RowSpec(
        wanted=frozenset(names),
        ids=ids,
        temperature=_temperature(temperature, shape, device, dtype, mask),
        softcap=softcap,
        scale=float(scale),
        mask=mask,
        keep=None if keep is None else (keep[0].long().contiguous(), keep[1].long().contiguous()),
        entropy_on_keep=entropy_support == "keep",
        shard=shard,
        backend=backend,
    )
    return spec, shard.size if shard is not None else total


def check_bias(bias: Tensor | None, columns: int, device: torch.device) -> None:
    if bias is None:
        return
    if bias.shape != (columns,):
        raise ValueError(f"bias must have shape ({columns},), one number a column, not {tuple(bias.shape)}")
    if bias.device != device:
        raise ValueError(f"bias is on {bias.device}, the rest on {device}")
    if bias.dtype not in FLOATS:
        raise TypeError(f"bias must be fp16, bf16, fp32 or fp64, not {bias.dtype}")


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Check the operands of the lm_head and return the dtype its product takes them in (autocast's, where that is on)."""
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden (…, H) and weight (V, H) do not fit: {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError("weight has no row")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, not {tensor.dtype}")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device}, weight on {weight.device}")
    check_bias(bias, weight.shape[0], weight.device)
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or run under autocast")
    return hidden.dtype


def check_cu_seqlens(cu_seqlens: Tensor, rows: int, device: torch.device) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be a 1-D int32 or int64 tensor of B + 1 offsets, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if len(cu_seqlens) == 1 and rows:
        raise ValueError(f"cu_seqlens has no sequence, but there are {rows} rows")
    if cu_seqlens.device not in (device, torch.device("cpu")):
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the rest on {device}")
    if readable(cu_seqlens) and (int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows or bool((cu_seqlens.diff() < 0).any())):
        raise ValueError(f"cu_seqlens must rise from 0 to {rows}, the number of rows; it is {cu_seqlens.tolist()[:8]}…")


def check_chunk_bytes(chunk_bytes: int) -> None:
    if not chunk_bytes > 0:
        raise ValueError(f"chunk_bytes must be above 0, not {chunk_bytes}")
