"""The tasks of the package reasoning-gym: `reasoning_gym:NAME`, say `reasoning_gym:spell_backward`.

A problem is right when the data set's own `score_answer` gives it 1 or more; its shaped scores below 1 are wrong answers here. Some of
these functions call `eval` on what the model wrote, so they run in a worker process (`reasoning_gym_worker.py`) that refuses what is not
a literal or plain arithmetic, with a time and a memory limit. A score that runs out of either is 0 and is counted.

Entries stay inside the checker: the audit map holds an entry's number and its answer, and no column holds anything of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from urlvr_fast.tasks.answer_tags import tagged_answer
from urlvr_fast.tasks.draws import check_split, split_of
from urlvr_fast.tasks.readers import DataError

PREFIX = "reasoning_gym:"
DEFAULT_LIMIT = 512  # some data sets take milliseconds a problem
INSTALL = "pip install reasoning-gym"
START_SECONDS = 120.0  # importing it on a busy machine
CACHE_SIZE = 65536  # scores that a checker remembers
# A thread per core would reserve most of the address space that the worker may use.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclasses.dataclass
class Draw:
    """Position i of `questions`, `answers` and `entries` is one problem."""

    questions: list[str]
    answers: list[str]
    entries: list[dict[str, Any]]
    checker: GymAnswers


def draw(name: str, split: str = "train", *, limit: int | None = None, seed: int = 0, **options: Any) -> Draw:
    """The first `limit` (unset: 512) distinct questions of the split; fewer where the data set has fewer.

    name: a data set of reasoning-gym. options: fields of its configuration, except `seed` and `size`. The SHA-256 of a question decides
    its split, as for the other tasks, so the test split shares no question with any training seed.

    Raises DataError: reasoning-gym is not installed, an unknown name, split or option, or a value that the configuration refuses.
    """
    dataset = create(name, seed, 10 * (DEFAULT_LIMIT if limit is None else limit) + 100, options)
    try:
        check_split(PREFIX + name, split)
    except ValueError as error:
        raise DataError(str(error)) from None
    entries: dict[str, dict[str, Any]] = {}
    for index in range(len(dataset)):
        if len(entries) == (DEFAULT_LIMIT if limit is None else limit):
            break
        entry = dataset[index]
        if split_of(entry["question"]) == split:
            entries.setdefault(entry["question"], entry)
    if not entries:
        raise DataError(f"{PREFIX}{name}: the {split} split is empty with these options")
    kept = list(entries.values())
    answers = [json.dumps({"entry": number, "answer": entry["answer"]}, default=str) for number, entry in enumerate(kept)]
    return Draw(list(entries), answers, kept, GymAnswers(dataset, kept))


def create(name: str, seed: int, size: int, options: Mapping[str, Any]) -> Any:
    """The data set of reasoning-gym; DataError when that is not possible."""
    try:
        package, datasets = importlib.import_module("reasoning_gym"), importlib.import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise DataError(f"{PREFIX}{name} needs the package reasoning-gym ({error}): {INSTALL}") from None
    if name not in datasets:
        near = difflib.get_close_matches(name, datasets, 1, 0.5)
        raise DataError(
            f"reasoning-gym {importlib.metadata.version('reasoning-gym')} has no data set {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" It has {len(datasets)}, such as {', '.join(sorted(datasets)[:5])}"
        )
    valid = [field.name for field in dataclasses.fields(datasets[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        if option not in valid:
            close = difflib.get_close_matches(str(option), valid, 1, 0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise DataError(f"{PREFIX}{name} has no option {option!r}{hint} It has: {', '.join(valid) or 'none'}")
    try:
        return package.create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:  # noqa: BLE001  a configuration may raise anything on a value that it did not expect
        raise DataError(f"{PREFIX}{name} refuses its options ({type(error).__name__}: {error})") from None


class GymAnswers:
    """An `AnswerChecker`: the last `<answer>…</answer>`, or, without one, the whole completion, stripped; blank is no answer.

    Two votes are one answer when they are the same text. `correct` asks the data set. timeout_s: of one score. memory_mb: of the worker.
    `cut_off` counts the scores that ended without a verdict. Usable from any thread.
    """

    def __init__(self, dataset: Any, entries: list[dict[str, Any]], timeout_s: float = 5.0, memory_mb: int = 4096) -> None:
        self.dataset, self.entries = dataset, entries
        self.timeout_s, self.memory_mb = timeout_s, memory_mb
        self.cut_off = 0
        self._scores: dict[tuple[int, str], float] = {}
        self._worker: Worker | None = None
        self._lock = threading.Lock()

    def extract(self, completion: str) -> str | None:
        return tagged_answer(completion).strip() or None

    def canonical(self, answer: str) -> str:
        return answer.strip()

    def equivalent(self, a: str, b: str) -> bool:
        return a.strip() == b.strip()

    def correct(self, given: str, answer: str) -> bool:
        """Whether `score_answer` gives 1 or more for the entry that `answer`, from the audit map, names."""
        return self.score(given, json.loads(answer)["entry"]) >= 1

    def score(self, given: str, entry: int) -> float:
        """The data set's own score of an answer; 0.0 where it raises or is cut off. DataError when no worker can be started."""
        with self._lock:
            if (entry, given) not in self._scores:
                if self._worker is None or self._worker.owner != os.getpid():  # forked: the pipes are the parent's
                    self._worker = Worker(self.dataset, self.entries, self.memory_mb)
                score = self._worker.score(given, entry, self.timeout_s)
                if score is None:
                    self.cut_off += 1
                    self._worker.close()
                    self._worker = None
                if len(self._scores) >= CACHE_SIZE:
                    self._scores.clear()
                self._scores[entry, given] = score or 0.0
            return self._scores[entry, given]


class Worker:
    """One process of `reasoning_gym_worker.py`. It gets pickles, which are ours, and answers in JSON, since it read what a model wrote."""

    def __init__(self, dataset: Any, entries: list[dict[str, Any]], memory_mb: int) -> None:
        self.owner = os.getpid()
        script = Path(__file__).with_name("reasoning_gym_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(memory_mb << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is ours
            env={**os.environ, **ONE_THREAD},
        )
        self.close = weakref.finalize(self, end, self.process)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.unread = b""
        self.send((type(dataset), dataset.config, entries))
        if self.receive(time.monotonic() + START_SECONDS) != "ready":
            self.close()
            raise DataError(
                f"the process that scores answers of reasoning-gym did not start (code {self.process.returncode}). It needs "
                f"{memory_mb} MB of address space"
            )

    def score(self, given: str, entry: int, timeout_s: float) -> float | None:
        """None after a timeout or a crash; then the process is of no further use."""
        self.send((given, entry, timeout_s))
        reply = self.receive(time.monotonic() + timeout_s)
        return float(reply) if isinstance(reply, (int, float)) else None

    def send(self, message: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a dead process: `receive` finds out
            self.process.stdin.write(pickle.dumps(message))
            self.process.stdin.flush()

    def receive(self, deadline: float) -> Any:
        """The next reply; None at the deadline (time.monotonic) or when the process ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                received = os.read(self.process.stdout.fileno(), 65536)
                if not received:
                    return None
                self.unread += received
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
