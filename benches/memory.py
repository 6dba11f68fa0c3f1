"""Memory of forward + backward in place beyond the logits: `python -m benches.memory 512 151936 bf16 cpp`, a process of its own.

Two numbers, as neither sees everything: what torch allocated (its profiler counts every block), and by how much the resident memory of the
process rose at most (which also counts the kernels' own scratch, and pages that are touched for the first time).
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benches.data import STATISTICS, Rows, Scenario, produced
from benches.machine import ROOT
from benches.peers import Statistics, providers

LIMIT = 4 << 20
TINY = 64


def _forward_backward(run: Statistics, rows: Rows) -> None:
    logits = produced(rows.logits)
    values = run(logits, rows.ids, rows.mask)
    gradient = torch.autograd.grad(values, logits, [rows.upstream[name] for name in STATISTICS])[0]
    assert gradient.data_ptr() == rows.logits.data_ptr()


class Allocated:
    """A context whose `value` is the largest sum of the blocks that torch held in it beyond what it held before, in bytes."""

    value = 0

    def __enter__(self) -> Allocated:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        events = [event for event in self._profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            self.value = max(self.value, held)


class Resident:
    """A context whose `value` is how far the resident memory of the process rose above what it was, at its highest, in bytes."""

    value = 0
    highest = 0  # of this process, before the last context began its high-water mark anew

    def __enter__(self) -> Resident:
        gc.collect()
        Resident.highest = max(Resident.highest, status("VmHWM") or 0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
            self._before, self._now = status("VmRSS") or 0, lambda: status("VmHWM") or 0
        except OSError:
            self._before, self._now = _ever(), _ever
        return self

    def __exit__(self, *_: object) -> None:
        self.value = max(0, self._now() - self._before)


def _ever() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status(field: str) -> int | None:
    """A line of /proc/self/status, in bytes."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def measure(scenario: Scenario, backend: str) -> dict:
    """In this process, which should have done nothing else."""
    device = torch.device("cuda" if backend in ("triton", "cuda") else "cpu")
    provider = next(p for p in providers() if p.name == f"urlvr_fast {backend}")
    run = provider.statistics(STATISTICS, True)
    for _ in range(2):  # code, thread pools and autograd's own tables are there before anything is counted
        warm = Rows(Scenario(2 * TINY, scenario.columns if device.type == "cuda" else TINY, scenario.dtype), device)
        _forward_backward(run, warm)
    rows = Rows(scenario, device)
    size = rows.logits.numel() * rows.logits.element_size()
    found = {"scenario": vars(scenario), "backend": backend, "logits_bytes": size, "limit_bytes": LIMIT}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _forward_backward(run, rows)
        return found | {"allocated_bytes": torch.cuda.max_memory_allocated() - before}
    with Resident() as resident:
        _forward_backward(run, rows)
    with Allocated():
        _forward_backward(run, warm)
    with Allocated() as allocated:
        _forward_backward(run, rows)
    return found | {"allocated_bytes": allocated.value, "resident_bytes": resident.value}


def in_fresh_process(scenario: Scenario, backend: str) -> dict:
    arguments = [str(scenario.rows), str(scenario.columns), scenario.dtype, backend]
    done = subprocess.run([sys.executable, "-m", "benches.memory", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"scenario": vars(scenario), "backend": backend, "absent": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    _rows, _columns, _dtype, _backend = sys.argv[1:]
    print(json.dumps(measure(Scenario(int(_rows), int(_columns), _dtype), _backend)))
