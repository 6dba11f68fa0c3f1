"""The charts of the page, and the data that its script reads under the pointer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from urlvr_fast.report.drawing import HEIGHT, WIDTH, Axis, Series, lines_of, merged, tick_label, x_ticks
from urlvr_fast.report.run import Run
from urlvr_fast.report.specs import Spec, sections_of
from urlvr_fast.report.text import esc, number


class Charts:
    """Draws the charts and collects, in `data`, what the page's script reads under the pointer."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._last_step = max((run.last_step or 0 for run in runs), default=0)
        self._steps: dict[tuple[int, ...], int] = {}
        self.data: dict[str, Any] = {"steps": [], "charts": []}

    def sections(self) -> str:
        sections = []
        for title, specs in sections_of(self._runs):
            charts = [chart for spec in specs for chart in self._charts(spec)]
            if charts:
                sections.append(f'<section><h2>{esc(title)}</h2><div class="charts">{"".join(charts)}</div></section>')
        return "".join(sections)

    def _charts(self, spec: Spec) -> list[str]:
        """One chart of the spec for one run; for several, one chart a metric, in which the colour is the run."""
        if len(self._runs) == 1:
            metrics = self._runs[0].metrics
            series = merged([Series(label, i, metrics[name]) for i, (name, label) in enumerate(spec.metrics) if metrics.get(name)])
            return [self._chart(spec, series, {name for name, _ in spec.metrics})] if series else []
        charts = []
        for name, label in spec.metrics:
            series = [Series(run.name, i, run.metrics[name]) for i, run in enumerate(self._runs) if run.metrics.get(name)]
            one = spec if len(spec.metrics) == 1 else replace(spec, title=f"{spec.title}: {label}", note="")
            if series:
                charts.append(self._chart(one, series, {name}))
        return charts

    def _chart(self, spec: Spec, series: list[Series], metrics: set[str]) -> str:
        axis = Axis.of([v for s in series for _, v in s.points], spec.scale)
        x_max = max(self._last_step, 1)
        lines = "".join(lines_of(s, axis, x_max, spec.points) for s in reversed(series))  # the first line lies on top
        grid = "".join(f'<path class="grid" d="M0 {axis.y(tick):.1f}H{WIDTH}"/>' for tick in axis.ticks)
        y_labels = "".join(f'<span class="y" style="top:{axis.y(t) / HEIGHT:.2%}">{esc(tick_label(t))}</span>' for t in axis.ticks)
        x_labels = "".join(f'<span class="x" style="left:{t / x_max:.2%}">{tick_label(t)}</span>' for t in x_ticks(x_max))
        legend = "".join(
            f'<li><i class="key c{s.colour}"></i><span>{esc(s.label)}</span> <b>{esc(number(s.points[-1][1]))}</b></li>' for s in series
        )
        marks, events, said = self._events(metrics, x_max)
        spoken = "; ".join([f"{s.label} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series] + said)
        self.data["charts"].append({"x": x_max, "y": [axis.low, axis.high], "log": axis.log, "series": [self._series(s) for s in series]})
        note = f'<p class="dim">{esc(spec.note)}</p>' if spec.note else ""
        return (
            f'<figure><figcaption><div class="head"><h3>{esc(spec.title)}</h3><span class="at dim">last</span></div>{note}'
            f'<ul class="legend">{legend}</ul>{events}</figcaption>'
            f'<div class="plot" tabindex="0" role="img" aria-label="{esc(f"{spec.title}: {spoken}")}">'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'
            f'{y_labels}{x_labels}{marks}<div class="cursor" hidden></div></div></figure>'
        )

    def _events(self, metrics: set[str], x_max: int) -> tuple[str, str, list[str]]:
        """The collapse step of each run as a vertical line, and on the step axis what detectors of these metrics found.

        Returns the markers, a list of what the detectors found for those who cannot point at one, and all of it in words.
        """
        marks, items, said = "", "", []
        at_step: Counter[int] = Counter()
        for index, run in enumerate(self._runs):
            several = len(self._runs) > 1
            colour, name = (f"c{index}", f"{run.name}: ") if several else ("alone", "")
            if reached := run.collapse.reached():
                threshold, step = reached
                side = " left" if step > 0.6 * x_max else ""
                words = f"{name}{threshold} (windowed) at step {step:,}"
                label = f'<span class="label{side}" style="top:{13 * index}px">{esc(threshold)}</span>'
                marks += f'<div class="mark {colour}" style="left:{step / x_max:.2%}" title="{esc(words)}">{label}</div>'
                said.append(words)
            for finding in run.findings:
                if finding.metric not in metrics or finding.step is None or not 0 <= finding.step <= x_max:
                    continue
                words = f"{name}{finding.spoken()}"
                left = f"calc({finding.step / x_max:.2%} + {4 * at_step[finding.step]}px)"  # of several at one step none hides another
                marks += f'<i class="tick {colour}" style="left:{left}" title="{esc(f"{words}: {finding.sentence}")}"></i>'
                items += f'<li><i class="tick {colour}"></i>{esc(words)}</li>'
                said.append(f"detector {words}")
                at_step[finding.step] += 1
        return marks, f'<ul class="events">{items}</ul>' if items else "", said

    def _series(self, series: Series) -> dict[str, Any]:
        steps = tuple(step for step, _ in series.points)
        if steps not in self._steps:
            self._steps[steps] = len(self._steps)
            self.data["steps"].append(list(steps))
        return {"steps": self._steps[steps], "values": [float(f"{v:.5g}") for _, v in series.points], "colour": series.colour}
