"""`python -m benches.linear`: losses from hidden states against the bare products, against peers, and their memory.

Time: forward and backward of `linear_policy_loss` against three products of the same size with their outputs preallocated, in the faster of
fp32 and bf16; with half of the rows dead; `linear_token_stats` without grad against one product; and peers (`benches/linear_peers.py`) on
the same loss, the on-policy DAPO loss. Memory: the most that torch held at once beyond the gradients themselves, from 1 k to 32 k rows,
ours and eager's; on a GPU also what each of the timed calls held.

Errors are against float64: the largest difference of statistics on 16 rows, ‖Δ‖/‖g‖ of dX on these rows and of dW on 16 columns of the
vocabulary, half of them sampled tokens.

The result goes to benches/results/linear-<device>-<date>-<commit>.json, and to --out after each part: on a GPU what is ours first, then
everybody, then the memory. A peer that leaves the GPU unusable is left out, and the command begins anew.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches import exact, linear_table
from benches.data import DTYPES, available_memory
from benches.gpu_check import FOUND_WRONG, UNCHECKED
from benches.linear_peers import Peer, eager, peers
from benches.linear_table import ADVANTAGES_1, HALF, NO_GRAD, OURS, OWN, PRODUCT, PRODUCTS, SAME, SMALLER
from benches.machine import describe, write
from benches.measure import Case, Limits, Stopwatch, Unusable, interleave
from benches.memory import Allocated

SHAPES = {"cpu": (1024, 1024, 50257), "cuda": (8192, 4096, 151936)}
DEFAULT_DTYPES = {"cpu": "fp32,bf16", "cuda": "bf16"}
CHUNK_BYTES = {"cpu": (256 << 20,), "cuda": (3 << 30, 3 << 29)}  # the second is that of SMALLER
SEQUENCE = {"cpu": 128, "cuda": 1024}  # tokens of a sequence, which have one advantage: some take nothing else
MEMORY_ROWS, MEMORY_WIDTH, MEMORY_CHUNK = (1024, 2048, 4096, 8192, 16384, 32768), 128, 64 << 20
EAGER_COPIES = 4  # of the fp32 logits that eager holds at its worst, for the decision what fits
CHECKED, BLOCK = 16, 8192  # rows and columns that are compared; columns of float64 logits at a time
LEFT_OUT = "left out: "


@dataclass
class Problem:
    """Hidden states (N, H), an lm_head (V, H), the sampled tokens and an advantage for each, equal within a sequence."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    sequences: int

    @staticmethod
    def of(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Problem:
        n, h, v = shape
        g = torch.Generator(device).manual_seed(0)
        here = {"generator": g, "device": device}
        hidden = torch.randn(n, h, **here).to(dtype)
        weight = (torch.randn(v, h, **here) * (3 / math.sqrt(h))).to(dtype)
        ids = torch.randint(v, (n,), **here)
        sequences = max(1, n // SEQUENCE[device.type])
        advantages = torch.randn(sequences, **here).repeat_interleave(n // sequences)
        return Problem(hidden.requires_grad_(), weight.requires_grad_(), ids, advantages, sequences)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    # The float64 values of some rows and columns. Neither the weight nor the logits are ever there in float64 as a whole.

    @functools.cached_property
    def rows(self) -> Tensor:
        return torch.linspace(0, len(self.ids) - 1, CHECKED, device=self.ids.device).long()

    @functools.cached_property
    def columns(self) -> Tensor:
        spread = torch.arange(CHECKED // 2, device=self.ids.device) * (len(self.weight) // (CHECKED // 2))
        return torch.cat([self.ids[self.rows[: CHECKED // 2]], spread]).unique()

    @functools.cached_property
    def logits(self) -> Tensor:
        """(rows, V)."""
        rows = self.hidden.detach()[self.rows].double()
        return torch.cat([rows @ block.double().T for block in self.weight.detach().split(BLOCK)], 1)

    @functools.cached_property
    def lse(self) -> Tensor:
        """(N,)."""
        hidden = self.hidden.detach().double()
        parts = [(hidden @ block.double().T).logsumexp(1) for block in self.weight.detach().split(BLOCK)]
        return torch.stack(parts).logsumexp(0)

    def statistics_errors(self, values: Mapping[str, Tensor | None]) -> dict[str, float]:
        expected = exact.statistics(self.logits, self.ids[self.rows])
        return {
            name: float((value[self.rows].double() - expected[name]).abs().max()) for name, value in values.items() if value is not None
        }

    def gradient_errors(self, d_hidden: Tensor, d_weight: Tensor, advantages: Tensor) -> dict[str, float]:
        """Of the on-policy loss with these advantages (N,)."""
        factor = -advantages.double()[:, None] / len(self.ids)  # of the gradient of logp
        d_logits = -self.logits.softmax(1)
        d_logits.scatter_add_(1, self.ids[self.rows, None], torch.ones_like(d_logits[:, :1]))
        blocks = zip(d_logits.split(BLOCK, 1), self.weight.detach().split(BLOCK), strict=True)
        exact_rows = factor[self.rows] * sum(part @ block.double() for part, block in blocks)
        hidden = self.hidden.detach().double()
        p = (hidden @ self.weight.detach()[self.columns].double().T - self.lse[:, None]).exp()
        exact_columns = (factor * ((self.ids[:, None] == self.columns).double() - p)).T @ hidden
        pairs = {"dX": (d_hidden[self.rows], exact_rows), "dW": (d_weight[self.columns], exact_columns)}
        return {name: float((got.double() - want).norm() / want.norm()) for name, (got, want) in pairs.items()}


# ---- what is timed ---------------------------------------------------------------------------------------------------------------------


def _floors(dtype: str, problem: Callable[[], Problem]) -> list[Case]:
    """One product, and the three of logits, dX and dW, as a library makes them, into memory that is there: fp32 results of 16-bit operands
    where the device has those products, in the operands' dtype elsewhere."""

    @functools.cache
    def operands() -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = problem().hidden.detach(), problem().weight.detach()
        wide = torch.float32 if hidden.is_cuda else hidden.dtype
        return hidden, weight, torch.empty(len(hidden), len(weight), dtype=wide, device=hidden.device)

    def product(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)

    def one() -> Callable[[Any], Any]:
        hidden, weight, logits = operands()
        return lambda _: product(hidden, weight.t(), logits)

    def three() -> Callable[[Any], Any]:
        hidden, weight, logits = operands()
        d_logits = torch.randn(logits.shape, device=logits.device).to(hidden.dtype)
        d_hidden, d_weight = (torch.empty_like(x, dtype=logits.dtype) for x in (hidden, weight))

        def run(_: Any) -> None:
            product(hidden, weight.t(), logits)
            product(d_logits, weight, d_hidden)
            product(d_logits.t(), hidden, d_weight)

        return run

    return [Case(f"{PRODUCTS}, {dtype}", "", three, 0), Case(f"{PRODUCT}, {dtype}", "", one, 0)]


def _ours(problem: Problem, chunk_bytes: int, **options: Any) -> Tensor:
    from urlvr_fast import linear_policy_loss

    call = {"advantages": problem.advantages, "chunk_bytes": chunk_bytes, **options}
    return linear_policy_loss(problem.hidden, problem.weight, problem.ids, **call)[0]


def _backward_case(
    measure: str,
    provider: str,
    problem: Callable[[], Problem],
    load: Callable[[], Callable[[Problem], Tensor]],
    advantages: Callable[[Problem], Tensor] = lambda p: p.advantages,
    d_weight: Callable[[], Tensor] | None = None,
) -> Case:
    """Forward and backward, gradients included, from a fresh start each time. `advantages` is what the errors are computed with, `d_weight`
    where the gradient of the weight goes if not to its `.grad`."""

    def loaded() -> Callable[[Any], Any]:
        run, p = load(), problem()
        if d_weight is not None:
            d_weight().zero_()

        def step(_: Any) -> None:
            p.clear()
            run(p).backward()

        return step

    def check(_: Any) -> dict[str, float]:
        p = problem()
        return p.gradient_errors(p.hidden.grad, p.weight.grad if d_weight is None else d_weight(), advantages(p))

    return Case(measure, provider, loaded, 0, check=check)


def _forward_case(measure: str, provider: str, problem: Callable[[], Problem], load: Callable[[], Callable]) -> Case:
    """Statistics without gradients, by name."""

    def loaded() -> Callable[[Any], Any]:
        run, p = load(), problem()
        return torch.no_grad()(lambda _: run(p))

    return Case(measure, provider, loaded, 0, check=lambda values: problem().statistics_errors(values))


def _dead(problem: Problem) -> Tensor:
    return torch.arange(len(problem.ids), device=problem.ids.device) % 2 == 0


def _own_cases(dtype: str, problem: Callable[[], Problem], buffer: Callable[[], Tensor], chunks: Sequence[int]) -> list[Case]:
    def half(p: Problem) -> Tensor:
        live = torch.arange(1, len(p.ids), 2)
        return _ours(p, chunks[0], grad_weight_out=buffer(), mask=~_dead(p), live=live)

    def counted(p: Problem) -> Tensor:  # the mean is over the rows that count
        return torch.where(_dead(p), 0, p.advantages) * (len(p.ids) / (len(p.ids) // 2))

    def statistics(p: Problem) -> dict[str, Tensor]:
        from urlvr_fast import linear_token_stats

        stats = linear_token_stats(p.hidden, p.weight, p.ids, outputs=("logp", "entropy", "self_certainty"), chunk_bytes=chunks[0])
        return {"logp": stats.logp, "entropy": stats.entropy, "self_certainty": stats.self_certainty}

    def preallocated(chunk: int) -> Callable[[Problem], Tensor]:  # outputs preallocated, as those of the products
        return lambda p: _ours(p, chunk, grad_weight_out=buffer())

    out = [
        _backward_case(f"{measure}, {dtype}", OWN, problem, functools.partial(preallocated, chunk), d_weight=buffer)
        for measure, chunk in zip((OURS, SMALLER), chunks, strict=False)
    ]
    out.append(_backward_case(f"{HALF}, {dtype}", OWN, problem, lambda: half, counted, d_weight=buffer))
    return [*out, _forward_case(f"{NO_GRAD}, {dtype}", OWN, problem, lambda: statistics)]


def _peer_cases(dtype: str, problem: Callable[[], Problem], peer: Peer) -> list[Case]:
    def statistics() -> Callable[[Problem], dict[str, Tensor | None]]:
        tokens = peer.tokens()
        return lambda p: dict(zip(("logp", "entropy"), tokens(p, True), strict=True))

    ones = (lambda p: torch.ones_like(p.advantages)) if peer.mean else (lambda p: p.advantages)
    out = [_backward_case(f"{ADVANTAGES_1 if peer.mean else SAME}, {dtype}", peer.name, problem, peer.training, ones)]
    return out + ([_forward_case(f"{NO_GRAD}, {dtype}", peer.name, problem, statistics)] if peer.tokens is not None else [])


def cases(problems: Mapping[str, Callable[[], Problem]], device: torch.device, chunks: Sequence[int], chosen: Sequence[Peer]) -> list[Case]:
    """All of every dtype: the products, ours, and the peers."""
    first = next(iter(problems.values()))
    buffer = functools.cache(lambda: torch.zeros(first().weight.shape, device=device))
    found = []
    for dtype, problem in problems.items():
        found += [*_floors(dtype, problem), *_own_cases(dtype, problem, buffer, chunks)]
        if device.type == "cuda":  # with the outputs of the peers
            found.append(_backward_case(f"{SAME}, {dtype}", OWN, problem, lambda: lambda p: _ours(p, chunks[0])))
        for peer in chosen:
            mine = _peer_cases(dtype, problem, peer)
            for case in mine:
                case.absent = peer.absent(device)
            found += mine
    return found


def _records(found: Sequence[Case], peaks: Mapping[tuple[str, str], int]) -> list[dict]:
    out = []
    for case in found:
        samples = [float(f"{sample:.5g}") for sample in case.samples]
        entry: dict[str, Any] = {"measure": case.measure, "provider": case.provider, "samples_ms": samples, "absent": case.absent}
        entry |= {"errors": case.errors} if case.errors else {}
        peak = peaks.get((case.measure, case.provider))
        out.append(entry | ({} if peak is None else {"peak_bytes": peak}))
    return out


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- memory ----------------------------------------------------------------------------------------------------------------------------


def _peaks(found: Sequence[Case], problems: Mapping[str, Callable[[], Problem]]) -> dict[tuple[str, str], int]:
    """Bytes that a call on a GPU held at most beyond its inputs and preallocated outputs: gradients, what it returned, and all between."""
    out = {}
    for case in found:
        step = case.load()
        problems[case.measure.rsplit(", ", 1)[1]]().clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with contextlib.suppress(RuntimeError):  # it has run before: out of memory, then, and no reason to lose the times
            step(None)
            out[case.measure, case.provider] = torch.cuda.max_memory_allocated() - before
    return out


def memory(
    rows: Sequence[int], width: int, columns: int, chunk_bytes: int, device: torch.device, dtypes: Sequence[str], until: float = math.inf
) -> Iterator[dict]:
    """The most that torch held beyond the inputs and the gradients (dX in the hidden states' dtype, dW in fp32), in bytes."""
    for n in rows:
        for dtype in dtypes:
            for name, run in ((OWN, lambda p: _ours(p, chunk_bytes)), ("torch eager", eager)):
                entry: dict[str, Any] = {"rows": n, "dtype": dtype, "provider": name, "chunk_bytes": chunk_bytes}
                needed = EAGER_COPIES * n * columns * 4
                if name == "torch eager" and needed > 0.6 * available_memory(device):
                    yield entry | {"absent": f"needs about {needed / 2**30:.0f} GiB"}
                    continue
                if time.monotonic() > until:
                    yield entry | {"absent": "the --budget was spent"}
                    continue
                problem = Problem.of((n, width, columns), DTYPES[dtype], device)
                gradients = problem.hidden.nbytes + problem.weight.numel() * 4
                try:
                    held = _held(problem, run, device)
                except torch.OutOfMemoryError:
                    yield entry | {"absent": "out of memory"}
                    continue
                yield entry | {"extra_bytes": held - gradients}
                del problem
                _free(device)
                print(f"memory, {n} rows, {dtype}, {name}: {(held - gradients) / 2**20:.0f} MiB", file=sys.stderr, flush=True)


def _held(problem: Problem, run: Callable[[Problem], Tensor], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(problem).backward()
        return torch.cuda.max_memory_allocated() - before
    with Allocated() as allocated:
        run(problem).backward()
    return allocated.value


# ---- the command -----------------------------------------------------------------------------------------------------------------------


def run(
    shape: tuple[int, int, int],
    device: torch.device,
    dtypes: Sequence[str],
    chosen: Sequence[Peer],
    rounds: int,
    seconds: float,
    chunks: Sequence[int],
    memory_of: tuple[Sequence[int], int, int, int],
    budget: float = math.inf,
) -> Iterator[dict]:
    """The result so far, after each part."""
    begin = time.monotonic()
    limits = Limits.within(rounds, seconds, budget)
    result: dict[str, Any] = {
        "benchmark": "linear",
        "machine": describe(device),
        "kind": device.type,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": shape,
        "chunk_bytes": chunks[0],
        "packages": {peer.package: peer.version() for peer in chosen},
        "times": [],
        "memory_width": memory_of[1],
        "memory": [],
    }
    for part in ([], chosen) if device.type == "cuda" and chosen else (chosen,):
        problems = {dtype: functools.cache(functools.partial(Problem.of, shape, DTYPES[dtype], device)) for dtype in dtypes}
        found = cases(problems, device, chunks, part)
        timed = [replace(case) for case in found]
        interleave(timed, Stopwatch(device, cold=True), limits)
        again = [c for c, measured in zip(found, timed, strict=True) if measured.samples and c.provider and device.type == "cuda"]
        before = {(entry["measure"], entry["provider"]): entry for entry in result["times"]}
        now = _records(timed, _peaks(again, problems))
        result["times"] = [e if e["samples_ms"] else before.get((e["measure"], e["provider"]), e) for e in now]
        del problems, found, timed, again
        _free(device)
        yield result
    result["memory"] = list(memory(*memory_of, device, dtypes, begin + budget))
    yield result


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benches.linear", description=__doc__, formatter_class=style)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, for tests; nothing is written without --out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each measure (default %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="for the whole command (default: no limit)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", help=f"default: {DEFAULT_DTYPES['cpu']} on a CPU, {DEFAULT_DTYPES['cuda']} on a GPU")
    parser.add_argument("--peers", default="", metavar="A,B", help="only peers whose name contains one of these")
    parser.add_argument("--without", action="append", default=[], metavar="NAME[: REASON]", help="leave this peer out; may be repeated")
    parser.add_argument("--compile", action="store_true", help="torch.compile on a CPU too, which takes it minutes")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser.parse_args(arguments)


def _chosen(options: argparse.Namespace, device: torch.device) -> list[Peer]:
    without = dict(entry.partition(": ")[::2] for entry in options.without)
    found = [peer for peer in peers(options.compile or device.type == "cuda") if any(p in peer.name for p in options.peers.split(","))]
    return [replace(peer, needs=LEFT_OUT + (without[peer.name] or "as asked")) if peer.name in without else peer for peer in found]


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, begin = _parse(given), time.monotonic()
    device = torch.device(options.device)
    dtypes = (options.dtypes or DEFAULT_DTYPES[device.type]).split(",")
    shape = (256, 32, 501) if options.quick else SHAPES[device.type]
    memory_of = ((2048, 4096), 16, 501, 2 << 20) if options.quick else (MEMORY_ROWS, MEMORY_WIDTH, shape[2], MEMORY_CHUNK)
    chosen, chunks, result = _chosen(options, device), CHUNK_BYTES[device.type], None
    try:
        for result in run(shape, device, dtypes, chosen, options.rounds, options.seconds, chunks, memory_of, options.budget):
            if options.out:
                write(result, linear_table.LINEAR, device, options.out, wanted=True)
    except Unusable as error:
        print(error, file=sys.stderr, flush=True)
        if error.case.provider not in ("", OWN):
            left = options.budget - (time.monotonic() - begin)
            again = ["--without", f"{error.case.provider}: {error.case.absent}", "--budget", str(left)]
            os.execv(sys.executable, [sys.executable, "-m", "benches.linear", *given, *again])
        return FOUND_WRONG if error.case.provider == OWN else UNCHECKED
    print(linear_table.text(result))
    if not options.out:
        write(result, linear_table.LINEAR, device, None, wanted=not options.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
