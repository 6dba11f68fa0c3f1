"""Drawing: curves of several runs, one colour a group, a line a seed. matplotlib, to SVG that stays the same when nothing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.matrix import Result


def curves(
    groups: Mapping[str, Sequence[Result]], metrics: Mapping[str, str], *, columns: int = 3, mark: Mapping[str, Any] | None = None
) -> Any:
    """A panel for each of `metrics` (name -> title), a line for each run, a colour for each of `groups`."""
    figure, axes = panels(len(metrics), columns)
    for axis, (metric, title) in zip(axes, metrics.items(), strict=False):
        for number, (name, results) in enumerate(groups.items()):
            for index, result in enumerate(results):
                steps, values = result.curve(metric)
                axis.plot(steps, values, color=f"C{number}", linewidth=0.9, alpha=0.85, label=name if index == 0 else None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "urlvr"  # ids that do not change from run to run
    from matplotlib import pyplot

    columns = min(columns, count)
    rows = -(-count // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(3.4 * columns, 2.5 * rows), squeeze=False, layout="constrained")
    axes = [axis for row in grid for axis in row]
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes
