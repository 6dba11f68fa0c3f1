"""The benchmark of the linear ops: everybody on it computes the same gradients, and what it prints is what it wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import linear, linear_table

CPU = torch.device("cpu")


def gradients(run, dtype: torch.dtype) -> list[torch.Tensor]:
    problem = linear.Problem.of((256, 16, 301), dtype, CPU)
    problem.advantages = torch.tensor([1.0, -0.5]).repeat_interleave(128)  # alike within a sequence, as Liger takes them
    run(problem).backward()
    return [problem.hidden.grad, problem.weight.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everybody_computes_the_same_loss(dtype: torch.dtype) -> None:
    runs = [lambda problem: linear._ours(problem, 1 << 20)]
    if importlib.util.find_spec("liger_kernel") is not None:  # a peer, installed by `make bench`
        runs.append(linear._liger)
    exact = gradients(linear._eager, dtype)
    for run in runs:
        for got, want in zip(gradients(run, dtype), exact, strict=True):
            assert (got.float() - want.float()).norm() <= (1e-5 if dtype == torch.float32 else 3e-2) * want.float().norm()


def test_the_command_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "linear.json"
    linear.main(["--quick", "--rounds", "1", "--out", str(path)])
    result = json.loads(path.read_text())
    assert linear_table.text(result) in capsys.readouterr().out
    peers = {"Liger chunked GRPO"} if importlib.util.find_spec("liger_kernel") is None else set()
    assert {entry["provider"] for entry in result["times"] if entry["absent"]} == peers
    assert {entry["provider"] for entry in result["memory"]} == {"urlvr_fast", "torch eager"}
    for entry in result["memory"]:
        if entry["provider"] == "urlvr_fast":
            assert entry["extra_bytes"] <= entry["chunk_bytes"]


def test_targets_are_judged() -> None:
    def times(ours: float, half: float) -> list[dict]:
        measured = {linear_table.PRODUCTS: ("", 10.0), linear_table.OURS: ("urlvr_fast", ours), linear_table.HALF: ("urlvr_fast", half)}
        return [{"measure": f"{m}, fp32", "provider": who, "samples_ms": [ms] * 3, "absent": ""} for m, (who, ms) in measured.items()]

    met = [row[-1] for row in linear_table.rows({"kind": "cpu", "times": times(11.9, 7.0)})[1:]]
    missed = [row[-1] for row in linear_table.rows({"kind": "cpu", "times": times(12.1, 7.5)})[1:]]
    assert met == ["–", "≤ 1.2× three products: 1.19 met", "≤ 0.6× full: 0.59 met"]
    assert missed == ["–", "≤ 1.2× three products: 1.21 NOT met", "≤ 0.6× full: 0.62 NOT met"]
