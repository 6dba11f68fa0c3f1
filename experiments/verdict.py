"""What a claim ends as, and the few figures that several claims judge runs by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from experiments.matrix import Result, Spec
from urlvr_fast.monitor.collapse import moving_average

ACCURACY = "eval/avg@4"  # on held-out prompts: what a run's rise and fall is judged by
SMOOTHING = 3  # evaluations
COLLAPSED = 0.8  # of its best accuracy: a run that ends below has collapsed


@dataclass
class Verdict:
    """verdict: `seen`, `not seen` or `mixed`. numbers: one sentence. header, rows: of a table. plots: file name -> what draws it."""

    verdict: str
    numbers: str
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    plots: dict[str, Callable[[], Any]] = field(default_factory=dict)


class Claim(Protocol):
    """A module of this package: its docstring is the claim, with the rule that judges it."""

    TITLE: str

    def runs(self) -> list[Spec]: ...

    def judge(self, results: Mapping[Spec, Result]) -> Verdict: ...


def overall(outcomes: Sequence[bool]) -> str:
    """`seen` when it was every time, `not seen` when it never was, else `mixed`."""
    return "seen" if all(outcomes) else "mixed" if any(outcomes) else "not seen"


@dataclass(frozen=True)
class Course:
    """How a run's accuracy went: moving averages over `SMOOTHING` evaluations, but for the start."""

    start: float
    best: float
    best_step: int
    end: float

    @property
    def collapsed(self) -> bool:
        return self.end < COLLAPSED * self.best


def course(result: Result, metric: str = ACCURACY) -> Course:
    steps, values = result.curve(metric)
    smooth = moving_average(values, SMOOTHING)[min(SMOOTHING, len(values)) - 1 :]
    best = max(range(len(smooth)), key=smooth.__getitem__)
    # A window is named by its middle.
    return Course(values[0], smooth[best], steps[best + min(SMOOTHING, len(values)) // 2], smooth[-1])


def collapse_by_accuracy(result: Result) -> int | None:
    """The step from which smoothed accuracy stays below `COLLAPSED` of the best before it; None when it never does."""
    steps, values = result.curve(ACCURACY)
    smooth = moving_average(values, SMOOTHING)
    for index in range(len(smooth)):
        best = max(smooth[: index + 1])
        if all(later < COLLAPSED * best for later in smooth[index:]):
            return steps[index]
    return None


def first(values: Sequence[float], count: int = 10) -> float:
    return sum(values[:count]) / len(values[:count])


def last(values: Sequence[float], count: int = 10) -> float:
    return sum(values[-count:]) / len(values[-count:])


def figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def label(spec: Spec, name: str) -> str:
    """The value of option `name` in a spec."""
    return next((o.partition("=")[2] for o in spec.options if o.startswith(f"{name}=")), "")
