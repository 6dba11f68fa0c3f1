"""`report.html`: one self-contained page about one run, or about several laid over each other.

The page needs no network and no JavaScript; a script adds reading values under the pointer. Everything that comes from a run is text to
be shown, never markup: completions are hostile input. A Content-Security-Policy that allows only this file's own script, by its hash,
stands behind the escaping.

Lines are drawn in an SVG that is stretched to the width there is; labels are HTML around it, so that they stay legible on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from urlvr_fast.report.page import page_of
from urlvr_fast.report.run import ReportError, load_run, name_apart
from urlvr_fast.trainer.logging import write_atomic

__all__ = ["ReportError", "write_report"]

MOST_RUNS = 8  # as many colours as can be told apart


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the report of these runs, and return its path.

    run_dirs: run directories as urlvr_fast.trainer.logging describes them; more than one are overlaid.
    out: the file to write; `report.html` in the first run directory when None.
    Raises ReportError for a directory that is not a run, and for none or more than eight of them.
    """
    directories = [Path(d) for d in run_dirs]
    if not 1 <= len(directories) <= MOST_RUNS:
        raise ReportError(f"a report shows 1 to {MOST_RUNS} runs, not {len(directories)}")
    path = directories[0] / "report.html" if out is None else Path(out)
    runs = [load_run(d) for d in directories]
    name_apart(runs)
    page = page_of(runs).encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [page])
    return path
