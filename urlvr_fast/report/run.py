"""Reading a run directory. Whatever one field holds, the rest can still be shown."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from urlvr_fast.errors import ExplainedError
from urlvr_fast.report.collapse import Collapse
from urlvr_fast.report.detections import Finding
from urlvr_fast.report.text import finite
from urlvr_fast.trainer.logging import jsonl_lines

Point = tuple[int, float]


class ReportError(ExplainedError, RuntimeError):
    """A report cannot be made. The message says why."""

    exit_status = 2


@dataclass
class Run:
    directory: Path
    name: str
    info: dict[str, Any]  # run.json
    config: dict[str, Any]  # config.yaml, flattened: {"trainer.steps": 300, …}
    config_text: str
    metrics: dict[str, list[Point]]
    last_step: int | None
    seconds: float | None
    collapse: Collapse
    findings: list[Finding]  # of the detectors
    samples: dict[int, list[dict[str, Any]]]  # the first, middle and last step that has some
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # what is wrong with the files

    @property
    def reward(self) -> str:
        return str(self.config.get("reward", "proxy reward"))

    @property
    def total_steps(self) -> int | None:
        steps = self.config.get("trainer.steps")
        return steps if isinstance(steps, int) else None


def load_run(directory: Path) -> Run:
    """Read a run directory. Raises ReportError when it is none, or when its JSON or YAML cannot be read."""
    if not directory.is_dir():
        raise ReportError(f"there is no run directory {directory}")
    if not (directory / "run.json").is_file():
        raise ReportError(f"{directory} is not a run directory: it has no run.json")
    notes: list[str] = []
    config_path = directory / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    info, lines = _read_json(directory / "run.json"), _read_lines(directory / "metrics.jsonl", notes)
    return Run(
        directory=directory,
        name=directory.resolve().name,
        info=info,
        config=_flatten(_parse_yaml(config_path, config_text)),
        config_text=config_text,
        metrics=_points(lines),
        last_step=lines[-1]["step"] if lines else None,
        seconds=finite(lines[-1].get("wall_s")) if lines else None,
        collapse=Collapse.of(lines),
        findings=[Finding.of(record) for record in records(info.get("detections"))],
        samples=_read_samples(directory / "samples.jsonl", notes),
        summary=_read_json(directory / "summary.json") if (directory / "summary.json").is_file() else {},
        notes=notes,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ReportError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path} must hold a JSON object")
    return value


def _parse_yaml(path: Path, text: str) -> dict[str, Any]:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ReportError(f"{path} is not valid YAML: {error}") from None
    return value if isinstance(value, dict) else {}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def records(value: Any) -> list[dict[str, Any]]:
    """The objects in a list of them; what is no list, and what in it is no object, is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one a step, in the order of the steps. What is wrong with them is added to `notes`."""
    by_step: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for _, record in jsonl_lines(path):
        if record is None or not isinstance(record.get("step"), int):
            unreadable += 1
        else:
            by_step.setdefault(record["step"], {}).update(record)
    if unreadable:
        notes.append(f"{unreadable} unreadable line(s) of metrics.jsonl left out: the run was probably killed while it wrote.")
    if not by_step:
        notes.append("metrics.jsonl holds no complete line yet, so there is nothing to draw.")
    return [by_step[step] for step in sorted(by_step)]


def _points(lines: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Metric -> its points; a value that is no number is no point."""
    metrics: dict[str, list[Point]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "wall_s") and (figure := finite(value)) is not None:
                metrics.setdefault(name, []).append((line["step"], figure))
    return metrics


def _read_samples(path: Path, notes: list[str]) -> dict[int, list[dict[str, Any]]]:
    """Rollouts of the first, middle and last step that has some. Two passes, so that a long run's file need not fit in memory."""
    steps = sorted({r["step"] for _, r in jsonl_lines(path) if r is not None and isinstance(r.get("step"), int)})
    if not steps:
        return {}
    chosen: dict[int, list[dict[str, Any]]] = {step: [] for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]})}
    unreadable = 0
    for _, record in jsonl_lines(path):
        if record is None:
            unreadable += 1
        elif isinstance(record.get("step"), int) and record["step"] in chosen:
            chosen[record["step"]].append(record)
    if unreadable:
        notes.append(f"{unreadable} unreadable line(s) of samples.jsonl left out.")
    return chosen


def name_apart(runs: list[Run]) -> None:
    """Runs in directories of the same name are told apart by the folder above, then by a number."""
    for rename in (lambda run, n: f"{run.directory.resolve().parent.name}/{run.name}", lambda run, n: f"{run.name} ({n})"):
        names = [run.name for run in runs]
        for n, run in enumerate(runs, 1):
            if names.count(run.name) > 1:
                run.name = rename(run, n)
