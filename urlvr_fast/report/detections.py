"""What the detectors found: the list of it, and which chart shows it. A detector that this version does not know is listed all the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from urlvr_fast.monitor.detectors import RULES
from urlvr_fast.report.text import esc, number

if TYPE_CHECKING:
    from urlvr_fast.report.run import Run

DONE = {
    "warn": "a warning; the run went on",
    "stop": "the run was stopped",
    "lower_rate": "the learning rate was lowered",
    "rollback": "the run was stopped and went back to its last good weights",
}


@dataclass(frozen=True)
class Finding:
    """One entry of run.json's `detections`, as far as it can be read."""

    step: int | None
    detector: str
    action: str
    message: str

    @staticmethod
    def of(record: dict[str, Any]) -> Finding:
        step = record.get("step")
        name, action, message = (str(record.get(key) or "") for key in ("detector", "action", "message"))
        if not message and record.get("value") is not None:
            message = f"{number(record['value'])}, limit {number(record.get('limit'))}"
        return Finding(step if isinstance(step, int) and not isinstance(step, bool) else None, name or "unknown detector", action, message)

    @property
    def metric(self) -> str | None:
        """What the detector watches; None when this version has no such detector."""
        return RULES[self.detector].metric if self.detector in RULES else None

    @property
    def sentence(self) -> str:
        return self.message.removeprefix(f"{self.detector}: ")

    @property
    def done(self) -> str:
        return DONE.get(self.action, self.action or "not recorded")

    def spoken(self) -> str:
        return f"{self.detector} at step {self.step:,}" if self.step is not None else self.detector


def stopped_by(run: Run) -> str:
    """For a table of several runs: the detector, where one ended the run, otherwise the reason that was given."""
    reason = str(run.info.get("reason") or "")
    if run.info.get("status") != "stopped":
        return "–"
    # An earlier part of a resumed run may have been stopped by a detector too; the one that counts is in the reason.
    return next((f.detector for f in run.findings if f.message and f.message in reason), reason or "no reason given")


def detections_section(runs: list[Run]) -> str:
    items = []
    for index, run in enumerate(runs):
        name = f'<i class="key c{index}"></i><b>{esc(run.name)}</b> ' if len(runs) > 1 else ""
        for finding in run.findings:
            step = "–" if finding.step is None else f"{finding.step:,}"
            items.append(
                f'<li>{name}<span class="dim">step {step}</span> <b>{esc(finding.detector)}</b> {esc(finding.sentence)} '
                f'<span class="done">→ {esc(finding.done)}</span></li>'
            )
    if not items:
        return ""
    title = "Detector that fired" if len(items) == 1 else "Detectors that fired"
    return f'<section class="warnings" id="detections" role="note"><h2>▲ {title}</h2><ul>{"".join(items)}</ul></section>'
