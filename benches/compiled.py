"""The Triton kernels as the host functions would launch them, compiled ahead of time: no GPU is needed.

`python -m benches.compiled` counts what the innermost loops of the kernels over rows execute for each logit, and how long a GPU is busy
issuing it, beside how long its memory is busy: a kernel whose first number comes near the second will not reach the memory's speed.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

ROWS, COLUMNS = 8192, 151936
LANES_PER_CLOCK = 128  # of a multiprocessor: four schedulers, a warp's instruction each
TRANSCENDENTAL = "MUFU.EX2"  # one for each logit, and a few for each step of a lane


def signature_of(argument: Any) -> str:
    """The type that Triton compiles a runtime argument for; None is compiled in."""
    if argument is None:
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64", "int32": "i32", "int64": "i64", "bool": "i1"}
        return "*" + short[str(argument.dtype).removeprefix("torch.")]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(2**31) <= argument < 2**31 else "i64"


def specialisation(launch: Any) -> tuple:
    """What decides the binary: module, kernel, signature, what is compiled in, arguments that are known to be aligned, options."""
    kernel, compiled_in = launch.kernel, {p.name for p in launch.kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in compiled_in else signature_of(launch.arguments[name]) for name in kernel.arg_names}
    constants = {name: launch.arguments[name] for name, kind in signature.items() if kind == "constexpr"}
    specialised = [i for i, p in enumerate(kernel.params) if not p.is_constexpr and not p.do_not_specialize]
    tensors = [i for i in specialised if isinstance(launch.arguments[kernel.arg_names[i]], torch.Tensor)]
    return kernel.fn.__module__, kernel.fn.__name__, signature, constants, tensors, launch.options()


def binary_of(entry: tuple, architecture: int) -> Any:
    """Triton's compiled kernel of a specialisation for sm_`architecture`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, signature, constants, aligned, options = entry
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(getattr(importlib.import_module(module), name), signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def cuobjdump(binary: Any, *options: str) -> str:
    """What the tool that Triton brings says of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def innermost_loops(sass: str) -> list[list[str]]:
    """The instructions of each loop that has no other in it."""
    code = [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    at = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= address and int(target[1], 16) in at:
            loops.append((at[int(target[1], 16)], i))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return [[text for _, text in code[a : b + 1]] for a, b in inner]


def hot_loop(sass: str, elements: int, writes: bool) -> tuple[float, dict[str, int]]:
    """Instructions a logit, and how many of which, of the shortest loop over at least `elements` logits a lane that writes or does not.
    What a row without −inf runs through: the loops beside it are for the others."""
    loops = [loop for loop in innermost_loops(sass) if sum(TRANSCENDENTAL in text for text in loop) >= elements]
    loops = [loop for loop in loops if any("STG" in text for text in loop) == writes]
    loop = min(loops, key=len)
    names = collections.Counter(re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in loop)
    return len(loop) / elements, dict(names.most_common())


def hot_launches() -> list[tuple[str, Any, int, bool]]:
    """(what, launch, logits that a lane takes in one step of its loop, whether that writes), each of the design's shape."""
    from urlvr_fast.kernels import policy_loss_from_logits, targets, token_stats

    from urlvr_fast.ops.layout import LOSS_LINES, STATS, Stat

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    logits, ids = meta(1, ROWS, COLUMNS, dtype=torch.bfloat16), meta(ROWS, dtype=torch.int64)
    rows = token_stats.row_arguments(logits, None, ids, None, None, None, None, 1.0, 0.0, 1.0, 0, COLUMNS)
    stats, loss = meta(STATS, ROWS), meta(LOSS_LINES, ROWS)
    tile = targets.STATISTICS[2]
    found = []
    wanted: dict[str, int] = {}
    for name in ("logp", "entropy", "self_certainty"):
        wanted[name] = 1 << Stat[name.upper()]
        (launch,) = token_stats.plan_statistics(rows, sum(wanted.values()), stats)
        found.append((f"statistics, {' + '.join(wanted)}", launch, tile.depth * targets.vector(2), False))
    numbers = [0.8, 1.28, float("inf"), 0.0, 0.01, 0.0, 5.0, 1.0, 1.05, 3.0, 0.0]
    flags = wanted["logp"] | wanted["entropy"]
    (launch,) = policy_loss_from_logits.plan_policy(rows, flags, loss, 0, 1, 0, 0, numbers, stats, logits, None)
    found.append(("policy loss, first pass", launch, targets.POLICY[2].depth * targets.vector(2), False))
    found.append(("policy loss, way back", launch, targets.POLICY_GRADIENT // (32 * targets.POLICY[2].warps), True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benches.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", type=int, default=90, help="sm_… (default %(default)s)")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the GPU (default %(default)s, as H100 and H200)")
    parser.add_argument("--gigahertz", type=float, default=1.98, help="its clock (default %(default)s)")
    parser.add_argument("--bandwidth", type=float, default=4300, help="of a copy, GB/s, read and write together (default %(default)s)")
    options = parser.parse_args()
    logits = ROWS * COLUMNS
    per_instruction = logits / (options.multiprocessors * LANES_PER_CLOCK * options.gigahertz * 1e9) * 1e3
    print(f"{ROWS} × {COLUMNS} bf16; an instruction a logit is {per_instruction:.4f} ms")
    for what, launch, elements, writes in hot_launches():
        binary = binary_of(specialisation(launch), options.architecture)
        each, names = hot_loop(cuobjdump(binary, "-sass"), elements, writes)
        memory = logits * 2 / options.bandwidth / 1e6  # read here, or written
        counts = ", ".join(f"{name} {count}" for name, count in list(names.items())[:9])
        registers = re.search(r"\bREG:(\d+)", cuobjdump(binary, "--dump-resource-usage"))
        print(
            f"{what:44} {each:5.1f} instructions a logit = {each * per_instruction:.3f} ms beside {memory:.3f} ms of memory "
            f"({each * per_instruction / memory:.0%}), {registers[1] if registers else '?'} registers | of {elements}: {counts}"
        )


if __name__ == "__main__":
    main()
