"""`report.html`: one self-contained page about one run, or about several laid over each other.

The page needs no network and no JavaScript; a script adds reading values under the pointer. Everything that comes from a run is text to
be shown, never markup: completions are hostile input. A Content-Security-Policy that allows only this file's own script, by its hash,
stands behind the escaping.

Lines are drawn in an SVG that is stretched to the width there is; labels are HTML around it, so that they stay legible on a phone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from urlvr_fast.errors import ExplainedError
from urlvr_fast.trainer.live_view import CONTROL_PICTURES
from urlvr_fast.trainer.logging import jsonl_lines, write_atomic

MOST_RUNS = 8  # as many colours as can be told apart
MOST_POINTS = 1200  # drawn per line; of more, the lowest and highest of each stretch are kept
MOST_ROLLOUTS = 16  # shown per prompt
LONGEST_TEXT = 4000  # characters shown of a prompt or completion
COLLAPSE = 0.01  # Reward Accuracy below which the paper calls a model collapsed

Point = tuple[int, float]


class ReportError(ExplainedError, RuntimeError):
    """A report cannot be made. The message says why."""

    exit_status = 2


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
    _name_apart(runs)
    page = _page(runs).encode("utf-8", "backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [page])
    return path


# ---- reading a run ---------------------------------------------------------------------------------------------------------------------


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
    metrics, last_step, seconds = _read_metrics(directory / "metrics.jsonl", notes)
    return Run(
        directory=directory,
        name=directory.resolve().name,
        info=_read_json(directory / "run.json"),
        config=_flatten(_parse_yaml(config_path, config_text)),
        config_text=config_text,
        metrics=metrics,
        last_step=last_step,
        seconds=seconds,
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


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, list[Point]], int | None, float | None]:
    """Metric -> points, the last step, and the seconds the run had taken then. What is wrong is added to `notes`."""
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
        return {}, None, None
    metrics: dict[str, list[Point]] = {}
    for step in sorted(by_step):
        for name, value in by_step[step].items():
            if name not in ("step", "wall_s") and isinstance(value, (int, float)):
                metrics.setdefault(name, []).append((step, float(value)))
    last = max(by_step)
    seconds = by_step[last].get("wall_s")
    return metrics, last, float(seconds) if isinstance(seconds, (int, float)) else None


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
        elif record.get("step") in chosen:
            chosen[record["step"]].append(record)
    if unreadable:
        notes.append(f"{unreadable} unreadable line(s) of samples.jsonl left out.")
    return chosen


def _name_apart(runs: list[Run]) -> None:
    """Runs in directories of the same name are told apart by the folder above, then by a number."""
    for rename in (lambda run, n: f"{run.directory.resolve().parent.name}/{run.name}", lambda run, n: f"{run.name} ({n})"):
        names = [run.name for run in runs]
        for n, run in enumerate(runs, 1):
            if names.count(run.name) > 1:
                run.name = rename(run, n)


# ---- text ------------------------------------------------------------------------------------------------------------------------------


def esc(value: Any) -> str:
    """Any value as HTML text that is also safe inside a quoted attribute; control characters become visible."""
    return html.escape(str(value).translate(CONTROL_PICTURES), quote=True)


def number(value: Any) -> str:
    """Four digits; the script on the page writes numbers in the same way."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s"


def _clip(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters in samples.jsonl)"


# ---- the page --------------------------------------------------------------------------------------------------------------------------


def _page(runs: list[Run]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    charts = _Charts(runs)
    body = [_header(runs, title), _warnings(runs), _facts(runs), _before_after(runs), charts.sections(), _differences(runs)]
    body += [_samples(runs), _configs(runs)]
    # `<` cannot close the script element when it is written as an escape; JSON has no other way out of a data block.
    data = json.dumps(charts.data, separators=(",", ":")).replace("<", "\\u003c")
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{esc(title)} · urlvr_fast</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
<script type="application/json" id="data">{data}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


STATUS_ICON = {"finished": "✓", "running": "▶", "interrupted": "■", "stopped": "■", "failed": "✕"}


def _header(runs: list[Run], title: str) -> str:
    lines = []
    for index, run in enumerate(runs):
        status = str(run.info.get("status", "running"))
        known = status if status in STATUS_ICON else "failed"
        name = f'<i class="key c{index}"></i><b>{esc(run.name)}</b> ' if len(runs) > 1 else ""
        lines.append(
            f'<p class="status">{name}<span class="pill {known}">{STATUS_ICON[known]} {esc(status)}</span> {esc(_sentence(run))}</p>'
        )
    return f'<header><p class="over">urlvr_fast · report</p><h1>{esc(title)}</h1>{"".join(lines)}</header>'


def _sentence(run: Run) -> str:
    """Status and reason in one sentence."""
    at = "before the first step" if run.last_step is None else f"at step {run.last_step:,}"
    of = f" of {run.total_steps:,}" if run.total_steps is not None and run.last_step is not None else ""
    took = f" after {duration(run.seconds)}" if run.seconds is not None else ""
    reason = str(run.info.get("reason") or "").rstrip(".")
    verbs = {
        "finished": "Finished",
        "interrupted": "Interrupted",
        "stopped": "Stopped",
        "failed": "Failed",
        "running": "Still running, or killed without a chance to say so,",
    }
    verb = verbs.get(str(run.info.get("status", "running")), "Ended")
    return f"{verb} {at}{of}{took}{f': {reason}' if reason else ''}."


def _warnings(runs: list[Run]) -> str:
    items = []
    for run in runs:
        name = f"<b>{esc(run.name)}</b> " if len(runs) > 1 else ""
        items += [f"<li>{name}{esc(note)}</li>" for note in run.notes]
        for warning in run.info.get("warnings") or []:
            items.append(f'<li>{name}<span class="dim">step {esc(warning.get("step"))}</span> {esc(warning.get("message"))}</li>')
    if not items:
        return ""
    title = "Warning" if len(items) == 1 else "Warnings"
    return f'<section class="warnings" role="note"><h2>⚠ {title}</h2><ul>{"".join(items)}</ul></section>'


def _facts(runs: list[Run]) -> str:
    if len(runs) == 1:
        facts = _run_facts(runs[0])
        cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in facts.items())
        return f'<section><h2>Key facts</h2><dl class="facts">{cells}</dl>{_provenance(runs[0])}</section>'
    tables = [_run_facts(run) for run in runs]
    names = list(dict.fromkeys(name for facts in tables for name in facts))
    table = _comparison(runs, {name: [facts.get(name, "–") for facts in tables] for name in names})
    return f"<section><h2>Key facts</h2>{table}</section>"


def _comparison(runs: list[Run], rows: dict[str, list[Any]]) -> str:
    """A table with a column for each run."""
    head = "".join(f'<th><i class="key c{i}"></i>{esc(run.name)}</th>' for i, run in enumerate(runs))
    body = ""
    for name, values in rows.items():
        cells = "".join(f"<td>{esc(value)}</td>" for value in values)
        body += f"<tr><th>{esc(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _run_facts(run: Run) -> dict[str, str]:
    """What a person asks first, in that order; what is not known is left out."""
    config, facts = run.config, {}
    for label, key in (("Model", "model"), ("Data", "data"), ("Reward", "reward"), ("Learning rate", "trainer.lr")):
        if key in config:
            facts[label] = f"{config[key]:g}" if isinstance(config[key], float) else str(config[key])
    if run.last_step is not None:
        facts["Steps"] = f"{run.last_step:,}" + (f" of {run.total_steps:,}" if run.total_steps is not None else "")
    if {"trainer.prompts_per_step", "rollout.group_size"} <= set(config):
        facts["Batch"] = f"{config['trainer.prompts_per_step']} × {config['rollout.group_size']} rollouts"
    if run.info.get("seed") is not None:
        facts["Seed"] = str(run.info["seed"])
    if run.seconds is not None:
        facts["Duration"] = duration(run.seconds)
    for label, metric in (("Rollout, median", "rollout_tokens_per_s"), ("Training, median", "train_tokens_per_s")):
        if metric in run.metrics:
            facts[label] = f"{statistics.median(v for _, v in run.metrics[metric]):,.0f} tokens/s"
    if "logp_gap_max" in run.metrics:
        facts["Largest log-prob gap"] = number(max(v for _, v in run.metrics["logp_gap_max"]))
    if "reward_accuracy" in run.metrics:
        collapsed = [step for step, value in run.metrics["reward_accuracy"] if value < COLLAPSE]
        facts["Model Collapse Step"] = f"{collapsed[0]:,}" if collapsed else "not reached"
    return facts


def _provenance(run: Run) -> str:
    rows = []
    for label, key in (("Started", "started"), ("Finished", "finished"), ("Machine", "machine")):
        if run.info.get(key):
            rows.append((label, str(run.info[key])))
    for resumed in run.info.get("resumed") or []:
        rows.append(("Resumed", f"after step {resumed.get('step')}, {resumed.get('time')}"))
    if run.info.get("command"):
        rows.append(("Command", " ".join(map(str, run.info["command"]))))
    rows += [(str(name), str(version)) for name, version in (run.info.get("versions") or {}).items()]
    for name, value in (run.summary.get("timing") or {}).items():
        seconds = isinstance(value, (int, float)) and str(name).endswith("_s")
        label = "Time: " + str(name).removesuffix("_s").replace("_", " ") if seconds else str(name)
        rows.append((label, duration(value) if seconds else number(value)))
    cells = "".join(f"<tr><th>{esc(label)}</th><td>{esc(value)}</td></tr>" for label, value in rows)
    return f"<details><summary>Versions, machine and timing</summary><table>{cells}</table></details>" if rows else ""


def _before_after(runs: list[Run]) -> str:
    tables = []
    for index, run in enumerate(runs):
        rows = run.summary.get("before_after") or []
        name = f'<caption><i class="key c{index}"></i>{esc(run.name)}</caption>' if len(runs) > 1 else ""
        cells = "".join(
            f"<tr><th>{esc(r.get('metric'))}</th><td>{esc(number(r.get('before')))}</td><td>{esc(number(r.get('after')))}</td>"
            f"<td>{esc(_change(r.get('before'), r.get('after')))}</td></tr>"
            for r in rows
        )
        if rows:
            tables.append(f'<table class="numbers">{name}<tr><th></th><th>before</th><th>after</th><th>change</th></tr>{cells}</table>')
    return f'<section><h2>Before and after</h2><div class="scroll tables">{"".join(tables)}</div></section>' if tables else ""


def _change(before: Any, after: Any) -> str:
    if not all(isinstance(v, (int, float)) for v in (before, after)):
        return "–"
    return f"{'▲' if after > before else '▼' if after < before else ''} {after - before:+.4g}".strip()


def _differences(runs: list[Run]) -> str:
    """The options in which overlaid runs differ."""
    if len(runs) == 1:
        return ""
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    differing = {key: [run.config.get(key, "–") for run in runs] for key in keys if len({repr(run.config.get(key)) for run in runs}) > 1}
    table = _comparison(runs, differing) if differing else "<p>None: the runs have the same configuration.</p>"
    return f"<section><h2>Options that differ</h2>{table}</section>"


def _configs(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        if run.config_text:
            name = f" of {esc(run.name)}" if len(runs) > 1 else ""
            parts.append(f"<details><summary>Resolved configuration{name}</summary><pre>{esc(run.config_text)}</pre></details>")
    return f"<section>{''.join(parts)}</section>" if parts else ""


# ---- sampled rollouts ------------------------------------------------------------------------------------------------------------------


def _samples(runs: list[Run]) -> str:
    blocks = []
    for index, run in enumerate(runs):
        name = f'<h3><i class="key c{index}"></i>{esc(run.name)}</h3>' if len(runs) > 1 and run.samples else ""
        details = []
        for step, rows in run.samples.items():
            unfolded = " open" if len(runs) == 1 and step == max(run.samples) else ""
            details.append(f"<details{unfolded}><summary>Step {step:,}</summary>{_step_samples(rows)}</details>")
        blocks.append(name + "".join(details))
    return f"<section><h2>Sampled rollouts</h2>{''.join(blocks)}</section>" if any(blocks) else ""


def _step_samples(rows: list[dict[str, Any]]) -> str:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("group", row.get("prompt_id"))), []).append(row)
    return "".join(_group_samples(group) for group in groups.values())


SAMPLE_COLUMNS = ("Completion", "Answer", "Vote", "Correct", "Reward", "Advantage", "Tokens")


def _group_samples(rows: list[dict[str, Any]]) -> str:
    body = "".join(_sample_row(row) for row in rows[:MOST_ROLLOUTS])
    rest = f'<p class="dim">{len(rows) - MOST_ROLLOUTS} more rollouts in samples.jsonl</p>' if len(rows) > MOST_ROLLOUTS else ""
    head = "".join(f"<th>{column}</th>" for column in SAMPLE_COLUMNS)
    return (
        f'<div class="group"><p class="dim">prompt {esc(rows[0].get("prompt_id", "–"))}</p>'
        f'<div class="text prompt">{esc(_clip(rows[0].get("prompt", "")))}</div>'
        f'<table class="samples"><tr>{head}</tr>{body}</table>{rest}</div>'
    )


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _sample_row(row: dict[str, Any]) -> str:
    correct = {None: "–", True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>'}[
        _truth(row.get("correct"))
    ]
    vote = "majority" if row.get("in_majority") else "–" if row.get("class") is None else "minority"
    answer = "none" if row.get("answer") is None else _clip(row["answer"])
    cut = ' <span class="dim">cut off</span>' if row.get("finish_reason") == "length" else ""
    completion, answer = (f'<div class="text">{esc(text)}</div>' for text in (_clip(row.get("completion", "")), answer))
    numbers = (esc(number(row.get("reward"))), esc(number(row.get("advantage"))), esc(number(row.get("length"))) + cut)
    cells = zip(SAMPLE_COLUMNS, (completion, answer, vote, correct, *numbers), strict=True)
    return "<tr>" + "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells) + "</tr>"


# ---- charts ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    title: str
    metrics: tuple[tuple[str, str], ...]  # (metric, label); those that a run lacks are left out
    note: str = ""
    scale: str = "linear"  # "linear", "log", or "spiky": log when the largest value dwarfs the median
    points: bool = False  # few measurements: marked and not smoothed


def _specs(runs: list[Run]) -> list[tuple[str, list[Spec]]]:
    """Sections of the page and their charts."""
    names = {name for run in runs for name in run.metrics}
    reward = " / ".join(dict.fromkeys(run.reward for run in runs))
    proxy: tuple[tuple[str, str], ...] = (("reward", reward),)
    votes = () if reward == "majority_voting" else (("majority_voting_reward", "majority voting reward"),)
    others = (("ground_truth_reward", "ground truth"), ("majority_ratio", "majority ratio"), *votes)
    unseen = "ground_truth_reward" in names and reward != "ground_truth"
    note = "The proxy that is trained on, beside the truth that it never sees." if unseen else ""
    # A proxy on another scale than shares (nats, log-probs) gets a chart of its own: two axes in one would suggest crossings that are none.
    shares = all(_is_share(run.metrics.get("reward", [])) for run in runs)
    rewards = (
        [Spec("Reward", proxy + others, note)]
        if shares
        else [Spec(f"Proxy reward: {reward}", proxy, "What is trained on."), Spec("Other rewards of the same rollouts", others)]
    )
    passes = tuple((name, name) for name in sorted(names) if name.startswith("pass@"))
    evaluations = tuple((name, name.removeprefix("eval/").replace("_", " ")) for name in _in_order(names, "eval/", runs))
    return [
        (
            "Is it learning?",
            [
                *rewards,
                Spec(
                    "Accuracy of the reward",
                    (
                        ("reward_accuracy", "Reward Accuracy"),
                        ("label_accuracy", "Label Accuracy"),
                        ("pseudo_label_accuracy", "pseudo-label"),
                    ),
                    "Share of rewards, and of voted labels, that agree with the truth.",
                ),
                Spec("Evaluation", evaluations, "On fixed prompts.", points=True),
                Spec("Entropy", (("actor_entropy", "nats per token"),), "Falls as the model grows sure, right or wrong."),
                Spec("Correlation of reward and correctness", (("point_biserial", "point-biserial"),)),
            ],
        ),
        (
            "Is it healthy?",
            [
                Spec("Response length", (("response_length", "tokens"),)),
                Spec("Rollouts", (("parse_rate", "answer parses"), ("truncated_rate", "cut off"), *passes), "Shares."),
                Spec(
                    "Log-prob gap",
                    (("logp_gap_max", "largest, nats"),),
                    "Between the engine that samples and the model that trains; log scale.",
                    scale="log",
                ),
                Spec("Gradient norm", (("grad_norm", "before clipping"),), scale="spiky"),
                Spec("Rollouts that carry a gradient", (("live_rollouts", "rollouts"),)),
                Spec("Clipped tokens", (("clip_frac_low", "low side"), ("clip_frac_high", "high side")), "Shares."),
            ],
        ),
        (
            "How fast?",
            [
                Spec("Tokens per second", (("rollout_tokens_per_s", "rollout"), ("train_tokens_per_s", "training"))),
                Spec("Seconds a step", (("step_s", "whole step"), ("rollout_s", "rollout"), ("train_s", "training"), ("sync_s", "sync"))),
            ],
        ),
    ]


def _in_order(names: set[str], prefix: str, runs: list[Run]) -> list[str]:
    """The metrics with this prefix in the order in which the runs logged them."""
    return list(dict.fromkeys(name for run in runs for name in run.metrics if name.startswith(prefix) and name in names))


def _is_share(points: Iterable[Point]) -> bool:
    return all(-1e-9 <= value <= 1 + 1e-9 for _, value in points)


@dataclass
class Series:
    label: str
    colour: int
    points: list[Point]


def _merged(series: list[Series]) -> list[Series]:
    """Lines that lie on each other become one that carries both names: under majority voting the reward is the majority ratio."""
    merged: list[Series] = []
    for one in series:
        same = next((m for m in merged if m.points == one.points), None)
        if same is None:
            merged.append(one)
        else:
            same.label += f" = {one.label}"
    return merged


class _Charts:
    """Draws the charts and collects, in `data`, what the page's script reads under the pointer."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._last_step = max((run.last_step or 0 for run in runs), default=0)
        self._steps: dict[tuple[int, ...], int] = {}
        self.data: dict[str, Any] = {"steps": [], "charts": []}

    def sections(self) -> str:
        sections = []
        for title, specs in _specs(self._runs):
            charts = [chart for spec in specs for chart in self._charts(spec)]
            if charts:
                sections.append(f'<section><h2>{esc(title)}</h2><div class="charts">{"".join(charts)}</div></section>')
        return "".join(sections)

    def _charts(self, spec: Spec) -> list[str]:
        """One chart of the spec for one run; for several, one chart a metric, in which the colour is the run."""
        if len(self._runs) == 1:
            metrics = self._runs[0].metrics
            series = _merged([Series(label, i, metrics[name]) for i, (name, label) in enumerate(spec.metrics) if metrics.get(name)])
            return [self._chart(spec, series)] if series else []
        charts = []
        for name, label in spec.metrics:
            series = [Series(run.name, i, run.metrics[name]) for i, run in enumerate(self._runs) if run.metrics.get(name)]
            one = spec if len(spec.metrics) == 1 else replace(spec, title=f"{spec.title}: {label}", note="")
            if series:
                charts.append(self._chart(one, series))
        return charts

    def _chart(self, spec: Spec, series: list[Series]) -> str:
        axis = Axis.of([v for s in series for _, v in s.points], spec.scale)
        x_max = max(self._last_step, 1)
        lines = "".join(_lines(s, axis, x_max, spec.points) for s in reversed(series))  # the first line lies on top
        grid = "".join(f'<path class="grid" d="M0 {axis.y(tick):.1f}H{WIDTH}"/>' for tick in axis.ticks)
        y_labels = "".join(f'<span class="y" style="top:{axis.y(t) / HEIGHT:.2%}">{esc(_tick(t))}</span>' for t in axis.ticks)
        x_labels = "".join(f'<span class="x" style="left:{t / x_max:.2%}">{_tick(t)}</span>' for t in _x_ticks(x_max))
        legend = "".join(
            f'<li><i class="key c{s.colour}"></i><span>{esc(s.label)}</span> <b>{esc(number(s.points[-1][1]))}</b></li>' for s in series
        )
        spoken = "; ".join(f"{s.label} from {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in series)
        self.data["charts"].append({"x": x_max, "y": [axis.low, axis.high], "log": axis.log, "series": [self._series(s) for s in series]})
        note = f'<p class="dim">{esc(spec.note)}</p>' if spec.note else ""
        return (
            f'<figure><figcaption><div class="head"><h3>{esc(spec.title)}</h3><span class="at dim">last</span></div>{note}'
            f'<ul class="legend">{legend}</ul></figcaption>'
            f'<div class="plot" tabindex="0" role="img" aria-label="{esc(f"{spec.title}: {spoken}")}">'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg>'
            f'{y_labels}{x_labels}<div class="cursor" hidden></div></div></figure>'
        )

    def _series(self, series: Series) -> dict[str, Any]:
        steps = tuple(step for step, _ in series.points)
        if steps not in self._steps:
            self._steps[steps] = len(self._steps)
            self.data["steps"].append(list(steps))
        return {"steps": self._steps[steps], "values": [float(f"{v:.5g}") for _, v in series.points], "colour": series.colour}


WIDTH, HEIGHT = 1000, 300  # of the drawing's own coordinates


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
        share = _is_share((0, v) for v in values)
        least = 0.2 if share else 0.1 * max(abs(low), abs(high)) or 1.0  # noise around a constant should look like that
        if high - low < least:
            middle = (high + low) / 2
            low, high = middle - least / 2, middle + least / 2
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        elif min(values) >= 0:
            low = max(low, 0.0)
        step = _nice_step((high - low) / 4)
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


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def _x_ticks(x_max: int) -> list[int]:
    step = max(1, round(_nice_step(x_max / 4)))
    return list(range(0, x_max + 1, step))


def _tick(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value / 1000:g}k" if abs(value) >= 10000 else f"{value:g}"


def _lines(series: Series, axis: Axis, x_max: int, points: bool) -> str:
    """The raw line, faint under its smoothed self when there is enough of it; measurements far apart are marked instead."""
    raw = _path(series.points, axis, x_max)
    if points or len(series.points) < 20:
        dots = "".join(f"M{WIDTH * step / x_max:.1f} {axis.y(value):.1f}h0" for step, value in series.points)
        return f'<path class="line c{series.colour}" d="{raw}"/><path class="dots c{series.colour}" d="{dots}"/>'
    smooth = _path(_smooth(series.points), axis, x_max)
    return f'<path class="raw c{series.colour}" d="{raw}"/><path class="line c{series.colour}" d="{smooth}"/>'


def _smooth(points: list[Point]) -> list[Point]:
    """Mean over a window of a twentieth of the run, centred so that the line does not lag, and cut where the run begins and ends."""
    sums = [0.0, *itertools.accumulate(value for _, value in points)]
    half = max(len(points) // 40, 2)
    smoothed = []
    for i, (step, _) in enumerate(points):
        first, end = max(i - half, 0), min(i + half + 1, len(points))
        smoothed.append((step, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def _path(points: list[Point], axis: Axis, x_max: int) -> str:
    return "M" + "L".join(f"{WIDTH * step / x_max:.1f} {axis.y(value):.1f}" for step, value in _thin(points)) + "h0"


def _thin(points: list[Point]) -> list[Point]:
    """At most about MOST_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    kept = []
    for i in range(stretches):
        stretch = points[i * len(points) // stretches : (i + 1) * len(points) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


# ---- style and script ------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --text: #1d1d1b; --dim: #63635e; --rule: #e3e2dd; --grid: #ecece7;
  --good: #0a6b2d; --bad: #b3261e; --warn-edge: #d99100; --warn: #fff8e6;
  --c0: #2a78d6; --c1: #d9571c; --c2: #12906a; --c3: #b98000; --c4: #c8528a; --c5: #3f7d00; --c6: #5b48c2; --c7: #cf3a3a; }
@media (prefers-color-scheme: dark) { :root {
  --page: #141413; --card: #1d1d1b; --text: #ecebe6; --dim: #a3a29a; --rule: #34342f; --grid: #2b2b27;
  --good: #62c98a; --bad: #ff8f85; --warn-edge: #d99100; --warn: #2a2313;
  --c0: #5b9df0; --c1: #f0854f; --c2: #3fc195; --c3: #dba935; --c4: #e884b4; --c5: #8bc34a; --c6: #a799f5; --c7: #f27a7a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1, h2, h3, p, ul, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; } h3 { font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
.over { font-size: 13px; color: var(--dim); margin-bottom: 4px; }
.dim { color: var(--dim); font-size: 13px; font-weight: 400; }
.status { margin-top: 10px; overflow-wrap: anywhere; }
.pill { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 10px; font-size: 13px; font-weight: 600;
  margin-right: 4px; white-space: nowrap; }
.finished { color: var(--good); } .failed { color: var(--bad); } .running { color: var(--c0); } .interrupted, .stopped { color: var(--c3); }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-edge); border-radius: 6px; padding: 12px 16px; margin-top: 20px; }
.warnings h2 { margin: 0 0 4px; font-size: 15px; } .warnings ul { list-style: none; }
.warnings li { overflow-wrap: anywhere; unicode-bidi: isolate; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 1px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; overflow: hidden; }
.facts div { outline: 1px solid var(--rule); padding: 10px 14px; } .facts dt { font-size: 13px; color: var(--dim); }
.facts dd { font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } .tables { display: flex; flex-wrap: wrap; gap: 24px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; font-weight: 400; }
tr:first-child > th { color: var(--dim); font-size: 13px; } td { overflow-wrap: anywhere; }
.numbers td, .numbers tr:first-child > th:not(:first-child) { text-align: right; white-space: nowrap; padding: 6px 0 6px 28px; }
.numbers td:nth-child(3) { font-weight: 600; }
details { margin-top: 12px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); padding: 0 16px; }
summary { cursor: pointer; padding: 10px 0; font-weight: 600; font-size: 14px; } details[open] { padding-bottom: 14px; }
pre { margin: 0; overflow-x: auto; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px 10px; min-width: 0;
  display: flex; flex-direction: column; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.head { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; } .at { white-space: nowrap; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin-top: 6px; font-size: 13px; color: var(--dim); }
.legend li { overflow-wrap: anywhere; } .legend b { color: var(--text); font-weight: 600; font-variant-numeric: tabular-nums; }
figcaption { flex: 1; }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: currentColor; vertical-align: middle;
  margin-right: 6px; }
.plot { position: relative; height: 190px; margin: 14px 6px 24px 42px; outline-offset: 6px; touch-action: pan-y; cursor: crosshair; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; stroke: currentColor; }
.grid { stroke: var(--grid); stroke-width: 1; } .raw { stroke-width: 1; opacity: .35; } .line { stroke-width: 2; }
.dots { stroke-width: 7; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); } .c7 { color: var(--c7); }
.plot span { position: absolute; font-size: 12px; line-height: 1; color: var(--dim); font-variant-numeric: tabular-nums;
  pointer-events: none; }
.y { right: 100%; margin-right: 8px; transform: translateY(-50%); white-space: nowrap; }
.x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.cursor { position: absolute; top: 0; bottom: 0; width: 0; border-left: 1px solid var(--dim); pointer-events: none; }
.cursor i { position: absolute; width: 9px; height: 9px; margin: -5px 0 0 -5px; border-radius: 50%; background: currentColor;
  border: 1px solid var(--card); }
.group { margin-top: 14px; padding-top: 10px; border-top: 1px solid var(--rule); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 12em; overflow-y: auto;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.prompt { background: var(--page); border-radius: 6px; padding: 8px 10px; margin: 4px 0 6px; }
.samples { width: 100%; } .samples td:first-child { width: 45%; } .samples td { padding-right: 14px; }
.samples td:nth-child(n+3) { white-space: nowrap; } .right { color: var(--good); } .wrong { color: var(--bad); }
@media (max-width: 760px) { main { padding: 20px 14px 48px; } h1 { font-size: 24px; } details { padding: 0 12px; }
  .charts { grid-template-columns: minmax(0, 1fr); } .facts { grid-template-columns: 1fr 1fr; }
  .numbers td, .numbers tr:first-child > th:not(:first-child) { padding-left: 16px; }
  /* A rollout becomes a card: the completion, and below it the rest with its column's name. */
  .samples, .samples tbody { display: block; } .samples tr:first-child { display: none; }
  .samples tr { display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 8px 0; border-bottom: 1px solid var(--rule); }
  .samples td { border: 0; padding: 0; max-width: 100%; } .samples td:first-child { width: 100%; }
  .samples td:not(:first-child)::before { content: attr(data-name) " "; color: var(--dim); font-size: 13px; }
  .samples td:nth-child(2) .text { display: inline; } }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
"""

SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const number = v => Math.abs(v) >= 1000 ? v.toLocaleString("en", {maximumFractionDigits: 0})
  : v && Math.abs(v) < 1e-3 ? v.toExponential(1) : String(+v.toPrecision(4));
const nearest = (steps, target) => {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) { const middle = (low + high) >> 1; if (steps[middle] < target) low = middle; else high = middle; }
  return Math.abs(steps[low] - target) <= Math.abs(steps[high] - target) ? low : high;
};
const charts = [...document.querySelectorAll("figure")].map((figure, index) => {
  const chart = data.charts[index], plot = figure.querySelector(".plot"), cursor = figure.querySelector(".cursor");
  const at = figure.querySelector(".at"), readings = figure.querySelectorAll(".legend b");
  const dots = chart.series.map(series => {
    const dot = document.createElement("i"); dot.className = "c" + series.colour; cursor.append(dot); return dot;
  });
  const height = v => {
    const f = chart.log ? Math.log(Math.max(v, chart.y[0])) : v, g = chart.log ? chart.y.map(Math.log) : chart.y;
    return 100 * (1 - (f - g[0]) / (g[1] - g[0]));
  };
  const show = target => {
    cursor.hidden = target === null;
    // The chart's cursor stands at the step, of any of its lines, that is nearest; a line without that step shows its own nearest.
    let step = null;
    for (const series of target === null ? [] : chart.series) {
      const steps = data.steps[series.steps], candidate = steps[nearest(steps, target)];
      if (step === null || Math.abs(candidate - target) < Math.abs(step - target)) step = candidate;
    }
    at.textContent = step === null ? "last" : "step " + step.toLocaleString("en");
    if (step !== null) cursor.style.left = 100 * step / chart.x + "%";
    chart.series.forEach((series, i) => {
      const steps = data.steps[series.steps], place = step === null ? steps.length - 1 : nearest(steps, step);
      readings[i].textContent = number(series.values[place]);
      dots[i].hidden = steps[place] !== step;
      dots[i].style.top = height(series.values[place]) + "%";
    });
    return step;
  };
  return {chart, plot, show};
});
let at = null, waiting = false;
const move = target => {  // all charts read the same step, once per frame
  at = target;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; for (const c of charts) c.show(at); });
};
for (const c of charts) {
  const follow = event => {
    const box = c.plot.getBoundingClientRect();
    move(Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * c.chart.x);
  };
  c.plot.addEventListener("pointermove", follow);
  c.plot.addEventListener("pointerdown", follow);
  c.plot.addEventListener("pointerleave", () => move(null));
  c.plot.addEventListener("blur", () => move(null));
  c.plot.addEventListener("keydown", event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = data.steps[c.chart.series[0].steps], here = at === null ? steps.length - 1 : nearest(steps, at) + way;
    move(steps[Math.min(Math.max(here, 0), steps.length - 1)]);
  });
}
"""
