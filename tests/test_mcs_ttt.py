"""`urlvr mcs` and `urlvr ttt` from the outside: what they train, write, skip and refuse."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer import mcs, ttt
from urlvr_fast.trainer.config import ConfigError
from urlvr_fast.trainer.logging import read_jsonl

URLVR = str(Path(sys.executable).parent / "urlvr")
QUICK = ["trainer.steps=3", "trainer.prompts_per_step=4", "rollout.group_size=4", "eval.prompts=8", "eval.group_size=2", "prompts.limit=32"]


def urlvr(*arguments, cwd):
    return subprocess.run([URLVR, *map(str, arguments)], capture_output=True, text=True, timeout=400, cwd=cwd)


def candidate(model, *steps, last=100):
    runs = [
        mcs.SeedRun(i, "x", last, dict.fromkeys(("MCS", "MCS_0.1", "MCS_0.25", "MCS_half", mcs.PROXY), step), 10, True)
        for i, step in enumerate(steps)
    ]
    return mcs.Candidate(model, runs)


def test_ranking_by_hand():
    """Medians over seeds 20, >100, 60, >100: the two that were not reached tie for the first place."""
    ranking = mcs.rank(
        [candidate("a", 10, 20, 30), candidate("b", None, None, 5), candidate("c", 50, 60, None), candidate("d", None, None, None)]
    )
    assert ranking.measure == "MCS"
    assert {c.model: rank for c, rank in zip(ranking.candidates, ranking.ranks, strict=True)} == {"b": 1.5, "d": 1.5, "c": 3, "a": 4}
    assert ranking.candidates[2].reach("MCS") == "60 [50, >100]"
    assert ranking.candidates[0].median("MCS") == math.inf


def test_the_smallest_threshold_that_half_of_the_models_reach():
    reached = {"MCS": None, "MCS_0.1": None, "MCS_0.25": 40, "MCS_half": 20, mcs.PROXY: 5}
    one = mcs.Candidate("a", [mcs.SeedRun(0, "x", 100, reached, 1, True)])
    other = mcs.Candidate("b", [mcs.SeedRun(0, "x", 100, dict.fromkeys(reached), 1, True)])
    assert mcs.rank([one, other]).measure == "MCS_0.25"
    assert mcs.rank([other]).measure == "MCS_half"  # none was reached: the last one, and a tie


def test_without_answers_the_proxy_is_named_as_one():
    run = mcs.SeedRun(0, "x", 100, {mcs.PROXY: 7}, 1, False)
    ranking = mcs.rank([mcs.Candidate("a", [run])])
    assert "proxy" in ranking.measure
    assert "label-free proxy" in mcs.summary(ranking)["ranked by"]


def test_models_have_directories_of_their_own():
    assert mcs.slug("org/model") != mcs.slug("org-model")
    assert "/" not in mcs.slug("../../etc/passwd")
    assert ".." not in mcs.slug("..")


def test_mcs_command_ranks_bundled_models_and_goes_on(tmp_path):
    arguments = ["mcs", "bundled:arithmetic-800", "bundled:arithmetic-2000", *QUICK, "--seeds", "2", "--out", tmp_path / "mcs"]
    first = urlvr(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(": training") == 4
    record = json.loads((tmp_path / "mcs" / "mcs.json").read_text())
    assert {c["model"] for c in record["candidates"]} == {"bundled:arithmetic-800", "bundled:arithmetic-2000"}
    assert all(len(c["runs"]) == 2 and all(run["tokens"] > 0 for run in c["runs"]) for c in record["candidates"])
    drawing = ElementTree.parse(tmp_path / "mcs" / "mcs.svg")
    assert len(drawing.findall(".//{http://www.w3.org/2000/svg}circle")) == 4
    again = urlvr(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert ": training" not in again.stdout
    assert again.stdout.count("there already") == 4
    # One run taken away is made again, alone, and comes out the same.
    lost = next((tmp_path / "mcs").glob("*/seed-1"))
    before = [line["reward"] for line in read_jsonl(lost / "metrics.jsonl") if "reward" in line]
    subprocess.run(["rm", "-r", str(lost)], check=True)
    third = urlvr(*arguments, cwd=tmp_path)
    assert third.stdout.count(": training") == 1
    assert [line["reward"] for line in read_jsonl(lost / "metrics.jsonl") if "reward" in line] == pytest.approx(before, abs=1e-6)
    other = urlvr(*arguments, "trainer.lr=1e-4", cwd=tmp_path)
    assert other.returncode == 2
    assert "trainer.lr" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundled", "bundled"], "once"),
        (["bundled", "seed=3"], "seed=3"),
        (["bundled:nothing"], "no model called 'nothing' is bundled; there are arithmetic"),
        (["bundled", "./nowhere", "--config", "x.yaml"], "no such directory"),
    ],
)
def test_mcs_refuses(tmp_path, arguments, message):
    found = urlvr("mcs", *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert message in found.stderr
    assert not (tmp_path / "runs").exists()


def test_mcs_refuses_what_would_end_runs_otherwise_and_models_that_its_setting_does_not_suit(tmp_path):
    for override in ("monitor.on_collapse=stop", "monitor.actions={repetition: lower_rate}", "trainer.stop_after=2"):
        with pytest.raises(ConfigError, match="needs them to go on"):
            mcs.rank_models(["bundled"], out=tmp_path / "mcs", overrides=[override, "trainer.eval_every=1"])
    with pytest.raises(ConfigError, match="--config"):
        mcs.rank_models(["org/some-8B"], out=tmp_path / "mcs")
    assert not (tmp_path / "mcs").exists()


# ---- test-time training


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{a + 7}=", "answer": str(2 * a + 7)}) + "\n" for a in range(20, 28)))
    return path


def test_ttt_command_gives_answers_before_and_after(tmp_path, prompts):
    found = urlvr(
        *("ttt", prompts, "answers.kind=exact", "rollout.engine=hf", "rollout.max_tokens=12", "trainer.steps=6", "trainer.lr=5e-4"),
        *("eval.samplings=1", "run_dir=run", "log.live=off"),
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    assert "answers changed" in found.stdout
    rows = read_jsonl(tmp_path / "run" / "answers.jsonl")
    assert [row["prompt"] for row in rows] == [f"{a}+{a + 7}=" for a in range(20, 28)]
    assert all(row["before"] is not None and 0 < row["share_before"] <= 1 and 0 < row["share_after"] <= 1 for row in rows)
    config = configuration.load(tmp_path / "run" / "config.yaml")
    assert config.trainer.prompts_per_step == config.eval.prompts == 8
    assert config.monitor.on_collapse == "rollback"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {row["metric"] for row in summary["before_after"]} >= {"greedy_accuracy", "avg@8"}


def test_ttt_needs_no_answers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+11="}) + "\n" for a in range(20, 24)))
    options = [
        "answers.kind=exact",
        "rollout.engine=hf",
        "rollout.max_tokens=8",
        "trainer.steps=2",
        f"run_dir={tmp_path / 'run'}",
        "log.live=off",
    ]
    status, found = ttt.train_at_test_time(ttt.configure(str(path), model="bundled", overrides=options))
    assert status == "finished"
    assert len(found) == 4
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "greedy_accuracy" not in {row["metric"] for row in summary["before_after"]}


def test_ttt_options_win_over_its_defaults(prompts, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("trainer:\n  steps: 9\nmonitor:\n  on_collapse: warn\n")
    config = ttt.configure(str(prompts), model="bundled", config_file=file, overrides=["trainer.eval_every=3"])
    assert (config.trainer.steps, config.trainer.eval_every, config.monitor.on_collapse) == (9, 3, "warn")
    assert config.data == config.eval.data == str(prompts)
    assert config.model == "bundled"
    file.write_text("model: some/model\n")
    assert ttt.configure(str(prompts), config_file=file).model == "some/model"
    assert ttt.configure(str(prompts), config_file=file, model="bundled:arithmetic-800").model == "bundled:arithmetic-800"


def test_ttt_refuses_one_prompt_and_no_file(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "1+1="}\n')
    with pytest.raises(ConfigError, match="one prompt"):
        ttt.configure(str(path), model="bundled")
    with pytest.raises(ConfigError, match="draws its prompts"):
        ttt.configure("arithmetic")
    found = urlvr("ttt", "trainer.steps=1", cwd=tmp_path)
    assert found.returncode == 2
    assert "one file of prompts" in found.stderr
