"""Timing: all cases in one process, in rounds, every round in a random order."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.table import ALONE, PRODUCT

SAMPLE_MS = 2.0  # calls shorter than this are repeated within a sample, where nothing must be prepared between them
HOT_BELOW = 16 << 20  # bytes of logits up to which a CPU is measured with whatever its caches hold


@dataclass(frozen=True)
class Target:
    """median <= reach · factor · median(of), or with `faster` median(of) >= reach · median. `of` is a measure or a provider."""

    of: str
    reach: float
    factor: float = 1.0
    faster: bool = False


@dataclass
class Case:
    """One measure of one provider. `load` imports and returns what is timed; what `prepare` returns is handed to it."""

    measure: str
    provider: str
    load: Callable[[], Callable[[Any], Any]]
    bytes: int
    prepare: Callable[[Callable[[Any], Any]], Any] | None = None
    check: Callable[[Any], dict[str, float]] | None = None
    threads: int | None = None  # None: all
    targets: tuple[Target, ...] = ()
    absent: str = ""
    run: Callable[[Any], Any] | None = None
    calls: int = 1
    errors: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)  # ms a call
    host_ms: float = math.nan  # until a call on an idle GPU comes back, which may be before its end; median of HOST_CALLS
    warmed_up: float = 0.0  # seconds for import, compilation, the first call and its comparison
    spent: float = 0.0  # seconds for the samples, preparation included


@dataclass(frozen=True)
class Limits:
    rounds: int = 25
    seconds: float = 3.0  # for each case of a scenario, preparation included
    least: int = 3  # rounds that a case gets beyond its time, as long as that is not doubled
    load_until: float = math.inf  # time.monotonic() after which no case is begun any more
    sample_until: float = math.inf  # and after which one sample has to do

    @staticmethod
    def within(rounds: int, seconds: float, budget: float) -> Limits:
        """So that all cases together take about `budget` seconds from now on: the first ones are begun, the others are absent."""
        now = time.monotonic()
        return Limits(rounds, seconds, load_until=now + 0.6 * budget, sample_until=now + 0.8 * budget)

    def allow(self, case: Case) -> bool:
        """Whether a case takes part in one more round; one is for everybody."""
        taken = len(case.samples)
        if taken and time.monotonic() > self.sample_until:
            return False
        return taken == 0 or case.spent < self.seconds or (taken < self.least and case.spent < 2 * self.seconds)


# Seconds that all cores are kept busy for before a sample on a CPU. The threads of an OpenMP pool go on spinning for some milliseconds
# after their work, and torch.compile brings a pool of its own: whoever came after it had a core less. And the cores of a virtual machine
# that have been idle may come back as two halves of one real core, which doubled the time of what computes much and left copies alone.
SETTLE = 0.03


CYCLES_A_MS = 2_000_000  # of a GPU, about
LONGEST_HEAD_START = 5.0  # ms that a GPU is kept busy before a sample, so that what a call launches is there when its time begins
HOST_CALLS = 5


class Unusable(Exception):
    """The GPU does nothing more in this process since a call of this case."""

    def __init__(self, case: Case) -> None:
        super().__init__(f"the GPU is unusable after {case.provider or case.measure}: {case.absent}")
        self.case = case


class Stopwatch:
    """Times single calls on a device, with cold caches where `cold`."""

    def __init__(self, device: torch.device, cold: bool) -> None:
        self.device, self.gpu = device, device.type == "cuda"
        self.busy = torch.ones(256, 256)
        self.flushed = torch.zeros(2 * _cache_bytes(device) // 4, device=device) if cold else None

    def flush(self) -> None:
        if self.flushed is None:
            return
        if not self.gpu:
            until = time.perf_counter() + SETTLE
            while time.perf_counter() < until:
                self.busy.mm(self.busy)
        self.flushed.sum()  # by reading: lines that were written would cost the next call their way back to memory

    def once(self, run: Callable[[Any], Any], state: Any, calls: int, host_ms: float = 0.0) -> tuple[float, Any]:
        """Milliseconds a call, and what the last call returned. A GPU is kept busy while the host, which needs `host_ms` for a call,
        launches: the time is the device's own, and none that it waits for a host with nothing else to do."""
        self.flush()
        if self.gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(CYCLES_A_MS * min(0.1 + 2 * calls * host_ms, LONGEST_HEAD_START)))
            start.record()
            for _ in range(calls):
                result = run(state)
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / calls, result
        begin = time.perf_counter()
        for _ in range(calls):
            result = run(state)
        return (time.perf_counter() - begin) * 1e3 / calls, result


def _cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max([int(size[:-1]) * 1024 for size in sizes if size.endswith("K")], default=32 << 20)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warm_up(case: Case, watch: Stopwatch) -> None:
    """Import, compile, compare with float64, and choose the calls a sample. A provider that fails here is absent, with the reason."""
    if case.absent:
        return
    try:
        with threads(case.threads):
            case.run = case.load()
            _, result = _call(case, watch)
            if case.check is not None:
                case.errors = case.check(result)
            del result
            if watch.gpu:
                case.host_ms = statistics.median(_host_ms(case) for _ in range(HOST_CALLS))
            if case.prepare is None and watch.flushed is None:
                took, _ = _call(case, watch)
                case.calls = max(1, round(SAMPLE_MS / max(took, 1e-4)))
    except Exception as error:  # noqa: BLE001 (whatever a peer raises is why it is not in the table)
        _give_up(case, error, watch)


def _give_up(case: Case, error: Exception, watch: Stopwatch) -> None:
    case.absent, case.run, case.samples = _reason(error), None, []
    if watch.gpu:
        try:
            torch.cuda.synchronize()
        except RuntimeError as fault:
            raise Unusable(case) from fault


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}" if text else type(error).__name__


def _prepared(case: Case) -> Any:
    assert case.run is not None
    return None if case.prepare is None else case.prepare(case.run)


def _call(case: Case, watch: Stopwatch) -> tuple[float, Any]:
    return watch.once(_timed(case), _prepared(case), case.calls, 0.0 if math.isnan(case.host_ms) else case.host_ms)


def _host_ms(case: Case) -> float:
    """Until a call on an idle GPU comes back."""
    state, run = _prepared(case), _timed(case)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(state)
    return (time.perf_counter() - begin) * 1e3


def _timed(case: Case) -> Callable[[Any], Any]:
    """A prepared case times what its preparation returned; the others time `run`."""
    return case.run if case.prepare is None else lambda state: state()


def sample(case: Case, watch: Stopwatch) -> None:
    begin = time.perf_counter()
    with threads(case.threads):
        if case.threads is not None:
            _call(case, watch)  # the pool of threads has just changed
        took, _ = _call(case, watch)
    case.samples.append(took)
    case.spent += time.perf_counter() - begin


def interleave(cases: list[Case], watch: Stopwatch, limits: Limits, seed: int = 0) -> None:
    """Fill `samples` of all cases that run. Raises Unusable where one of them breaks the GPU."""
    order = random.Random(seed)
    for case in cases:
        begin = time.perf_counter()
        if time.monotonic() > limits.load_until and case.provider:  # what everything is compared with takes part in any case
            case.absent = case.absent or "the --budget was spent"
        warm_up(case, watch)
        case.warmed_up = time.perf_counter() - begin
    for _ in range(limits.rounds):
        due = [case for case in cases if case.run is not None and limits.allow(case)]
        order.shuffle(due)
        for case in due:
            try:
                sample(case, watch)
            except Exception as error:  # noqa: BLE001 (as in warm_up: out of memory, most likely)
                _give_up(case, error, watch)
    for case in cases:
        case.run = None  # and with it whatever memory it holds


def floors(logits: Tensor, destination: Callable[[], Tensor]) -> list[Case]:
    """`copy_` and `clone()` of the logits, which everything is compared with, and on a CPU a product with one thread and with all: on a
    virtual machine what two threads gain there says whether they have a core each at the moment."""
    size = 2 * logits.numel() * logits.element_size()
    found = [
        Case("copy_", "", lambda: lambda _: destination().copy_(logits), size),
        Case("clone()", "", lambda: lambda _: logits.clone(), size),
    ]
    if logits.device.type == "cpu":
        square = torch.ones(256, 256)
        product = Case(PRODUCT, "", lambda: lambda _: square.mm(square), 3 * 4 * 256**2)
        found += [product, Case(PRODUCT + ALONE, "", product.load, product.bytes, threads=1)]
    return found
