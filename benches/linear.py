"""`python -m benches.linear`: losses from hidden states against the bare products, against peers, and their memory.

Time: forward and backward of `linear_policy_loss` against three products of the same size with their outputs preallocated, in the faster of
fp32 and bf16; with half of the rows dead; `linear_token_stats` without grad against one product; and peers on the same loss, the on-policy
DAPO loss. Memory: the most that torch held at once beyond the gradients themselves, from 1 k to 32 k rows, ours and eager's.

The result goes to benches/results/linear-<device>-<date>-<commit>.json.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches import linear_table
from benches.data import DTYPES, available_memory
from benches.linear_table import HALF, NO_GRAD, OURS, PRODUCT, PRODUCTS
from benches.machine import describe, write
from benches.measure import Case, Limits, Stopwatch, interleave
from benches.memory import Allocated

SHAPES = {"cpu": (1024, 1024, 50257), "cuda": (8192, 4096, 151936)}
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 3 << 30}
MEMORY_ROWS, MEMORY_WIDTH, MEMORY_CHUNK = (1024, 2048, 4096, 8192, 16384, 32768), 128, 64 << 20
EAGER_COPIES = 4  # of the fp32 logits that eager holds at its worst, for the decision what fits


@dataclass
class Problem:
    """Hidden states (N, H), an lm_head (V, H), the sampled tokens and an advantage for each."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor

    @staticmethod
    def of(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
        n, h, v = shape
        g = torch.Generator(device).manual_seed(0)
        here = {"generator": g, "device": device}
        hidden = torch.randn(n, h, **here).to(dtype)
        weight = (torch.randn(v, h, **here) * (3 / math.sqrt(h))).to(dtype)
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,), **here), torch.randn(n, **here))

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def _products(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Callable[[Any], Any]]:
    """Logits, dX and dW as a library makes them, into memory that is there: fp32 results of 16-bit operands where the device has those
    products, in the operands' dtype elsewhere."""

    def load() -> Callable[[Any], Any]:
        problem = Problem.of(shape, dtype, device)
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        wide = torch.float32 if device.type == "cuda" else dtype
        n, h, v = shape
        logits, d_logits = torch.empty(n, v, dtype=wide, device=device), torch.randn(n, v, device=device).to(dtype)
        d_hidden, d_weight = torch.empty(n, h, dtype=wide, device=device), torch.empty(v, h, dtype=wide, device=device)

        def product(a: Tensor, b: Tensor, out: Tensor) -> None:
            torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)

        def run(_: Any) -> None:
            product(hidden, weight.t(), logits)
            product(d_logits, weight, d_hidden)
            product(d_logits.t(), hidden, d_weight)

        return run

    return load


def _one_product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], Callable[[Any], Any]]:
    def load() -> Callable[[Any], Any]:
        problem = Problem.of(shape, dtype, device)
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        wide = torch.float32 if device.type == "cuda" else dtype
        out = torch.empty(shape[0], shape[2], dtype=wide, device=device)
        if wide == dtype:
            return lambda _: torch.mm(hidden, weight.t(), out=out)
        return lambda _: torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)

    return load


def _ours(problem: Problem, chunk_bytes: int, **options: Any) -> Tensor:
    from urlvr_fast import linear_policy_loss

    call = {"advantages": problem.advantages, "chunk_bytes": chunk_bytes, **options}
    return linear_policy_loss(problem.hidden, problem.weight, problem.ids, **call)[0]


def _eager(problem: Problem) -> Tensor:
    logits = (problem.hidden @ problem.weight.T).float()
    logp = logits.log_softmax(-1).gather(1, problem.ids[:, None])[:, 0]
    return -(torch.exp(logp - logp.detach()) * problem.advantages).mean()


def _liger(problem: Problem) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", chunk_size=1)
    n = len(problem.ids)
    sequences = max(1, n // 128)
    hidden = problem.hidden.view(sequences, n // sequences, -1)
    ids = problem.ids.view(sequences, -1)
    mask = torch.ones_like(ids)
    advantages = problem.advantages.view(sequences, -1)[:, 0]  # Liger takes one a sequence, which costs the same
    return loss(hidden, problem.weight, ids, mask, advantages)[0]


def _backward_case(measure: str, provider: str, shape: tuple[int, int, int], dtype: str, device: torch.device, run: Callable) -> Case:
    """Forward and backward, gradients included, from a fresh start each time."""

    def load() -> Callable[[Any], Any]:
        problem = Problem.of(shape, DTYPES[dtype], device)

        def step(_: Any) -> None:
            problem.clear()
            run(problem).backward()

        return step

    return Case(f"{measure}, {dtype}", provider, load, 0)


def cases(shape: tuple[int, int, int], device: torch.device, chunk_bytes: int) -> list[Case]:
    found = []
    for dtype in ("fp32", "bf16"):
        found.append(Case(f"{PRODUCTS}, {dtype}", "", _products(shape, DTYPES[dtype], device), 0))
        found.append(Case(f"{PRODUCT}, {dtype}", "", _one_product(shape, DTYPES[dtype], device), 0))
        buffer = torch.zeros(shape[2], shape[1], device=device)

        def plain(problem: Problem, buffer: Tensor = buffer) -> Tensor:
            return _ours(problem, chunk_bytes, grad_weight_out=buffer)  # outputs preallocated, as those of the products

        def half(problem: Problem, buffer: Tensor = buffer) -> Tensor:
            dead = torch.arange(len(problem.ids), device=device) % 2 == 0
            live = torch.arange(1, len(problem.ids), 2)
            return _ours(problem, chunk_bytes, grad_weight_out=buffer, mask=~dead, live=live)

        def statistics(dtype: str = dtype) -> Callable[[Any], Any]:
            from urlvr_fast import linear_token_stats

            problem, outputs = Problem.of(shape, DTYPES[dtype], device), ("logp", "entropy", "self_certainty")
            call = {"outputs": outputs, "chunk_bytes": chunk_bytes}
            return torch.no_grad()(lambda _: linear_token_stats(problem.hidden, problem.weight, problem.ids, **call))

        found.append(_backward_case(OURS, "urlvr_fast", shape, dtype, device, plain))
        found.append(_backward_case(HALF, "urlvr_fast", shape, dtype, device, half))
        found.append(Case(f"{NO_GRAD}, {dtype}", "urlvr_fast", statistics, 0))
        found.append(_backward_case("the same loss", "torch eager", shape, dtype, device, _eager))
        found.append(_backward_case("the same loss", "Liger chunked GRPO", shape, dtype, device, _liger))
    return found


def _medians(found: Sequence[Case]) -> dict[tuple[str, str], dict]:
    out = {}
    for case in found:
        entry: dict[str, Any] = {"samples_ms": [float(f"{sample:.5g}") for sample in case.samples], "absent": case.absent}
        out[case.measure, case.provider] = entry
    return out


def memory(rows: Sequence[int], width: int, columns: int, chunk_bytes: int, device: torch.device) -> list[dict]:
    """The most that torch held beyond the inputs and the gradients (dX in the hidden states' dtype, dW in fp32), in bytes."""
    found = []
    for n in rows:
        for dtype in ("fp32", "bf16"):
            for name, run in (("urlvr_fast", lambda p: _ours(p, chunk_bytes)), ("torch eager", _eager)):
                entry: dict[str, Any] = {"rows": n, "dtype": dtype, "provider": name, "chunk_bytes": chunk_bytes}
                needed = EAGER_COPIES * n * columns * 4
                if name == "torch eager" and needed > 0.6 * available_memory(device):
                    found.append(entry | {"absent": f"needs about {needed / 2**30:.0f} GiB"})
                    continue
                problem = Problem.of((n, width, columns), DTYPES[dtype], device)
                gradients = problem.hidden.nbytes + problem.weight.numel() * 4
                held = _held(problem, run, device)
                found.append(entry | {"extra_bytes": held - gradients})
                del problem
                gc.collect()
                print(f"memory, {n} rows, {dtype}, {name}: {(held - gradients) / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    return found


def _held(problem: Problem, run: Callable[[Problem], Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(problem).backward()
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as allocated:
        run(problem).backward()
    return allocated.value


def run(
    shape: tuple[int, int, int], device: torch.device, limits: Limits, chunk_bytes: int, memory_of: tuple[Sequence[int], int, int, int]
) -> dict:
    found = cases(shape, device, chunk_bytes)
    interleave(found, Stopwatch(device, cold=True), limits)
    times = [{"measure": m, "provider": p, **entry} for (m, p), entry in _medians(found).items()]
    del found
    gc.collect()
    return {
        "benchmark": "linear",
        "machine": describe(device),
        "kind": device.type,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": shape,
        "chunk_bytes": chunk_bytes,
        "times": times,
        "memory_width": memory_of[1],
        "memory": memory(*memory_of, device),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benches.linear", description=__doc__, formatter_class=style)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests; nothing is written without --out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each measure (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    shape = (256, 32, 501) if options.quick else SHAPES[device.type]
    memory_of = ((2048, 4096), 16, 501, 2 << 20) if options.quick else (MEMORY_ROWS, MEMORY_WIDTH, shape[2], MEMORY_CHUNK)
    result = run(shape, device, Limits(options.rounds, options.seconds), CHUNK_BYTES[device.type], memory_of)
    print(linear_table.text(result))
    write(result, linear_table.LINEAR, device, options.out, wanted=not options.quick)


if __name__ == "__main__":
    main()
