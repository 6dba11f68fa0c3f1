"""`make gpu-check` as a whole, on the simulated GPU with tiny shapes: what runs, what is written, and what its exit status says."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import grid
from benches.gpu_check import FOUND_WRONG, summary
from benches.gpu_check import __main__ as check
from benches.machine import ROOT

simulated = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH: the device cannot be built"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.timeout(1800),
]
FEW = ["--pytest=-k", "--pytest=test_gpu and (advantages_make_nobody_wait or (host_knows and cuda-dapo))"]


def gpu_check(out: Path, *arguments: str, device: bool = True) -> subprocess.CompletedProcess:
    """As the make target runs it; every process of it finds a GPU that is there from its start."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("URLVR_FAST_", "PYTEST_"))}
    if device:
        start = out / "start"
        start.mkdir(parents=True, exist_ok=True)
        (start / "sitecustomize.py").write_text("import simulated_gpu\nsimulated_gpu.install()\n")
        environment["PYTHONPATH"] = os.pathsep.join([str(start), str(ROOT / "tests")])
        environment |= {"URLVR_FAST_TEST_DEVICE": "simulated", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        environment["URLVR_FAST_BACKEND"] = "torch"  # where nobody asks for another: the interpreter is slow
    command = [sys.executable, "-m", "benches.gpu_check", "--quick", "--out", str(out), "--wheels", str(out / "none"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def written(out: Path) -> dict:
    (path,) = out.glob("gpu-check-*.json")
    return json.loads(path.read_text())


class TestOnTheSimulatedGpu:
    pytestmark = simulated

    def test_everything_is_run_and_written(self, tmp_path: Path) -> None:
        done = gpu_check(tmp_path, "--stages", "rates,tests,ops,linear,grid", "--seconds", "400", "--commit", "abc1234", *FEW)
        assert done.returncode == check.RIGHT, done.stdout[-3000:] + done.stderr[-3000:]
        result = written(tmp_path)
        assert result["machine"]["commit"] == "abc1234"
        assert result["verdict"] == {"all": "right", "wrong": [], "unchecked": []}
        assert list(result["stages"]) == ["rates", "tests", "ops", "linear", "grid"]
        assert all(record["status"] == 0 for record in result["stages"].values())
        assert result["stages"]["tests"]["result"]["passed"] == 2
        assert set(result["stages"]["rates"]["result"]["rates"]) == {"copy_", "bf16 product", "bf16 product into fp32"}
        for kind in ("ops", "linear", "grid"):
            raw = json.loads((tmp_path / result["stages"][kind]["file"]).read_text())
            assert raw["kind"] == "cuda"
            assert raw["machine"]["commit"] == "abc1234"
        providers = {
            case["provider"]: case for case in json.loads((tmp_path / result["stages"]["ops"]["file"]).read_text())["scenarios"][0]["cases"]
        }
        for backend in ("triton", "cuda"):
            assert len(providers[f"urlvr_fast {backend}"]["samples_ms"]) == 1
            assert providers[f"urlvr_fast {backend}"]["host_ms"] > 0
            assert max(providers[f"urlvr_fast {backend}"]["errors"].values()) < 1e-2
        assert done.stdout.rstrip().splitlines()[-1].startswith("Results are right; ")
        assert "2 shapes" in done.stdout
        assert "2 passed, 0 failed" in done.stdout
        drawn = summary.block(tmp_path)
        assert "* tests: " in drawn
        assert "* Grid: 2 shapes" in drawn
        assert "* Results are right." in drawn

    def test_a_wrong_result_is_the_exit_status(self, tmp_path: Path) -> None:
        (tmp_path / "start").mkdir()
        (tmp_path / "start" / "broken_kernel.py").write_text("def pytest_runtest_call():\n    assert 1 + 1 == 3\n")
        done = gpu_check(tmp_path, "--stages", "tests", *FEW, "--pytest=-p", "--pytest=broken_kernel")
        assert done.returncode == check.WRONG
        found = written(tmp_path)["stages"]["tests"]["result"]
        assert (found["passed"], found["failed"]) == (0, 2)
        assert "assert (1 + 1) == 3" in found["failures"][0]["said"]
        assert "WRONG: tests: 2 failed, the first tests/test_gpu.py::" in done.stdout

    def test_what_is_cut_short_is_not_called_right(self, tmp_path: Path) -> None:
        done = gpu_check(tmp_path, "--stages", "tests,ops", "--seconds", "5")
        assert done.returncode == check.UNCHECKED
        stages = written(tmp_path)["stages"]
        assert stages["tests"]["killed"]
        assert stages["ops"]["absent"] == "no time was left"
        assert "Results are unchecked" in done.stdout


def test_only_a_stage_that_saw_a_wrong_result_is_called_wrong(tmp_path: Path) -> None:
    stages = [stage for stage in check.STAGES if stage.name in ("build", "sanitized", "trainer")]
    ended = {"killed": False, "seconds": 1.0}
    result = {"stages": {"build": {**ended, "status": 1}, "sanitized": {**ended, "status": FOUND_WRONG}, "trainer": {**ended, "status": 2}}}
    found = check.verdict(result, stages, tmp_path)
    assert found["all"] == "wrong"
    assert found["wrong"] == ["sanitized: failed; its tail says how"]
    assert found["unchecked"] == ["build: did not run to its end", "trainer: did not run to its end"]


def test_a_test_whose_process_ended_says_nothing_of_a_result(tmp_path: Path) -> None:
    (stage,) = (stage for stage in check.STAGES if stage.name == "tests")
    lines = [
        {"test": "t.py::right", "outcome": "passed"},
        {"test": "t.py::slow", "outcome": "failed", "said": "worker 'gw1' crashed while running 't.py::slow'"},
    ]
    for failed, verdict in ([], "unchecked"), ([{"test": "t.py::false", "outcome": "failed", "said": "assert 1 == 3"}], "wrong"):
        (tmp_path / "tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines, *failed)))
        record = check.collect(stage, check.Check(tmp_path, False, []), {"status": 1, "killed": False})
        assert record["result"]["failed"] == len(record["result"]["failures"]) == len(failed)
        found = check.verdict({"stages": {"tests": record}}, [stage], tmp_path)
        assert found["all"] == verdict
        assert found["unchecked"] == ["tests: the process of 1 ended, or its time did, the first t.py::slow"]


def test_failures_are_all_named_and_some_of_each_kind_in_full() -> None:
    said = "a traceback\nof many lines\nAssertionError: 1 above 0"
    failures = [{"test": f"t.py::f[{i}-{backend}]", "said": said} for backend in ("cuda", "triton") for i in range(5)]
    found = check.shortened([*failures, {"test": "t.py::g"}])
    assert [line["test"] for line in found] == [line["test"] for line in [*failures, {"test": "t.py::g"}]]
    assert [line["said"] == said for line in found] == [True] * 3 + [False] * 2 + [True] * 3 + [False] * 3
    assert found[4]["said"] == "AssertionError: 1 above 0"


def test_a_build_that_fails_leaves_the_kernels_that_need_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes away the library of an earlier build, which may be of other sources."""
    ran = []
    checkout = tmp_path / "checkout"
    stale = checkout / "urlvr_fast" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()

    def run_stage(stage: check.Stage, given: check.Check, seconds: float) -> dict:
        ran.append((stage.name, stage.variables(given).get("URLVR_FAST_BUILD")))
        return {"status": int(stage.name == "build"), "killed": False, "seconds": 0.0, "tail": "nvcc: no"}

    monkeypatch.setattr(check, "ROOT", checkout)
    monkeypatch.setattr(check, "run_stage", run_stage)
    monkeypatch.setattr(check, "missing", lambda building: [])
    monkeypatch.setattr(check, "describe", lambda device: {"device": "none", "torch": "0", "commit": "0"})
    monkeypatch.setattr(check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(check, "slug", lambda device: "none")
    monkeypatch.setattr(check, "clocks", dict)
    assert check.main(["--out", str(tmp_path), "--wheels", str(tmp_path / "none"), "--stages", "build,rates"]) == check.UNCHECKED
    assert ran == [("build", None), ("build without csrc", "0"), ("rates", None)]
    assert not stale.exists()


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, device=False)
    assert done.returncode == check.UNCHECKED
    assert "gpu-check cannot run here" in done.stderr
    assert "a build without CUDA: install one with it" in done.stderr or "run this where `nvidia-smi` shows one" in done.stderr
    assert not list(tmp_path.glob("*.json"))


def test_stages_are_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        check.main(["--stages", "build,fly"])
    assert "no such stage: fly" in capsys.readouterr().err


def test_a_result_of_ours_that_is_far_off_is_wrong(tmp_path: Path) -> None:
    def case(provider: str, **errors: float) -> dict:
        return {"provider": provider, "measure": "forward", "errors": errors}

    cases = [case("urlvr_fast cuda", logp=3e-4), case("urlvr_fast triton", gradient=1e-2), case("TRL", logp=1.0), case("urlvr_fast torch")]
    cases.append(case("urlvr_fast triton", entropy=float("nan")))
    (tmp_path / "ops.json").write_text(json.dumps({"scenarios": [{"scenario": {"rows": 8, "columns": 9}, "cases": cases}]}))
    found = summary.wrong_numbers({"stages": {"ops": {"file": "ops.json"}}}, tmp_path)
    assert found == [
        "ops, 8 × 9, urlvr_fast cuda, forward: logp is off by 3.0e-04",
        "ops, 8 × 9, urlvr_fast triton, forward: entropy is off by nan",
    ]


class TestGrid:
    @staticmethod
    def result(*shapes: tuple[int, int, dict[str, float]]) -> dict:
        scenarios = []
        for rows, columns, times in shapes:
            cases = [{"measure": "copy_", "provider": "", "samples_ms": [1.0]}]
            cases += [{"measure": "forward, logp", "provider": name, "samples_ms": [ms]} for name, ms in times.items()]
            scenarios.append({"scenario": {"rows": rows, "columns": columns}, "cases": cases})
        return {"scenarios": scenarios, "skipped": []}

    def test_the_fastest_of_ours_is_held_against_the_fastest_peer(self) -> None:
        result = self.result((8, 64, {"urlvr_fast triton": 2.0, "urlvr_fast cuda": 1.0, "urlvr_fast torch": 0.1, "TRL": 3.0, "Liger": 0.8}))
        (point,) = grid.points(result)
        assert (point.backend, point.peer, point.ahead) == ("cuda", "Liger", 0.8)
        assert grid.slower([point]) == [point]
        assert "behind in 1 (8 × 64 forward, logp: Liger 1.25× as fast)" in grid.verdict(result)

    def test_the_host_s_time_is_held_against_that_of_peers(self) -> None:
        result = self.result((1, 1024, {"urlvr_fast triton": 2.0, "urlvr_fast cuda": 1.0, "TRL": 3.0, "Liger": 4.0}))
        for case, host in zip(result["scenarios"][0]["cases"][1:], (0.5, 0.25, 0.5, 0.125), strict=True):
            case["host_ms"] = host
        (point,) = grid.points(result)
        assert (point.ahead, point.host, point.host_ahead) == (3.0, 0.25, 0.5)
        assert "behind in 0; on the host alone, behind in 1 of 1; cliffs: none" in grid.verdict(result)

    def test_a_cliff_is_a_large_shape_far_from_the_others(self) -> None:
        large = [(8192, columns, {"urlvr_fast cuda": ms}) for columns, ms in ((32000, 0.6), (128256, 0.5), (151936, 0.55), (262144, 1.9))]
        found = grid.points(self.result((1, 1024, {"urlvr_fast cuda": 30.0}), *large))
        assert [(p.rows, p.columns) for p in grid.cliffs(found)] == [(8192, 262144)]
        assert grid.slower(found) == []
