"""`urlvr ttt`: test-time training. The prompts to be answered are the training set: majority voting on them, without labels, and their
votes before and after (paper, section 4.6: with few prompts this sharpens without collapsing).

It is an ordinary run with the prompts as training and evaluation data, all of them in every batch as far as they fit, and the default
stop rule set to go back to the last evaluation before the answers that the model was sure of began to change. Answers, where the file has
any, are only measured against.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from urlvr_fast.tasks.prompt_set import is_procedural, load_prompts
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.logging import encode_json, read_jsonl, write_atomic
from urlvr_fast.trainer.loop import train
from urlvr_fast.trainer.run_dir import default_run_dir

MOST_PROMPTS = 64  # in a batch


@dataclass(frozen=True)
class Answer:
    """The vote on one prompt: the winning answer and its share of the rollouts, before and after."""

    prompt_id: int
    prompt: str
    before: str | None
    share_before: float
    after: str | None
    share_after: float


def configure(prompts: str, *, model: str | None = None, config_file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a test-time training run on the prompts of a file or data set. Options in the file or as overrides win.

    Raises ConfigError and DataError.
    """
    if is_procedural(prompts):
        raise ConfigError(f"{prompts} draws its prompts; test-time training is on prompts that are there: name a file of them")
    given = configuration.load(config_file, overrides)
    rows = load_prompts(
        prompts,
        split=given.prompts.split,
        prompt_column=given.prompts.prompt_column,
        answer_column=given.prompts.answer_column,
        limit=given.prompts.limit,
    )
    defaults = (
        f"trainer.prompts_per_step={min(len(rows), MOST_PROMPTS)}",
        "trainer.steps=50",
        "trainer.eval_every=5",
        "trainer.save_every=0",
        "monitor.on_collapse=rollback",
    )
    named = {o.partition("=")[0] for o in overrides} | _keys(config_file)
    config = configuration.load(
        config_file,
        [
            *(d for d in defaults if d.partition("=")[0] not in named),
            *overrides,
            *(f"data={json.dumps(prompts)}", f"eval.data={json.dumps(prompts)}", f"eval.prompts={len(rows)}"),
            f"eval.split={json.dumps(given.prompts.split)}",
            *([] if model is None else [f"model={json.dumps(model)}"]),
        ],
    )
    if len(rows) == 1:
        raise ConfigError(f"{prompts} has one prompt; test-time training wants at least two, or its detectors have nothing to compare")
    config.run_dir = config.run_dir or default_run_dir("ttt")
    return config


def _keys(config_file: str | Path | None) -> set[str]:
    """The options that a YAML file sets, dotted."""
    import yaml

    if config_file is None:
        return set()
    tree = yaml.safe_load(Path(config_file).read_text(encoding="utf-8")) or {}
    return {f"{section}.{name}" for section, options in tree.items() if isinstance(options, dict) for name in options} | set(tree)


def train_at_test_time(config: Config, *, overwrite: bool = False) -> tuple[str, list[Answer]]:
    """Train; returns how it ended and the votes before and after, which are also in `answers.jsonl` of the run.

    A run that was interrupted has no votes after training, and then there is no answer and no such file.
    """
    status = train(config, overwrite=overwrite)
    assert config.run_dir is not None
    path = Path(config.run_dir)
    found = answers(path)
    if found:
        write_atomic(path / "answers.jsonl", [encode_json(vars(answer)) + b"\n" for answer in found])
    return status, found


def answers(run_dir: Path) -> list[Answer]:
    """The votes of a run's evaluation prompts before training and after it; none where it was interrupted before those after."""
    rows = read_jsonl(run_dir / "votes.jsonl")
    last = max(row["step"] for row in rows)
    if last == 0:
        return []
    after = {row["prompt_id"]: row for row in rows if row["step"] == last}
    return [
        Answer(
            row["prompt_id"],
            row["prompt"],
            row["answer"],
            row["share"],
            after[row["prompt_id"]]["answer"],
            after[row["prompt_id"]]["share"],
        )
        for row in rows
        if row["step"] == 0
    ]
