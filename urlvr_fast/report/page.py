"""The page, from its header to its last section."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
from typing import Any

from urlvr_fast.report.charts import Charts
from urlvr_fast.report.collapse import collapse_section, step_in_words
from urlvr_fast.report.detections import detections_section, stopped_by
from urlvr_fast.report.run import Run, records
from urlvr_fast.report.samples import samples_section
from urlvr_fast.report.style import SCRIPT, STYLE
from urlvr_fast.report.text import duration, esc, finite, number


def page_of(runs: list[Run]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    charts = Charts(runs)
    body = [_header(runs, title), _warnings(runs), detections_section(runs), _facts(runs), _before_after(runs), collapse_section(runs)]
    body += [charts.sections(), _differences(runs), samples_section(runs), _configs(runs)]
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
        for warning in records(run.info.get("warnings")):
            items.append(f'<li>{name}<span class="dim">step {esc(warning.get("step"))}</span> {esc(warning.get("message"))}</li>')
    if not items:
        return ""
    title = "Warning" if len(items) == 1 else "Warnings"
    return f'<section class="warnings" role="note"><h2>⚠ {title}</h2><ul>{"".join(items)}</ul></section>'


def _facts(runs: list[Run]) -> str:
    if len(runs) == 1:
        facts = _run_facts(runs[0])
        if paper := runs[0].collapse.steps.get("MCS"):  # to the letter of the paper; the other thresholds have a table of their own
            facts["Model Collapse Step"] = step_in_words(paper.raw, paper.last_step)
        cells = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in facts.items())
        return f'<section><h2>Key facts</h2><dl class="facts">{cells}</dl>{_provenance(runs[0])}</section>'
    tables = [_run_facts(run) | {"Collapse step": run.collapse.in_words(), "Stopped by": stopped_by(run)} for run in runs]
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
    return f'<div class="scroll"><table class="compare"><tr><th></th>{head}</tr>{body}</table></div>'


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
    return facts


def _provenance(run: Run) -> str:
    rows = []
    for label, key in (("Started", "started"), ("Finished", "finished"), ("Machine", "machine")):
        if run.info.get(key):
            rows.append((label, str(run.info[key])))
    for resumed in records(run.info.get("resumed")):
        rows.append(("Resumed", f"after step {resumed.get('step')}, {resumed.get('time')}"))
    if isinstance(command := run.info.get("command"), list) and command:
        rows.append(("Command", " ".join(map(str, command))))
    rows += [(str(name), str(version)) for name, version in _fields(run.info.get("versions"))]
    for name, value in _fields(run.summary.get("timing")):
        seconds = finite(value) is not None and str(name).endswith("_s")
        label = "Time: " + str(name).removesuffix("_s").replace("_", " ") if seconds else str(name)
        rows.append((label, duration(value) if seconds else number(value)))
    cells = "".join(f"<tr><th>{esc(label)}</th><td>{esc(value)}</td></tr>" for label, value in rows)
    return f"<details><summary>Versions, machine and timing</summary><table>{cells}</table></details>" if rows else ""


def _fields(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _before_after(runs: list[Run]) -> str:
    tables = []
    for index, run in enumerate(runs):
        rows = records(run.summary.get("before_after"))
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
    if finite(before) is None or finite(after) is None:
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
