"""`python -m benches`: measure, print the table, write benches/results/<device>-<date>-<commit>.json.

Without arguments the shapes that the design sets numbers for and a few around them, some minutes on two cores; `--full` measures
everything that fits into memory, which takes hours where a peer is slow; `--grid` looks for a cliff: two measures of everybody at 25 shapes
from 1 row to 32768 and 1024 columns to 262144. What `--only` or `--providers` select is written only with `--out`. With `--out` the file is
written after every scenario: a run that is killed leaves what it had.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from benches import grid, memory, policy_loss_from_logits, table, token_stats
from benches.data import DTYPES, Rows, Scenario, available_memory, memory_needed
from benches.gpu_check import FOUND_WRONG, UNCHECKED
from benches.machine import describe, write
from benches.measure import HOT_BELOW, Case, Limits, Stopwatch, Unusable, floors, interleave
from benches.peers import Provider, providers

OPS = (token_stats, policy_loss_from_logits)
LEAST_LEFT = 15.0  # seconds of the budget without which the command does not begin anew
ROUNDS = {"cpu": 25, "cuda": 50}
SHAPES = ((1, 151936), (3, 151936), (64, 32000), (512, 32000), (64, 151936), (512, 151936), (2048, 151936), (8192, 32000), (8192, 151936))
GRID_ROWS, GRID_COLUMNS = (1, 32, 1024, 8192, 32768), (1024, 32000, 128256, 151936, 262144)
GRID = sorted((Scenario(rows, columns) for rows in GRID_ROWS for columns in GRID_COLUMNS), key=lambda s: s.rows * s.columns)
GRID_MEASURES = ("forward, logp", "forward, logp + entropy", "forward, logp + entropy + SC", policy_loss_from_logits.IN_PLACE)
FULL = [
    Scenario(rows, columns, dtype, data, masked)
    for rows, columns in SHAPES
    for dtype in ("bf16", "fp32")
    for data in ("random", "peaked")
    for masked in ((0.0, 0.4) if rows > 3 else (0.0,))
]
EVERYBODY, NOT_COMPILED, OURS = "everybody", "all but torch.compile", "ours"
# (scenario, who is measured without --full): compiling takes longer than what is compiled, and slow peers are slower still on more rows.
CHOSEN = {
    "cpu": (
        (Scenario(512, 151936), EVERYBODY),
        (Scenario(1, 151936), NOT_COMPILED),
        (Scenario(3, 151936), NOT_COMPILED),
        (Scenario(64, 32000), EVERYBODY),
        (Scenario(64, 32000, "fp32"), NOT_COMPILED),
        (Scenario(512, 151936, "fp32"), OURS),
        (Scenario(512, 151936, "bf16", "peaked", 0.4), OURS),
        (Scenario(8192, 151936), OURS),
    ),
    "cuda": (
        (Scenario(8192, 151936), EVERYBODY),
        (Scenario(512, 151936), NOT_COMPILED),
        (Scenario(1, 151936), NOT_COMPILED),
        (Scenario(3, 151936), NOT_COMPILED),
        (Scenario(64, 32000), NOT_COMPILED),
        (Scenario(8192, 32000), NOT_COMPILED),
        (Scenario(8192, 151936, "fp32"), OURS),
        (Scenario(8192, 151936, "bf16", "peaked", 0.4), NOT_COMPILED),
    ),
}


def left_out(scenario: Scenario, device: torch.device) -> str:
    """Why a scenario is not measured; "" where it is."""
    needed, free = memory_needed(scenario), available_memory(device)
    return "" if needed < 0.9 * free else f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def _not_chosen(who: str, provider: Provider, first: Provider) -> str:
    """Why a provider is not measured in a scenario; "" where it is."""
    chosen = provider is first if who == OURS else who == EVERYBODY or provider.name != "torch.compile"
    return "" if chosen else "measured with --full"


def _too_large(case: Case, provider: Provider, scenario: Scenario, device: torch.device) -> str:
    per_logit = provider.per_logit[case.prepare is not None]
    needed, free = memory_needed(scenario, per_logit) - scenario.logit_bytes, available_memory(device)  # the logits are there by now
    return "" if needed < 0.9 * free else f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


def run_scenario(
    scenario: Scenario, who: str, taking_part: Sequence[Provider], device: torch.device, limits: Limits, measures: Sequence[str] = ()
) -> dict:
    """measures: only these; all where there are none."""
    torch._dynamo.reset()  # every scenario compiles anew: a full cache would quietly fall back to eager
    absent = {p.name: _not_chosen(who, p, taking_part[0]) for p in taking_part}
    here = {p.name: p for p in taking_part if not absent[p.name]}
    rows = Rows(scenario, device)
    cases = [case for op in OPS for case in op.cases(rows, list(here.values())) if not measures or case.measure in measures]
    for case in cases:
        case.absent = _too_large(case, here[case.provider], scenario, device)
    # Where time is short the last to begin are absent: first what is to be measured, then peers, last who compiles for long.
    cases.sort(key=lambda case: (case.provider == "torch.compile", not here[case.provider].ours, case.provider == "urlvr_fast torch"))
    cases = floors(rows.logits, rows.destination) + cases
    cold = device.type == "cuda" or scenario.logit_bytes >= HOT_BELOW
    interleave(cases, Stopwatch(device, cold), limits)
    result = {
        "scenario": vars(scenario),
        "cold": cold,
        "cases": [_record(case) for case in cases],
        "absent": {name: reason for name, reason in absent.items() if reason},
    }
    del rows, cases
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def _record(case: Case) -> dict:
    return {
        "measure": case.measure,
        "provider": case.provider,
        "bytes": case.bytes,
        "threads": case.threads,
        "calls_per_sample": case.calls,
        "warm_up_s": round(case.warmed_up, 3),
        "samples_ms": [float(f"{sample:.5g}") for sample in case.samples],
        **({} if math.isnan(case.host_ms) else {"host_ms": float(f"{case.host_ms:.4g}")}),
        "errors": case.errors,
        "targets": [vars(target) for target in case.targets],
        "absent": case.absent,
    }


def run(
    scenarios: Sequence[tuple[Scenario, str]],
    chosen: Sequence[Provider],
    device: torch.device,
    limits: Limits,
    with_memory: bool,
    budget: float = math.inf,
    measures: Sequence[str] = (),
    without: Mapping[str, str] | None = None,
) -> Iterator[dict]:
    """The result so far, after each scenario and at the end. Each scenario may take as much of the `budget` as those after it. `without`:
    providers that are left out, and why."""
    started = time.time()
    without = without or {}
    missing = {p.name: without[p.name] if p.name in without else p.absent(device) for p in chosen}
    there = [p for p in chosen if not missing[p.name]]
    result = {
        "machine": describe(device),
        "kind": device.type,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "limits": {"rounds": limits.rounds, "seconds": limits.seconds},
        "providers": [{"name": p.name, "package": p.package, "version": p.version(), "absent": missing[p.name]} for p in chosen],
        "scenarios": [],
        "skipped": [],
        "memory": [],
    }
    for number, (scenario, who) in enumerate(scenarios, 1):
        left = budget - (time.time() - started)
        reason = left_out(scenario, device) or ("the --budget was spent" if left <= 0 else "")
        print(f"[{number}/{len(scenarios)}] {scenario}{f': left out, {reason}' if reason else ''}", file=sys.stderr, flush=True)
        if reason:
            result["skipped"].append({"scenario": vars(scenario), "reason": reason})
        else:
            # The first is the one that matters, and everybody compiles in it.
            share = left / (len(scenarios) - number + 1) if number > 1 or measures else left / 2
            within = Limits.within(limits.rounds, limits.seconds, share)
            result["scenarios"].append(run_scenario(scenario, who, there, device, within, measures))
            yield result
    if with_memory:
        for provider in [p for p in there if p.ours]:
            result["memory"].append(memory.in_fresh_process(Scenario(512, 151936), provider.name.split()[-1]))
    result["seconds"] = round(time.time() - started)
    yield result


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every shape, dtype, data and mask, all peers")
    parser.add_argument("--grid", action="store_true", help="a few measures at many shapes")
    parser.add_argument("--only", action="append", metavar="N,V[,dtype[,data[,masked]]]", help="this scenario; may be repeated")
    parser.add_argument("--providers", metavar="A,B", help="only providers whose name contains one of these")
    left_out = {"action": "append", "default": [], "metavar": "NAME[: REASON]"}
    parser.add_argument("--without", **left_out, help="leave this provider out; may be repeated")
    parser.add_argument("--broke", **left_out, help="the same, because it broke the GPU before: if it is ours, that is a wrong result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help=f"rounds of a scenario (default {ROUNDS['cpu']} on a CPU, {ROUNDS['cuda']} on a GPU)")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="for each case of a scenario (default %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="for the whole command (default: no limit)")
    parser.add_argument("--no-memory", action="store_true", help="do not count memory")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser.parse_args(arguments)


def _scenario(text: str) -> Scenario:
    rows, columns, *rest = text.split(",")
    dtype, data, masked = (*rest, *("bf16", "random", "0")[len(rest) :])
    if dtype not in DTYPES or data not in ("random", "peaked"):
        raise SystemExit(f"--only {text}: dtype is one of {', '.join(DTYPES)}, data is random or peaked")
    return Scenario(int(rows), int(columns), dtype, data, float(masked))


def main(arguments: Sequence[str] | None = None) -> int:
    given, begin = list(sys.argv[1:] if arguments is None else arguments), time.monotonic()
    options = _parse(given)
    device = torch.device(options.device)
    chosen = providers()
    if options.providers:
        chosen = [p for p in chosen if any(part in p.name for part in options.providers.split(","))]
    scenarios = [(s, EVERYBODY) for s in FULL] if options.full else list(CHOSEN[device.type])
    if options.only:
        scenarios = [(_scenario(text), EVERYBODY) for text in options.only]
    if options.grid:
        chosen = [p for p in chosen if p.name != "torch.compile"]  # it compiles for longer at each shape than all others measure
        scenarios = scenarios if options.only else [(scenario, EVERYBODY) for scenario in GRID]
    limits = Limits(options.rounds or ROUNDS[device.type], options.seconds)
    with_memory, measures = not (options.no_memory or options.grid), GRID_MEASURES if options.grid else ()
    prefix, result = table.GRID if options.grid else "", {}
    without = {name: reason or "as asked" for name, _, reason in (entry.partition(": ") for entry in options.without + options.broke)}
    status = FOUND_WRONG if any(entry.startswith(table.OWN) for entry in options.broke) else 0
    try:
        for result in run(scenarios, chosen, device, limits, with_memory, options.budget, measures, without):
            if options.out:
                write(result, prefix, device, options.out, wanted=True)
    except Unusable as error:
        left = options.budget - (time.monotonic() - begin)
        if not error.case.provider or left < LEAST_LEFT:
            print(error, file=sys.stderr, flush=True)
            return FOUND_WRONG if error.case.provider.startswith(table.OWN) else UNCHECKED
        print(f"{error}; once more without it", file=sys.stderr, flush=True)
        again = ["--broke", f"{error.case.provider}: {error.case.absent}", "--budget", str(left)]
        os.execv(sys.executable, [sys.executable, "-m", "benches", *given, *again])
    print(grid.text(result) if options.grid else table.text(result))
    if not options.out:
        write(result, prefix, device, None, wanted=not (options.only or options.providers))
    return status


if __name__ == "__main__":
    sys.exit(main())
