"""The run directory: where it is, whether it may be written to, and what a resumed run starts from."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import Config, ConfigError

CONFIG_FILE = "config.yaml"
# Options that may change between the parts of one run; a change of any other makes it another run.
MAY_CHANGE = (
    "run_dir",
    "trainer.stop_after",
    "trainer.save_every",
    "trainer.keep_checkpoints",
    "trainer.eval_every",
    "trainer.samples",
    "log.",
    "rollout.engine",
)


def default_run_dir(name: str) -> str:
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def is_run(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


def check(config: Config, *, resume: bool, overwrite: bool) -> Path | None:
    """Whether the run may use `config.run_dir`; writes nothing. Returns the checkpoint to resume from, if any.

    Raises ConfigError: the directory holds a run and neither resume nor overwrite was asked for; it is not a run's and not empty; there is
    nothing to resume; the configuration differs from the one the run was started with.
    """
    path = _path(config)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run_dir={path} is a file")
    occupied = path.is_dir() and any(path.iterdir())
    if occupied and not is_run(path):
        raise ConfigError(f"run_dir={path} is not empty and not a run's; nothing in it was touched. Name another directory")
    if resume:
        if not occupied:
            raise ConfigError(f"there is no run in {path} to resume")
        found = checkpoints(path)
        if not found:
            raise ConfigError(f"{path} has no complete checkpoint to resume from; start it again with --overwrite")
        _refuse_changes(path, config)
        return found[-1]
    # A run that failed before its first step has nothing to lose.
    if occupied and not overwrite and (checkpoints(path) or (path / "metrics.jsonl").is_file()):
        raise ConfigError(f"{path} already holds a run; use --resume to go on with it, --overwrite to delete it, or another run_dir")
    return None


def create(config: Config, *, resume: bool) -> Path:
    """Make the directory `check` has passed, emptied unless the run is resumed, and write the resolved configuration into it."""
    path = _path(config)
    if not resume and path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    configuration.save(config, path / CONFIG_FILE)
    return path


def _path(config: Config) -> Path:
    if config.run_dir is None:
        raise ConfigError("run_dir is not set")
    return Path(config.run_dir)


def _refuse_changes(path: Path, config: Config) -> None:
    before = configuration.flatten(configuration.load(path / CONFIG_FILE))
    changed = [
        f"{key} was {before[key]!r} and is {value!r}"
        for key, value in configuration.flatten(config).items()
        if before[key] != value and not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(f"cannot resume {path} with another configuration: {'; '.join(changed)}")
