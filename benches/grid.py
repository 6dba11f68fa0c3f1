"""A result of `python -m benches --grid`: where ours is slower than somebody, and where its distance to a copy jumps.

On a GPU a time is the device's own, of a call that is all there when it begins, as in a captured graph or behind other work. How long the
host takes for a call is beside it: at few rows that is what a loop waits for which does nothing else.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benches import table

CLIFF = 2.0  # times the median of a measure's distances to a copy, among the shapes that do not fit into caches
LARGE = 1 << 28  # bytes of logits from which on a shape does not


@dataclass(frozen=True)
class Point:
    rows: int
    columns: int
    measure: str
    backend: str  # the fastest of ours
    ms: float
    to_copy: float  # of the logits, in the same rounds
    peer: str  # the fastest of the others on the same measure; "" where there is none
    ahead: float | None  # its time / ours
    host: float | None = None  # ms that the host needs for a call of ours, of the backend that needs least
    host_ahead: float | None = None  # the least that a peer's call needs / ours


def points(result: dict) -> list[Point]:
    """A shape and a measure each, in the order in which they were taken."""
    out = []
    for scenario in result["scenarios"]:
        copied = next(case["samples_ms"] for case in scenario["cases"] if case["measure"] == "copy_")
        if not copied:
            continue
        copy = statistics.median(copied)
        taken = [case for case in scenario["cases"] if case["provider"] and case["samples_ms"]]
        for measure in dict.fromkeys(case["measure"] for case in taken):
            of = {case["provider"]: statistics.median(case["samples_ms"]) for case in taken if case["measure"] == measure}
            ours = {name: ms for name, ms in of.items() if name.startswith(table.OWN) and name != table.OWN_TORCH}
            others = {name: ms for name, ms in of.items() if not name.startswith(table.OWN)}
            if not ours:
                continue
            mine, peer = min(ours, key=ours.__getitem__), min(others, key=others.__getitem__, default="")
            shape = scenario["scenario"]["rows"], scenario["scenario"]["columns"]
            ahead = others[peer] / ours[mine] if peer else None
            hosts = {case["provider"]: case["host_ms"] for case in taken if case["measure"] == measure and "host_ms" in case}
            host = min((hosts[name] for name in ours if name in hosts), default=None)
            host_of_peer = min((hosts[name] for name in others if name in hosts), default=None)
            host_ahead = host_of_peer / host if host and host_of_peer else None
            to_copy = ours[mine] / copy
            out.append(Point(*shape, measure, mine.removeprefix(table.OWN), ours[mine], to_copy, peer, ahead, host, host_ahead))
    return out


def slower(found: list[Point]) -> list[Point]:
    """Where somebody is ahead of us."""
    return [point for point in found if point.ahead is not None and point.ahead < 1]


def cliffs(found: list[Point]) -> list[Point]:
    """Shapes too large for caches whose distance to a copy is far from that of the others on the same measure."""
    out = []
    for measure in dict.fromkeys(point.measure for point in found):
        large = [point for point in found if point.measure == measure and 2 * point.rows * point.columns >= LARGE]
        if large:
            usual = statistics.median(point.to_copy for point in large)
            out += [point for point in large if point.to_copy > CLIFF * usual]
    return out


def verdict(result: dict) -> str:
    found = points(result)
    compared = [point for point in found if point.ahead is not None]
    shapes = len({(point.rows, point.columns) for point in found})
    behind, steep = slower(found), cliffs(found)
    names = "; ".join(f"{p.rows} × {p.columns} {p.measure}: {p.peer} {1 / p.ahead:.2f}× as fast" for p in behind if p.ahead)
    hosts = [point for point in found if point.host_ahead is not None]
    busy = f"on the host alone, behind in {sum(point.host_ahead < 1 for point in hosts if point.host_ahead)} of {len(hosts)}; "
    walls = "; ".join(f"{p.rows} × {p.columns} {p.measure}: {p.to_copy:.1f}× copy_" for p in steep)
    return (
        f"{shapes} shapes, {len(compared)} comparisons with the fastest peer, behind in {len(behind)}{f' ({names})' if names else ''}; "
        f"{busy if hosts else ''}"
        f"cliffs: {walls or 'none'}"
    )


def text(result: dict) -> str:
    rows = [
        ["logits", "measure", "fastest of ours", "ms", "to copy_", "fastest peer", "its time / ours", "host ms", "least of peers / ours"]
    ]
    for p in points(result):
        ahead, host_ahead = ("–" if times is None else f"{times:.2f}×" for times in (p.ahead, p.host_ahead))
        host = "–" if p.host is None else f"{p.host:.3g}"
        cells = [f"{p.rows} × {p.columns}", p.measure, p.backend, f"{p.ms:.3g}", f"{p.to_copy:.2f}×", p.peer or "–", ahead]
        rows.append([*cells, host, host_ahead])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    skipped = [f"{entry['scenario']['rows']} × {entry['scenario']['columns']}: {entry['reason']}" for entry in result["skipped"]]
    return "\n".join([*drawn, "", verdict(result), table.machine(result), *skipped])
