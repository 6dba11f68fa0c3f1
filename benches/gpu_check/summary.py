"""The result of a check as one table: every number that the design asks of a GPU, and how the stages ended."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from benches import grid, linear_table, table

# Errors against float64 above which a result of ours is wrong, whatever the shape: of gradients in norm, of statistics as they stand.
LARGEST = {"gradient": 2e-2, "dX": 1e-2, "dW": 1e-2}
LARGEST_STATISTIC = 1e-4
BEGIN, END = "<!-- gpu-check:begin -->", "<!-- gpu-check:end -->"


def _loaded(result: dict, kind: str, folder: Path) -> dict | None:
    path = folder / result["stages"].get(kind, {}).get("file", "-")
    return json.loads(path.read_text()) if path.is_file() else None


def wrong_numbers(result: dict, folder: Path) -> list[str]:
    """Measured results of ours that are too far from float64."""
    cases = []
    for kind in ("ops", "grid"):
        for scenario in (_loaded(result, kind, folder) or {"scenarios": []})["scenarios"]:
            cases += [(f"{kind}, {scenario['scenario']['rows']} × {scenario['scenario']['columns']}", case) for case in scenario["cases"]]
    cases += [("linear", case) for case in (_loaded(result, "linear", folder) or {"times": []})["times"]]
    found = []
    for where, case in cases:
        if case["provider"].startswith("urlvr_fast"):
            too_far = {name: e for name, e in (case.get("errors") or {}).items() if not e <= LARGEST.get(name, LARGEST_STATISTIC)}
            who = f"{where}, {case['provider']}, {case['measure']}"
            found += [f"{who}: {name} is off by {error:.1e}" for name, error in too_far.items()]
    return found


def design_rows(result: dict, folder: Path) -> list[list[str]]:
    """What was asked, by whom it was made, what it is."""
    out = []
    ops, linear = _loaded(result, "ops", folder), _loaded(result, "linear", folder)
    for line in table.lines(ops) if ops else []:
        shape = f"{line.scenario['rows']} × {line.scenario['columns']} {line.scenario['dtype']}"
        for text, _, now, met in line.targets:
            out.append([f"{line.measure}, {shape}", line.provider, f"{line.ms:.4g}", text, f"{now:.3f}", "met" if met else "NOT met"])
    for measure, who, ms, *_, cell in linear_table.rows(linear)[1:] if linear else []:
        for target in cell.split("; ") if cell != "–" else []:
            text, now = target.rsplit(": ", 1)
            value, met = now.split(" ", 1)
            out.append([measure, who, ms, text, value, met])
    return out


def _stage_lines(result: dict) -> list[list[str]]:
    out = []
    for name, record in result["stages"].items():
        if "absent" in record:
            out.append([name, "–", f"not run: {record['absent']}"])
            continue
        ended = "killed" if record["killed"] else "ok" if record["status"] == 0 else f"status {record['status']}"
        said, found = "", record.get("result", {})
        if name == "tests" and found:
            said = f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
        elif name == "rates" and found:
            said = ", ".join(f"{what} {entry['rate']:.4g} {entry['unit']}" for what, entry in found["rates"].items())
        out.append([name, f"{record['seconds']:.0f} s", f"{ended}{f': {said}' if said else ''}"])
    return out


def block(results: Path) -> str:
    """What stands between the README's markers: the newest check of each GPU."""
    found = sorted((json.loads(path.read_text()) for path in results.glob(f"{table.CHECK}*.json")), key=lambda result: result["time"])
    newest = {result["machine"]["device"]: result for result in found}
    return "\n\n".join(_markdown(result, results) for result in newest.values()) or "No GPU has been checked yet: `make gpu-check` does it."


def _markdown(result: dict, folder: Path) -> str:
    asked = [["what", "who", "ms", "asked", "now", ""], *design_rows(result, folder)]
    drawn = ["| " + " | ".join(row) + " |" for row in asked]
    drawn.insert(1, "|" + "---|" * len(asked[0]))
    ending, machine = result["verdict"], result["machine"]
    notes = [": ".join([name, f"{seconds}, {said}"]) for name, seconds, said in _stage_lines(result)]
    if found := _loaded(result, "grid", folder):
        notes.append(f"Grid: {grid.verdict(found)}")
    notes.append(f"Results are {ending['all']}{''.join(f'; {line}' for line in ending['wrong'] + ending['unchecked'])}")
    notes.append(f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}; {result['time'][:10]}")
    return "\n".join([*drawn, "", *(f"* {note}." for note in notes)])


def _drawn(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def text(result: dict, folder: Path) -> str:
    machine, said = result["machine"], result["clocks"]
    parts = [f"{machine['device']}, driver {said.get('driver_version', '?')}, torch {machine['torch']}, commit {machine['commit']}"]
    for name in ("sanitized", "trainer", "counters"):
        if found := result["stages"].get(name, {}).get("result"):  # what the stage needed, it has found
            parts.append(importlib.import_module(f"benches.gpu_check.{name}").text(found))
    if found := _loaded(result, "grid", folder):
        parts.append("grid: " + grid.verdict(found))
    parts.append("\n".join(_drawn(_stage_lines(result))))
    asked = design_rows(result, folder)
    parts.append("\n".join(_drawn([["what", "who", "ms", "asked", "now", ""], *asked])) if asked else "nothing that was asked was measured")
    ending = result["verdict"]
    parts.append("\n".join(f"{kind.upper()}: {line}" for kind in ("wrong", "unchecked") for line in ending[kind]))
    parts.append(
        f"Results are {ending['all']}; {sum(row[-1] == 'met' for row in asked)} of {len(asked)} numbers met; {result['seconds']} s"
    )
    return "\n\n".join(part for part in parts if part)
