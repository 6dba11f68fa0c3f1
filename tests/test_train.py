"""Training from the outside: the command line, real engines, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from urlvr_fast.rewards import RewardError
from urlvr_fast.tasks.prompt_set import DataError
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import ConfigError, RolloutConfig
from urlvr_fast.trainer.logging import LogError, read_jsonl
from urlvr_fast.trainer.loop import check_gaps, train
from urlvr_fast.trainer.rollout import RolloutError, Sampling

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
URLVR = str(Path(sys.executable).parent / "urlvr")
SMALL = [
    "reward_options={}",  # plain majority voting
    "trainer.prompts_per_step=8",
    "rollout.group_size=4",
    "eval.prompts=16",
    "eval.samplings=1",
    "eval.group_size=4",
    "prompts.limit=64",
]
QUICK = [*SMALL, "trainer.steps=3", "rollout.engine=hf", "log.live=off"]


def urlvr(*arguments, **options):
    return subprocess.run([URLVR, *map(str, arguments)], capture_output=True, text=True, timeout=400, **options)


def run(tmp_path, *overrides, resume=False, overwrite=False, name="run"):
    config = configuration.load(QUICKSTART, [*QUICK, f"run_dir={tmp_path / name}", *overrides])
    status = train(config, resume=resume, overwrite=overwrite)
    return status, tmp_path / name


def steps(run_dir):
    return [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")]


def weights(run_dir):
    return AutoModelForCausalLM.from_pretrained(checkpoints(run_dir)[-1]).state_dict()


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- the main job, as a user runs it ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_run(tmp_path_factory):
    """Five steps through the command line with vLLM, stopped after three and resumed."""
    run_dir = tmp_path_factory.mktemp("vllm") / "run"
    arguments = ["train", QUICKSTART, *SMALL, "trainer.steps=5", f"run_dir={run_dir}"]
    first = urlvr(*arguments, "trainer.stop_after=3")
    assert first.returncode == 0, first.stdout + first.stderr
    stopped = json.loads((run_dir / "run.json").read_text())
    assert stopped["status"] == "stopped"
    assert steps(run_dir) == [0, 1, 2, 3]
    second = urlvr(*arguments, "--resume")
    assert second.returncode == 0, second.stdout + second.stderr
    return run_dir, second.stdout


def test_run_directory_is_complete(vllm_run):
    run_dir, stdout = vllm_run
    assert steps(run_dir) == [0, 1, 2, 3, 4, 5]
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["seed"] == 0
    assert {"torch", "transformers", "urlvr_fast"} <= set(record["versions"])
    assert configuration.load(run_dir / "config.yaml").trainer.steps == 5
    assert [p.name for p in checkpoints(run_dir)] == ["step-000003", "step-000005"]
    assert "<svg" in (run_dir / "report.html").read_text()
    assert "report.html" in stdout
    table = {row["metric"] for row in json.loads((run_dir / "summary.json").read_text())["before_after"]}
    assert {"majority_voting_reward", "greedy_accuracy", "avg@4", "pass@4", "maj@4"} <= table
    samples = read_jsonl(run_dir / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 5}
    for sample in samples:
        # Membership in the winning class is what majority voting pays for.
        assert sample["reward"] == float(sample["in_majority"])


def test_metrics_carry_the_papers_names_and_the_engines_agree(vllm_run):
    names = {
        *("label_accuracy", "reward_accuracy", "majority_voting_reward", "ground_truth_reward", "majority_ratio", "pass@4"),
        *("actor_entropy", "response_length", "logp_gap_max", "rollout_tokens_per_s", "train_tokens_per_s", "grad_norm", "lr"),
    }
    for line in read_jsonl(vllm_run[0] / "metrics.jsonl")[1:]:
        assert names <= set(line)
        assert 0 < line["logp_gap_max"] < 1e-4
        assert line["majority_voting_reward"] == pytest.approx(line["reward"])


def test_checkpoint_loads_in_both_libraries(vllm_run):
    from urlvr_fast.trainer.rollout.vllm import VLLMRollout

    checkpoint = checkpoints(vllm_run[0])[-1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer("23+45=").input_ids
    engine = VLLMRollout(str(checkpoint), dtype="float32", max_model_len=64, stop_token_ids=[tokenizer.eos_token_id])
    try:
        ((completion,),) = engine.generate([prompt], Sampling(1, 0.0, 8), 0)
    finally:
        engine.close()
    ids = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        likeliest = model(ids).logits[0].argmax(-1)[len(prompt) - 1 : -1]
    assert likeliest.tolist() == completion.token_ids


def test_eval_of_a_run(vllm_run, tmp_path):
    out = tmp_path / "eval.json"
    result = urlvr("eval", vllm_run[0], "--k", "1,4", "--limit", "16", "--json", out, "--set", "rollout.engine=hf")
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text())
    assert {"avg@1", "avg@4", "pass@4", "maj@4", "greedy_accuracy", "majority_voting_reward"} <= set(figures)
    assert figures["avg@1"] == pytest.approx(figures["avg@4"])  # the unbiased estimate of the same mean
    assert figures["pass@4"] >= figures["avg@4"]


def test_real_problems_with_a_model_that_cannot_solve_them(contest_data, tmp_path):
    """Prompts of a few hundred characters, boxed answers, and a model that writes digits: nothing parses, and the run says so."""
    run_dir = tmp_path / "amc"
    result = urlvr(
        *(
            "train",
            QUICKSTART,
            f"data={contest_data / 'amc.json'}",
            "trainer.steps=3",
            "trainer.prompts_per_step=8",
            "rollout.group_size=4",
        ),
        *("eval.prompts=8", "eval.samplings=1", f"run_dir={run_dir}"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert steps(run_dir) == [0, 1, 2, 3]
    assert all(line["parse_rate"] == 0 and line["reward"] == 0 for line in read_jsonl(run_dir / "metrics.jsonl")[1:])
    warnings = json.loads((run_dir / "run.json").read_text())["warnings"]
    assert any("pars" in w["message"] for w in warnings)
    assert "pars" in result.stdout


# ---- what a run must not do ------------------------------------------------------------------------------------------------------------


def test_labels_do_not_reach_training(tmp_path):
    """The same prompts with right answers, with nonsense for answers and without answers train the same weights, bit for bit."""
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10, 26) for b in (12, 47)]
    trained = []
    for name, change in (("right", {}), ("wrong", {"answer": "7"}), ("none", None)):
        path = tmp_path / f"{name}.jsonl"
        kept = [{"prompt": r["prompt"]} if change is None else r | change for r in rows]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
        _, run_dir = run(tmp_path, f"data={path}", "answers.kind=exact", "prompts.limit=null", "trainer.lr=1e-3", name=name)
        trained.append(weights(run_dir))
        lines = read_jsonl(run_dir / "metrics.jsonl")[1:]
        assert all(("label_accuracy" in line) == (change is not None) for line in lines)
        assert all(line["parse_rate"] > 0 for line in lines)
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    # The oracle is the one reward that sees them.
    oracle = [
        weights(run(tmp_path, f"data={tmp_path / name}.jsonl", "answers.kind=exact", "reward=ground_truth", name=f"oracle-{name}")[1])
        for name in ("right", "wrong")
    ]
    assert not same(*oracle)


def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path):
    _, whole = run(tmp_path, "trainer.steps=4", name="whole")
    status, parts = run(tmp_path, "trainer.steps=4", "trainer.stop_after=2", name="parts")
    assert status == "stopped"
    status, _ = run(tmp_path, "trainer.steps=4", "rollout.logp_gap_mean_limit=0.5", resume=True, name="parts")
    assert status == "finished"
    assert same(weights(whole), weights(parts))
    keys = ("step", "reward", "actor_entropy", "grad_norm", "eval/avg@4")
    a, b = ([{k: line.get(k) for k in keys} for line in read_jsonl(d / "metrics.jsonl")] for d in (whole, parts))
    assert a == b


def test_an_existing_run_is_not_overwritten_by_accident(tmp_path):
    _, run_dir = run(tmp_path, "trainer.steps=1")
    with pytest.raises(ConfigError, match=r"already holds a run; use --resume .* --overwrite"):
        run(tmp_path, "trainer.steps=1")
    with pytest.raises(ConfigError, match=r"cannot resume .*trainer.lr was 0.0001 and is 0.5"):
        run(tmp_path, "trainer.steps=1", "trainer.lr=0.5", resume=True)
    run(tmp_path, "trainer.steps=2", overwrite=True)
    assert steps(run_dir) == [0, 1, 2]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    for _ in range(2):  # the second time with a config.yaml of somebody's, which does not make it a run
        with pytest.raises(ConfigError, match=r"holds .*which is not a run's"):
            run(tmp_path, name="precious", overwrite=True)
        assert (precious / "thesis.txt").exists()
        (precious / "config.yaml").write_text("mine: true")
    (run_dir / "notes.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"notes\.txt"):
        run(tmp_path, overwrite=True)
    (run_dir / "notes.txt").unlink()
    with pytest.raises(ConfigError, match="about to be deleted"):
        run(tmp_path, f"model={checkpoints(run_dir)[-1]}", overwrite=True)
    with pytest.raises(LogError, match="pip install wandb"):
        run(tmp_path, "log.wandb=true", overwrite=True)
    assert steps(run_dir) == [0, 1, 2]  # a request that cannot be met deletes nothing
    with pytest.raises(ConfigError, match="no run in"):
        run(tmp_path, name="nowhere", resume=True)


def test_ctrl_c_writes_a_checkpoint_and_can_be_resumed(tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", QUICKSTART, *QUICK, "trainer.steps=100000", "eval.prompts=0", f"run_dir={run_dir}"]
    process = subprocess.Popen([URLVR, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").is_file() or len(steps(run_dir)) < 4:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert (run_dir / "report.html").is_file()
    last = steps(run_dir)[-1]
    assert [p.name for p in checkpoints(run_dir)][-1] == f"step-{last:06d}"
    resumed = urlvr("train", f"run_dir={run_dir}", f"trainer.stop_after={last + 1}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert steps(run_dir)[-1] == last + 1


# ---- bad input -------------------------------------------------------------------------------------------------------------------------


def test_bad_input_is_named_before_anything_is_written(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    no_prompt = tmp_path / "no_prompt.jsonl"
    no_prompt.write_text('{"prompt": "1+1="}\n{"question": "2+2="}\n')
    for override, kind, message in (
        ("data=nothing.jsonl", DataError, "nothing.jsonl"),
        (f"data={empty}", DataError, "empty"),
        (f"data={no_prompt}", DataError, "prompt"),
        ("data=arithmetik", DataError, "arithmetic"),
        ("model=/no/such/model", ConfigError, "no such directory"),
        (f"model={tmp_path}", ConfigError, "config.json"),
        ("reward=majority_votin", Exception, "majority_voting"),
        ("rollout.max_tokens=5000", ConfigError, "leaves no room for a prompt"),
    ):
        with pytest.raises(kind, match=message):
            run(tmp_path, override)
        assert not (tmp_path / "run").exists()
    result = urlvr("train", "data=nothing.jsonl", f"run_dir={tmp_path / 'run'}", "rollout.engine=hf")
    assert result.returncode == 2
    assert "nothing.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


def test_eval_of_the_bundled_model_needs_nothing_but_its_name(tmp_path):
    out = tmp_path / "figures.json"
    result = urlvr("eval", "bundled", "--limit", "32", "--k", "2", "--json", out, "--set", "rollout.engine=hf", "rollout.max_tokens=12")
    assert result.returncode == 0, result.stderr
    assert 0.5 < json.loads(out.read_text())["greedy_accuracy"] < 0.95


def test_a_log_prob_that_is_not_a_number_stops_the_run(tmp_path, monkeypatch):
    from urlvr_fast.trainer.rollout.hf import HFRollout

    generate = HFRollout.generate

    def spoilt(self, prompts, sampling, seed):
        completions = generate(self, prompts, sampling, seed)
        completions[0][0].logp[0] = float("nan")
        return completions

    monkeypatch.setattr(HFRollout, "generate", spoilt)
    with pytest.raises(RolloutError, match="differ by up to nan"):
        run(tmp_path, "eval.prompts=0")


def test_prompts_longer_than_the_context(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("1+1=", "9" * 2000, "2+2=")))
    options = [f"data={path}", "answers.kind=exact", "trainer.steps=1"]
    _, run_dir = run(tmp_path, *options)
    warnings = json.loads((run_dir / "run.json").read_text())["warnings"]
    assert any("1 prompts" in w["message"] and "skipped" in w["message"] for w in warnings)
    with pytest.raises(Exception, match=r"2001|2000"):
        run(tmp_path, *options, "prompts.overlong=refuse", name="refused")


REWARDS = """
import torch

def by_length(batch, policy, scale=1.0):
    return scale * batch.response_lens.float()

def constant(batch, policy):
    return [1.0] * len(batch)

def raises(batch, policy):
    raise KeyError("oh no")

def short(batch, policy):
    return torch.zeros(len(batch) - 1)

def nan(batch, policy):
    rewards = torch.zeros(len(batch))
    rewards[5] = float("nan")
    return rewards

def of_statistics(batch, policy):
    return batch.sequence_mean(batch.self_certainty + 3 * batch.prob_gap - batch.entropy)

of_statistics.needs = {"entropy", "self_certainty", "prob_gap"}

def asks_the_policy(batch, policy):
    logp = policy.score(batch, ("logp",))["logp"]
    assert (logp - batch.sampled_logp).abs().max() < 1e-4
    texts = policy.generate(["1+1=", "2+2="], 3, temperature=1.0, max_tokens=4)
    assert [len(t) for t in texts] == [3, 3]
    assert not hasattr(batch, "answers")
    return batch.sequence_mean(logp)
"""


def test_rewards_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    _, run_dir = run(tmp_path, f"reward={path}:by_length", "reward_options={scale: 2.0}", name="length")
    for line in read_jsonl(run_dir / "metrics.jsonl")[1:]:
        assert line["reward"] == pytest.approx(2 * line["response_length"])
    run(tmp_path, f"reward={path}:asks_the_policy", "trainer.steps=1", name="asks")
    for name, message in (("raises", "raises.*oh no"), ("short", "short.*31.*32"), ("nan", "nan.*rollout 5|rollout 5.*nan")):
        with pytest.raises(RewardError, match=f"(?is){message}"):
            run(tmp_path, f"reward={path}:{name}", name=name)
        assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "failed"
        assert "RewardError" in (tmp_path / name / "report.html").read_text()


def test_constant_rewards_are_an_alarm(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    _, run_dir = run(tmp_path, f"reward={path}:constant")
    warnings = json.loads((run_dir / "run.json").read_text())["warnings"]
    assert any("reward" in w["message"] and w["step"] <= 3 for w in warnings)


@pytest.mark.parametrize("reward", ["self_certainty", "token_entropy", "trajectory_entropy", "probability", "ground_truth"])
def test_every_reward_trains(tmp_path, reward):
    status, run_dir = run(tmp_path, f"reward={reward}", "trainer.steps=2")
    lines = read_jsonl(run_dir / "metrics.jsonl")[1:]
    assert status == "finished"
    assert all(line["grad_norm"] > 0 and line["reward_std"] > 0 for line in lines)


@pytest.fixture
def passes(monkeypatch):
    """What the learner's body does: "forward" (with gradient), "score" (without) and "backward". Generation, with a cache, is left out."""
    from urlvr_fast.trainer import loop

    seen = []
    load = loop.load_model

    def counted(*arguments):
        loaded = load(*arguments)
        body = loaded.model.base_model

        def count(_module, _args, kwargs):
            if kwargs.get("use_cache") is False:
                seen.append("forward" if torch.is_grad_enabled() else "score")

        body.register_forward_pre_hook(count, with_kwargs=True)
        body.norm.weight.register_post_accumulate_grad_hook(lambda _: seen.append("backward"))
        return loaded

    monkeypatch.setattr(loop, "load_model", counted)
    return seen


@pytest.mark.parametrize("engine", ["vllm", "hf"])
def test_a_certainty_step_is_one_forward_and_one_backward(tmp_path, passes, engine):
    """But for the first of a run and the first after a resume, which are checked against a forward of the old policy."""
    options = ["reward=self_certainty", f"rollout.engine={engine}", "trainer.steps=4", "monitor.kl_every=0"]
    step = ["forward", "backward"]
    for stop in (3, 4):
        passes.clear()
        _, run_dir = run(tmp_path, *options, f"trainer.stop_after={stop}", resume=stop == 4)
        assert passes[:2] == ["score", "score"]  # the learner looks at the head of a model it has not seen
        assert passes[2:] == ["score", *step * (3 if stop == 3 else 1)]
    lines = read_jsonl(run_dir / "metrics.jsonl")[1:]
    assert ["stats_gap_max" in line for line in lines] == [True, False, False, True]
    assert all(0 < line["stats_gap_max"] < 1e-4 for line in (lines[0], lines[3]))
    assert all(line["logp_gap_max"] < 1e-4 and line["actor_entropy"] > 0 for line in lines)


def test_statistics_taken_while_sampling_train_what_recomputed_ones_do(tmp_path, passes):
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    trained = {}
    for stats in ("sampling", "recompute"):
        _, run_dir = run(tmp_path, f"reward={path}:of_statistics", f"rollout.stats={stats}", name=stats)
        trained[stats] = read_jsonl(run_dir / "metrics.jsonl")[1:]
    assert passes[-9:] == ["score", "forward", "backward"] * 3
    assert not any("stats_gap_max" in line for line in trained["recompute"])
    for a, b in zip(*trained.values(), strict=True):
        for name in ("reward", "actor_entropy", "grad_norm", "response_length"):
            assert a[name] == pytest.approx(b[name], rel=1e-3)


def test_statistics_of_other_tokens_stop_the_run(tmp_path, monkeypatch):
    from urlvr_fast.trainer.rollout.hf import HFRollout

    generate = HFRollout.generate

    def mixed_up(self, prompts, sampling, seed):
        completions = generate(self, prompts, sampling, seed)
        for c in (c for group in completions for c in group):
            c.statistics = {name: values.flip(0) for name, values in c.statistics.items()}
        return completions

    monkeypatch.setattr(HFRollout, "generate", mixed_up)
    with pytest.raises(RolloutError, match=r"step 1: entropy.*rollout\.stats=recompute"):
        run(tmp_path, "reward=self_certainty", "eval.prompts=0")


@pytest.mark.parametrize(
    ("dtype", "mean", "largest", "given", "stops"),
    [
        ("float32", 9e-4, 9e-4, {}, False),
        ("float32", 9e-4, 2e-3, {}, True),
        ("float32", 0.5, 0.9, {"logp_gap_limit": 1.0}, False),  # who allows it for a token allows it for all of them
        ("bfloat16", 0.01, 4.0, {}, False),
        ("bfloat16", 0.3, 1.0, {}, True),
        ("bfloat16", 0.3, 1.0, {"logp_gap_mean_limit": 0.4}, False),
        ("bfloat16", 0.01, 6.0, {}, True),
        ("bfloat16", math.nan, 1.0, {}, True),
    ],
)
def test_which_gaps_end_a_run(dtype, mean, largest, given, stops):
    rest = SimpleNamespace(loaded=SimpleNamespace(dtype=dtype), config=SimpleNamespace(rollout=RolloutConfig(**given)))
    with pytest.raises(RolloutError, match="stale weights") if stops else nullcontext():
        check_gaps(rest, 7, {"logp_gap_mean": mean, "logp_gap_max": largest})


@pytest.mark.parametrize("limit", ["logp_gap_limit", "logp_gap_mean_limit"])
def test_a_log_prob_gap_stops_the_run(tmp_path, limit):
    with pytest.raises(RolloutError, match="stale weights"):
        run(tmp_path, f"rollout.{limit}=1e-12")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "failed"
    assert "log-prob" in record["reason"]


def test_a_model_without_a_pad_token_trains(tmp_path):
    source = ROOT / "urlvr_fast" / "bundled" / "arithmetic"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    _, with_pad = run(tmp_path, name="with")
    _, without = run(tmp_path, f"model={tmp_path / 'model'}", name="without")
    assert same(weights(with_pad), weights(without))


def test_a_model_without_an_end_of_sequence_is_refused(tmp_path):
    source = ROOT / "urlvr_fast" / "bundled" / "arithmetic"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    eos = tokenizer.eos_token_id
    tokenizer.eos_token = None
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"rollout\.stop_token_ids"):
        run(tmp_path, f"model={tmp_path / 'model'}")
    run(tmp_path, f"model={tmp_path / 'model'}", f"rollout.stop_token_ids=[{eos}]", "trainer.steps=1")


def test_the_full_disk_of_a_run(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        result = urlvr("train", QUICKSTART, *QUICK, "trainer.steps=1", f"run_dir={mount / 'run'}")
        assert result.returncode == 1
        assert "no space left" in result.stderr.lower()
        assert "Traceback" not in result.stderr
    finally:
        subprocess.run(["umount", mount], check=True)
