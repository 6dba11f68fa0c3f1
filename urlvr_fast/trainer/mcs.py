"""`urlvr mcs`: which base model to train with RL, by how long it withstands training without labels (paper, section 5).

Each candidate is trained for a short while by majority voting, at one setting that is the same for all, and ranked by its Model Collapse
Step: a strong prior keeps agreeing with the truth for longer, and gains more from RL with labels, at a fraction of its cost. Runs are
ordinary run directories, `<out>/<model>/seed-<n>`: what is finished is not made again, and what was interrupted goes on.

The collapse step needs answers. On data without any, models are ranked by the label-free proxy `unanimity_step` instead, and every table
and file says so: it tells when nothing is left to sharpen, not whether the answers are right.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from urlvr_fast.monitor.collapse import THRESHOLDS, average_ranks, collapse_steps, later, reward_accuracy_series, unanimity_step
from urlvr_fast.monitor.detectors import STOP_RULE
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.logging import read_jsonl, write_atomic, write_json
from urlvr_fast.trainer.loop import train
from urlvr_fast.trainer.model import resolve_model

SETTING = Path(__file__).parents[1] / "mcs.yaml"  # for the bundled arithmetic models
PROXY = "unanimity_step (label-free proxy)"


@dataclass(frozen=True)
class SeedRun:
    """One run of a candidate. steps: measure -> collapse step, None where it was not reached by `last_step`."""

    seed: int
    run_dir: str
    last_step: int
    steps: dict[str, int | None]
    tokens: int  # sampled
    answer_known: bool  # whether the collapse step is exact


@dataclass(frozen=True)
class Candidate:
    model: str
    runs: list[SeedRun]

    def median(self, measure: str) -> float:
        """Over the seeds; infinite where the median seed did not get there."""
        return median(later(run.steps[measure]) for run in self.runs)

    def reach(self, measure: str) -> str:
        """`93 [71, >150]`: the median of the seeds, the earliest and the latest."""
        by_time = sorted(self.runs, key=lambda run: later(run.steps[measure]))

        def text(step: float, last: int) -> str:
            return f"{step:g}" if step < float("inf") else f">{last}"

        lowest, highest = (text(later(run.steps[measure]), run.last_step) for run in (by_time[0], by_time[-1]))
        return f"{text(self.median(measure), by_time[-1].last_step)} [{lowest}, {highest}]"


@dataclass(frozen=True)
class Ranking:
    measure: str  # what the candidates are ranked by
    candidates: list[Candidate]  # latest collapse first
    ranks: list[float]  # 1 is best; ties share the mean of their ranks


def rank_models(
    models: Sequence[str],
    *,
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> Ranking:
    """Train every model under every seed and rank them; writes `mcs.json` and `mcs.svg` into `out` as it goes.

    config_file, overrides: the setting, which may name neither model, seed nor run_dir: those are this function's. Raises ConfigError for
    that, for a model named twice and where a run in `out` is of another setting; and whatever `train` raises.
    """
    if not models or not seeds or len(set(models)) < len(models) or len(set(seeds)) < len(seeds):
        raise ConfigError("name each model and each seed once, and at least one of each")
    taken = [o for o in overrides if o.partition("=")[0] in ("model", "seed", "run_dir")]
    if taken:
        raise ConfigError(f"{taken[0]}: the model, the seed and the run's directory are for `urlvr mcs` to set (models, --seeds, --out)")
    if config_file is None and (own := [model for model in models if not model.startswith("bundled")]):
        raise ConfigError(f"{own[0]} is not bundled, and the setting of the bundled models would not suit it: give one with --config")
    sources = {model: resolve_model(model) for model in models}  # a name that is wrong is found out before the first run
    candidates = []
    for model in models:
        runs = []
        for seed in seeds:
            path = out / slug(model) / f"seed-{seed}"
            config = configuration.load(
                config_file or SETTING, [*overrides, f"model={json.dumps(sources[model])}", f"seed={seed}", f"run_dir={path}"]
            )
            refuse_other_ends(config)
            make_run(config, path, log)
            runs.append(measured(path, seed))
        candidates.append(Candidate(model, runs))
        write_ranking(out, rank(candidates))
    return rank(candidates)


def refuse_other_ends(config: Config) -> None:
    """A run that something else ends, or holds back, has no collapse step, and would rank as one that withstands."""
    actions = {STOP_RULE: config.monitor.on_collapse, **config.monitor.actions}
    acting = [f"{name}: {action}" for name, action in actions.items() if action not in ("off", "warn")]
    if acting or config.trainer.stop_after:
        what = acting[0] if acting else f"trainer.stop_after={config.trainer.stop_after}"
        raise ConfigError(f"{what} would end or slow runs before they collapse; `urlvr mcs` needs them to go on")


def make_run(config: Config, path: Path, log: Callable[[str], None]) -> None:
    """Make the run in `path`, or what is left of it."""
    state = json.loads((path / "run.json").read_text(encoding="utf-8")) if (path / "run.json").exists() else {}
    if state.get("status") in ("finished", "stopped"):
        before = configuration.flatten(configuration.load(path / "config.yaml"))
        changed = [
            key for key, value in configuration.flatten(config).items() if before[key] != value and not key.startswith(("run_dir", "log."))
        ]
        if changed:
            raise ConfigError(f"{path} was made with another {changed[0]}; compare models at one setting, or choose another --out")
        log(f"{path}: there already")
        return
    log(f"{path}: training")
    resume = bool(checkpoints(path))
    if train(config, resume=resume, overwrite=not resume) == "interrupted":
        raise KeyboardInterrupt


def measured(path: Path, seed: int) -> SeedRun:
    """The collapse steps of a run, windowed, and what it cost."""
    lines = [line for line in read_jsonl(path / "metrics.jsonl") if "reward" in line]
    if not lines:
        raise ConfigError(f"{path} has no training step; trainer.steps must be at least 1")
    steps, accuracy = reward_accuracy_series(lines)
    found: dict[str, int | None] = {PROXY: unanimity_step([line["step"] for line in lines], [line["majority_ratio"] for line in lines])}
    if steps:
        found |= {name: step.windowed for name, step in collapse_steps(steps, accuracy).items()}
    tokens = round(sum(line["rollout_tokens_per_s"] * line["rollout_s"] for line in lines))
    # A run that was stopped at its collapse is not censored there for the thresholds that it did not reach.
    return SeedRun(seed, str(path), lines[-1]["step"], found, tokens, bool(steps))


def rank(candidates: Sequence[Candidate]) -> Ranking:
    """By the smallest threshold that at least half of the candidates reach in their median seed (the paper's 1 % where they do)."""
    measures = list(THRESHOLDS) if all(run.answer_known for c in candidates for run in c.runs) else [PROXY]
    reached = [m for m in measures if 2 * sum(c.median(m) < float("inf") for c in candidates) >= len(candidates)]
    measure = reached[0] if reached else measures[-1]
    ordered = sorted(candidates, key=lambda c: -c.median(measure))
    return Ranking(measure, ordered, average_ranks([-c.median(measure) for c in ordered]))


def table(ranking: Ranking) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the ranked table: median over the seeds [earliest, latest] of what they are ranked by and of the paper's own
    measure, and the tokens spent. mcs.json has the others."""
    measures = [ranking.measure, *(["MCS"] if ranking.measure not in ("MCS", PROXY) else [])]
    header = ("rank", "model", *measures, "tokens")
    rows = [
        (f"{rank:g}", c.model, *(c.reach(m) for m in measures), f"{sum(run.tokens for run in c.runs):,}")
        for rank, c in zip(ranking.ranks, ranking.candidates, strict=True)
    ]
    return header, rows


def write_ranking(out: Path, ranking: Ranking) -> None:
    record: dict[str, Any] = {"measure": ranking.measure, "thresholds": THRESHOLDS, "variant": "windowed", "ranks": ranking.ranks}
    record["candidates"] = [asdict(candidate) for candidate in ranking.candidates]
    write_json(out / "mcs.json", record)
    write_atomic(out / "mcs.svg", [draw(ranking).encode()])


def draw(ranking: Ranking) -> str:
    """A row a model, best first: a dot for each seed, hollow at the end of a run that did not collapse, and a bar at the median."""
    left, width, row_height = 220, 420, 26
    last = max(run.last_step for c in ranking.candidates for run in c.runs)
    height = 50 + row_height * len(ranking.candidates)

    def x(step: float) -> float:
        return left + width * min(step, last) / last

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {height}" font-family="sans-serif" font-size="12">',
        f'<text x="{left}" y="16" font-weight="bold">{html.escape(ranking.measure)}, step (hollow: not reached)</text>',
    ]
    for index, candidate in enumerate(ranking.candidates):
        y = 40 + row_height * index
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{html.escape(candidate.model[-30:])}</text>')
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        middle = x(candidate.median(ranking.measure))
        parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y - 9}" y2="{y + 9}" stroke="#333" stroke-width="2"/>')
        for run in candidate.runs:
            step = run.steps[ranking.measure]
            fill = "#fff" if step is None else "#1f77b4"
            parts.append(f'<circle cx="{x(run.last_step if step is None else step):.1f}" cy="{y}" r="4.5" fill="{fill}" stroke="#1f77b4"/>')
    parts.append(
        f'<text x="{left}" y="{height - 6}">0</text><text x="{left + width}" y="{height - 6}" text-anchor="end">{last}</text></svg>\n'
    )
    return "\n".join(parts)


def slug(model: str) -> str:
    """A directory's name for a model: readable, and different for different models."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.")[-60:] or "model"
    return f"{readable}-{hashlib.sha256(model.encode()).hexdigest()[:6]}"


def summary(ranking: Ranking) -> Mapping[str, str]:
    """What the table is about, in words."""
    exact = ranking.measure != PROXY
    tokens = sum(run.tokens for c in ranking.candidates for run in c.runs)
    return {
        "ranked by": f"{ranking.measure}, windowed, later is better"
        + ("" if exact else "; the data has no answers, so this is a label-free proxy and not the collapse step"),
        "tokens sampled": f"{tokens:,}",
    }
