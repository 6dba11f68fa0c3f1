"""A result of `python -m benches.linear` as the table that it prints, and as one of the README's."""

from __future__ import annotations

import json
from pathlib import Path

from benches import table
from benches.table import LINEAR, RESULTS

BEGIN, END = "<!-- linear:begin -->", "<!-- linear:end -->"
OURS, PRODUCTS, PRODUCT = "linear_policy_loss", "three products", "one product"
NO_GRAD, HALF = "linear_token_stats, no grad", "linear_policy_loss, half dead"
# (measure, what it is divided by, at most)
TARGETS = {
    "cpu": ((OURS, PRODUCTS, 1.2), (HALF, OURS, 0.6)),
    "cuda": ((OURS, PRODUCTS, 1.10), (HALF, OURS, 0.55), (NO_GRAD, PRODUCT, 1.15)),
}


def _ms(result: dict) -> dict[tuple[str, str], float]:
    return {(t["measure"], t["provider"]): table.summary(t["samples_ms"])[0] for t in result["times"] if t["samples_ms"]}


def floor(result: dict, measure: str) -> float:
    """The bare products in the faster of the two dtypes, or another measure of ours as it stands."""
    medians = _ms(result)
    return min(ms for (name, _), ms in medians.items() if name.split(", fp32")[0].split(", bf16")[0] == measure)


def rows(result: dict) -> list[list[str]]:
    out = [["measure", "who", "ms", "of the products", "of those of its dtype", "target: now"]]
    medians = _ms(result)
    targets = {measure: (of, reach) for measure, of, reach in TARGETS[result["kind"]]}
    for (measure, who), ms in medians.items():
        kind, dtype = measure.rsplit(", ", 1)
        same = PRODUCT if kind in (PRODUCT, NO_GRAD) else PRODUCTS
        base, own = floor(result, same), medians[f"{same}, {dtype}", ""]
        cell = "–"
        if kind in targets:
            of, reach = targets[kind]
            by = medians[f"{OURS}, {dtype}", who] if of == OURS else floor(result, of)
            cell = f"≤ {reach:g}× {'full' if of == OURS else of}: {ms / by:.2f} {'met' if ms / by <= reach else 'NOT met'}"
        spread = table.summary(next(t["samples_ms"] for t in result["times"] if (t["measure"], t["provider"]) == (measure, who)))[1]
        out.append([measure, who or "library", f"{ms:.4g} ± {spread:.0%}", f"{ms / base:.2f}×", f"{ms / own:.2f}×", cell])
    return out


def memory_rows(result: dict) -> list[list[str]]:
    counts = list(dict.fromkeys(entry["rows"] for entry in result["memory"]))
    out = [["MiB beyond dX and dW", *(f"N = {n}" for n in counts)]]
    for name in ("urlvr_fast", "torch eager"):
        for dtype in ("fp32", "bf16"):
            found = {e["rows"]: e for e in result["memory"] if (e["provider"], e["dtype"]) == (name, dtype)}
            cells = [f"{found[n]['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in found[n] else found[n]["absent"] for n in counts]
            out.append([f"{name}, {dtype}", *cells])
    return out


def _notes(result: dict) -> list[str]:
    n, h, v = result["shape"]
    ours = [e for e in result["memory"] if e["provider"] == "urlvr_fast"]
    most, limit = max(e["extra_bytes"] for e in ours), ours[0]["chunk_bytes"]
    return [
        f"(N, H, V) = ({n}, {h}, {v}), chunk_bytes = {result['chunk_bytes'] >> 20} MiB; medians ± half the distance of the quartiles. "
        "The products are torch.mm's in the faster dtype, their outputs preallocated; bf16 products also round their results to bf16, "
        "which logits do not stand.",
        f"Memory at H = {result['memory_width']}, chunk_bytes = {limit >> 20} MiB: ours at most {most / 2**20:.1f} MiB "
        f"({'met' if most <= limit else 'NOT met'}).",
        f"{table.machine(result)}; {result['time'][:10]}.",
        *(f"{t['provider']}, {t['measure']}: {t['absent']}." for t in result["times"] if t["absent"]),
    ]


def text(result: dict) -> str:
    drawn = []
    for part in (rows(result), memory_rows(result)):
        widths = [max(len(row[i]) for row in part) for i in range(len(part[0]))]
        drawn += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in part] + [""]
    return "\n".join([*drawn, *_notes(result)])


def markdown(result: dict) -> str:
    drawn = []
    for part in (rows(result), memory_rows(result)):
        body = ["| " + " | ".join(row) + " |" for row in part]
        body.insert(1, "|" + "---|" * len(part[0]))
        drawn += [*body, ""]
    return "\n".join([*drawn, *(f"* {note}" for note in _notes(result))])


def block(results: Path = RESULTS) -> str:
    """What stands between the markers: the newest result of each kind of device."""
    found = sorted((json.loads(path.read_text()) for path in results.glob(f"{LINEAR}*.json")), key=lambda result: result["time"])
    newest = [by_kind for _, by_kind in sorted({result["kind"]: result for result in found}.items())]
    return "\n\n".join(markdown(result) for result in newest) or "No results yet: `python -m benches.linear` makes them."
