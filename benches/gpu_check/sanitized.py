"""The kernels under compute-sanitizer: accesses beyond an allocation, races in shared memory, memory nobody wrote, broken barriers.

`python -m benches.gpu_check.sanitized --out FILE.json --seconds 60` makes the same small calls five times, each time in a process of its
own: once bare, where results are compared with float64 and the kernels that ran are listed, then under memcheck, racecheck, initcheck and
synccheck. Each has an equal share of the seconds that are left; beyond the first few, calls that do not fit are left out, and it is said
how many. Exit status: 0 where nothing was reported, 10 where a tool reported something or a result is wrong, 2 where a tool could not run
to its end, with the reason, or one that is known for false alarms reported something.

What the tools see is made for them:

* torch does not cache memory, so an allocation is what a call asked for, and memcheck puts padding behind each. Only the memory of logits
  ends at a multiple of 16 bytes: the kernels read blocks of 16 bytes of which one byte is a row's (`csrc/cuda/rows.cuh`).
* Only our kernels are instrumented (`--kernel-name` looks for a part of the mangled name). initcheck then knows of writes by our kernels
  and of copies, so nothing that we read may be written by a kernel of torch's: inputs come from the host, most outputs are not initialised
  at all, and the copy of an output back to the host is itself a check that all of it was written.
* Errors of the API are not asked for: our launches raise them, and torch makes harmless ones.

By their release notes, racecheck before 2026.1 has false alarms about barriers across a cluster, and synccheck about cooperative groups in
what nvcc 13.0 compiled: what they report is to be looked at.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benches.gpu_check import FOUND_WRONG, RIGHT, UNCHECKED
from benches.machine import write_whole
from urlvr_fast.ops import reference
from urlvr_fast.ops.backend import available_backends, kernels
from urlvr_fast.ops.layout import (
    ENTROPY_ON_KEEP,
    GRADS,
    HAS_CORRECTION,
    HAS_OLD,
    HAS_RATIO,
    HAS_REF,
    HAS_ROLLOUT,
    LOSS_LINES,
    METRICS,
    RAW,
    STATS,
    LossLine,
    Metric,
    Stat,
    Weighing,
)
from urlvr_fast.ops.packed_loss import kernel_kinds

ROOT = Path(__file__).resolve().parents[2]
TOOLS: dict[str, dict[str, str]] = {"memcheck": {"--padding": "256"}, "racecheck": {}, "initcheck": {}, "synccheck": {}}
BARE = "bare"
OPTIONS = {
    "--show-backtrace": "no",
    "--report-api-errors": "no",
    "--destroy-on-device-error": "kernel",  # so that one finding does not end the run
    "--print-limit": "20",
    "--target-processes": "application-only",
    "--launch-timeout": "60",  # until the process is found
}
OURS = re.compile(r"(\w+_kernel)(<[^(]*>)?")


# ---- what is called --------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
# Columns and (A, B), in the order of what they cover: clusters of several blocks and statistics by segments; a block to a row; one kernel
# after the other; more rows than the bias gradient has in shared memory; a cluster of one block; the shortest rows.
TOO_LONG = 1_000_003  # for a cluster of 8 blocks
LEAST = 14  # cases that take place however late it is: the first three shapes, with which every kernel has run
SHAPES = ((40_009, (1, 3)), (4099, (2, 3)), (TOO_LONG, (1, 2)), (270, (30, 5)), (17_001, (2, 2)), (7, (2, 3)), (1, (2, 3)))
GARBAGE = 768.0  # between rows; a number of every dtype
EVERYTHING = (1 << 9) - 1
LOSSES = [
    reference.LossOptions(name, beta=0.1, entropy_coef=0.02, self_certainty_coef=0.01, rollout_correction="truncate")
    for name in ("reinforce", "dapo", "cispo", "sapo")
]


GSPO = reference.LossOptions("gspo", rollout_correction="truncate")
ONE_TERM = Weighing.BY_SEQUENCES | Weighing.SEQUENCE_MEAN | Weighing.JOINED | Weighing.ONE_TERM


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    columns: int
    shape: tuple[int, int]
    general: bool  # not only a positive number times the logits
    full: bool  # with all options there are, on rows of any alignment; otherwise with as few as possible, on aligned rows

    def __str__(self) -> str:
        kind = ("general" if self.general else "plain") + (", all options" if self.full else "")
        return f"{self.shape[0]} × {self.shape[1]} × {self.columns} {str(self.dtype)[6:]}, {kind}"


def cases() -> Iterator[Case]:
    for full in (True, False):
        for (columns, shape), general, dtype in itertools.product(SHAPES, (False, True), DTYPES):
            if columns != TOO_LONG or (full and general == (dtype == torch.float32) and dtype != torch.float16):
                yield Case(dtype, columns, shape, general, full)


def placed(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> Tensor:
    """Rows with garbage between them, in memory that ends with the 16 bytes of the last element."""
    a, b, v = shape
    vector = 16 // dtype.itemsize
    stride = -(-v // vector) * vector + vector if aligned else v + 5
    offset = 0 if aligned else 3
    outer = b * stride + (0 if aligned else 1)
    last = offset + (a - 1) * outer + (b - 1) * stride + v
    return torch.full((-(-last // vector) * vector,), GARBAGE, dtype=dtype).as_strided(shape, (outer, stride, 1), offset)


def inputs_of(case: Case) -> dict[str, Any]:
    """Everything that the calls of a case read, on the host."""
    g = torch.Generator().manual_seed(case.columns)
    (a, b), v = case.shape, case.columns
    n = a * b
    logits = placed((a, b, v), case.dtype, not case.full)
    logits.copy_(torch.randn(a, b, v, generator=g) * 1.5)
    ids = torch.randint(v, (n,), generator=g)
    given: dict[str, Any] = dict.fromkeys(("bias", "mask", "temperatures", "crow", "col"))
    given |= {"logits": logits, "ids": ids, "temperature": 0.8, "softcap": 0.0, "scale": 1.1, "flags": EVERYTHING, "bias_grad": None}
    if case.full:
        kept = torch.rand(n, v, generator=g) < min(0.3, 200 / v)
        kept[torch.arange(n), ids] = True
        lengths = kept.sum(1).cumsum(0)
        given["crow"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths])
        given["col"] = kept.nonzero()[:, 1].contiguous()
        given |= {"mask": torch.arange(n) % 3 != 1, "temperatures": torch.linspace(0.6, 1.7, n), "temperature": 1.0}
    if case.general and case.full:
        given |= {"bias": torch.randn(v, generator=g), "softcap": 7.0, "bias_grad": torch.ones(v), "flags": EVERYTHING | ENTROPY_ON_KEEP}
    elif case.general:
        given["scale"] = -0.8
    lines = torch.randn(LOSS_LINES, n, generator=g) * 0.5
    lines[LossLine.WEIGHT : LossLine.REGULARISER + 1] = torch.rand(2, n, generator=g)
    lines[LossLine.OLD : LossLine.ROLLOUT + 1] -= math.log(v) + 1  # about what the log-probs are, so that ratios are ratios
    given |= {"loss": lines, "options": LOSSES[v % len(LOSSES)], "upstream": torch.randn(GRADS, n, generator=g), "half": torch.tensor(0.5)}
    given["factor"] = torch.tensor(1.25)
    given["out"] = placed((a, b, v), case.dtype, True) if case.full else None  # where there is none, the gradient takes the logits' place
    return given | loss_inputs_of(case, given["options"], g)


SEQUENCES = (0, 5, 0, 401, 190, 1, 0)  # their lengths: several blocks of rows; one sequence that is longer than a block
DIFFERENTIATED = [Stat.LOGP, Stat.ENTROPY, Stat.SELF_CERTAINTY]


def loss_inputs_of(case: Case, options: reference.LossOptions, g: torch.Generator) -> dict[str, Any]:
    """The rows of a policy loss, which have nothing to do with the logits: in full cases of sequences, with all that there may be;
    otherwise with what the loss cannot do without."""
    m = sum(SEQUENCES) if case.full else 3
    numbers = torch.rand(5, m, generator=g).unbind()
    given: dict[str, Any] = dict.fromkeys(("loss_mask", "cu_seqlens", "old_logp", "denominator"))
    given |= {"logp": -3 * numbers[0], "rollout_logp": -3 * numbers[1], "ref_logp": -3 * numbers[2]}
    given |= {"entropy": 5 * numbers[3], "self_certainty": numbers[3] + 1}
    given |= {"advantages": torch.randn(len(SEQUENCES) if case.full and case.general else m, generator=g)}
    mean = Weighing.SEQUENCE_MEAN if options.loss_type in reference.SEQUENCE_MEAN else Weighing(0)
    given["weighing"] = mean | Weighing.REGULARISED | (Weighing.PER_SEQUENCE if len(given["advantages"]) != m else Weighing(0))
    if case.full or mean:
        given["cu_seqlens"] = torch.tensor((0, *itertools.accumulate(SEQUENCES)) if case.full else (0, m))
    if case.full:
        given["loss_mask"] = (torch.rand(m + 3, generator=g) < 0.7)[3:]
        given["old_logp"] = -3 * numbers[4]
    if case.full and not case.general:
        given["denominator"] = torch.tensor(123.0)
    else:
        given["weighing"] |= Weighing.COUNTED | (Weighing.BY_SEQUENCES if mean else Weighing(0))
    return given


def call_all(package: Any, on: dict[str, Any], new: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Every function of a kernel package on these inputs, and what it wrote. `new` gives memory that nobody wrote."""
    names = ("logits", "bias", "ids", "mask", "temperatures", "crow", "col", "temperature", "softcap", "scale")
    logits, flags, (n, v) = on["logits"], on["flags"], (on["ids"].shape[0], on["logits"].shape[2])
    rows = (*(on[name] for name in names), 0, v)
    out: dict[str, Tensor] = {"stats": new(STATS, n), "sums": new(STATS, n), "policy_stats": new(STATS, n)}
    package.statistics(*rows, flags, out["stats"])
    package.statistics(*rows, flags | RAW, out["sums"])
    out["gradient"] = new(*logits.shape, dtype=logits.dtype)
    package.gradient(*rows, flags, out["stats"], on["upstream"], (1 << GRADS) - 1, out["gradient"], on["bias_grad"])
    if on["bias_grad"] is not None:
        out["bias_grad"] = on["bias_grad"]
    wanted = 1 << Stat.LOGP | 1 << Stat.ENTROPY | 1 << Stat.SELF_CERTAINTY
    row_scale = new(n) if logits.dtype == torch.float16 else None
    out["policy"] = logits if on["out"] is None else on["out"]
    kinds = kernel_kinds(on["options"], HAS_OLD | HAS_REF | HAS_ROLLOUT)
    package.policy(*rows, wanted, on["loss"], *kinds, out["policy_stats"], out["policy"], row_scale)
    package.scale(out["policy"], on["half"], row_scale)
    package.scale(out["policy"], on["factor"], None)
    if row_scale is not None:
        out["row_scale"] = row_scale
    if on["out"] is not None:
        package.gradient(*rows, flags, out["stats"], on["upstream"], (1 << GRADS) - 1, logits, None)
        out["gradient_in_place"] = logits
    return out | call_loss(package, on, new)


def call_loss(package: Any, on: dict[str, Any], new: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Those of the functions that take no logits."""
    m, optional = len(on["logp"]), {HAS_OLD: on["old_logp"], HAS_REF: on["ref_logp"], HAS_ROLLOUT: on["rollout_logp"]}
    present = sum(bit for bit, value in optional.items() if value is not None)
    packed = {"lines": new(LOSS_LINES, m), "live": new(m, dtype=torch.bool), "counts": new(2)}
    of_rows = (on["advantages"], on["loss_mask"], on["cu_seqlens"], *optional.values(), on["denominator"])
    package.loss_rows(*of_rows, 1.0, None, 1.0, int(on["weighing"]), *packed.values())
    out = {**packed, "metrics": new(METRICS), "row_gradients": new(GRADS, m)}
    arguments = (on["logp"], on["entropy"], on["self_certainty"], *packed.values(), *kernel_kinds(on["options"], present))
    package.objective(*arguments, out["metrics"], out["row_gradients"])
    out["metrics_alone"] = new(METRICS)
    package.objective(*arguments, out["metrics_alone"], None)
    if on["old_logp"] is None or on["cu_seqlens"] is None:
        return out
    joined = {"joined": new(LOSS_LINES, m), "joined_live": new(m, dtype=torch.bool), "joined_counts": new(2)}
    package.loss_rows(*of_rows, 1.0, on["denominator"], 1.0, int(on["weighing"] | ONE_TERM), *joined.values())
    kinds = kernel_kinds(GSPO, present | HAS_RATIO | HAS_CORRECTION)
    for which, product in ((joined["joined_live"], False), (None, True)):
        lines = new(LOSS_LINES, m)
        lines.copy_(joined["joined"])
        package.join(on["logp"], on["cu_seqlens"], which, kinds[0], kinds[1], kinds[3], product, kinds[4], lines)
        out["of_products" if product else "of_means"] = lines[LossLine.RATIO :]
    return out | joined


def memory_of(tensor: Tensor) -> Tensor:
    """All that a view is a view of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


def moved(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """The same view of converted memory."""
    if not isinstance(value, Tensor):
        return value
    return convert(memory_of(value)).as_strided(value.shape, value.stride(), value.storage_offset())


def on_device(case: Case, backend: str) -> dict[str, Tensor]:
    """What the kernels wrote, back on the host."""
    given = {name: moved(value, lambda memory: memory.to("cuda")) for name, value in inputs_of(case).items()}

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    return {name: moved(value, lambda memory: memory.cpu()) for name, value in call_all(kernels(backend), given, new).items()}


# ---- what it should be -----------------------------------------------------------------------------------------------------------------


class Exact(SimpleNamespace):
    """A kernel package in plain PyTorch. The loss is differentiated by autograd, from its definition."""

    def __init__(self, options: reference.LossOptions) -> None:
        plain = kernels("torch")
        super().__init__(options=options, statistics=plain.statistics, gradient=plain.gradient, scale=plain.scale)

    def policy(self, *arguments: Any) -> None:
        *rows, wanted, loss, present, _, _, _, _, stats, out, _ = arguments
        self.statistics(*rows, wanted, stats)
        counts = torch.ones(loss.shape[1], dtype=torch.bool) if rows[3] is None else rows[3]
        upstream = torch.zeros(GRADS, loss.shape[1], dtype=torch.float64)
        self._differentiate([stats[line] for line in DIFFERENTIATED], loss, counts, present, upstream)
        self.gradient(*rows, wanted, stats, upstream, wanted, out, None)

    def _differentiate(self, statistics: Sequence[Tensor], loss: Tensor, live: Tensor, present: int, upstream: Tensor) -> dict[str, Tensor]:
        """The loss and its metrics; its gradients by the statistics are written to `upstream`."""
        leaves = [value.clone().requires_grad_() for value in statistics]
        advantages, weight, regulariser, old, ref, rollout, _, _ = loss
        of = reference.LossRows(advantages, live, live, weight, regulariser, rollout_logp=rollout)
        if present & HAS_OLD:
            of.old_logp, of.log_rollout_weight = old, old - rollout
        if present & HAS_REF:
            of.ref_logp = ref
        value, metrics = reference.policy_objective(*leaves, of, self.options)
        upstream[DIFFERENTIATED] = torch.stack(torch.autograd.grad(value, leaves))
        return {"loss": value.detach(), **metrics}

    def loss_rows(self, *arguments: Any) -> None:
        advantages, mask, cu_seqlens, old, ref, rollout, denominator, _, token_denominator, _, weighing, lines, live, counts = arguments
        m, one_term = len(live), weighing & Weighing.ONE_TERM
        of = reference.loss_rows(
            replace(self.options, loss_type="gspo") if one_term else self.options,
            advantages=advantages,
            mask=torch.ones(m, dtype=torch.bool) if mask is None else mask,
            dtype=torch.float64,
            cu_seqlens=torch.tensor([0, m]) if cu_seqlens is None else cu_seqlens,
            denominator=denominator,
            token_denominator=token_denominator if token_denominator is not None else 1.0,
        )
        assert of.lengths is not None
        if one_term:
            share = of.lengths.reciprocal().masked_fill(of.lengths == 0, 0)[of.sequence]
            of.weight = share * of.sequence_weight
            if not weighing & Weighing.PER_SEQUENCE:
                of.advantages = of.sequence_sum(torch.where(of.mask, of.advantages, 0))[of.sequence] * share
        packed = (of.advantages, of.weight, of.regulariser_weight, old, ref, rollout, None, None)
        lines.copy_(torch.stack([torch.zeros(m, dtype=torch.float64) if line is None else line.expand(m) for line in packed]))
        live.copy_(of.live)
        counts.copy_(torch.stack([of.lengths.sum(), (of.lengths > 0).sum()]))

    def join(self, logp: Tensor, cu_seqlens: Tensor, which: Tensor | None, *arguments: Any) -> None:
        *_, product, _, lines = arguments
        cuts, old, rollout = cu_seqlens.tolist(), lines[LossLine.OLD], lines[LossLine.ROLLOUT]
        for rows in itertools.starmap(slice, itertools.pairwise(cuts)):
            chosen = torch.ones(rows.stop - rows.start, dtype=torch.bool) if which is None else which[rows]
            if not chosen.any():
                continue
            log_weight = (old - rollout)[rows][chosen]
            weight = log_weight.sum().exp() if product else log_weight.exp()
            lines[LossLine.RATIO, rows] = (logp - old)[rows][chosen].mean()
            lines[LossLine.CORRECTION, rows] = weight.clamp(max=GSPO.rollout_cap).mean()

    def objective(self, *arguments: Any) -> None:
        *statistics, lines, live, counts, present, _, _, _, _, metrics, upstream = arguments
        upstream = torch.empty(GRADS, len(live), dtype=torch.float64) if upstream is None else upstream
        upstream.zero_()
        found = self._differentiate(statistics, lines, live, present, upstream) | {"tokens": counts[0], "sequences": counts[1]}
        metrics.copy_(torch.stack([found.get(metric.name.lower(), torch.zeros(())).double() for metric in Metric]))


def exact(case: Case) -> dict[str, Tensor]:
    """The same in plain PyTorch and float64. 16-bit logits count as exact numbers."""
    given = inputs_of(case)

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full(shape, math.nan, dtype=torch.float64 if dtype.is_floating_point else dtype)

    return call_all(Exact(given["options"]), {name: wide(value) for name, value in given.items()}, new)


def _largest_x(given: dict[str, Any]) -> Tensor:
    temperature = given["temperature"] if given["temperatures"] is None else given["temperatures"].double()
    flat = given["logits"].reshape(-1, given["logits"].shape[2]).double()
    return reference.scaled_logits(flat, temperature, given["softcap"] or None, given["scale"], given["bias"]).abs().amax(-1)


def differences(case: Case, got: dict[str, Tensor]) -> list[str]:
    """What is further off than the design allows: statistics 2e-6 + 2 ulp, gradients 1e-5 in norm and 5e-3 in 16 bits, what is
    one number a row or a call about 1e-5. Consumes `got`."""
    given, want, found = inputs_of(case), exact(case), []
    live = torch.ones(len(given["ids"]), dtype=torch.bool) if given["mask"] is None else given["mask"]
    asked = {"stats": list(range(Stat.ARGMAX + 1)), "policy_stats": [Stat.LOGP, Stat.LSE, Stat.ENTROPY, Stat.SELF_CERTAINTY]}
    asked["sums"] = [i for i in range(STATS) if (i < 10 or case.full) and (i != 2 or not given["flags"] & ENTROPY_ON_KEEP)]
    for name, lines in asked.items():
        ours, theirs = got[name][lines].double(), want[name][lines]
        if name == "sums":  # up to V numbers of any size, relative to a maximum that is itself rounded
            ours, theirs, bound = ours[:, live], theirs[:, live], 1e-5 + 1e-5 * theirs[:, live].abs()
        else:
            size = torch.maximum(_largest_x(given), theirs.abs().nan_to_num(0))
            bound = 2e-6 + 2 * torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent - 24)
        wrong = ~((ours == theirs) | ((ours - theirs).abs() <= bound))
        if wrong.any():
            bad = sorted({lines[i] for i in wrong.nonzero()[:, 0].tolist()})
            found.append(f"{name}: lines {bad}, up to {(ours - theirs).abs()[wrong].max():.2g} off")
    bound = 1e-5 if case.dtype == torch.float32 else 5e-3
    for name in {"gradient", "gradient_in_place", "policy", "bias_grad"} & got.keys():
        ours, theirs = got[name].double(), want[name]
        error, size = float((ours - theirs).norm()), float(theirs.norm())
        allowed = (1e-5 if name == "bias_grad" else bound) * size + 2e-6 * len(live) ** 0.5  # of one column the gradient is 0
        if not error <= allowed:
            found.append(f"{name}: ‖Δ‖ = {error:.2g} where ‖g‖ = {size:.2g}")
        memory, view = memory_of(got[name]), got[name]
        if name in ("gradient_in_place", "policy"):
            view.fill_(GARBAGE)
            if not (memory == GARBAGE).all():
                found.append(f"{name}: what lies between the rows was written to")
    allowed_of = {"lines": (1e-6, 0.0), "live": (0.0, 0.0), "counts": (0.0, 0.0), "row_gradients": (2e-5, 1e-7)}
    allowed_of |= dict.fromkeys(("metrics", "metrics_alone"), (1e-5, 1e-5))
    if "joined" in got:
        allowed_of |= {"joined": (1e-6, 1e-6), "joined_live": (0.0, 0.0), "joined_counts": (0.0, 0.0)}
        allowed_of |= {"of_means": (1e-5, 1e-5), "of_products": (2e-4, 1e-5)}  # e to the sum of hundreds of numbers
    for name, (relative, absolute) in allowed_of.items():
        ours, theirs = got[name].double(), want[name].double()
        wrong = ~((ours - theirs).abs() <= relative * theirs.abs() + absolute)
        if wrong.any():
            found.append(f"{name}: {sorted(set(wrong.nonzero()[:, 0].tolist()))}, up to {(ours - theirs).abs()[wrong].max():.2g} off")
    if "row_scale" in got and not (got["row_scale"].log2() == got["row_scale"].log2().round()).all():
        found.append("row_scale: not a power of two")
    return found


# ---- the child -------------------------------------------------------------------------------------------------------------------------


def kernel_names(backends: Sequence[str]) -> dict[str, int]:
    """Every kernel in the sources and how many instances of it there are."""
    names: dict[str, int] = {}
    instances = {"class T, bool GENERAL": 6, "class T": 3, "class": 1}
    if "cuda" in backends:
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
            found = re.findall(r"template <([^>]*)>\s*ROW_KERNEL\([^)]*\)\s*(\w+)\(", path.read_text())
            names |= {name: instances[parameters] for parameters, name in found}
    if "triton" in backends:
        for path in sorted((ROOT / "kernels").glob("*.py")):
            names |= dict.fromkeys(re.findall(r"@triton\.jit[^\n]*\ndef (\w+_kernel)\(", path.read_text()), 1)
    return names


def _kernels_by_case(profiler: Any, names: dict[str, int]) -> dict[int, list[str]]:
    """A case ends with copies that wait for its kernels, so that a kernel began while the case was under way."""
    ranges, started = {}, []
    for event in profiler.events():
        ours = OURS.search(event.name.replace("urlvr::cuda::", ""))
        if event.name.startswith("case ") and event.device_type == torch.autograd.DeviceType.CPU:
            ranges[int(event.name.split()[1])] = event.time_range.start, event.time_range.end
        elif event.device_type == torch.autograd.DeviceType.CUDA and ours and ours[1] in names:
            started.append((event.time_range.start, ours[0]))
    return {i: sorted({name for at, name in started if a <= at <= b}) for i, (a, b) in ranges.items()}


def run(backends: list[str], until: float, bare: bool, report: Path) -> None:
    """All cases that fit before `until`; bare, their kernels are listed and their results compared with float64."""
    todo = [(case, backend) for case in cases() for backend in backends]
    found: dict[str, Any] = {"of": len(todo), "cases": 0, "kernels": {}, "compared": 0, "wrong": []}
    results = []
    with torch.profiler.profile() if bare else nullcontext() as profiler:
        for i, (case, backend) in enumerate(todo):
            if time.time() > until and i >= LEAST * len(backends):
                break
            with torch.profiler.record_function(f"case {i}") if bare else nullcontext():
                got = on_device(case, backend)
            results += [got] if bare else []
            found["cases"] = i + 1
            report.write_text(json.dumps(found))
    if profiler is not None:
        found["kernels"] = _kernels_by_case(profiler, kernel_names(backends))
    for (case, backend), got in zip(todo, results, strict=False):
        if time.time() > until:
            break
        found["wrong"] += [f"{backend}, {case}: {what}" for what in differences(case, got)]
        found["compared"] += 1
        report.write_text(json.dumps(found))


# ---- the parent ------------------------------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """The path of one of CUDA's programs, on the PATH or where toolkits put it, the newest first."""
    places = ("/usr/local/cuda*/bin", "/usr/local/cuda*/compute-sanitizer", "/opt/nvidia/*/*", "/opt/nvidia/*", "/opt/cuda/bin")
    there = [path for place in places for path in sorted(glob.glob(f"{place}/{name}"), reverse=True)]
    return shutil.which(name) or next((path for path in there if os.access(path, os.X_OK)), None)


def finish(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """The exit status of a command, None where it had to be ended with all that it started, and what it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(max(1.0, seconds))
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # a group of its own, and not waited for yet
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        printed.seek(0)
        return status, printed.read()


def known_options(usage: str, options: dict[str, str]) -> list[str]:
    """Those that this version has: an option that it does not know would end the run."""
    return [word for option, value in options.items() if option in usage or "--tool" not in usage for word in (option, value)]


def parse_log(log: str) -> dict[str, Any]:
    """What a tool found. `summary` is whether it came to its end; without one, reports are counted."""
    blocks = [block.strip() for block in re.split(r"(?m)^=========\s*$", log)]
    blocks = ["\n".join(line for line in block.splitlines() if line.startswith("=========")) for block in blocks]
    other = re.compile(r"(?m)^========= (?:COMPUTE-SANITIZER|.*SUMMARY: ).*\n?")
    reports = [block for block in (other.sub("", block).strip() for block in blocks) if block]
    count = re.search(r"(?m)^========= ERROR SUMMARY: ([\d,]+) errors?\s*$", log)
    hazards = re.search(r"(?m)^========= RACECHECK SUMMARY: .*\(([\d,]+) errors?, ([\d,]+) warnings?\)", log)
    numbers = [int(number.replace(",", "")) for match in (count, hazards) if match for number in match.groups()]
    return {
        "summary": bool(numbers),
        "errors": sum(numbers) if numbers else len(reports),
        "warnings": numbers[-1] if hazards else 0,
        "reports": [report[:2000] for report in reports[:5]],
    }


def _reason(log: str, printed: str, status: int | None) -> str:
    """Why a tool has not come to an end."""
    if status is None:
        return "ended: its share of the seconds was over; give it more with --seconds"
    if "Device not supported" in log + printed:
        return "compute-sanitizer refuses this device («Device not supported»): such virtual machines do not let it in; try another one"
    last = [line for line in (printed + "\n" + log).splitlines() if line.strip() and "SUMMARY" not in line][-3:]
    return f"exit status {status}: " + " | ".join(last)[-600:]


def under(tool: str, sanitizer: str | None, usage: str, backends: str, seconds: float, most: float, folder: Path) -> dict[str, Any]:
    """One run of all cases, under a tool or, without a sanitizer, bare. It is asked to end within `seconds` and ended after half as many
    again, or `most`."""
    begin, log, report = time.time(), folder / f"{tool}.log", folder / f"{tool}.json"
    command = [sys.executable, "-m", "benches.gpu_check.sanitized", "--run", "--out", str(report), "--backends", backends]
    command += ["--until", str(begin + 0.7 * seconds)]
    if sanitizer is None:
        command.append("--bare")
    else:
        wanted = "kns=urlvr", *(f"kns={name}" for name in kernel_names([b for b in backends.split(",") if b != "cuda"]))
        by_name = "--kernel-regex" if "--kernel-regex" in usage else "--kernel-name"  # the name until 2023.3
        options = known_options(usage, OPTIONS | TOOLS[tool]) + [word for part in wanted for word in (by_name, part)]
        command = [sanitizer, "--tool", tool, "--log-file", str(log), *options, *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    status, printed = finish(command, min(1.5 * seconds, most), environment)
    text = log.read_text(errors="replace") if log.exists() else ""
    found: dict[str, Any] = {"tool": tool, "ran": False, "reason": "", "seconds": time.time() - begin, "cases": 0, "of": 0}
    found |= {"kernels": [], "command": " ".join(command)}
    with suppress(OSError, ValueError):
        found |= json.loads(report.read_text())
    if sanitizer is None:
        fault = status not in (0, None) and "CUDA error" in printed
        wrong = [*found.pop("wrong", []), *([_reason("", printed, status)] if fault else [])]
        found |= {"errors": len(wrong), "reports": wrong[:20], "summary": status == 0}
    else:
        found |= parse_log(text)
    # A report that names a kernel counts even where the first call did not come back.
    began = found["cases"] > 0 or any("_kernel" in report for report in found["reports"])
    found["ran"] = began and (found["summary"] or found["errors"] > 0 or status is None)
    if not (found["ran"] and found["summary"]):
        found["reason"] = _reason(text, printed, status)
    elif found.get("compared", found["cases"]) < found["cases"]:
        found["reason"] = f"only {found['compared']} cases were compared: give it more with --seconds"
    if not found["ran"] and sanitizer is not None:
        found["errors"] = 0
    return found


def check(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, written after each of them."""
    end = time.time() + args.seconds
    result: dict[str, Any] = {"check": "sanitized", "backends": args.backends, "reason": "", "runs": []}
    sanitizer = find_tool("compute-sanitizer")
    reasons = {b: r for b, r in available_backends().items() if b in args.backends.split(",") and r != "available"}
    if not torch.cuda.is_available():
        result["reason"] = "there is no CUDA GPU that torch can use: nvidia-smi must name one, and torch be a CUDA build"
    elif reasons:
        result["reason"] = "; ".join(f"backend {name} is {reason}" for name, reason in reasons.items())
    elif sanitizer is None:
        result["reason"] = (
            "compute-sanitizer is neither on the PATH nor under /usr/local/cuda*/bin: install the CUDA toolkit's, or add its folder"
        )
    if result["reason"]:
        write_whole(args.out, result)
        return result
    assert sanitizer is not None
    _, usage = finish([sanitizer, "--help"], 20, dict(os.environ))
    _, result["version"] = finish([sanitizer, "--version"], 20, dict(os.environ))
    runs = [BARE, *TOOLS]
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(runs):
            left = end - time.time()
            found = under(name, None if name == BARE else sanitizer, usage, args.backends, left / (len(runs) - i), left, Path(folder))
            result["runs"].append(found)
            bare = result["runs"][0]["kernels"]
            seen = {kernel for case, ones in bare.items() if int(case) < found["cases"] for kernel in ones} if bare else set()
            found["kernels_seen"] = sorted(seen)
            write_whole(args.out, result)
    names = kernel_names(args.backends.split(","))
    if bare := result["runs"][0]["kernels_seen"]:
        result["never_launched"] = sorted(names.keys() - {kernel.partition("<")[0] for kernel in bare})
    if not any(found["ran"] for found in result["runs"][1:]):
        result["reason"] = "no tool could run: " + result["runs"][1]["reason"]
    write_whole(args.out, result)
    return result


def _doubtful(version: str) -> set[str]:
    """The tools of that version that are known for false alarms."""
    found = re.search(r"[Vv]ersion (\d+)\.(\d+)", version)
    return {"synccheck"} if found and (int(found[1]), int(found[2])) >= (2026, 1) else {"racecheck", "synccheck"}


def exit_status(result: dict[str, Any]) -> int:
    doubtful = _doubtful(result.get("version", ""))
    if any(found["errors"] for found in result["runs"] if found["tool"] not in doubtful):
        return FOUND_WRONG
    return UNCHECKED if result["reason"] or any(found["errors"] or found["reason"] for found in result["runs"]) else RIGHT


def text(result: dict[str, Any]) -> str:
    lines = [f"{'':12}{'errors':>8}{'cases':>12}{'kernels':>9}{'seconds':>9}"] if result["runs"] else []
    for found in result["runs"]:
        errors, done = found["errors"] if found["ran"] else "–", f"{found['cases']} of {found['of']}"
        numbers = f"{errors:>8}{done:>12}{len(found['kernels_seen']):>9}{found['seconds']:>9.1f}"
        lines.append(f"{found['tool']:12}{numbers}  {found['reason']}".rstrip())
        lines += [f"    {line}" for report in found["reports"][:3] for line in report.splitlines()[:8]]
    if result.get("never_launched"):
        lines.append(f"never launched: {', '.join(result['never_launched'])}")
    if result["reason"]:
        lines.append(f"NOT CHECKED: {result['reason']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check.sanitized", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of all that was found")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--backends", default="cuda", help="cuda, triton, or both with a comma")
    parser.add_argument("--run", action="store_true", help="launch the kernels: what the tools look at")
    parser.add_argument("--bare", action="store_true", help="with --run: compare with float64, list the kernels")
    parser.add_argument("--until", type=float, default=math.inf, help="with --run: seconds since the epoch after which no case begins")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.run:
        run(args.backends.split(","), args.until, args.bare, args.out)
        return 0
    result = check(args)
    print(text(result))
    return exit_status(result)


if __name__ == "__main__":
    sys.exit(main())
