"""The run log: what is on disk after a run, a kill, a resume and a full disk; what the terminal shows."""

from __future__ import annotations

import ctypes
import errno
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from urlvr_fast.trainer import live_view as live_view_module
from urlvr_fast.trainer import logging
from urlvr_fast.trainer.live_view import sparkline
from urlvr_fast.trainer.logging import LogError, RunLog, encode_json, jsonl_lines, read_jsonl


def start(run_dir: Path, **options: object) -> RunLog:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"reward": "majority_voting", "seed": 7}))
    return RunLog(run_dir, **({"total_steps": 10, "live": "off"} | options))  # type: ignore[arg-type]


def info(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "run.json").read_text())


# ---- files -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        assert info(tmp_path)["status"] == "running"
        log.metrics(0, {"eval/greedy_accuracy": 0.5})
        log.metrics(1, {"reward": torch.tensor(0.25, dtype=torch.float64), "live_rollouts": 3, "skipped": False, "grad_norm": math.nan})
        # Written when the call returns, not when the log closes.
        assert read_jsonl(tmp_path / "metrics.jsonl")[1]["reward"] == 0.25
        log.samples(1, [{"completion": "1 − 2\n\udc80", "correct": None, "reward": -math.inf}, {"completion": "", "correct": True}])
        log.summary({"before_after": [{"metric": "avg@8", "before": 0.5, "after": math.nan}]})
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert (first["step"], first["eval/greedy_accuracy"]) == (0, 0.5)
    assert {k: v for k, v in second.items() if k != "wall_s"} == {
        "step": 1,
        "reward": 0.25,
        "live_rollouts": 3,
        "skipped": False,
        "grad_norm": None,
    }
    assert 0 <= first["wall_s"] <= second["wall_s"]
    samples = read_jsonl(tmp_path / "samples.jsonl")
    assert [row["step"] for row in samples] == [1, 1]
    assert samples[0] == {"step": 1, "completion": "1 − 2\n\udc80", "correct": None, "reward": None}
    assert json.loads((tmp_path / "summary.json").read_text())["before_after"][0]["after"] is None
    run = info(tmp_path)
    assert (run["status"], run["seed"]) == ("finished", 7)
    assert run["versions"]["torch"] == torch.__version__  # type: ignore[index]
    assert run["started"] <= run["finished"]  # type: ignore[operator]
    files = ["config.yaml", "metrics.jsonl", "run.json", "samples.jsonl", "summary.json", "votes.jsonl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(KeyboardInterrupt(), "interrupted", "Ctrl-C"), (ValueError("no prompts"), "failed", "ValueError: no prompts")],
)
def test_how_a_run_ended_is_recorded(tmp_path: Path, error: BaseException, status: str, reason: str) -> None:
    with pytest.raises(type(error)), start(tmp_path):
        raise error
    assert (info(tmp_path)["status"], info(tmp_path)["reason"]) == (status, reason)


def test_a_status_that_was_given_stays(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        log.status("stopped", "trainer.stop_after=3")
    assert (info(tmp_path)["status"], info(tmp_path)["reason"]) == ("stopped", "trainer.stop_after=3")
    with start(tmp_path / "other") as log, pytest.raises(ValueError, match="valid are running"):
        log.status("done")


@pytest.mark.parametrize("value", ["0.5", [0.5], torch.zeros(2), object()])
def test_only_numbers_are_metrics(tmp_path: Path, value: object) -> None:
    with start(tmp_path) as log, pytest.raises(TypeError, match="'reward' must be a number"):
        log.metrics(1, {"reward": value})
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_a_second_run_does_not_mix_into_the_first(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        log.metrics(1, {"reward": 1.0})
    with pytest.raises(LogError, match="--resume"):
        start(tmp_path)


def test_resume_drops_what_comes_later(tmp_path: Path) -> None:
    with start(tmp_path) as log:
        for step in range(1, 8):
            log.metrics(step, {"reward": step})
            log.samples(step, [{"completion": str(step)}] * 2)
        log.warn(2, "early")
        log.warn(6, "late")
    wall = read_jsonl(tmp_path / "metrics.jsonl")[3]["wall_s"]
    with start(tmp_path, resume_step=4) as log:
        assert info(tmp_path)["status"] == "running"
        log.metrics(5, {"reward": 50})
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert lines[-1]["wall_s"] >= wall
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 1, 2, 2, 3, 3, 4, 4]
    run = info(tmp_path)
    assert run["warnings"] == [{"step": 2, "message": "early"}]
    assert [r["step"] for r in run["resumed"]] == [4]  # type: ignore[attr-defined]


@pytest.mark.parametrize("tail", [b'{"step": 3, "rew', b'{"step": 3}', b"\x00" * 100, b'{"step": 3, "text": "\xe2\x88'])
def test_a_torn_last_line_is_tolerated_and_cut_on_resume(tmp_path: Path, tail: bytes) -> None:
    with start(tmp_path) as log:
        log.metrics(1, {"reward": 1})
        log.metrics(2, {"reward": 2})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    with start(tmp_path, resume_step=2) as log:
        log.metrics(3, {"reward": 3})
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 3]
    assert "unfinished line" in info(tmp_path)["warnings"][0]["message"]  # type: ignore[index]


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n[1]\n{"step": 2}\n')
    with pytest.raises(LogError, match="line 2"):
        read_jsonl(path)
    assert [record for _, record in jsonl_lines(path)] == [{"step": 1}, None, {"step": 2}]
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_run_killed_between_lines_leaves_whole_ones(tmp_path: Path) -> None:
    code = f"""
import os, signal
from urlvr_fast.trainer.logging import RunLog
log = RunLog({str(tmp_path)!r}, total_steps=9, live="off")
for step in range(1, 6):
    log.metrics(step, {{"reward": step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False).returncode == -9
    assert [line["reward"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert info(tmp_path)["status"] == "running"


def test_what_cannot_be_json_is_refused() -> None:
    assert json.loads(encode_json({"a": [torch.tensor(2), math.inf, (1, True, None)]})) == {"a": [2, None, [1, True, None]]}
    with pytest.raises(TypeError, match="cannot log a set"):
        encode_json({"a": {1}})


# ---- a full disk -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = tmp_path / "disk"
    path.mkdir()
    if not hasattr(libc, "mount") or libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip("cannot mount a file system here (needs root on Linux)")
    try:
        yield path
    finally:
        libc.umount2(str(path).encode(), 2)


def test_a_full_disk_names_the_file_and_loses_nothing(small_disk: Path) -> None:
    run_dir = small_disk / "run"
    step = 0
    with pytest.raises(OSError, match="disk is full") as caught, start(run_dir, total_steps=10**6) as log:  # noqa: PT012
        while step < 10**6:
            step += 1
            log.samples(step, [{"completion": "x" * 10_000}])
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(run_dir / "samples.jsonl")
    assert (run_dir / "samples.jsonl").read_bytes().endswith(b"\n")  # no half line
    assert [row["step"] for row in read_jsonl(run_dir / "samples.jsonl")] == list(range(1, step))
    assert info(run_dir)["seed"] == 7  # still whole, whether or not the new one fitted
    assert list(run_dir.glob(".*.tmp")) == []


def test_a_full_disk_leaves_the_old_json(small_disk: Path) -> None:
    path = small_disk / "summary.json"
    logging.write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk is full") as caught:
        logging.write_json(path, {"a": "x" * 2_000_000})
    assert caught.value.filename == str(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in small_disk.iterdir()] == ["summary.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_stream_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"disk is full.*metrics\.jsonl"), start(tmp_path) as log:
        log.metrics(1, {"reward": 1.0})
    assert info(tmp_path)["status"] == "failed"


# ---- TensorBoard and W&B ---------------------------------------------------------------------------------------------------------------


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with start(tmp_path, tensorboard=True) as log:
        for step in range(1, 6):
            log.metrics(step, {"reward": step / 8, "eval/avg@8": 0.5, "grad_norm": math.nan})
    with start(tmp_path, tensorboard=True, resume_step=3) as log:
        log.metrics(4, {"reward": 0.75})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"reward", "eval/avg@8"} <= set(tags)
    assert "grad_norm" not in tags
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(1, 0.125), (2, 0.25), (3, 0.375), (4, 0.75)]


@pytest.mark.parametrize(("option", "module", "command"), [("wandb", "wandb", "wandb"), ("tensorboard", "tensorboard", "tensorboard")])
def test_a_sink_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, module: str, command: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python's own way to make an import fail
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(LogError, match=f"pip install {command}"):
        RunLog(tmp_path / "run", total_steps=1, **{option: True})  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


# ---- the terminal ----------------------------------------------------------------------------------------------------------------------

METRICS = {"reward": 0.5, "ground_truth_reward": 0.25, "actor_entropy": 0.125, "response_length": 8.0, "logp_gap_max": 2e-6}
SPEEDS = {"rollout_tokens_per_s": 5400.0, "train_tokens_per_s": 8100.0}


def test_plain_lines_without_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with start(tmp_path, total_steps=200) as log:
        for step in range(1, 201):
            log.metrics(step, METRICS | SPEEDS)
        log.warn(200, "bad answer \x1b[2J\x07\u202e")
        log.summary({"before_after": [{"metric": "avg@8", "before": 0.5, "after": 0.75}]})
    said = capsys.readouterr().out
    assert not [c for c in said if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in said
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert 10 <= len(lines) < 60
    assert "majority_voting 0.500" in lines[-1]
    assert "step 200/200" in lines[-1]
    assert "rollout tokens/s 5,400" in lines[-1]
    assert "logp gap 2.0e-06" in lines[-1]
    assert "WARNING (step 200): bad answer" in said
    assert "before    0.500  after    0.750" in said
    assert said.splitlines()[-1] == "finished"


def live_view(width: int = 100, total_steps: int = 40) -> tuple[live_view_module.LiveView, io.StringIO]:
    console = pytest.importorskip("rich.console")
    screen = io.StringIO()
    terminal = console.Console(file=screen, force_terminal=True, width=width, color_system=None)
    return live_view_module.LiveView(title="run", reward="majority_voting", total_steps=total_steps, first_step=0, console=terminal), screen


def test_the_live_view_says_what_it_should() -> None:
    view, screen = live_view()
    for step in range(1, 41):
        view.step(step, METRICS | SPEEDS | {"reward": step / 40} | ({"eval/greedy_accuracy": 0.5} if step == 20 else {}))
    view.warn(40, "nothing parses [red]")
    view.summary({"before_after": [{"metric": "avg@8", "before": 0.5, "after": None}]})
    view.close("failed", "the reason")
    said = screen.getvalue()
    last = said[said.rindex("step 40/40") :]
    for text in ("majority_voting", "1.000", "ground truth", "entropy", "5,400", "8,100", "2.0e-06", "▁", "█", "0:00 left", "until"):
        assert text in last, text
    assert "evaluation at step 20: greedy_accuracy 0.500" in last
    assert "last warning, step 40: nothing parses [red]" in last
    assert "WARNING · step 40" in said
    assert "avg@8" in said
    assert said.rstrip().endswith("failed: the reason")
    assert "\x1b[2K\x1b[1A" in said  # redrawn in place


def test_the_live_view_before_the_first_step_and_in_a_narrow_terminal() -> None:
    view, screen = live_view(width=40)
    assert "waiting for the first step" in screen.getvalue()
    view.step(1, METRICS)
    view.close("finished", "")
    assert all(len(line.replace("\x1b[2K", "").replace("\x1b[1A", "")) <= 60 for line in screen.getvalue().splitlines())


def test_steps_redraw_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    view, _ = live_view(total_steps=10**6)
    now = 1000.0
    monkeypatch.setattr(logging.time, "monotonic", lambda: now)
    draws = []
    monkeypatch.setattr(view, "_panel", lambda: draws.append(now) or "")
    for step in range(1, 1001):
        now += 0.01
        view.step(step, METRICS)
    view._live.stop()
    assert 36 <= len(draws) <= 41  # ten seconds


def test_auto_draws_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert live_view_module.view_class("auto") is live_view_module.PlainView
    assert live_view_module.view_class("on") is live_view_module.LiveView
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert live_view_module.view_class("auto") is live_view_module.LiveView
    assert live_view_module.view_class("off") is live_view_module.PlainView
    monkeypatch.setenv("TERM", "dumb")
    assert live_view_module.view_class("auto") is live_view_module.PlainView
    with pytest.raises(ValueError, match="auto, on, off"):
        live_view_module.view_class("yes")


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float(i) for i in range(1000)], width=32)) == 32
