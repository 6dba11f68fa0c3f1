"""Runs, judges and writes: `python -m experiments [--only NAME …] [--fresh] [--steps N] [--workers N]`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from experiments import (
    ablations,
    alignment_decides,
    collapse_ranks,
    failure_modes,
    matrix,
    page,
    rise_then_fall,
    self_verification,
    small_data,
    test_time,
    when_to_stop,
)

CLAIMS: dict[str, ModuleType] = {
    "a": rise_then_fall,
    "b": failure_modes,
    "c": alignment_decides,
    "d": small_data,
    "e": test_time,
    "f": collapse_ranks,
    "g": self_verification,
    "h": ablations,
    "i": when_to_stop,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=sorted(CLAIMS), default=sorted(CLAIMS), help="these claims alone; writes no page")
    parser.add_argument("--fresh", action="store_true", help="make the runs anew")
    parser.add_argument("--steps", type=int, help="try everything out with runs of so many steps, in a temporary place; writes no page")
    parser.add_argument("--workers", type=int, help="runs at once (default: one a core)")
    options = parser.parse_args(arguments)
    os.chdir(Path(__file__).parents[1])  # prompt files are named relative to the checkout
    claims = {name: CLAIMS[name] for name in options.only}
    with tempfile.TemporaryDirectory() as scratch:
        results_dir = Path(scratch) if options.steps else matrix.RESULTS
        started = time.monotonic()
        specs = [spec for claim in claims.values() for spec in claim.runs()]
        results = matrix.run_all(specs, steps=options.steps, results=results_dir, workers=options.workers, fresh=options.fresh)
        verdicts = {name: claim.judge(results) for name, claim in claims.items()}
        for name, verdict in verdicts.items():
            print(f"({name}) {verdict.verdict}: {verdict.numbers}")
        cpu = sum(result.cpu_s for result in results.values()) / 60
        print(f"{len(results)} runs, {time.monotonic() - started:.0f} s here; {cpu:.0f} minutes of one core in all")
        target = Path(scratch) / "docs" if options.steps or len(claims) < len(CLAIMS) else Path("docs")
        page.write(target, claims, verdicts, results, results_dir)
        print(f"wrote {target / 'paper.md'}")


if __name__ == "__main__":
    main()
