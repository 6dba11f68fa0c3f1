"""A result as the table that `python -m benches.grpo_step` prints, and as the README's second table.

Everything is computed here, from the samples in the JSON. It imports nothing outside the standard library, as `benches/table.py`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.table import RESULTS, STEP, summary

BEGIN, END = "<!-- grpo:begin -->", "<!-- grpo:end -->"
OURS, TRL, UNTUNED = "urlvr_fast", "TRL", "TRL (malloc untuned)"
LARGE_VOCABULARY, QUICKSTART = "49k vocabulary", "quickstart"
# (scenario, what) -> at most so many times the floor, at least so many times faster than TRL.
TARGETS = {(LARGE_VOCABULARY, "learn"): (1.15, 1.3), (LARGE_VOCABULARY, "step"): (1.10, 1.5), (QUICKSTART, "step"): (None, 1.0)}
MEMORY = {"allocated": "learn, allocated by torch", "resident": "learn, resident", "process": "process, engine included"}


@dataclass(frozen=True)
class Line:
    """What one thing costs: seconds, or MiB for memory."""

    what: str
    unit: str
    ours: tuple[float, float]  # median, half of the distance between the quartiles relative to it
    floor: tuple[float, float] | None
    trl: tuple[float, float] | None
    untuned: tuple[float, float] | None  # TRL as it runs with glibc's defaults, as ours does
    most: float | None  # of the floor
    least: float | None  # of TRL, where it keeps its pages; of memory, where it does not

    @property
    def to_floor(self) -> float | None:
        return None if self.floor is None else self.ours[0] / self.floor[0]

    def to(self, theirs: tuple[float, float] | None) -> float | None:
        return None if theirs is None or not self.ours[0] else theirs[0] / self.ours[0]  # resident memory need not rise


def key(side: str, what: str) -> str:
    return side if side == what else f"{side} {what}"


def lines(scenario: dict[str, Any]) -> Iterator[Line]:
    samples = scenario["samples_s"]

    def parts(name: str, *without: str) -> tuple[float, float] | None:
        found = samples.get(name)
        return summary([one["total"] - sum(one[part] for part in without) for one in found]) if found else None

    learn_floor = samples["floor"]
    step_floor = [
        step["generate"] + step["sync"] + learn["total"] for step, learn in zip(samples[key(OURS, "step")], learn_floor, strict=True)
    ]
    targets = {what: TARGETS.get((scenario["name"], what), (None, None)) for what in ("learn", "step")}
    ours = {what: parts(key(OURS, what)) for what in ("learn", "step")}
    assert ours["learn"] is not None
    assert ours["step"] is not None
    theirs = {what: (parts(key(TRL, what)), parts(key(UNTUNED, what))) for what in ("learn", "step")}
    yield Line("learn", "s", ours["learn"], parts("floor"), *theirs["learn"], *targets["learn"])
    known = summary(step_floor) if scenario["full_length"] else None  # rollouts that end early are less work than the given ones
    yield Line("step", "s", ours["step"], known, *theirs["step"], *targets["step"])
    rest = parts(key(OURS, "step"), "generate")
    assert rest is not None
    trl, untuned = (parts(key(side, "step"), "generate") for side in (TRL, UNTUNED))
    yield Line("step without generation", "s", rest, None, trl, untuned, None, None)
    memory = scenario["memory_bytes"]
    exact = float("nan")
    for kind, what in MEMORY.items():
        mine, other = memory[OURS][kind] / 2**20, memory.get(UNTUNED, {}).get(kind)
        least = 1.0 if scenario["name"] == LARGE_VOCABULARY and kind != "process" else None
        yield Line(what, "MiB", (mine, exact), None, None, None if other is None else (other / 2**20, exact), None, least)


# ---- writing them ----------------------------------------------------------------------------------------------------------------------


def _value(value: tuple[float, float] | None, unit: str) -> str:
    if value is None:
        return "–"
    median, spread = value
    number = f"{median:.0f}" if unit == "MiB" else f"{median:.3g}"
    return f"{number} {unit}" + ("" if spread != spread else f" ± {spread:.0%}")


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _targets(line: Line) -> str:
    found = []
    if line.most is not None and line.to_floor is not None:
        found.append(f"ours / floor ≤ {line.most:g}: {'met' if line.to_floor <= line.most else 'NOT met'}")
    gain = line.to(line.trl or line.untuned)
    if line.least is not None and gain is not None:
        found.append(f"{TRL} / ours ≥ {line.least:g}: {'met' if gain >= line.least else 'NOT met'}")
    return "; ".join(found) or "–"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    table = [["scenario", "what", "ours", "floor", "ours / floor", TRL, f"{TRL} / ours", UNTUNED, f"{UNTUNED} / ours", "target"]]
    for scenario in result["scenarios"]:
        for line in lines(scenario):
            values = [_value(line.ours, line.unit), _value(line.floor, line.unit), _times(line.to_floor)]
            theirs = [cell for other in (line.trl, line.untuned) for cell in (_value(other, line.unit), _times(line.to(other)))]
            table.append([scenario["name"], line.what, *values, *theirs, _targets(line)])
    return table


def _batch(scenario: dict[str, Any]) -> str:
    model, (short, long) = scenario["model"], scenario["prompt_tokens"]
    size = f"{model['model_type']}, {model['num_hidden_layers']} layers × {model['hidden_size']}, {model['vocab_size']} words"
    lengths = f"prompts of {short} to {long} tokens, responses of at most {scenario['response_tokens']}"
    return f"{size}; {scenario['rollouts']} rollouts, {lengths}"


def _engines(scenario: dict[str, Any]) -> str:
    return "; ".join(f"{side}: {about['engine']}" for side, about in scenario["about"].items() if "engine" in about)


def _where(scenario: dict[str, Any]) -> Iterator[str]:
    """Medians of the parts, by side."""
    for name, samples in scenario["samples_s"].items():
        parts = {part: statistics.median(one[part] for one in samples) for part in samples[0] if part != "total"}
        if parts:
            rest = statistics.median(2 * one["total"] - sum(one.values()) for one in samples)
            parts = parts if name == "floor" else parts | {"rest": rest}
            yield f"{name}: {', '.join(f'{part} {1e3 * seconds:.0f} ms' for part, seconds in parts.items())}"


def _notes(result: dict[str, Any]) -> Iterator[str]:
    absent: dict[str, str] = {}
    for scenario in result["scenarios"]:
        name, difference = scenario["name"], scenario["gradient_difference"]
        yield f"{name}: {_batch(scenario)}. Engines: {_engines(scenario)}"
        if difference is not None:
            yield f"{name}: on the same rollouts the two gradients differ by {difference:.0e} of their norm"
        yield f"{name}, where the time goes: {'; '.join(_where(scenario))}"
        absent |= scenario["absent"]
    yield from (f"{name}: {reason}" for name, reason in absent.items())
    machine = result["machine"]
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{machine['device']}, {machine['instructions']}, {machine['threads']} threads, commit {machine['commit']}"
    yield f"{where}; {used}; {result['time'][:10]}"


def text(result: dict[str, Any]) -> str:
    """The whole result for a terminal."""
    table = _rows(result)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    drawn.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*drawn, "", *_notes(result)])


def markdown(result: dict[str, Any]) -> str:
    table = _rows(result)
    drawn = ["| " + " | ".join(row) + " |" for row in table]
    drawn.insert(1, "|" + "---|" * len(table[0]))
    notes = ["Medians ± half of the distance between the quartiles. Memory of learn: what it adds to weights and optimiser at its highest."]
    return "\n".join([*drawn, "", *(f"* {note}." for note in [notes[0].rstrip("."), *_notes(result)])])


def block(folder: Path = RESULTS) -> str:
    """What stands between the markers: the newest result."""
    results = sorted((json.loads(path.read_text()) for path in folder.glob(f"{STEP}*.json")), key=lambda result: result["time"])
    return markdown(results[-1]) if results else "No results yet: `python -m benches.grpo_step` makes them."
