"""The sampled rollouts with their votes."""

from __future__ import annotations

from typing import Any

from urlvr_fast.report.run import Run
from urlvr_fast.report.text import clip, esc, number

MOST_ROLLOUTS = 16  # shown per prompt


def samples_section(runs: list[Run]) -> str:
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
        f'<div class="text prompt">{esc(clip(rows[0].get("prompt", "")))}</div>'
        f'<table class="samples"><tr>{head}</tr>{body}</table>{rest}</div>'
    )


def _truth(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _sample_row(row: dict[str, Any]) -> str:
    correct = {None: "–", True: '<span class="right">✓ right</span>', False: '<span class="wrong">✗ wrong</span>'}[
        _truth(row.get("correct"))
    ]
    vote = "majority" if row.get("in_majority") else "–" if row.get("class") is None else "minority"
    answer = "none" if row.get("answer") is None else clip(row["answer"])
    cut = ' <span class="dim">cut off</span>' if row.get("finish_reason") == "length" else ""
    completion, answer = (f'<div class="text">{esc(text)}</div>' for text in (clip(row.get("completion", "")), answer))
    numbers = (esc(number(row.get("reward"))), esc(number(row.get("advantage"))), esc(number(row.get("length"))) + cut)
    cells = zip(SAMPLE_COLUMNS, (completion, answer, vote, correct, *numbers), strict=True)
    return "<tr>" + "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells) + "</tr>"
