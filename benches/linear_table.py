"""A result of `python -m benches.linear` as the table that it prints, and as one of the README's."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benches import table
from benches.table import LINEAR, RESULTS

OWN = "urlvr_fast"
SHORT = {"self_certainty": "SC"}
BEGIN, END = "<!-- linear:begin -->", "<!-- linear:end -->"
OURS, PRODUCTS, PRODUCT = "linear_policy_loss", "three products", "one product"
SMALLER, HALF = "linear_policy_loss, 1.5 GiB chunks", "linear_policy_loss, half dead"
NO_GRAD = "linear_token_stats, no grad"
SAME, ADVANTAGES_1 = "the same loss", "the same loss, advantages 1"
# (measure of ours, what it is divided by, at most)
TARGETS = {
    "cpu": ((OURS, PRODUCTS, 1.2), (HALF, OURS, 0.6)),
    "cuda": ((OURS, PRODUCTS, 1.10), (SMALLER, PRODUCTS, 1.20), (HALF, OURS, 0.55), (NO_GRAD, PRODUCT, 1.15)),
}
# How many times the time of ours a peer takes on the same loss with the same outputs, at least.
AHEAD = {"cpu": {}, "cuda": {"Liger FLSCE": 1.3, "verl": 2.5, "TRL chunked log-prob": 2.0}}


def _ms(result: dict) -> dict[tuple[str, str], float]:
    return {(t["measure"], t["provider"]): table.summary(t["samples_ms"])[0] for t in result["times"] if t["samples_ms"]}


def floor(result: dict, measure: str) -> float:
    """The bare products in the faster of the dtypes; NaN where they were not measured."""
    return min((ms for (name, _), ms in _ms(result).items() if name.rsplit(", ", 1)[0] == measure), default=math.nan)


def _targets(result: dict, kind: str, dtype: str) -> str:
    """What is asked of a measure of ours, and what it is."""
    medians, out = _ms(result), []
    ms = medians[f"{kind}, {dtype}", OWN]
    for measure, of, reach in TARGETS[result["kind"]]:
        if measure == kind:
            by = medians.get((f"{OURS}, {dtype}", OWN), math.nan) if of == OURS else floor(result, of)
            out.append(f"≤ {reach:g}× {'full' if of == OURS else of}: {ms / by:.2f} {'met' if ms / by <= reach else 'NOT met'}")
    for peer, reach in AHEAD[result["kind"]].items() if kind == SAME else ():
        theirs = medians.get((f"{SAME}, {dtype}", peer))
        if theirs is not None:
            out.append(f"≥ {reach:g}× {peer}: {theirs / ms:.2f} {'met' if theirs / ms >= reach else 'NOT met'}")
    return "; ".join(out) or "–"


def rows(result: dict) -> list[list[str]]:
    """A line for each measure that was taken; errors and memory where the result has them."""
    times = [t for t in result["times"] if t["samples_ms"]]
    with_errors, with_peaks = any(t.get("errors") for t in times), any("peak_bytes" in t for t in times)
    optional = ["error"] * with_errors + ["GiB"] * with_peaks
    out = [["measure", "who", "ms", "of the products", "of those of its dtype", *optional, "target: now"]]
    medians = _ms(result)
    for t in times:
        kind, dtype = t["measure"].rsplit(", ", 1)
        ms, spread = table.summary(t["samples_ms"])
        taken = f"{ms:.4g}" + ("" if math.isnan(spread) else f" ± {spread:.0%}")
        same = PRODUCT if kind in (PRODUCT, NO_GRAD) else PRODUCTS
        base, own = floor(result, same), medians.get((f"{same}, {dtype}", ""), math.nan)
        errors = ", ".join(f"{SHORT.get(name, name)} {error:.0e}" for name, error in t.get("errors", {}).items()) or "–"
        peak = f"{t['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in t else "–"
        cells = [errors] * with_errors + [peak] * with_peaks
        cell = _targets(result, kind, dtype) if t["provider"] == OWN else "–"
        out.append([t["measure"], t["provider"] or "library", taken, f"{ms / base:.2f}×", f"{ms / own:.2f}×", *cells, cell])
    return out


def memory_rows(result: dict) -> list[list[str]]:
    measured = result["memory"]
    counts, names, dtypes = (list(dict.fromkeys(entry[key] for entry in measured)) for key in ("rows", "provider", "dtype"))
    out = [["MiB beyond dX and dW", *(f"N = {n}" for n in counts)]]
    for name in names:
        for dtype in dtypes:
            found = {e["rows"]: e for e in measured if (e["provider"], e["dtype"]) == (name, dtype)}
            cells = [f"{found[n]['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in found[n] else found[n]["absent"] for n in counts]
            out.append([f"{name}, {dtype}", *cells])
    return out


def _parts(result: dict) -> list[list[list[str]]]:
    """The tables of what was measured."""
    return [rows(result)] + ([memory_rows(result)] if result["memory"] else [])


def _notes(result: dict) -> list[str]:
    n, h, v = result["shape"]
    rounded = ", their outputs preallocated; bf16 products also round their results to bf16, which logits do not stand."
    products = ", their outputs, of fp32, preallocated." if result["kind"] == "cuda" else rounded
    out = [
        f"(N, H, V) = ({n}, {h}, {v}), chunk_bytes = {result['chunk_bytes'] >> 20} MiB; medians ± half the distance of the quartiles. "
        f"The products are torch.mm's in the faster dtype{products}",
    ]
    if any(t.get("errors") for t in result["times"]):
        out.append("Errors are against float64: of dX and dW in norm, of the others the largest difference.")
    if result["kind"] == "cuda":
        out.append(
            f"GiB: held at most beyond the inputs. {OURS} has an fp32 buffer for dW beforehand, as the products have; on {SAME} everybody "
            "makes dW in the dtype of the weight."
        )
    ours = [e for e in result["memory"] if e["provider"] == OWN and "extra_bytes" in e]
    if ours:
        most, limit = max(e["extra_bytes"] for e in ours), ours[0]["chunk_bytes"]
        out.append(
            f"Memory at H = {result['memory_width']}, chunk_bytes = {limit >> 20} MiB: ours at most {most / 2**20:.1f} MiB "
            f"({'met' if most <= limit else 'NOT met'})."
        )
    versions = "".join(f", {name} {version}" for name, version in result.get("packages", {}).items() if version and name != "torch")
    there = {t["provider"] for t in result["times"] if t["samples_ms"]}
    absent = []
    for t in (t for t in result["times"] if t["absent"]):
        where = f", {t['measure']}" if t["provider"] in there else ""
        absent.append(f"{t['provider'] or 'library'}{where}: {t['absent']}.")
    return [
        *out,
        f"{table.machine(result)}{versions}; {result['time'][:10]}.",
        *dict.fromkeys(absent),
    ]


def text(result: dict) -> str:
    drawn = []
    for part in _parts(result):
        widths = [max(len(row[i]) for row in part) for i in range(len(part[0]))]
        drawn += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in part] + [""]
    return "\n".join([*drawn, *_notes(result)])


def markdown(result: dict) -> str:
    drawn = []
    for part in _parts(result):
        body = ["| " + " | ".join(row) + " |" for row in part]
        body.insert(1, "|" + "---|" * len(part[0]))
        drawn += [*body, ""]
    return "\n".join([*drawn, *(f"* {note}" for note in _notes(result))])


def block(results: Path = RESULTS) -> str:
    """What stands between the markers: the newest result of each kind of device."""
    found = sorted((json.loads(path.read_text()) for path in results.glob(f"{LINEAR}*.json")), key=lambda result: result["time"])
    newest = [by_kind for _, by_kind in sorted({result["kind"]: result for result in found}.items())]
    return "\n\n".join(markdown(result) for result in newest) or "No results yet: `python -m benches.linear` makes them."
