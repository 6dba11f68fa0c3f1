"""What a person sees while a run goes on: a panel drawn in place on a terminal, plain lines elsewhere. Rich is imported to draw."""

from __future__ import annotations

import math
import os
import sys
import time
from typing import Any

from urlvr_fast.errors import LogError

# C0 controls have pictures of their own. The C1 ones, which some terminals obey too, and those that reverse the direction of the text
# after them have none.
CONTROL_PICTURES = (
    {c: 0x2400 + c for c in range(32) if c not in (9, 10)}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
)
SHOWN = {  # metric -> name and format, in this order
    "ground_truth_reward": ("ground truth", "{:.3f}"),
    "actor_entropy": ("entropy", "{:.3f}"),
    "response_length": ("length", "{:.1f}"),
    "rollout_tokens_per_s": ("rollout tokens/s", "{:,.0f}"),
    "train_tokens_per_s": ("train tokens/s", "{:,.0f}"),
    "logp_gap_max": ("logp gap", "{:.1e}"),
}
SPARKLINES = ("reward", "ground_truth_reward", "actor_entropy", "response_length")
BARS = "▁▂▃▄▅▆▇█"


def printable(text: str) -> str:
    """Text that cannot move a terminal's cursor or change its colours: control characters become their pictures."""
    return str(text).translate(CONTROL_PICTURES)


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def sparkline(values: list[float], width: int = 32) -> str:
    """The whole history in at most `width` bars, each the mean of its share of the steps, from the lowest to the highest of them."""
    cells = min(width, len(values))
    means = []
    for i in range(cells):
        share = values[i * len(values) // cells : (i + 1) * len(values) // cells]
        means.append(sum(share) / len(share))
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        return BARS[3] * cells
    return "".join(BARS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


class _Clock:
    """Time left, from the mean of the last steps, evaluations included."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total = total_steps
        self._times = [(first_step, time.monotonic())]

    def step(self, step: int) -> None:
        self._times = [*self._times[-20:], (step, time.monotonic())]

    def seconds_left(self) -> float | None:
        (first, then), (last, now) = self._times[0], self._times[-1]
        return None if last <= first else (self._total - last) * (now - then) / (last - first)


def view_class(live: str) -> type[PlainView] | type[LiveView]:
    if live not in ("auto", "on", "off"):
        raise ValueError(f"live={live!r}: valid are auto, on, off")
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    can_draw = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and encoding == "utf8"
    return LiveView if live == "on" or (live == "auto" and can_draw) else PlainView


class PlainView:
    """For pipes and log files: a line every tenth of the run or every ten seconds, without control characters."""

    def __init__(self, *, title: str, reward: str, total_steps: int, first_step: int) -> None:
        self._reward, self._total = printable(reward), total_steps
        self._clock = _Clock(total_steps, first_step)
        self._printed_at = -math.inf
        self._printed_tenth = -1
        self._print(f"{printable(title)}: {total_steps} steps" + (f", continuing after step {first_step}" if first_step else ""))

    def step(self, step: int, numbers: dict[str, float]) -> None:
        self._clock.step(step)
        now, tenth = time.monotonic(), 10 * step // max(self._total, 1)
        if tenth == self._printed_tenth and now - self._printed_at < 10 and step != self._total:
            return
        self._printed_at, self._printed_tenth = now, tenth
        parts = [f"step {step}/{self._total}"]
        parts += [f"{label} {text}" for _, label, text in _readings(self._reward, numbers)]
        parts += [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in numbers.items() if name.startswith("eval/")]
        left = self._clock.seconds_left()
        self._print("  ".join(parts + ([f"left {_duration(left)}"] if left is not None else [])))

    def warn(self, step: int, message: str) -> None:
        self._print(f"WARNING (step {step}): {message}")

    def summary(self, summary: dict[str, Any]) -> None:
        for name, before, after in _before_after(summary):
            self._print(f"{name:<32} before {before:>8}  after {after:>8}")

    def close(self, status: str, reason: str) -> None:
        self._print(f"{status}: {reason}" if reason else status)

    def _print(self, text: str) -> None:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class LiveView:
    """For terminals: one panel that is redrawn in place, and whatever else is printed scrolls above it.

    Redrawn by the steps themselves, at most four times a second, rather than by a thread: the answer checkers fork, and a thread that
    holds the terminal's lock at that moment would hang them. The time left therefore also says when that is.
    """

    INTERVAL = 0.25  # seconds

    def __init__(self, *, title: str, reward: str, total_steps: int, first_step: int, console: Any = None) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError as error:
            raise LogError("the live view needs rich: pip install 'urlvr_fast[train]', or set log.live=off") from error
        self._title, self._reward, self._total, self._step = printable(title), printable(reward), total_steps, first_step
        self._clock = _Clock(total_steps, first_step)
        self._start = time.monotonic()
        self._history: dict[str, list[float]] = {name: [] for name in SPARKLINES}
        self._latest: dict[str, float] = {}
        self._evaluation = self._warning = ""
        self._drawn_at = -math.inf
        self._console = console or Console(force_terminal=True)
        self._live = Live(self._panel(), console=self._console, auto_refresh=False)
        self._live.start(refresh=True)

    def step(self, step: int, numbers: dict[str, float]) -> None:
        self._clock.step(step)
        self._step = step
        self._latest |= numbers
        for name in SPARKLINES:
            if name in numbers:
                self._history[name].append(numbers[name])
        evaluation = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in numbers.items() if name.startswith("eval/")]
        if evaluation:
            self._evaluation = f"step {step}: " + " · ".join(evaluation)
        if time.monotonic() - self._drawn_at >= self.INTERVAL or step >= self._total:
            self._draw()

    def warn(self, step: int, message: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self._warning = f"step {step}: {message}"
        self._console.print(Panel(Text(message), title=Text(f"WARNING · step {step}", "bold red"), border_style="yellow"))
        self._draw()

    def summary(self, summary: dict[str, Any]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "before", "after", title="Before and after", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in _before_after(summary):
            table.add_row(*(Text(cell) for cell in row))
        if table.row_count:
            self._console.print(table)

    def close(self, status: str, reason: str) -> None:
        from rich.text import Text

        self._draw()
        self._live.stop()
        colour = {"finished": "green", "failed": "bold red"}.get(status, "yellow")
        self._console.print(Text(f"{status}: {reason}" if reason else status, colour))

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        self._live.update(self._panel(), refresh=True)

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        rows = Table.grid(padding=(0, 2))
        for name, label, text in _readings(self._reward, self._latest):
            history = self._history.get(name, [])
            rows.add_row(Text(label, "dim"), Text(text, "bold", justify="right"), Text(sparkline(history), "cyan"))
        body: list[Any] = [self._progress(), rows]
        if not self._latest:
            body.append(Text("waiting for the first step", "dim"))
        if self._evaluation:
            body.append(Text(f"evaluation at {self._evaluation}"))
        if self._warning:
            body.append(Text(f"last warning, {self._warning}", "yellow", no_wrap=True, overflow="ellipsis"))
        return Panel(Group(*body), title=Text(self._title, "bold"), title_align="left", border_style="blue", padding=(0, 1))

    def _progress(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self._clock.seconds_left()
        ends = "" if left is None else time.strftime("%H:%M", time.localtime(time.time() + left))
        when = f"{_duration(time.monotonic() - self._start)} gone" + ("" if left is None else f", {_duration(left)} left, until {ends}")
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._total, 1), completed=self._step)
        line.add_row(Text(f"step {self._step}/{self._total}", "bold"), bar, Text(when))
        return line


def _readings(reward: str, numbers: dict[str, float]) -> list[tuple[str, str, str]]:
    """What is shown of a step, as (metric, label, value): the proxy reward, under its own name, first."""
    shown = {"reward": (reward, "{:.3f}")} | SHOWN
    return [(name, label, form.format(numbers[name])) for name, (label, form) in shown.items() if name in numbers]


def _before_after(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    def text(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "-" if value is None else printable(str(value))

    return [(printable(row["metric"]), text(row["before"]), text(row["after"])) for row in summary.get("before_after", [])]
