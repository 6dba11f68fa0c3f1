"""The run directory: where it is, whether it may be written to, and what a resumed run starts from."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.logging import read_jsonl

CONFIG_FILE = "config.yaml"
# All that a run writes. Anything else in the directory is somebody's, and is neither deleted nor written beside.
RUN_FILES = (
    CONFIG_FILE,
    "run.json",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "anchors.json",
    "votes.jsonl",
    "answers.jsonl",
    "report.html",
    "checkpoints",
    "tensorboard",
    "wandb",
)
# Options that may change between the parts of one run: they do not change what is learnt. A change of any other makes it another run.
MAY_CHANGE = (
    *(
        "run_dir",
        "model",
        "log.",
        "eval.samplings",
        "eval.group_size",
        "eval.temperature",
        "eval.top_p",
        "trainer.stop_after",
        "trainer.save_every",
        "trainer.keep_checkpoints",
        "trainer.eval_every",
    ),
    *("trainer.samples_", "trainer.micro_batch_tokens", "trainer.chunk_bytes", "trainer.gradient_checkpointing", "trainer.threads"),
    *("trainer.device", "trainer.max_bad_steps", "rollout.engine", "rollout.logp_gap_", "rollout.max_sequences"),
    *(
        "monitor.on_collapse",
        "monitor.actions",
        "monitor.thresholds",
        "monitor.rate_factor",
        "monitor.stop_at_collapse",
        "monitor.kl_every",
    ),
    *("rollout.kv_cache_gib", "rollout.gpu_memory", "rollout.batch_prompts"),
)


def default_run_dir(name: str) -> str:
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def check(config: Config, *, resume: bool, overwrite: bool) -> Path | None:
    """Whether the run may use `config.run_dir`; writes nothing. Returns the checkpoint to resume from, if any.

    Raises ConfigError: the directory holds something that is not a run's; it holds a run and neither resume nor overwrite was asked for;
    the model to start from lies in what would be deleted; there is nothing to resume; the configuration is not that of the run.
    """
    path = _path(config)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"run_dir={path} is not a directory")
    strangers = [name for name in _entries(path) if name not in RUN_FILES and not (name.startswith(".") and name.endswith(".tmp"))]
    if strangers:
        raise ConfigError(f"run_dir={path} holds {strangers[0]!r}, which is not a run's; nothing was touched. Name another directory")
    found = checkpoints(path)
    if resume:
        if not _entries(path):
            raise ConfigError(f"there is no run in {path} to resume")
        if not found:
            raise ConfigError(f"{path} has no complete checkpoint to resume from; start it again with --overwrite")
        _refuse_changes(path, config)
        return found[-1]
    # A run that ended before its first step has nothing to lose.
    if not overwrite and (found or any(line["step"] > 0 for line in read_jsonl(path / "metrics.jsonl"))):
        raise ConfigError(f"{path} already holds a run; use --resume to go on with it, --overwrite to delete it, or another run_dir")
    if Path(config.model).expanduser().resolve().is_relative_to(path.resolve()):
        raise ConfigError(f"model={config.model} lies in run_dir={path}, which is about to be deleted; name another run_dir")
    return None


def create(config: Config, *, resume: bool) -> Path:
    """Make the directory that `check` has passed, emptied unless the run is resumed, and write the resolved configuration into it."""
    path = _path(config)
    if not resume and path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    configuration.save(config, path / CONFIG_FILE)
    return path


def _entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []


def _path(config: Config) -> Path:
    if config.run_dir is None:
        raise ConfigError("run_dir is not set")
    return Path(config.run_dir)


def _refuse_changes(path: Path, config: Config) -> None:
    before = configuration.flatten(configuration.load(path / CONFIG_FILE))
    # With a constant rate a run can be made longer; a cosine is laid out over its steps.
    may_change = (*MAY_CHANGE, "trainer.steps") if config.trainer.lr_schedule == "constant" else MAY_CHANGE
    changed = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in configuration.flatten(config).items()
        if before[key] != value and not key.startswith(may_change)
    ]
    if changed:
        raise ConfigError(f"cannot resume {path} with another configuration: {'; '.join(changed)}")
