"""What the hardware counted while a kernel ran: the bytes it moved beside those it cannot do without, and what else may hold it up.

`python -m benches.gpu_check.counters --out FILE.json --seconds 40` starts itself under Nsight Compute (`ncu`) and profiles one launch of
each memory-bound row of the design: statistics, their gradient in place, and a policy loss with its gradient in place, on 8192 × 151936
bf16 logits, by Triton and by CUDA C++. Exit status: 0 where all rows were read, 1 where some were not, 2 where no counter could be read,
with the reason.

ncu runs a kernel once for every few counters, from cold caches and with the same memory each time. Its time is no benchmark; its bytes are
exact. What a kernel leaves in the L2 when it ends is not among the bytes written: about a hundredth of such a tensor. Clocks are left as
they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benches.data import Rows, Scenario
from benches.gpu_check.sanitized import find_tool, finish, kernel_names
from benches.machine import write_whole
from urlvr_fast.ops.backend import available_backends, kernels
from urlvr_fast.ops.layout import GRADS, LOSS_KINDS, LOSS_LINES, STATS, Stat, Weighing
from urlvr_fast.ops.layout import METRICS as LOSS_METRICS
from urlvr_fast.ops.spec import RowSpec

FORWARD, BACKWARD, POLICY = "token_stats forward", "its backward, in place", "policy loss, forward + backward in place"
AROUND = (
    "lengths_kernel",
    "loss_rows_kernel",
    "join_kernel",
    "objective_kernel",
    "metrics_kernel",
)  # vectors of N numbers before and after the logits
# The bytes of the logits that a row must read and write, and the kernels that it may consist of: no other row has them.
ROWS = {
    FORWARD: (1, 0, ("statistics_kernel", "segments_kernel", "merge_kernel")),
    BACKWARD: (1, 1, ("gradient_kernel",)),
    POLICY: (1, 1, ("policy_kernel", "cluster_kernel", "twice_kernel", "upstream_kernel", "scale_kernel", *AROUND)),
}
METRICS = {
    "seconds": "gpu__time_duration.sum",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "xu": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",  # exponentials
    "fma": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "alu": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "lsu": "sm__inst_executed_pipe_lsu.avg.pct_of_peak_sustained_active",
    "l2_sectors": "lts__t_sectors_srcunit_tex.sum",
    "l2_hits": "lts__t_sectors_srcunit_tex_lookup_hit.sum",
    "waiting_for_memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "clock": "sm__cycles_elapsed.avg.per_second",
    "registers": "launch__registers_per_thread",
    "shared": "launch__shared_mem_per_block",
    "block": "launch__block_size",
    "grid": "launch__grid_size",
    "waves": "launch__waves_per_multiprocessor",
}
PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "n": 1e-9, "u": 1e-6, "m": 1e-3}


# ---- the child -------------------------------------------------------------------------------------------------------------------------


def calls(backend: str, rows: Rows) -> dict[str, Callable[[], None]]:
    """The rows of a backend. Gradients take the place of the logits, in memory that the caller fills before each call."""
    n, v = rows.logits.shape
    package, device, memory = kernels(backend), rows.device, rows.destination().view(1, n, v)
    wanted = frozenset(("logp", "entropy", "self_certainty"))
    spec, policy = RowSpec(wanted, ids=rows.ids, backend=backend), RowSpec(frozenset(("logp", "entropy")), ids=rows.ids, backend=backend)
    stats, row_scale = torch.zeros(STATS, n, device=device), None
    upstream, loss = torch.randn(GRADS, n, device=device), torch.empty(LOSS_LINES, n, device=device)
    metrics = torch.empty(LOSS_METRICS, device=device)
    live, counts, advantages = torch.empty(n, dtype=torch.bool, device=device), torch.empty(2, device=device), rows.advantages.float()
    numbers = [0.8, 1.28, math.inf, 0.0, 0.0, 0.0, 5.0, 1.0, 1.05, 3.0, 0.0]
    one = torch.ones((), device=device)

    def forward() -> None:
        package.statistics(memory, None, *spec.arguments(v), spec.flags, stats)

    def backward() -> None:
        given = 1 << Stat.LOGP | 1 << Stat.ENTROPY | 1 << Stat.SELF_CERTAINTY
        package.gradient(memory, None, *spec.arguments(v), spec.flags, stats, upstream, given, memory, None)

    def policy_loss() -> None:
        kinds, of_policy = (0, LOSS_KINDS["dapo"], 0, 0, numbers), torch.empty_like(stats)
        package.loss_rows(advantages, None, None, None, None, None, None, 1.0, None, 1.0, int(Weighing.COUNTED), loss, live, counts)
        package.policy(memory, None, *policy.arguments(v), policy.flags, loss, *kinds, of_policy, memory, row_scale)
        package.objective(of_policy[Stat.LOGP], of_policy[Stat.ENTROPY], None, loss, live, counts, *kinds, metrics, None)
        package.scale(memory, one, row_scale)

    return {FORWARD: forward, BACKWARD: backward, POLICY: policy_loss}


def run(backends: Sequence[str], scenario: Scenario, until: float, report: Path) -> None:
    """Each row twice, once to be compiled and once to be profiled. No row begins after `until`: ncu writes nothing before it comes to an
    end. `report` says which came through."""
    rows = Rows(scenario, torch.device("cuda"))
    done: list[dict[str, str]] = []
    for backend in backends:
        for name, call in calls(backend, rows).items():
            entry = {"backend": backend, "row": name, "error": ""}
            done.append(entry)
            try:
                if time.time() > until:
                    raise TimeoutError("the seconds were over before; give it more with --seconds")
                rows.overwritable()
                call()
                rows.overwritable()
                torch.cuda.synchronize()
                with torch.cuda.profiler.profile():
                    call()
                    torch.cuda.synchronize()
            except Exception as error:  # noqa: BLE001 (the other rows are worth having)
                entry["error"] = f"{type(error).__name__}: {error}"[:500]
            report.write_text(json.dumps(done))


# ---- the parent ------------------------------------------------------------------------------------------------------------------------


def _number(value: str, unit: str) -> float | None:
    """In bytes, seconds, hertz or whatever the unit is without its prefix."""
    try:
        number = float(value.replace(",", ""))
    except ValueError:
        return None
    base = re.fullmatch(r"([KMGTnum]?)(byte|s|second|hz|Hz)((?:/.*)?)", unit)
    return number * PREFIXES.get(base[1], 1.0) if base else number


def parse_csv(log: str) -> list[dict[str, Any]]:
    """The launches in ncu's raw page, in their order: one row each, below a row of names and a row of units."""
    lines = list(csv.reader(line for line in log.splitlines() if line.startswith('"')))
    head = next((i for i, line in enumerate(lines) if line[0] == "ID"), None)
    if head is None or len(lines) < head + 2:
        return []
    names, units = lines[head : head + 2]
    launches = []
    for line in lines[head + 2 :]:
        values = {name: (value, unit) for name, value, unit in zip(names, line, units, strict=False)}
        found = {short: _number(*values[metric]) for short, metric in METRICS.items() if metric in values}
        launches.append({"kernel": values["Kernel Name"][0], **found})
    return launches


def by_row(launches: list[dict[str, Any]], entries: list[dict[str, str]], size: int) -> list[dict[str, Any]]:
    """Launches handed out to the rows, and what a row as a whole moved beside its floor. C++ names its namespace, Triton has none."""
    out = []
    for entry in entries:
        read, written, names = ROWS[entry["row"]]
        of_backend = [one for one in launches if ("urlvr::cuda::" in one["kernel"]) == (entry["backend"] == "cuda")]
        mine = [one for one in of_backend if any(name in one["kernel"] for name in names)]
        found: dict[str, Any] = {**entry, "kernels": mine, "floor_read": read * size, "floor_written": written * size}
        if not mine:
            found["error"] = entry["error"] or "ncu has no launch of it"
        total = {key: sum(one.get(key) or 0.0 for one in mine) for key in ("seconds", "read", "written")}
        found |= total | {"bandwidth": (total["read"] + total["written"]) / total["seconds"] if total["seconds"] else 0.0}
        out.append(found)
    return out


def reason_of(log: str, printed: str, status: int | None) -> str:
    """Why there are no counters, and what to do about it."""
    both = log + printed
    if "ERR_NVGPUCTRPERM" in both:
        return (
            "no permission for the counters (ERR_NVGPUCTRPERM): run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
        )
    if "LibraryNotLoaded" in both:
        return "ncu cannot reach the counters here (LibraryNotLoaded): such virtual machines do not let it in; try another one"
    if status is None:
        return "ended: the seconds were over; give it more with --seconds"
    said = re.findall(r"(?m)^==ERROR==.*", both) or [line for line in both.splitlines() if line.strip()][-3:]
    return f"exit status {status}: " + " | ".join(said)[-600:]


def profile(ncu: str, metrics: Sequence[str], options: Sequence[str], report: Path, seconds: float) -> tuple[str, str, int | None]:
    """What ncu wrote, what was printed beside it, and its exit status."""
    log = report.with_suffix(".csv")
    names = "|".join(kernel_names(("cuda", "triton")))
    command = [ncu, "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--target-processes", "application-only", "--kernel-name", f"regex:.*({names}).*", "--launch-count", "100"]
    command += ["--metrics", ",".join(metrics), "--log-file", str(log)]
    command += [sys.executable, "-m", "benches.gpu_check.counters", "--run", "--out", str(report), *options]
    command += ["--until", str(time.time() + 0.7 * seconds)]
    status, printed = finish(command, seconds, dict(os.environ))
    return log.read_text(errors="replace") if log.exists() else "", printed, status


def check(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"check": "counters", "reason": "", "rows": [], "scenario": f"{args.rows} × {args.columns} bf16"}
    available, ncu = available_backends(), find_tool("ncu")
    backends = [name for name in args.backends.split(",") if available.get(name) == "available"]
    left_out = {name: available.get(name, "unknown") for name in args.backends.split(",") if name not in backends}
    if not torch.cuda.is_available():
        result["reason"] = "there is no CUDA GPU that torch can use: nvidia-smi must name one, and torch be a CUDA build"
    elif ncu is None:
        result["reason"] = (
            "ncu is neither on the PATH nor under /usr/local/cuda*/bin or /opt/nvidia: install Nsight Compute, or add its folder"
        )
    elif not backends:
        result["reason"] = f"no backend to look at: {left_out}"
    else:
        options = ["--backends", ",".join(backends), "--rows", str(args.rows), "--columns", str(args.columns)]
        metrics = list(METRICS.values())
        end = time.time() + args.seconds
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "rows.json"
            log, printed, status = profile(ncu, metrics, options, report, end - time.time())
            complaints = "\n".join(re.findall(r".*[Ff]ailed to find metric.*", log + printed))
            unknown = [metric for metric in metrics if metric in complaints]
            if unknown and not parse_csv(log):  # one name that this version or chip does not have must not cost all the others
                metrics = [metric for metric in metrics if metric not in unknown]
                log, printed, status = profile(ncu, metrics, options, report, end - time.time())
            entries: list[dict[str, str]] = []
            with suppress(OSError, ValueError):
                entries = json.loads(report.read_text())
        launches = parse_csv(log)
        result |= {"metrics": metrics, "launches": launches, "log": "" if launches else (log + printed)[-4000:]}
        result["rows"] = by_row(launches, entries, args.rows * args.columns * 2)
        if not launches:
            result["reason"] = reason_of(log, printed, status)
    result["rows"] += [{"backend": name, "row": row, "kernels": [], "error": why} for name, why in left_out.items() for row in ROWS]
    write_whole(args.out, result)
    return result


def exit_status(result: dict[str, Any]) -> int:
    if result["reason"]:
        return 2
    return int(any(row["error"] for row in result["rows"]))


def text(result: dict[str, Any]) -> str:
    """Bytes in units of the floor; the rest of each row's longest kernel. XU, FMA, ALU, LSU: how busy these pipes were."""
    heads = ("ms", "read", "written", "TB/s", "DRAM", "occup.", "issue", "XU", "FMA", "ALU", "LSU", "L2 hits", "regs", "KB")
    lines = [f"{result['scenario']}: bytes over the floor's, % of peak", f"{'':50}" + "".join(f"{head:>8}" for head in heads)]
    for row in result["rows"]:
        title = f"{row['backend']}: {row['row']}"
        if row["error"]:
            lines.append(f"{title:50}  {row['error']}")
            continue
        one = max(row["kernels"], key=lambda kernel: kernel.get("seconds") or 0.0)
        hits = 100 * one["l2_hits"] / one["l2_sectors"] if one.get("l2_hits") is not None and one.get("l2_sectors") else None
        shared = None if one.get("shared") is None else one["shared"] / 1e3
        over = [row[name] / row[f"floor_{name}"] if row[f"floor_{name}"] else None for name in ("read", "written")]
        percents = [one.get(name) for name in ("dram", "occupancy", "issue", "xu", "fma", "alu", "lsu")]
        cells = [(1e3 * row["seconds"], ".3f"), *((x, ".3f") for x in over), (row["bandwidth"] / 1e12, ".2f")]
        cells += [*((x, ".0f") for x in (*percents, hits, one.get("registers"), shared))]
        lines.append(f"{title:50}" + "".join(f"{'–' if x is None else format(x, digits):>8}" for x, digits in cells))
    if result["reason"]:
        lines.append(f"NOT READ: {result['reason']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check.counters", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON of all that was found")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--backends", default="triton,cuda")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=151936)
    parser.add_argument("--run", action="store_true", help="launch the kernels: what ncu looks at")
    parser.add_argument("--until", type=float, default=math.inf, help="with --run: seconds since the epoch after which no row begins")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.run:
        run(args.backends.split(","), Scenario(args.rows, args.columns), args.until, args.out)
        return 0
    result = check(args)
    print(text(result))
    return exit_status(result)


if __name__ == "__main__":
    sys.exit(main())
