"""A process that does one thing at a time, when it is told to, and says how long it took.

A `Worker` is a spawned process that owns one end of a pipe. It greets with a dictionary about itself, then answers every command with a
dictionary of seconds, bytes or whatever the command is about. One that fails answers with its error and is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benches.memory import Allocated, Resident, status

LEARN, STEP, FLOOR, GRADIENT, PEAK, STOP = "learn", "step", "floor", "gradient", "peak", "stop"
RESIDENT, ALLOCATED = "resident", "allocated"
SETTLE = 0.1  # seconds between two turns: threads of the last one may still be spinning


class WorkerError(RuntimeError):
    """What a worker died of; `log` is the end of what it printed."""

    log = ""


class Worker:
    def __init__(
        self, name: str, log: Path, main: Callable[..., None], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        """environment: variables that must stand before the process starts."""
        context = multiprocessing.get_context("spawn")
        self.name, self._log = name, log
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(log, main, theirs, *arguments), name=name, daemon=True)
        before = dict(os.environ)
        os.environ |= environment or {}
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ |= before
        theirs.close()

    def about(self) -> dict[str, Any]:
        """What it greeted with, once it is ready."""
        return self._answer()

    def ask(self, command: str) -> dict[str, Any]:
        time.sleep(SETTLE)
        self._pipe.send(command)
        return self._answer()

    def stop(self) -> None:
        """End it, whatever it is doing."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def _answer(self) -> dict[str, Any]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = {"error": f"it ended with status {self._process.exitcode}"}
        if "error" not in answer:
            return answer
        error = WorkerError(f"{self.name}: {answer['error']}")
        error.log = self._log.read_text(errors="replace")[-4000:]
        raise error


def _run(log: Path, main: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    with log.open("w") as file:  # what libraries print belongs to no table
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # nothing is downloaded
    try:
        main(pipe, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # the parent has had enough
    except Exception as error:  # noqa: BLE001 (the parent raises it)
        traceback.print_exc()
        pipe.send({"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"})


def about_threads() -> dict[str, int]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return {"threads": torch.get_num_threads(), "cores": affinity}


class Seconds:
    """A context that counts seconds, as `benches.memory` has contexts that count bytes."""

    value = 0.0

    def __enter__(self) -> Seconds:
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.value = time.perf_counter() - self._begun


def probe(command: str) -> Seconds | Resident | Allocated:
    """What observes the learner under this command."""
    probes: dict[str, type[Seconds | Resident | Allocated]] = {LEARN: Seconds, RESIDENT: Resident, ALLOCATED: Allocated}
    return probes[command]()


def peak() -> dict[str, int]:
    return {"bytes": max(Resident.highest, status("VmHWM") or 0)}
