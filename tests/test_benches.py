"""The benchmarks: everybody computes what they say, nobody disappears, and the README says what the results say. No test asserts a time."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import __main__ as bench
from benches import linear_table, memory, policy_loss_from_logits, table, token_stats
from benches.data import STATISTICS, Rows, Scenario
from benches.gpu_check import FOUND_WRONG, summary
from benches.grpo_step import table as steps
from benches.measure import Case, Limits, Stopwatch, Unusable, interleave
from benches.peers import Provider, providers

CPU = torch.device("cpu")
ONCE = Limits(rounds=1)
TAKING_PART = [p for p in providers() if not p.absent(CPU)]
SCENARIOS = [Scenario(16, 203, "fp32"), Scenario(16, 203, "bf16", "peaked", 0.4), Scenario(3, 64)]
# Largest error allowed, by dtype: of a statistic, of a gradient in norm (which is rounded to the dtype of the logits).
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-5, 4e-3)}
SIXTEEN_BIT = {"TRL": (0.1, 5e-2)}  # keeps log-probs of bf16 logits in bf16


def _measured(provider: Provider, scenario: Scenario) -> list[Case]:
    rows = Rows(scenario, CPU)
    cases = [case for op in (token_stats, policy_loss_from_logits) for case in op.cases(rows, [provider])]
    if provider.name == "torch.compile":  # minutes, all of them
        cases = [case for case in cases if case.measure == token_stats.FORWARD]
    interleave(cases, Stopwatch(CPU, cold=False), ONCE)
    return cases


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.parametrize("provider", TAKING_PART, ids=lambda p: p.name)
def test_a_provider_agrees_with_float64_in_all_it_claims(provider: Provider, scenario: Scenario) -> None:
    cases = _measured(provider, scenario)
    assert cases
    tolerance = TOLERANCE[scenario.dtype]
    if scenario.dtype == "bf16":
        tolerance = SIXTEEN_BIT.get(provider.name, tolerance)
    for case in cases:
        if case.absent.startswith(("ModuleNotFoundError", "ImportError")):
            pytest.skip(f"{provider.name}: {case.absent}")
        assert not case.absent, case.measure
        assert len(case.samples) == 1
        assert case.errors
        for name, error in case.errors.items():
            assert error <= tolerance[name == "gradient"], (case.measure, name)


def test_everything_asked_for_is_measured_for_our_op() -> None:
    ours = TAKING_PART[0]
    if ours.brief:
        pytest.skip("this build has PyTorch alone")
    measures = {c.measure for op in bench.OPS for c in op.cases(Rows(Scenario(16, 64), CPU), [ours])}
    assert {token_stats.FORWARD, token_stats.NEW, token_stats.IN_PLACE} <= measures
    assert {"forward, logp + entropy", "forward, logp", policy_loss_from_logits.IN_PLACE, policy_loss_from_logits.NEW} <= measures
    measures = {(c.measure, c.threads) for c in token_stats.cases(Rows(Scenario(3, 64), CPU), [ours])}
    assert {(token_stats.OP, None), (f"{token_stats.OP}, one thread", 1), (f"{token_stats.FORWARD}, one thread", 1)} <= measures


def test_scenarios_hold_what_they_say() -> None:
    rows = Rows(Scenario(200, 1000, "fp32", "peaked", 0.4), CPU)
    top = rows.logits.softmax(-1).amax(-1)
    assert 0.7 < float((top - 0.9).abs().lt(1e-3).float().mean()) < 0.9
    assert 0.5 < rows.live / 200 < 0.7
    assert Rows(Scenario(200, 1000), CPU).mask is None
    assert bool(((rows.checked + 1) % rows.length != 0).all())
    assert rows.overwritable().data_ptr() == rows.overwritable().data_ptr()
    assert not rows.overwritable().is_leaf


def test_a_slow_case_gets_fewer_rounds() -> None:
    fast, slow = (Case(name, "", lambda: lambda _: None, 1) for name in ("fast", "slow"))
    interleave([fast], Stopwatch(CPU, cold=False), Limits(rounds=6, seconds=1e9))
    interleave([slow], Stopwatch(CPU, cold=False), Limits(rounds=6, seconds=0.0))
    assert [len(fast.samples), len(slow.samples)] == [6, 1]
    assert Limits(seconds=3.0).allow(Case("", "", slow.load, 1, samples=[1.0, 1.0], spent=5.0))
    assert not Limits(seconds=3.0).allow(Case("", "", slow.load, 1, samples=[1.0, 1.0], spent=7.0))


class OnGpu(Stopwatch):
    """Calls are the host's; the rest believes in a GPU."""

    def __init__(self) -> None:
        super().__init__(CPU, cold=False)

    def once(self, run: Callable, state: object, calls: int, host_ms: float = 0.0) -> tuple[float, object]:
        self.gpu = False
        try:
            return super().once(run, state, calls)
        finally:
            self.gpu = True


def test_who_broke_the_gpu_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = []

    def fault(_: object) -> None:
        broken.append(True)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def refuse(_: object) -> None:
        raise RuntimeError("unsupported")

    def synchronize() -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    runs = {"good": lambda _: None, "refuses": refuse, "breaks": fault, "never begun": lambda _: None}
    cases = [Case("forward", name, lambda run=run: run, 1) for name, run in runs.items()]
    with pytest.raises(Unusable, match="the GPU is unusable after breaks: RuntimeError: CUDA error") as caught:
        interleave(cases, OnGpu(), ONCE)
    assert caught.value.case.provider == "breaks"
    assert cases[1].absent == "RuntimeError: unsupported"
    assert cases[0].host_ms > 0
    assert math.isnan(cases[3].host_ms)


def test_the_command_begins_anew_without_who_broke_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    def broken(*_: object) -> dict:
        raise Unusable(Case("forward", "urlvr_fast cuda", lambda: None, 1, absent="RuntimeError: CUDA error: broken"))

    def execv(program: str, arguments: list[str]) -> None:
        raise Replaced(arguments)

    monkeypatch.setattr(bench, "run_scenario", broken)
    monkeypatch.setattr(bench.os, "execv", execv)
    with pytest.raises(Replaced) as caught:
        bench.main(["--only", "4,64", "--budget", "100", "--no-memory", "--without", "TRL"])
    again = caught.value.args[0][3:]
    options = bench._parse(again)
    assert 0 < options.budget < 100
    assert (options.without, options.broke) == (["TRL"], ["urlvr_fast cuda: RuntimeError: CUDA error: broken"])
    seen = {}
    monkeypatch.setattr(bench, "run_scenario", lambda scenario, who, taking_part, *_: seen.update({p.name: p for p in taking_part}) or {})
    monkeypatch.setattr(bench.table, "text", lambda result: "")
    assert bench.main(again) == FOUND_WRONG  # ours broke it
    assert "torch eager" in seen
    assert not {"TRL", "urlvr_fast cuda"} & seen.keys()
    monkeypatch.setattr(bench, "run_scenario", broken)
    assert bench.main(["--only", "4,64", "--budget", "3", "--no-memory"]) == FOUND_WRONG  # and leaves what was written


@pytest.fixture(scope="module")
def result() -> dict:
    def not_there(names: tuple[str, ...], inplace: bool) -> None:
        raise ImportError("no module of that name")

    taking_part = [p for p in providers() if p.name not in ("torch.compile", "TRL")]
    taking_part.append(Provider("uninstalled", "uninstalled", not_there, STATISTICS))
    taking_part.append(Provider("hungry", "hungry", not_there, STATISTICS, per_logit=(1 << 60, 1 << 60)))
    scenarios = [
        (Scenario(16, 64), bench.EVERYBODY),
        (Scenario(3, 151936), bench.EVERYBODY),
        (Scenario(1 << 40, 151936), bench.EVERYBODY),
        (Scenario(8, 64, "fp32"), bench.OURS),
    ]
    *_, found = bench.run(scenarios, taking_part, CPU, Limits(rounds=2), with_memory=False)
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_result_has_what_the_table_needs(result: dict) -> None:
    assert {"device", "cpu", "threads", "torch", "commit"} <= set(result["machine"])
    first, second, third = result["scenarios"]
    assert {"copy_", "clone()"} <= {case["measure"] for case in first["cases"]}
    assert all(len(case["samples_ms"]) == 2 for case in first["cases"] if not case["absent"])
    assert {case["provider"] for case in third["cases"]} == {"", next(p.name for p in TAKING_PART)}
    lines = list(table.lines(result))
    assert all(line.ms > 0 and line.bandwidth > 0 and line.share > 0 and line.ratio > 0 and line.errors for line in lines)
    assert all("torch eager" in line.peers for line in lines if line.measure == token_stats.FORWARD and line.scenario["rows"] == 16)
    if lines[0].provider != "urlvr_fast torch":
        assert any(line.gain is not None and line.targets for line in lines if line.scenario["rows"] == 3)
    assert second["scenario"]["rows"] == 3


def test_nobody_and_nothing_is_left_out_without_a_reason(result: dict) -> None:
    text = table.text(result)
    assert "ImportError: no module of that name" in text
    assert "hungry, policy" not in text
    assert f"hungry, {token_stats.FORWARD}: needs about" in text
    assert f"{1 << 40} × 151936 bf16, random: needs" in text
    for provider in providers():
        assert provider.name.removeprefix("urlvr_fast ") in text or provider.name in ("torch.compile", "TRL")
        if provider.absent(CPU):
            assert f"{provider.name}: {provider.absent(CPU)}" in text


def test_the_table_marks_targets(result: dict) -> None:
    changed = copy.deepcopy(result)
    case = next(c for c in changed["scenarios"][0]["cases"] if c["measure"] == token_stats.FORWARD and c["provider"].startswith("urlvr"))
    case["targets"] = [
        {"of": "copy_", "reach": 1e9, "factor": 0.5, "faster": False},
        {"of": "torch eager", "reach": 1e9, "factor": 1.0, "faster": True},
    ]
    line = next(iter(table.lines(changed)))
    assert [met for *_, met in line.targets] == [True, False]
    assert [text for text, *_ in line.targets] == ["≤ 1e+09× 0.5 copy_", "≥ 1e+09× torch eager"]


def test_the_readme_follows_the_newest_result(result: dict, tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    markers = "\n".join(f"{part.BEGIN}\n{part.END}" for part in (table, linear_table, steps, summary))
    readme.write_text(f"before\n{markers}\nafter\n")
    assert table.main(["--check"], readme, results) == 1
    assert table.main([], readme, results) == 0
    assert "No results yet" in readme.read_text()
    for time, threads in (("2001-01-01", 11), ("2002-01-01", 22)):
        dated = {**result, "time": time, "machine": {**result["machine"], "threads": threads}}
        (results / f"{time}.json").write_text(json.dumps(dated))
    assert table.main(["--check"], readme, results) == 1
    assert table.main([], readme, results) == 0
    assert table.main(["--check"], readme, results) == 0
    text = readme.read_text()
    assert "22 threads" in text
    assert "11 threads" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    readme.write_text(text.replace("22 threads", "44 threads"))
    assert table.main(["--check"], readme, results) == 1


def test_a_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(ValueError, match="bench:begin"):
        table.main([], tmp_path / "README.md", tmp_path)


def test_the_readme_of_the_project_follows_its_results() -> None:
    assert table.main(["--check"]) == 0


def test_memory_is_counted() -> None:
    with memory.Allocated() as allocated:
        torch.zeros(1 << 20)
    assert allocated.value >= 4 << 20
    with memory.Resident() as resident:
        torch.ones(8 << 20)
    assert resident.value >= 16 << 20
    found = memory.in_fresh_process(Scenario(64, 500), TAKING_PART[0].name.split()[-1])
    assert "absent" not in found, found
    assert found["logits_bytes"] == 64 * 500 * 2
    assert found["allocated_bytes"] >= 0
    assert found["resident_bytes"] >= 0


def test_the_command_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "out.json"
    bench.main(["--only", "8,64", "--providers", "urlvr_fast,eager", "--rounds", "1", "--seconds", "0", "--no-memory", "--out", str(path)])
    assert table.text(json.loads(path.read_text())) in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["--only", "8,64,int8"])
