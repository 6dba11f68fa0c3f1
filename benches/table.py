"""Results as tables: the text that `python -m benches` prints, and the README's tables.

    python benches/table.py           write the newest results into README.md, between the markers of each table
    python benches/table.py --check   fail where README.md says something else

The first table is of the ops on logits, the newest result of each kind of device; those of the linear ops and of a training step are
`benches/linear_table.py` and `benches/grpo_step/table.py`.

Everything is computed here, from the raw samples in the JSON; no number of the README is typed by hand.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STEP, LINEAR, GRID, CHECK = "grpo-step-", "linear-", "grid-", "gpu-check-"  # what the files of the other tables begin with
OWN, OWN_TORCH, ALONE = "urlvr_fast ", "urlvr_fast torch", ", one thread"
PRODUCT = "a product of 256 × 256"  # what tells whether two threads have a core each
SHORT = {"self_certainty": "SC", "gradient": "grad"}


@dataclass(frozen=True)
class Peer:
    speed: float | None  # their time / ours
    error: float  # the largest of their errors
    absent: str


@dataclass(frozen=True)
class Line:
    """One measure of ours in one scenario, and everybody else on the same."""

    scenario: dict
    measure: str
    provider: str
    ms: float
    spread: float  # half of the distance between the quartiles, relative to the median
    samples: int
    gigabytes: float
    bandwidth: float  # GB/s
    share: float  # of the copy bandwidth of the same rounds
    floor: str
    ratio: float  # to the floor
    targets: tuple[tuple[str, float, float, bool], ...]  # what it is, what was asked, what it is now, met
    gain: float | None  # one thread's time / ours
    errors: dict[str, float]
    peers: dict[str, Peer]


def summary(samples: list[float]) -> tuple[float, float]:
    """Median, and half of the distance between the quartiles relative to it."""
    median = statistics.median(samples)
    if len(samples) < 2:
        return median, math.nan
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, (high - low) / 2 / median


def lines(result: dict) -> Iterator[Line]:
    for scenario in result["scenarios"]:
        medians = {(c["measure"], c["provider"]): summary(c["samples_ms"])[0] for c in scenario["cases"] if c["samples_ms"]}
        if ("copy_", "") not in medians:
            continue  # whoever was cut short has nothing to compare with
        mine = [c for c in scenario["cases"] if c["provider"].startswith(OWN) and c["samples_ms"] and not c["measure"].endswith(ALONE)]
        fused = [c for c in mine if c["provider"] != OWN_TORCH]
        for case in fused or mine:
            yield _line(scenario, case, medians)


def _line(scenario: dict, case: dict, medians: dict[tuple[str, str], float]) -> Line:
    measure, (ms, spread) = case["measure"], summary(case["samples_ms"])
    copy = medians["copy_", ""]
    logit_bytes = next(c["bytes"] for c in scenario["cases"] if c["measure"] == "copy_")
    targets = tuple(_target(target, measure, ms, medians) for target in case["targets"])
    floor = "copy_" if "in place" in measure or measure.startswith("forward") else "clone()"
    alone = medians.get((measure + ALONE, case["provider"]))
    return Line(
        scenario["scenario"],
        measure,
        case["provider"],
        ms,
        spread,
        len(case["samples_ms"]),
        case["bytes"] / 1e9,
        case["bytes"] / ms / 1e6,
        case["bytes"] / ms / (logit_bytes / copy),
        floor,
        ms / medians[floor, ""],
        targets,
        None if alone is None else alone / ms,
        case["errors"],
        _peers(scenario, case, medians),
    )


def _target(target: dict, measure: str, ms: float, medians: dict[tuple[str, str], float]) -> tuple[str, float, float, bool]:
    of, reach = target["of"], target["reach"]
    theirs = medians.get((of, "")) or medians.get((measure, of))
    if target["faster"]:
        if theirs is None:  # the same measure with one thread
            theirs = next((m for (name, _), m in medians.items() if name == of), math.nan)
        name = "one thread" if of.endswith(ALONE) else of
        return f"≥ {reach:g}× {name}", reach, theirs / ms, theirs / ms >= reach
    ratio = ms / (target["factor"] * theirs)
    name = of if target["factor"] == 1 else f"{target['factor']:g} {of}"
    return f"≤ {reach:g}× {name}", reach, ratio, ratio <= reach


def _peers(scenario: dict, case: dict, medians: dict[tuple[str, str], float]) -> dict[str, Peer]:
    out = {}
    for other in scenario["cases"]:
        if other["measure"] != case["measure"] or other["provider"] == case["provider"]:
            continue
        median = medians.get((other["measure"], other["provider"]))
        speed = None if median is None else median / summary(case["samples_ms"])[0]
        out[other["provider"]] = Peer(speed, max(other["errors"].values(), default=math.nan), other["absent"])
    return out


# ---- writing them ----------------------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _errors(errors: dict[str, float]) -> str:
    return ", ".join(f"{SHORT.get(name, name)} {value:.0e}" for name, value in errors.items())


def _peer(peer: Peer | None) -> str:
    if peer is None:
        return "–"
    return "did not run" if peer.speed is None else f"{_number(peer.speed)}× ({peer.error:.0e})"


def _shape(scenario: dict) -> str:
    return f"{scenario['rows']} × {scenario['columns']} {scenario['dtype']}"


def _data(scenario: dict) -> str:
    return scenario["data"] + (f", {scenario['masked']:.0%} masked" if scenario["masked"] else "")


def _full(scenario: dict) -> str:
    return f"{_shape(scenario)}, {_data(scenario)}"


def _columns(found: list[Line]) -> list[str]:
    """The others that have a cell, in the order in which they first appear."""
    return list(dict.fromkeys(name for line in found for name in line.peers))


def _cells(line: Line, others: list[str]) -> list[str]:
    targets = "; ".join(f"{text}: {_number(now)} {'met' if met else 'NOT met'}" for text, _, now, met in line.targets)
    return [
        _shape(line.scenario),
        _data(line.scenario),
        line.measure,
        line.provider.removeprefix(OWN),
        _number(line.ms) + ("" if math.isnan(line.spread) else f" ± {line.spread:.0%}"),
        f"{line.gigabytes:.2g}",
        f"{line.bandwidth:.3g}",
        f"{line.share:.0%}",
        f"{line.ratio:.2f}× {line.floor}",
        "–" if line.gain is None else f"{line.gain:.2f}×",
        targets or "–",
        *(_peer(line.peers.get(name)) for name in others),
        _errors(line.errors),
    ]


def _header(others: list[str]) -> list[str]:
    names = [name.removeprefix(OWN) + " backend" if name.startswith(OWN) else name for name in others]
    fixed = ["logits", "data", "measure", "backend", "ms", "GB", "GB/s", "of copy", "to floor", "to 1 thread", "target: now"]
    return [*fixed, *(f"vs {name}" for name in names), "error"]


def _rows(found: list[Line]) -> list[list[str]]:
    others = _columns(found)
    return [_header(others), *(_cells(line, others) for line in found)]


def _memory(result: dict) -> Iterator[str]:
    for entry in result["memory"]:
        scenario, name = entry["scenario"], OWN + entry["backend"]
        what = f"Memory of forward + backward in place beyond the logits, {_shape(scenario)}, {name}: "
        if "absent" in entry:
            yield what + f"not measured ({entry['absent']})"
            continue
        parts = [f"{entry['allocated_bytes'] / 2**20:.2f} MiB allocated by torch"]
        if "resident_bytes" in entry:
            parts.append(f"resident memory up by {entry['resident_bytes'] / 2**20:.2f} MiB")
        worst = max(entry["allocated_bytes"], entry.get("resident_bytes", 0))
        met = "met" if worst <= entry["limit_bytes"] else "NOT met"
        goal = "" if entry["backend"] == "torch" else f" (target ≤ {entry['limit_bytes'] / 2**20:.0f} MiB: {met})"
        yield what + ", ".join(parts) + goal


def _absences(result: dict) -> Iterator[str]:
    """Who is not in the table and why; the same reason in several scenarios once."""
    for provider in result["providers"]:
        if provider["absent"]:
            yield f"{provider['name']}: {provider['absent']}"
    reasons: dict[str, list[str]] = {}
    for scenario in result["scenarios"]:
        for name, reason in scenario["absent"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(_full(scenario["scenario"]))
        for case in scenario["cases"]:
            if case["absent"]:
                reasons.setdefault(f"{case['provider']}, {case['measure']}: {case['absent']}", []).append(_full(scenario["scenario"]))
    for reason, shapes in reasons.items():
        yield f"{reason} [{'; '.join(dict.fromkeys(shapes))}]"
    for skipped in result["skipped"]:
        yield f"{_full(skipped['scenario'])}: {skipped['reason']}"


def machine(result: dict) -> str:
    machine = result["machine"]
    extra = machine.get("instructions") or machine.get("capability")
    return f"{machine['device']}, {extra}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}"


def _versions(result: dict) -> str:
    known = {p["package"]: p["version"] for p in result["providers"] if p["version"] and p["package"] != "urlvr_fast"}
    return ", ".join(f"{package} {version}" for package, version in known.items())


def _copies(result: dict) -> Iterator[str]:
    for scenario in result["scenarios"]:
        found = {c["measure"]: c for c in scenario["cases"] if c["measure"] in ("copy_", "clone()")}
        rates = [f"{name} {c['bytes'] / summary(c['samples_ms'])[0] / 1e6:.3g}" for name, c in found.items()]
        yield f"{_full(scenario['scenario'])}: {', '.join(rates)}"


def _threads_gain(result: dict) -> Iterator[str]:
    for scenario in result["scenarios"]:
        product = {c["measure"]: summary(c["samples_ms"])[0] for c in scenario["cases"] if c["measure"].startswith(PRODUCT)}
        if product:
            yield f"{_shape(scenario['scenario'])} {product[PRODUCT + ALONE] / product[PRODUCT]:.2f}×"


def _cores(result: dict) -> list[str]:
    gains = ", ".join(dict.fromkeys(_threads_gain(result)))
    return [f"All threads against one in {PRODUCT}, measured between the others: {gains}"] if gains else []


def text(result: dict) -> str:
    """The whole result for a terminal."""
    table = _rows(list(lines(result)))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    drawn.insert(1, "  ".join("-" * width for width in widths))
    notes = [
        machine(result),
        _versions(result),
        "GB/s (2 · bytes / time):",
        *(f"  {rate}" for rate in _copies(result)),
        *_cores(result),
        *_memory(result),
    ]
    return "\n".join([*drawn, "", *notes, "Not in the table:", *(f"  {reason}" for reason in _absences(result))])


README_COLUMNS = ("torch eager", "torch.compile", "TRL", "Liger", "fla", "QuACK")


def _in_readme(line: Line, numbered: tuple[int, int]) -> bool:
    s = line.scenario
    plain = (s["dtype"], s["data"], s["masked"]) == ("bf16", "random", 0.0)
    return plain and ((s["rows"], s["columns"]) == numbered or s["rows"] in (1, 3))


def markdown(result: dict) -> str:
    """The scenarios that the design sets numbers for."""
    numbered = (8192 if result["kind"] == "cuda" else 512, 151936)
    found = [line for line in lines(result) if _in_readme(line, numbered)]
    found = [line for line in found if line.scenario["rows"] > 3 or line.gain is not None]
    others = [name for name in _columns(found) if name in README_COLUMNS]
    table = [_header(others), *(_cells(line, others) for line in found)]
    kept = [i for i, name in enumerate(_header(others)) if name not in ("data", "to 1 thread")]
    table = [[row[i] for i in kept] for row in table]
    drawn = ["| " + " | ".join(row) + " |" for row in table]
    drawn.insert(1, "|" + "---|" * len(table[0]))
    notes = ["Milliseconds: median ± half of the distance between the quartiles. SC: self-certainty. of copy: of the bandwidth of `copy_`."]
    notes += [
        f"{machine(result)}; {_versions(result)}; {result['time'][:10]}.",
        *(f"{entry}." for entry in [*_cores(result), *_memory(result)]),
    ]
    absent = [f"{p['name']} ({p['absent']})" for p in result["providers"] if p["absent"]]
    notes += [f"Not in the table: {'; '.join(absent)}."] if absent else []
    return "\n".join([*drawn, "", *(f"* {note}" for note in notes)])


def newest(folder: Path = RESULTS) -> list[dict]:
    """The newest result of each kind of device."""
    of_ops = [path for path in folder.glob("*.json") if not path.name.startswith((STEP, LINEAR, GRID, CHECK))]
    results = sorted((json.loads(path.read_text()) for path in of_ops), key=lambda result: result["time"])
    return [by_kind for _, by_kind in sorted({result["kind"]: result for result in results}.items())]


def block(results: list[dict]) -> str:
    """What stands between the markers."""
    return "\n\n".join(markdown(result) for result in results) or "No results yet: `python -m benches` makes them."


def inserted(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with `content` between the markers."""
    if readme.count(begin) != 1 or readme.count(end) != 1 or readme.index(begin) > readme.index(end):
        raise ValueError(f"README needs {begin} and then {end}, once each")
    return f"{readme[: readme.index(begin)]}{begin}\n{content}\n{readme[readme.index(end) :]}"


def main(arguments: list[str], readme: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    from benches import linear_table as linear  # they take their arithmetic from here
    from benches.gpu_check import summary as check
    from benches.grpo_step import table as step

    before = readme.read_text()
    after = inserted(before, block(newest(results)))
    after = inserted(after, linear.block(results), linear.BEGIN, linear.END)
    after = inserted(after, step.block(results), step.BEGIN, step.END)
    after = inserted(after, check.block(results), check.BEGIN, check.END)
    if "--check" in arguments:
        if before != after:
            print(f"{readme.name} is not what {results.name}/ says: run python benches/table.py", file=sys.stderr)
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main(sys.argv[1:]))
