"""The benchmark of a training step: both sides compute the same, its table says what was measured, and its smallest size runs. No test
asserts a time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import table as ops_table
from benches.grpo_step import __main__ as bench
from benches.grpo_step import floor, ours, table
from benches.grpo_step.material import Material, Shape, of_shape, reward
from benches.grpo_step.worker import Worker, WorkerError

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("grpo") / "out.json"
    bench.main(["--quick", "--threads", "1", "--out", str(path)])
    return json.loads(path.read_text())


def test_the_smallest_size_measures_both_sides_and_the_floor(result: dict) -> None:
    (scenario,) = result["scenarios"]
    sides = ["urlvr_fast"] + ["TRL", "TRL (malloc untuned)"] * (importlib.util.find_spec("trl") is not None)
    assert set(scenario["samples_s"]) == {"floor", *(f"{side} {what}" for side in sides for what in ("learn", "step"))}
    for samples in scenario["samples_s"].values():
        assert len(samples) == 2
        assert all(2 * sample["total"] > sum(sample.values()) - 1e-9 for sample in samples)  # no part is counted twice
    assert all(about["threads"] == 1 for about in scenario["about"].values())
    assert all(scenario["about"][side]["engine"] for side in sides)
    assert set(scenario["memory_bytes"]) == {side for side in sides if side != "TRL"}
    for memory in scenario["memory_bytes"].values():
        assert memory["allocated"] > 0
        assert memory["process"] > 50 << 20
    if "TRL" in sides:
        assert 0 < scenario["gradient_difference"] < 1e-4
        assert scenario["absent"] == {"TRL with vLLM": "not tried"}
        assert scenario["about"]["TRL"]["settings"]["loss_type"] == "dapo"
    text = table.text(result)
    assert all(side in text for side in sides)
    assert "NOT met" not in text  # the smallest size has no targets


def test_the_table_marks_targets(result: dict) -> None:
    scenario = {**result["scenarios"][0], "name": table.LARGE_VOCABULARY}
    seconds = {"floor": 1.0, "urlvr_fast learn": 1.1, "TRL learn": 1.4, "TRL (malloc untuned) learn": 3.3}
    samples = {name: [{"total": value}] * 2 for name, value in seconds.items()}
    samples["urlvr_fast step"] = [{"total": 4.0, "generate": 2.0, "sync": 0.5}] * 2
    samples["TRL step"] = [{"total": 5.0, "generate": 3.0}] * 2
    untuned = {"allocated": 1, "resident": 5, "process": 3}
    memory = {"urlvr_fast": {"allocated": 2, "resident": 0, "process": 9}, "TRL (malloc untuned)": untuned}
    lines = {line.what: line for line in table.lines({**scenario, "samples_s": samples, "memory_bytes": memory})}
    assert lines["learn"].to_floor == pytest.approx(1.1)
    assert scenario["full_length"]
    assert lines["step"].to_floor == pytest.approx(4.0 / 3.5)
    assert lines["step"].to(lines["step"].trl) == pytest.approx(1.25)
    assert lines["learn"].to(lines["learn"].untuned) == pytest.approx(3.0)
    assert lines["step without generation"].to(lines["step without generation"].trl) == pytest.approx(1.0)
    text = table.text({**result, "scenarios": [{**scenario, "samples_s": samples, "memory_bytes": memory}]})
    assert "ours / floor ≤ 1.15: met; TRL / ours ≥ 1.3: NOT met" in text
    assert "ours / floor ≤ 1.1: NOT met; TRL / ours ≥ 1.5: NOT met" in text
    assert text.count("TRL / ours ≥ 1: NOT met") == 1  # allocated: resident memory did not rise


def test_the_readme_has_the_newest_step_beside_the_ops(result: dict, tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text((ops_table.ROOT / "README.md").read_text())
    for time, threads in (("2001-01-01", 11), ("2002-01-01", 22)):
        dated = {**result, "time": time, "machine": {**result["machine"], "threads": threads}}
        (results / f"{table.STEP}{time}.json").write_text(json.dumps(dated))
    assert ops_table.newest(results) == []
    assert ops_table.main(["--check"], readme, results) == 1
    assert ops_table.main([], readme, results) == 0
    assert ops_table.main(["--check"], readme, results) == 0
    text = readme.read_text()
    assert "22 threads" in text
    assert "11 threads" not in text
    readme.write_text(text.replace(table.BEGIN, ""))
    with pytest.raises(ValueError, match="grpo:begin"):
        ops_table.main([], readme, results)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return of_shape(Shape(hidden=64, layers=1, vocabulary=300, prompts=3, group_size=2, response=5), tmp_path_factory.mktemp("model"))


def test_no_rollout_ends_early(material: Material) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(2, 300)[None]).logits[0]
    assert float(logits.softmax(-1)[:, material.stop_token_id].max()) < 1e-4


def test_the_floor_and_our_learner_are_given_the_same_rollouts(material: Material) -> None:
    batch = ours.given_rollouts(material)
    ids, mask, predicting = floor.padded(material)
    assert torch.equal(ids[mask.bool()], batch.tokens)
    assert torch.equal(ids.roll(-1, 1)[predicting], material.responses.flatten())
    assert int(predicting.sum()) == int(batch.response_lens.sum()) == material.rollouts * material.response
    assert ours.trained_value(batch, None) == [reward(row) for row in material.responses.tolist()]
    assert bool((ours.advantages_of(batch) != 0).all())


def test_every_way_of_the_floor_makes_the_three_products() -> None:
    rows, weight = torch.randn(5, 8), torch.randn(30, 8)
    for products in (floor._mm, floor._onednn, floor._mixed):
        grad_rows, grad_weight = torch.zeros(5, 8), torch.ones(30, 8)
        products(rows, weight, torch.zeros(5, 30), grad_rows, grad_weight)
        torch.testing.assert_close(grad_rows, rows @ weight.t() @ weight, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grad_weight, 1 + (rows @ weight.t()).t() @ rows, rtol=1e-4, atol=1e-4)


def test_gradients_that_differ_are_refused(tmp_path: Path) -> None:
    gradient = {"a": torch.ones(3), "b": torch.ones(2)}
    for name, changed in (("same", gradient), ("near", {**gradient, "a": torch.tensor([1.0, 1.0, 1.001])}), ("less", {"a": gradient["a"]})):
        torch.save(changed, tmp_path / name)
    torch.save({**gradient, "b": torch.full((2,), torch.nan)}, tmp_path / "nan")
    torch.save({**gradient, "a": -gradient["a"]}, tmp_path / "far")
    assert bench.gradient_difference(tmp_path / "same", tmp_path / "same") == 0
    assert bench.gradient_difference(tmp_path / "near", tmp_path / "same") == pytest.approx(1e-3 / 5**0.5, rel=1e-3)
    for other in ("far", "nan", "less"):
        with pytest.raises(bench.GradientsDiffer):
            bench.gradient_difference(tmp_path / other, tmp_path / "same")


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    worker = Worker("side", tmp_path / "log", floor.main, None, 1)
    with pytest.raises(WorkerError, match="side: AttributeError: 'NoneType' object has no attribute 'model'") as error:
        worker.about()
    assert "Traceback" in error.value.log
    worker.stop()
