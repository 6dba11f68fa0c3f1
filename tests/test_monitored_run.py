"""What a run does with what the monitor finds, and the options around it: stopping, going back, lower rates, KL, mini-batches, votes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from urlvr_fast.monitor.anchors import anchored_majority
from urlvr_fast.rewards import RewardError
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer import loop
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import ConfigError
from urlvr_fast.trainer.logging import read_jsonl
from urlvr_fast.trainer.loop import train

SMALL = [
    "rollout.engine=hf",
    "rollout.max_tokens=12",
    "rollout.group_size=4",
    "trainer.prompts_per_step=4",
    "trainer.eval_every=2",
    "trainer.save_every=0",
    "trainer.steps=4",
    "eval.prompts=16",
    "eval.samplings=1",
    "eval.group_size=2",
    "prompts.limit=32",
    "log.live=off",
]
# Ruins the bundled model within a few steps.
RUINOUS = ["trainer.lr=3e-3", "trainer.steps=12"]


def run(tmp_path: Path, *overrides: str, resume: bool = False, name: str = "run") -> tuple[str, Path]:
    config = configuration.load(None, [*SMALL, *overrides, f"run_dir={tmp_path / name}"])
    return train(config, resume=resume), tmp_path / name


def record(path: Path) -> dict:
    return json.loads((path / "run.json").read_text())


def lines(path: Path) -> list[dict]:
    return read_jsonl(path / "metrics.jsonl")


def weights(path: Path, index: int = -1) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(checkpoints(path)[index]).state_dict()


def test_the_stop_rule_stops_a_ruined_run_and_says_why(tmp_path):
    status, path = run(tmp_path, *RUINOUS, "monitor.on_collapse=stop")
    assert status == "stopped"
    fired = record(path)["detections"][-1]
    assert fired["detector"] == "anchor_drift"
    assert fired["action"] == "stop"
    assert lines(path)[-1]["step"] == fired["step"] < 12
    reason = record(path)["reason"]
    assert reason.startswith(f"step {fired['step']}, anchor_drift: eval/anchored_majority is ")
    assert reason in (path / "report.html").read_text().replace("&#x27;", "'")
    assert checkpoints(path)[-1].name == f"step-{fired['step']:06d}"


def test_warning_is_the_default_and_leaves_the_run_alone(tmp_path):
    status, path = run(tmp_path, *RUINOUS, "trainer.steps=6")
    assert status == "finished"
    assert {d["action"] for d in record(path)["detections"]} == {"warn"}


def test_rollback_leaves_the_weights_of_the_last_quiet_evaluation(tmp_path):
    status, path = run(tmp_path, *RUINOUS, "monitor.on_collapse=rollback", "trainer.save_every=1", "trainer.keep_checkpoints=0")
    assert status == "stopped"
    good = int(record(path)["reason"].rsplit("step ", 1)[1])
    readings = anchored_majority(lines(path))
    assert good == max(readings, key=readings.__getitem__)  # the evaluation at which the anchors held best
    kept = weights(path)
    if good == 0:
        expected = AutoModelForCausalLM.from_pretrained(configuration_source()).state_dict()
    else:
        expected = AutoModelForCausalLM.from_pretrained(path / "checkpoints" / f"step-{good:06d}").state_dict()
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    after = {row["metric"]: row["after"] for row in json.loads((path / "summary.json").read_text())["before_after"]}
    at_good = next(line for line in lines(path) if line["step"] == good)
    assert after["greedy_accuracy"] == at_good["eval/greedy_accuracy"]  # of what is left, not of what was left behind


def configuration_source() -> str:
    from urlvr_fast.trainer.base_model import bundled_model_path

    return str(bundled_model_path())


def test_lower_rate(tmp_path):
    status, path = run(tmp_path, *RUINOUS, "monitor.actions={kl_spike: lower_rate}", "monitor.kl_every=1", "monitor.rate_factor=0.1")
    assert status == "finished"
    fired = next(d["step"] for d in record(path)["detections"] if d["detector"] == "kl_spike")
    rates = {line["step"]: line["lr"] for line in lines(path) if "lr" in line}
    assert rates[fired] == pytest.approx(3e-3)
    assert rates[fired + 1] == pytest.approx(3e-4)


def test_a_resumed_run_remembers_what_fired_and_its_anchors(tmp_path):
    lowering = ["monitor.actions={kl_spike: lower_rate}", "monitor.kl_every=1", "monitor.rate_factor=0.1"]
    whole = run(tmp_path, *RUINOUS, *lowering, name="whole")[1]
    run(tmp_path, *RUINOUS, *lowering, "trainer.stop_after=6", name="parts")
    parts = run(tmp_path, *RUINOUS, *lowering, name="parts", resume=True)[1]
    assert [d["detector"] for d in record(parts)["detections"]] == [d["detector"] for d in record(whole)["detections"]]
    for a, b in zip(lines(whole), lines(parts), strict=True):
        for name in ("lr", "eval/anchored_majority", "kl_start", "reward"):
            assert (name in a) == (name in b), (a["step"], name)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), (a["step"], name)


def test_a_run_that_was_stopped_goes_on_when_resumed_and_says_so(tmp_path):
    stopped = [*RUINOUS, "monitor.on_collapse=stop"]
    assert run(tmp_path, *stopped)[0] == "stopped"
    status, path = run(tmp_path, *stopped, resume=True)
    assert status == "finished"
    assert any("has ended this run before and will not do so again" in w["message"] for w in record(path)["warnings"])
    assert lines(path)[-1]["step"] == 12


def test_too_few_anchors_are_said_and_not_looked_at(tmp_path):
    """Four evaluation prompts hold nothing fast: the rule must not look content."""
    status, path = run(tmp_path, *RUINOUS, "eval.prompts=4", "monitor.on_collapse=stop", "trainer.steps=4")
    assert status == "finished"
    assert any("anchor_drift cannot look" in w["message"] for w in record(path)["warnings"])
    assert not any("eval/anchor_agreement" in line for line in lines(path))
    quiet = run(tmp_path, "eval.prompts=4", "monitor.on_collapse=off", "trainer.steps=1", name="off")[1]
    assert not any("cannot look" in w["message"] for w in record(quiet)["warnings"])


def test_resuming_on_other_evaluation_prompts_is_refused(tmp_path):
    run(tmp_path, "trainer.stop_after=2")
    with pytest.raises(ConfigError, match=r"eval\.prompts was 16 and is 8"):
        run(tmp_path, "eval.prompts=8", resume=True)


def test_stop_at_collapse_ends_at_the_model_collapse_step(tmp_path):
    # Every Reward Accuracy is below 1.01, so the run has "collapsed" as soon as that could be persistent.
    with pytest.raises(ConfigError, match="stop_at_collapse"):
        configuration.load(None, ["monitor.stop_at_collapse=-1"])
    status, path = run(tmp_path, "trainer.steps=12", "monitor.stop_at_collapse=1.01", "trainer.lr=0")
    assert status == "stopped"
    assert lines(path)[-1]["step"] == 5
    assert "Reward Accuracy has stayed below 1.01 since step 1" in record(path)["reason"]
    collapse = json.loads((path / "summary.json").read_text())["collapse"]
    assert set(collapse) == {"MCS", "MCS_0.1", "MCS_0.25", "MCS_half"}


# ---- KL, mini-batches, votes


def test_kl_to_the_start_is_zero_at_first_and_a_penalty_holds_it_down(tmp_path):
    long = ["monitor.kl_every=1", "trainer.steps=10", "trainer.lr=1e-3", "trainer.eval_every=0"]
    free = lines(run(tmp_path, *long, name="free")[1])
    held = lines(run(tmp_path, *long, "loss.kl_coef=20", name="held")[1])
    assert free[1]["kl_start"] == pytest.approx(0, abs=1e-8)  # of the policy that sampled, which has not moved yet
    assert all(line["kl_start"] > 0 for line in free[2:])
    assert held[-1]["kl_start"] < free[-1]["kl_start"]
    off = lines(run(tmp_path, "monitor.kl_every=0", "trainer.steps=1", name="off")[1])
    assert "kl_start" not in off[1]


def test_mini_batches_make_several_updates(tmp_path, monkeypatch):
    updates = []
    original = loop.Learner.update

    def counted(self, step):
        updates.append(step)
        return original(self, step)

    monkeypatch.setattr(loop.Learner, "update", counted)
    one = run(tmp_path, "trainer.steps=2", "trainer.mini_batch_prompts=4", name="one")[1]
    assert updates == [1, 2]
    updates.clear()
    unset = run(tmp_path, "trainer.steps=2", name="unset")[1]
    several = run(tmp_path, "trainer.steps=2", "trainer.mini_batch_prompts=3", "trainer.lr=1e-3", name="several")[1]
    assert updates == [1, 2, 1, 1, 2, 2]  # 3 of the 4 prompts, then the last
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(unset).items())
    last = lines(several)[-1]
    assert last["logp_gap_max"] < 1e-3  # of the engine against the weights that it sampled with, not against later ones


def test_more_votes_than_samples(tmp_path, monkeypatch):
    masks, rewarded = [], []
    original = loop.Learner.accumulate

    def seen(self, batch, advantages):
        masks.append(batch.train_mask)
        rewarded.append(advantages)
        return original(self, batch, advantages)

    monkeypatch.setattr(loop.Learner, "accumulate", seen)
    run(tmp_path, "trainer.steps=1", "rollout.votes=6", "rollout.group_size=2")
    assert masks[0].tolist() == [True, True, False, False, False, False] * 4
    assert not rewarded[0][~masks[0]].any()
    with pytest.raises(ConfigError, match=r"rollout\.votes=2 is fewer than rollout\.group_size=4"):
        configuration.load(None, ["rollout.votes=2", "rollout.group_size=4"])


@pytest.mark.parametrize(
    "override",
    ["monitor.actions={repetitions: stop}", "monitor.thresholds={nothing: 1}", "monitor.on_collapse=halt", "monitor.rate_factor=1.5"],
)
def test_bad_monitor_options_are_refused_before_anything_starts(override):
    with pytest.raises(ConfigError, match="monitor"):
        configuration.load(None, [override])


def test_a_stop_rule_that_would_never_look_is_refused():
    for blind in ("eval.prompts=0", "trainer.eval_every=0"):
        configuration.load(None, [blind])
        with pytest.raises(ConfigError, match="looks at evaluations, and there are none"):
            configuration.load(None, [blind, "monitor.on_collapse=stop"])
        with pytest.raises(ConfigError, match="looks at evaluations, and there are none"):
            configuration.load(None, [blind, "monitor.actions={anchor_drift: rollback}"])
    with pytest.raises(ConfigError, match="kl_spike looks at the KL"):
        configuration.load(None, ["monitor.actions={kl_spike: stop}", "monitor.kl_every=0"])


# ---- rewards in the loop


@pytest.mark.parametrize(
    "overrides",
    [
        ["reward=restrain"],
        ["reward=empo"],
        ["reward=mixture", "reward_options={rewards: [{reward: majority_voting, weight: 0.5}, {reward: token_entropy, normalise: group}]}"],
        ["reward=self_verification", "data=countdown", "data_options={numbers: 3, largest: 6}", "model=bundled:countdown"],
        ["reward=self_verification", "reward_options={mode: generate, max_tokens: 4}", "data=countdown", "model=bundled:countdown"],
        ["reward=procedural", "data=sorting"],
        ["reward=next_token", "data=next_token", "rollout.max_tokens=8"],
        ["reward=probability_disparity"],
        ["reward=covo"],
    ],
    ids=lambda overrides: overrides[0] + "-" + str(len(overrides)),
)
def test_every_kind_of_reward_trains(tmp_path, overrides):
    status, path = run(tmp_path, *overrides, "trainer.steps=2", "eval.prompts=4")
    assert status == "finished"
    assert len(lines(path)) == 3


def test_a_procedural_reward_needs_a_verifier(tmp_path):
    with pytest.raises(RewardError, match="procedural"):
        run(tmp_path, "reward=procedural")


def test_votes_are_written_before_and_after(tmp_path):
    path = run(tmp_path)[1]
    rows = read_jsonl(path / "votes.jsonl")
    assert [row["step"] for row in rows] == [0] * 16 + [4] * 16
    assert {row["prompt_id"] for row in rows[:16]} == {row["prompt_id"] for row in rows[16:]}
    assert all(0 <= row["share"] <= 1 and row["prompt"].endswith("=") for row in rows)
    assert json.loads((path / "anchors.json").read_text())
