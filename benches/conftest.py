"""pytest-benchmark on the same cases: `pytest benches --benchmark-only`, one test for each measure of each provider.

pytest-benchmark runs one case after the other, so a slow minute falls on a few of them: compare with `python -m benches`, use this to keep
histories and to compare two commits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches.data import Rows, Scenario
from benches.measure import HOT_BELOW, Case, Stopwatch
from benches.peers import providers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCENARIO = Scenario(64, 151936)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    everybody = providers()
    there = [p for p in everybody if not p.absent(DEVICE)]
    cases = metafunc.module.op.cases(Rows(Scenario(8, 64), DEVICE), there)
    params = [pytest.param((c.measure, c.provider), id=f"{c.provider}: {c.measure}") for c in cases]
    for provider in everybody:
        if reason := provider.absent(DEVICE):
            params.append(pytest.param(None, id=provider.name, marks=pytest.mark.skip(reason=f"{provider.name}: {reason}")))
    metafunc.parametrize("case", params, indirect=True)


@pytest.fixture(scope="session")
def rows() -> Rows:
    return Rows(SCENARIO, DEVICE)


@pytest.fixture
def case(request: pytest.FixtureRequest, rows: Rows) -> Case:
    there = [p for p in providers() if not p.absent(DEVICE)]
    return next(c for c in request.module.op.cases(rows, there) if (c.measure, c.provider) == request.param)


@pytest.fixture
def timed(benchmark: Callable, rows: Rows) -> Callable[[Case], None]:
    """Let pytest-benchmark time a case, caches cold."""
    watch = Stopwatch(DEVICE, DEVICE.type == "cuda" or rows.scenario.logit_bytes >= HOT_BELOW)

    def time(case: Case) -> None:
        torch._dynamo.reset()
        try:
            run = case.load()
        except ImportError as error:
            pytest.skip(f"{case.provider}: {error}")
        synchronize = torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None

        def prepare() -> tuple[tuple, dict]:
            state = None if case.prepare is None else case.prepare(run)
            watch.flush()
            synchronize()
            return (state,), {}

        def call(state: Callable | None) -> None:
            run(None) if state is None else state()
            synchronize()

        benchmark.group = case.measure
        benchmark.extra_info |= {"provider": case.provider, "bytes": case.bytes, "scenario": str(rows.scenario)}
        benchmark.pedantic(call, setup=prepare, rounds=7, warmup_rounds=1)

    return time
