"""The matrix of runs: every run is named by the hash of its configuration and its base model, made once, and shared between claims.

A result is a small JSON file with the run's curves, in `experiments/results/<key>.json`. A key covers all that decides what is learnt: the
resolved configuration (without paths) and the weights it started from. It does not cover this library's code: after a change of the
trainer, `--fresh` makes them anew. Runs go through `urlvr_fast.trainer.loop.train`, as a user's would, on the `hf` engine: at this size an
engine's start takes longer than it saves.

One process a core, one thread each: these models are too small to gain from a second thread.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MACHINE = "machine.json"  # what the newest of them were made on
# What a result keeps of metrics.jsonl: what claims and detectors read.
KEPT = (
    *("reward", "ground_truth_reward", "label_accuracy", "reward_accuracy", "majority_reward_accuracy", "pseudo_label_accuracy"),
    *("majority_ratio", "parse_rate", "point_biserial", "actor_entropy", "response_length", "truncated_rate", "repetition"),
    *("top_answer_share", "flat_groups", "kl_start", "eval/greedy_accuracy", "eval/avg@4", "eval/maj@4", "eval/anchor_agreement"),
)


@dataclass(frozen=True)
class Spec:
    """One run: a base model and the options in which it differs from `settings.COMMON`."""

    base: str  # a name of `bases.BASES`
    options: tuple[str, ...]  # sorted `a.b=c` overrides
    seed: int

    @property
    def title(self) -> str:
        return f"{self.base} {' '.join(self.options)} seed={self.seed}"


@dataclass
class Result:
    """The curves of one run. `steps` and each of `curves` run in parallel; None where a figure was not taken at a step."""

    spec: Spec
    key: str
    steps: list[int]
    curves: dict[str, list[float | None]]
    status: str
    tokens: int  # sampled in training
    cpu_s: float
    detections: list[dict[str, Any]] = field(default_factory=list)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which `name` was taken, and its values there."""
        pairs = [(step, value) for step, value in zip(self.steps, self.curves.get(name, []), strict=False) if value is not None]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def values(self, name: str) -> list[float]:
        return self.curve(name)[1]

    def lines(self) -> list[dict[str, Any]]:
        """As the run's metrics.jsonl had them."""
        return [
            {"step": step, **{name: values[i] for name, values in self.curves.items() if values[i] is not None}}
            for i, step in enumerate(self.steps)
        ]


def run_all(
    specs: Iterable[Spec], *, steps: int | None = None, results: Path = RESULTS, workers: int | None = None, fresh: bool = False
) -> dict[Spec, Result]:
    """The result of each spec, made now where it is not there yet; what is finished is kept whatever happens to the rest.

    steps: for trying the experiments out: so many in the place of each run's own (other keys, so nothing real is replaced). fresh: make all
    of these runs again; each result is replaced when its run is through.
    """
    from experiments.settings import resolved
    from urlvr_fast.trainer.logging import cpu_name, versions

    wanted = {spec: resolved(spec, steps) for spec in dict.fromkeys(specs)}
    keys = {spec: key_of(spec, config) for spec, config in wanted.items()}
    results.mkdir(parents=True, exist_ok=True)
    missing = [spec for spec, key in keys.items() if fresh or not (results / f"{key}.json").exists()]
    if missing:
        (results / MACHINE).write_text(json.dumps({"machine": cpu_name(), "versions": versions()}, indent=1) + "\n", encoding="utf-8")
    started = time.monotonic()
    for done, line in enumerate(_run_missing(missing, steps, results, workers), 1):
        left = (time.monotonic() - started) / done * (len(missing) - done)
        print(f"[{done}/{len(missing)}, about {left / 60:.0f} min left] {line}", flush=True)
    return {spec: load(results / f"{key}.json") for spec, key in keys.items()}


def _run_missing(missing: Sequence[Spec], steps: int | None, results: Path, workers: int | None) -> Iterator[str]:
    workers = workers or len(os.sched_getaffinity(0))
    if not missing:
        return
    # Spawned, with one thread from the start: OpenMP's pool must not be sized for the whole machine.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for finished in as_completed([pool.submit(_run, (spec, steps, results)) for spec in missing]):
                yield finished.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or a run that fails would be heard of an hour later
            raise


def _run(task: tuple[Spec, int | None, Path]) -> str:
    """Make one run in this process and write its result."""
    from experiments.settings import resolved
    from urlvr_fast.trainer.logging import read_jsonl
    from urlvr_fast.trainer.loop import train

    spec, steps, results = task
    config = resolved(spec, steps)
    key = key_of(spec, config)
    started = time.process_time()
    with tempfile.TemporaryDirectory(prefix="urlvr-paper-") as directory, open(os.devnull, "w") as silence:
        config.run_dir = f"{directory}/run"
        saved = os.dup(1)
        os.dup2(silence.fileno(), 1)  # a hundred runs' progress is no progress
        try:
            status = train(config)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        lines = read_jsonl(Path(config.run_dir) / "metrics.jsonl")
        run = json.loads((Path(config.run_dir) / "run.json").read_text(encoding="utf-8"))
    result = Result(
        spec=spec,
        key=key,
        steps=[line["step"] for line in lines],
        curves={name: [_rounded(line.get(name)) for line in lines] for name in KEPT if any(name in line for line in lines)},
        status=status,
        tokens=round(sum(line.get("rollout_tokens_per_s", 0) * line.get("rollout_s", 0) for line in lines)),
        cpu_s=round(time.process_time() - started, 1),
        detections=[{"step": d["step"], "detector": d["detector"]} for d in run.get("detections", [])],
    )
    temporary = results / f".{key}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(result)) + "\n", encoding="utf-8")
    temporary.replace(results / f"{key}.json")
    return f"{spec.title}: {result.cpu_s:.0f} s"


def load(path: Path) -> Result:
    record = json.loads(path.read_text(encoding="utf-8"))
    spec = record.pop("spec")
    return Result(spec=Spec(spec["base"], tuple(spec["options"]), spec["seed"]), **record)


def key_of(spec: Spec, config: Any) -> str:
    """Hash of what decides the run: its configuration and the weights of its base model."""
    from experiments.bases import fingerprint
    from urlvr_fast.trainer import config as configuration

    # Only what is not a default: an option that is added to the trainer later leaves the keys as they are.
    defaults = configuration.flatten(configuration.Config())
    record = {name: value for name, value in configuration.flatten(config).items() if value != defaults[name]}
    for name in [name for name in record if name.startswith(("model", "run_dir", "log."))]:
        del record[name]
    for name in ("data", "eval.data"):
        if Path(record.get(name, "")).is_file():
            record[name] = hashlib.sha256(Path(record[name]).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([fingerprint(spec.base), record], sort_keys=True).encode()).hexdigest()[:20]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")
