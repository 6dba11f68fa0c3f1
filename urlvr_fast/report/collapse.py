"""The collapse step of a run, and the label-free proxies beside it: their table, and what the charts mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from urlvr_fast.monitor.collapse import (
    PERSISTENCE,
    WINDOW,
    CollapseStep,
    collapse_steps,
    one_answer_step,
    reward_accuracy_series,
    unanimity_step,
)
from urlvr_fast.report.text import esc, finite, number

if TYPE_CHECKING:
    from urlvr_fast.report.run import Run

ACCURACIES = {
    "reward_accuracy": "the Reward Accuracy of the reward that is trained on",
    "majority_reward_accuracy": "the Reward Accuracy of the majority vote on the same rollouts, "
    "because the reward that is trained on is not 0 or 1 and has none",
}
PROXIES = {  # metric -> the proxy that is read off it, and how it is said
    "majority_ratio": (unanimity_step, "the winning answers hold 99 % of the rollouts"),
    "top_answer_share": (one_answer_step, "one answer wins half of the prompts"),
}


class Proxy(NamedTuple):
    meaning: str
    step: int | None
    last_step: int


@dataclass(frozen=True)
class Collapse:
    steps: dict[str, CollapseStep] = field(default_factory=dict)  # threshold's name -> step; empty where answers cannot tell it
    source: str = ""  # which of the two Reward Accuracies was used
    problem: str = ""  # why there is no step although there are answers
    proxies: tuple[Proxy, ...] = ()

    @staticmethod
    def of(lines: Sequence[dict[str, Any]]) -> Collapse:
        """lines: of metrics.jsonl, one a step, by step. What cannot be told from them is said in `problem`, never raised."""
        lines = [{name: value if name == "step" else finite(value) for name, value in line.items()} for line in lines]
        logged = [name for name in ACCURACIES if any(line.get(name) is not None for line in lines)]
        proxies = tuple(_proxies(lines))
        steps, accuracy = reward_accuracy_series(lines)
        if not steps:
            problem = "Reward Accuracy was not logged in every step, so there is no collapse step to tell." if logged else ""
            return Collapse(problem=problem, proxies=proxies)
        own, _ = reward_accuracy_series([{n: v for n, v in line.items() if n != "majority_reward_accuracy"} for line in lines])
        try:
            found = collapse_steps(steps, accuracy)
        except ValueError as error:
            return Collapse(problem=f"The collapse step cannot be told: {error}.", proxies=proxies)
        return Collapse(found, "reward_accuracy" if own else "majority_reward_accuracy", "", proxies)

    def reached(self) -> tuple[str, int] | None:
        """The smallest threshold that the windowed Reward Accuracy fell below, and when: what the charts mark."""
        by_threshold = sorted(self.steps.items(), key=lambda item: item[1].threshold)
        return next(((name, step.windowed) for name, step in by_threshold if step.windowed is not None), None)

    def in_words(self) -> str:
        """For a table of several runs."""
        if not self.steps:
            return "unknown: no answers" if not self.problem else "unknown"
        reached = self.reached()
        return f"{reached[1]:,} ({reached[0]}, windowed)" if reached else step_in_words(None, next(iter(self.steps.values())).last_step)


def _proxies(lines: Sequence[dict[str, Any]]) -> list[Proxy]:
    found = []
    for metric, (proxy, meaning) in PROXIES.items():
        points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            found.append(Proxy(f"{proxy.__name__}: {meaning}", proxy(steps, values), steps[-1]))
    return found


def step_in_words(step: int | None, last_step: int) -> str:
    return f"not reached by step {last_step:,}" if step is None else f"{step:,}"


def collapse_section(runs: list[Run]) -> str:
    blocks = [_block(run, index if len(runs) > 1 else None) for index, run in enumerate(runs)]
    if not any(blocks):
        return ""
    definition = ""
    if any(run.collapse.steps for run in runs):
        definition = (
            '<p class="dim">The Model Collapse Step (MCS) is the first step with a Reward Accuracy below the threshold: as logged (raw), '
            f"as its mean over the last {WINDOW} steps (windowed), or below it for {PERSISTENCE} steps running (persistent).</p>"
        )
    return f'<section id="collapse"><h2>Collapse</h2>{definition}<div class="tables">{"".join(blocks)}</div></section>'


def _block(run: Run, colour: int | None) -> str:
    collapse = run.collapse
    if not (collapse.steps or collapse.problem or collapse.proxies):
        return ""
    rows = [
        f"<tr><th>{esc(name)} <span class='dim'>below {esc(number(step.threshold))}</span></th>"
        + "".join(f"<td>{step_in_words(value, step.last_step)}</td>" for value in (step.raw, step.windowed, step.persistent))
        + "</tr>"
        for name, step in collapse.steps.items()
    ]
    rows += [
        f'<tr class="proxy"><th>Proxy without answers <span class="dim">{esc(proxy.meaning)}</span></th>'
        f'<td colspan="3">{step_in_words(proxy.step, proxy.last_step)}</td></tr>'
        for proxy in collapse.proxies
    ]
    head = "<tr><th></th><th>raw</th><th>windowed</th><th>persistent</th></tr>" if collapse.steps else "<tr><th></th><th>step</th></tr>"
    name = f'<h3><i class="key c{colour}"></i>{esc(run.name)}</h3>' if colour is not None else ""
    table = f'<div class="scroll"><table class="steps">{head}{"".join(rows)}</table></div>' if rows else ""
    return f"<div>{name}{table}<p class='dim'>{esc(_source(collapse))}</p></div>"


def _source(collapse: Collapse) -> str:
    proxies = " A proxy is no collapse step: it cannot tell whether answers are right." if collapse.proxies else ""
    if collapse.steps:
        reached = collapse.reached()
        marked = f" The charts mark {reached[0]}, windowed, at step {reached[1]:,}." if reached else ""
        return f"Computed from {ACCURACIES[collapse.source]}; it needs answers.{marked}{proxies}"
    return (collapse.problem or "No answers were logged, so there is no collapse step, which needs them.") + proxies
