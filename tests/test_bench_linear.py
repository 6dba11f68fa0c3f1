"""The benchmark of the linear ops: everybody on it computes the same gradients, and what it prints is what it wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import linear, linear_table
from benches.data import DTYPES
from benches.linear_peers import eager, on_policy, peers
from benches.measure import Case, Limits, Stopwatch, Unusable, interleave

CPU = torch.device("cpu")
SHAPE = (256, 16, 301)
INSTALLED = {"Liger chunked GRPO": "liger_kernel", "TRL chunked log-prob": "trl"}
# Largest error allowed against float64 by dtype: of a statistic, of a gradient in norm. Peers have 16-bit logits where their inputs are.
TOLERANCE = {"fp32": {"urlvr_fast": (1e-5, 1e-5), "peers": (1e-5, 1e-5)}, "bf16": {"urlvr_fast": (1e-5, 5e-3), "peers": (5e-2, 3e-2)}}


def taking_part() -> set[str]:
    """Peers that run here."""
    there = {peer.name for peer in peers(compiled=False) if not peer.absent(CPU)}
    without = {name for name, module in INSTALLED.items() if importlib.util.find_spec(module) is None}
    without |= set() if hasattr(torch.nn.functional, "linear_cross_entropy") else {"torch linear_cross_entropy (mean CE)"}
    return there - without


def problem(dtype: str = "fp32", shape: tuple[int, int, int] = SHAPE) -> linear.Problem:
    return linear.Problem.of(shape, DTYPES[dtype], CPU)


@pytest.fixture(params=["fp32", "bf16"])
def measured(request: pytest.FixtureRequest) -> tuple[str, list[Case]]:
    p = problem(request.param)
    found = linear.cases({request.param: lambda: p}, CPU, (1 << 20, 1 << 19), peers(compiled=False))
    interleave(found, Stopwatch(CPU, cold=False), linear.Limits(rounds=2))
    return request.param, found


def test_everybody_is_close_to_float64(measured: tuple[str, list[Case]]) -> None:
    dtype, found = measured
    for case in found:
        if not case.samples:
            assert case.absent
            assert case.provider not in taking_part() | {"", "urlvr_fast"}, case.absent
        elif case.provider:
            statistic, gradient = TOLERANCE[dtype]["urlvr_fast" if case.provider == "urlvr_fast" else "peers"]
            assert case.errors, case.measure
            for name, error in case.errors.items():
                assert error <= (gradient if name in ("dX", "dW") else statistic), (case.measure, case.provider, name)


def test_all_measures_are_there(measured: tuple[str, list[Case]]) -> None:
    dtype, found = measured
    measures = {(case.measure, case.provider) for case in found}
    for name in (linear_table.OURS, linear_table.SMALLER, linear_table.HALF, linear_table.NO_GRAD):
        assert (f"{name}, {dtype}", "urlvr_fast") in measures
    for peer in peers(compiled=False):
        assert (f"{linear_table.ADVANTAGES_1 if peer.mean else linear_table.SAME}, {dtype}", peer.name) in measures
        assert ((f"{linear_table.NO_GRAD}, {dtype}", peer.name) in measures) == (peer.tokens is not None)


def test_a_second_call_is_measured_on_the_same_gradients(measured: tuple[str, list[Case]]) -> None:
    """The cases share a problem and a buffer; no case may see what another left there."""
    _, found = measured
    for case in reversed(found):
        if case.samples and case.check is not None:
            result = case.load()(None)
            assert case.check(result) == pytest.approx(case.errors, rel=1e-3, abs=1e-7), (case.measure, case.provider)


def test_the_exact_values_are_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "BLOCK", 100)  # several blocks, the last one shorter
    p = problem()
    hidden, weight = (x.detach().double().requires_grad_() for x in (p.hidden, p.weight))
    log_p = torch.log_softmax(hidden @ weight.T, 1)
    logp = log_p.gather(1, p.ids[:, None])[:, 0]
    on_policy(logp, p.advantages.double()).backward()
    assert all(error < 1e-12 for error in p.gradient_errors(hidden.grad, weight.grad, p.advantages).values())
    assert torch.allclose(p.lse, (hidden @ weight.T).logsumexp(1))
    entropy = -(log_p.exp() * log_p).sum(1)
    values = {"logp": logp.detach(), "entropy": entropy.detach(), "self_certainty": None}
    assert all(error < 1e-12 for error in p.statistics_errors(values).values())
    off = p.gradient_errors(hidden.grad * 1.5, weight.grad * 0.75, p.advantages)
    assert off == pytest.approx({"dX": 0.5, "dW": 0.25})
    assert {int(row) % 2 for row in p.rows} == {0, 1}  # dead rows and live ones


def test_advantages_are_equal_within_a_sequence() -> None:
    p = problem()
    assert p.advantages.shape == (256,)
    assert bool((p.advantages.view(p.sequences, -1) == p.advantages.view(p.sequences, -1)[:, :1]).all())
    assert len(p.advantages.unique()) == p.sequences == 2


def test_the_command_writes_what_it_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "linear.json"
    linear.main(["--quick", "--rounds", "1", "--out", str(path)])
    result = json.loads(path.read_text())
    text = linear_table.text(result)
    assert text in capsys.readouterr().out
    absent = {entry["provider"] for entry in result["times"] if entry["absent"]}
    assert absent == {peer.name for peer in peers(compiled=False)} - taking_part()
    assert all(f"{name}: " in text for name in absent)
    assert {entry["provider"] for entry in result["memory"]} == {"urlvr_fast", "torch eager"}
    for entry in result["memory"]:
        if entry["provider"] == "urlvr_fast":
            assert entry["extra_bytes"] <= entry["chunk_bytes"]


def test_dtypes_and_peers_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "linear.json"
    linear.main(["--quick", "--rounds", "1", "--dtypes", "bf16", "--peers", "eager,verl", "--without", "verl: no", "--out", str(path)])
    result = json.loads(path.read_text())
    assert {entry["measure"].rsplit(", ", 1)[1] for entry in result["times"]} == {"bf16"}
    assert {entry["provider"] for entry in result["times"]} == {"", "urlvr_fast", "torch eager", "verl"}
    assert {entry["absent"] for entry in result["times"] if entry["provider"] == "verl"} == {"left out: no"}


def test_a_spent_budget_leaves_a_result(tmp_path: Path) -> None:
    path = tmp_path / "linear.json"
    linear.main(["--quick", "--budget", "0", "--out", str(path)])
    result = json.loads(path.read_text())
    assert all(entry["absent"] for entry in result["times"] if entry["provider"])
    assert all(entry["samples_ms"] for entry in result["times"] if not entry["provider"])  # the products take part in any case
    assert "the --budget was spent" in linear_table.text(result)


def test_everybody_who_began_in_time_gets_one_sample() -> None:
    slow = [Case(name, "", lambda: lambda _: time.sleep(0.01), 0) for name in "ab"]
    interleave(slow, Stopwatch(CPU, cold=False), Limits(rounds=5, sample_until=time.monotonic()))
    assert [len(case.samples) for case in slow] == [1, 1]


def test_each_part_is_written_before_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "linear.json"

    def killed(*_: object) -> list:
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "memory", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.main(["--quick", "--rounds", "1", "--peers", "eager", "--dtypes", "fp32", "--out", str(path)])
    result = json.loads(path.read_text())
    assert result["memory"] == []
    assert any(entry["samples_ms"] for entry in result["times"])
    assert linear_table.OURS in linear_table.text(result)
    assert linear_table.OURS in linear_table.markdown(result)


def test_the_command_begins_anew_without_who_broke_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Callable:
        raise Unusable(Case("", "CCE", lambda: None, 0, absent="RuntimeError: CUDA error: broken"))

    class Replaced(Exception):
        pass

    def execv(program: str, arguments: list[str]) -> None:
        raise Replaced(arguments)

    monkeypatch.setattr(linear, "run", broken)
    monkeypatch.setattr(linear.os, "execv", execv)
    with pytest.raises(Replaced) as caught:
        linear.main(["--quick", "--budget", "100", "--without", "verl"])
    options = linear._parse(caught.value.args[0][3:])
    assert 0 < options.budget < 100
    assert options.without == ["verl", "CCE: RuntimeError: CUDA error: broken"]
    absences = {peer.name: peer.absent(torch.device("cuda")) for peer in linear._chosen(options, torch.device("cuda"))}
    assert absences["CCE"] == "left out: RuntimeError: CUDA error: broken"
    assert absences["verl"] == "left out: as asked"
    assert absences["TRL chunked log-prob"] == ""


def _result(kind: str, times: list[tuple[str, str, float]]) -> dict:
    entries = [{"measure": f"{m}, bf16", "provider": who, "samples_ms": [ms] * 3, "absent": ""} for m, who, ms in times]
    return {"kind": kind, "times": entries, "memory": [], "shape": (8, 4, 16), "chunk_bytes": 3 << 30}


def test_targets_are_judged() -> None:
    def rows(ours: float, half: float) -> list[str]:
        times = [(linear_table.PRODUCTS, "", 10.0), (linear_table.OURS, "urlvr_fast", ours), (linear_table.HALF, "urlvr_fast", half)]
        return [row[-1] for row in linear_table.rows(_result("cpu", times))[1:]]

    assert rows(11.9, 7.0) == ["–", "≤ 1.2× three products: 1.19 met", "≤ 0.6× full: 0.59 met"]
    assert rows(12.1, 7.5) == ["–", "≤ 1.2× three products: 1.21 NOT met", "≤ 0.6× full: 0.62 NOT met"]


def test_targets_on_a_gpu_are_those_of_the_design() -> None:
    times = [
        (linear_table.PRODUCTS, "", 40.0),
        (linear_table.PRODUCT, "", 13.0),
        (linear_table.OURS, "urlvr_fast", 44.0),
        (linear_table.SMALLER, "urlvr_fast", 49.0),
        (linear_table.NO_GRAD, "urlvr_fast", 14.0),
        (linear_table.SAME, "urlvr_fast", 46.0),
        (linear_table.SAME, "Liger FLSCE", 60.0),
        (linear_table.SAME, "TRL chunked log-prob", 80.0),
        (linear_table.NO_GRAD, "TRL chunked log-prob", 80.0),
    ]
    assert [row[-1] for row in linear_table.rows(_result("cuda", times))[3:]] == [
        "≤ 1.1× three products: 1.10 met",
        "≤ 1.2× three products: 1.23 NOT met",
        "≤ 1.15× one product: 1.08 met",
        "≥ 1.3× Liger FLSCE: 1.30 met; ≥ 2× TRL chunked log-prob: 1.74 NOT met",
        *["–"] * 3,
    ]
    assert set(linear_table.AHEAD["cuda"]) <= {peer.name for peer in peers(compiled=True)}


def test_errors_and_memory_are_shown_where_they_were_taken() -> None:
    result = _result("cuda", [(linear_table.PRODUCTS, "", 10.0), (linear_table.SAME, "urlvr_fast", 11.0)])
    assert linear_table.rows(result)[0][-1] == "target: now"
    assert len(linear_table.rows(result)[0]) == 6
    result["times"][1] |= {"errors": {"dX": 0.002, "self_certainty": 1e-6}, "peak_bytes": 3 << 29}
    header, floor, ours = linear_table.rows(result)
    assert header[5:] == ["error", "GiB", "target: now"]
    assert floor[5:] == ["–", "–", "–"]
    assert ours[5:7] == ["dX 2e-03, SC 1e-06", "1.5"]


def test_ours_and_eager_agree_without_the_float64_values() -> None:
    grads = []
    for run in (lambda p: linear._ours(p, 1 << 20), eager):
        p = problem()
        run(p).backward()
        grads.append((p.hidden.grad, p.weight.grad))
    for got, want in zip(*grads, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
