"""How the kernels are launched: tile sizes, warps, and which specialisation a call gets. Nothing else decides it.

A row is cut into segments of fixed width, merged in index order, and a segment into tiles of `depth` × `lanes` × `vector` columns. A lane
is a thread with its own running sums: it sees the same columns of every row of that width, whatever else is in the call, so the bits of a
row depend on nothing but the row. Another `lanes`, `depth` or `segment` gives other last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl

VECTOR_BYTES = 16  # the widest load of a thread
PROCESSORS_ON_HOST = 1  # programs of a persistent grid when the kernels are interpreted
ROWS_PER_PROCESSOR = 4  # with fewer rows than this the statistics split each row over programs: a program a row leaves processors idle


@dataclass(frozen=True)
class RowTiles:
    """How one program reduces (a segment of) a row."""

    warps: int
    lanes: int  # threads of the program: 32 · warps, so that a lane's sums never leave its thread before the end of the segment
    depth: int  # vectors that each lane has in flight, and as many again that it loads ahead
    segment: int  # columns; a multiple of lanes · depth · vector
    registers: int | None = None  # a thread may take; None leaves it to ptxas


@dataclass(frozen=True)
class Block:
    """How one program walks over columns that do not depend on each other."""

    warps: int
    columns: int


@dataclass(frozen=True)
class Pairs:
    """How one program compares some rollouts with all rollouts."""

    warps: int
    rows: int  # of its own
    columns: int  # of the others, a step


# By the bytes of a logit, here and below. Two vectors a lane and two ahead need few enough registers for several programs a processor.
STATISTICS = {2: RowTiles(8, 256, 2, 16384), 4: RowTiles(8, 256, 2, 16384)}
MANY_REGISTERS = 128  # of statistics with a keep set or the rarer sums: left alone, ptxas takes fewer and spills
# One row a processor is in flight (it has to stay in L2 until it is read again), so that one program must keep the memory busy alone; and
# its lanes run over the whole row, because every merge of segments makes all warps wait. 16 warps may take 128 registers a thread (ptxas,
# left alone, aims at 64). Four vectors of 16-bit logits at a time would not fit into them.
POLICY = {2: RowTiles(16, 512, 2, 1 << 30, 128), 4: RowTiles(16, 512, 2, 1 << 30, 128)}
POLICY_GRADIENT = 8192  # columns a step of the way back
GRADIENT = {2: Block(8, 8192), 4: Block(8, 4096)}
BIAS = Block(4, 1024)
BIAS_ROWS = 256  # rows summed by one program; the sums of the programs are added in order
KEEP = Block(4, 512)  # entries of a row's keep set, a step
ROWS = Block(4, 128)  # rows, where a kernel has one number a row
LENGTHS = Block(4, 1024)  # tokens of a sequence, and lengths of sequences, a step
LENGTHS_PART = 4096  # tokens that one program counts where there are no sequences
OBJECTIVE = Block(4, 512)  # rows whose terms one program adds up
METRICS = Block(4, 128)  # sums of such programs, a step
ADVANTAGES = Pairs(4, 8, 128)  # eight pairs a thread; few rollouts a program, so that a batch of 512 occupies 64 processors
KEEP_LANES = 128  # entries of a row's keep set that the statistics read at a time

# Arguments of the kernels that are never compiled in, not even as "divisible by 16" or "equal to 1": a new length, temperature
# or loss number must not cost a compilation. What is known about alignment is passed as VECTORS; of the bias, Triton may find out.
RUNTIME = (
    *("logits", "stride_a", "stride_b", "inner", "columns", "ids", "mask", "temperatures", "crow", "col"),
    *("factor", "scale", "softcap", "inv_softcap", "id_offset", "total", "flags", "rows", "stats", "stats_stride", "partial", "segments"),
    *("upstream", "upstream_stride", "given", "out", "out_stride_a", "out_stride_b", "values", "bias_values", "bias_grad", "blocks"),
    *("loss", "loss_stride", "present", "loss_kind", "kl_kind", "correction", "row_scale", "low", "high", "log_delta", "beta"),
    *("entropy_coef", "self_certainty_coef", "ratio_cap", "tau_pos", "tau_neg", "rollout_cap", "rollout_floor"),
    *("advantages", "cu_seqlens", "old_logp", "ref_logp", "rollout_logp", "denominator", "number", "weighing", "lengths", "sequences"),
    *(
        "token_denominator",
        "token_number",
        "means",
        "alive",
        "which",
        "steps",
        "live",
        "counts",
        "logp",
        "entropy",
        "self_certainty",
        "metrics",
    ),
    *("rewards", "group_ids", "eps_bits"),
)


class Constant(tl.constexpr):
    """A global that kernels use. Before every launch Triton compares each with what it was when the kernel was compiled, and the comparison
    of its own class makes objects: for thirty constants a third of the launch's time on the host."""

    def __ne__(self, other: Any) -> Any:
        return self.value != other.value if isinstance(other, Constant) else super().__ne__(other)


class Launch(NamedTuple):
    """A kernel with everything it is called with. `arguments` decide what it is compiled for."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int
    registers: int | None = None

    def options(self) -> dict[str, Any]:
        # Products and sums are fused only where the kernels say so: left to the compiler, the bits of a row would depend on the kernel.
        options = {"num_warps": self.warps, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def run(self) -> None:
        self.kernel[(self.grid,)](**self.arguments, **self.options())


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_ON_HOST
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_rows(rows: int, columns: int, tiles: RowTiles, device: torch.device) -> bool:
    """Whether the statistics take a program a segment, and a second kernel that merges, instead of a program a row."""
    return columns > tiles.segment and rows < ROWS_PER_PROCESSOR * processors(device)


def vector(itemsize: int) -> int:
    return VECTOR_BYTES // itemsize


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every row of these (A, B, V) tensors starts on a vector boundary."""
    for tensor in tensors:
        strides = [stride for size, stride in zip(tensor.shape[:2], tensor.stride()[:2], strict=True) if size > 1]
        if any(n * tensor.element_size() % VECTOR_BYTES for n in strides) or tensor.data_ptr() % VECTOR_BYTES:
            return False
    return True
