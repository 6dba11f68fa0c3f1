"""Axes, and lines as SVG paths. The drawing is stretched to the width there is, so its coordinates are its own."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass

from urlvr_fast.report.run import Point
from urlvr_fast.report.specs import is_share

WIDTH, HEIGHT = 1000, 300  # of the drawing's own coordinates
MOST_POINTS = 1200  # drawn per line; of more, the lowest and highest of each stretch are kept


@dataclass
class Series:
    label: str
    colour: int
    points: list[Point]


def merged(series: list[Series]) -> list[Series]:
    """Lines that lie on each other become one that carries both names: under majority voting the reward is the majority ratio."""
    apart: list[Series] = []
    for one in series:
        same = next((m for m in apart if m.points == one.points), None)
        if same is None:
            apart.append(one)
        else:
            same.label += f" = {one.label}"
    return apart


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @staticmethod
    def of(values: list[float], scale: str) -> Axis:
        positive = [v for v in values if v > 0]
        if scale == "log" or (scale == "spiky" and positive and max(positive) > 30 * statistics.median(positive)):
            return Axis._log(positive)
        low, high = min(values), max(values)
        share = is_share((0, v) for v in values)
        least = 0.2 if share else 0.1 * max(abs(low), abs(high)) or 1.0  # noise around a constant should look like that
        if high - low < least:
            middle = (high + low) / 2
            low, high = middle - least / 2, middle + least / 2
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        elif min(values) >= 0:
            low = max(low, 0.0)
        step = nice_step((high - low) / 4)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return Axis(low, high, tuple(round(low + i * step, 12) for i in range(round((high - low) / step) + 1)))

    @staticmethod
    def _log(positive: list[float]) -> Axis:
        low = math.floor(math.log10(min(positive, default=0.1)))
        high = max(math.ceil(math.log10(max(positive, default=1.0))), low + 1)
        stride = max(1, math.ceil((high - low) / 5))
        return Axis(10.0**low, 10.0**high, tuple(10.0**e for e in range(low, high + 1, stride)), log=True)

    def y(self, value: float) -> float:
        """Distance from the top of the drawing. A value of zero or less on a log axis lies at the bottom."""
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            share = (math.log10(max(value, self.low)) - low) / (high - low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return HEIGHT * (1 - share)


def nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def x_ticks(x_max: int) -> list[int]:
    step = max(1, round(nice_step(x_max / 4)))
    return list(range(0, x_max + 1, step))


def tick_label(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def lines_of(series: Series, axis: Axis, x_max: int, points: bool) -> str:
    """The raw line, faint under its smoothed self when there is enough of it; measurements far apart are marked instead."""
    raw = path(series.points, axis, x_max)
    if points or len(series.points) < 20:
        dots = "".join(f"M{WIDTH * step / x_max:.1f} {axis.y(value):.1f}h0" for step, value in series.points)
        return f'<path class="line c{series.colour}" d="{raw}"/><path class="dots c{series.colour}" d="{dots}"/>'
    smoothed = path(smooth(series.points), axis, x_max)
    return f'<path class="raw c{series.colour}" d="{raw}"/><path class="line c{series.colour}" d="{smoothed}"/>'


def smooth(points: list[Point]) -> list[Point]:
    """Mean over a window of a twentieth of the run, centred so that the line does not lag, and cut where the run begins and ends."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    half = max(len(points) // 40, 2)
    smoothed = []
    for i, (step, _) in enumerate(points):
        first, end = max(i - half, 0), min(i + half + 1, len(points))
        smoothed.append((step, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def path(points: list[Point], axis: Axis, x_max: int) -> str:
    return "M" + "L".join(f"{WIDTH * step / x_max:.1f} {axis.y(value):.1f}" for step, value in thin(points)) + "h0"


def thin(points: list[Point]) -> list[Point]:
    """At most about MOST_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    kept = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept
