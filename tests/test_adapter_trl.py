"""The adapter on the real TRL: its head against TRL's own, whole runs of a small model, and two processes that share groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from urlvr_fast import adapters, token_stats
from urlvr_fast.adapters import AdapterError
from urlvr_fast.adapters.trl import LabelFreeGRPOTrainer, LabelFreeReward
from urlvr_fast.adapters.trl_head import FusedHead, taking, use_fused_ops
from urlvr_fast.adapters.trl_watch import Watch
from urlvr_fast.rewards import RewardError
from urlvr_fast.tasks import arithmetic
from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.batch import RolloutBatch
from urlvr_fast.trainer.policy import Policy

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
PROBLEMS = arithmetic.draw("train", limit=16)


@pytest.fixture(autouse=True)
def trl_as_it_was():
    yield
    trl_utils._ChunkedLogProbFunction = ChunkedLogProbFunction


def settings(folder: Path, **changes: object) -> GRPOConfig:
    fixed = dict(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",
        max_steps=2,
        logging_steps=1,
        beta=0.0,
        seed=3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return GRPOConfig(**(fixed | changes))  # type: ignore[arg-type]


def data_set() -> Dataset:
    return Dataset.from_list([{"prompt": p.prompt, "answer": str(p.answer)} for p in PROBLEMS])


def label_free(spec: str, **options: object) -> LabelFreeReward:
    return LabelFreeReward(spec, checker=arithmetic.checker(), **options)  # type: ignore[arg-type]


def trainer_of(folder: Path, reward: object, **options: object) -> LabelFreeGRPOTrainer:
    changes = options.pop("settings", {})
    return LabelFreeGRPOTrainer(
        model=str(bundled_model_path()), reward_funcs=reward, args=settings(folder, **changes), train_dataset=data_set(), **options
    )


# ---- the head --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
def test_the_head_computes_what_trls_does(softcap: float | None, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), torch.randn(301, 16, generator=generator)
    bias = torch.randn(301, generator=generator) if biased else None
    targets = torch.randint(301, (37,), generator=generator)
    upstream = torch.randn(2, 37, generator=generator)

    def run(head: type) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
        found = head.apply(*leaves[:2], leaves[2] if biased else None, targets, 0.7, 64, softcap, 1.5, OUTPUTS)
        ((found[0] * upstream[0]).sum() + (found[1] * upstream[1]).sum()).backward()
        assert not any(tensor.requires_grad for tensor in found[2:])
        return [tensor.detach() for tensor in found], [leaf.grad for leaf in leaves]

    (ours, gradients), (theirs, expected) = run(FusedHead), run(ChunkedLogProbFunction)
    for name, a, b in zip(OUTPUTS, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_model_with_trls_head_runs_on_ours(tiny_model_dir: Path) -> None:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        trl_utils.add_fused_lm_head(model, temperature=1.3, outputs=OUTPUTS)
        ids = torch.arange(24).reshape(3, 8) % 20
        labels = ids.masked_fill(ids < 5, -100)
        with taking(("self_certainty",), 1.3) as taken:
            found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        found.loss.backward()
        runs.append(len(taken))
        return found.log_probs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    runs: list[int] = []
    logp, gradient = run()
    use_fused_ops()
    ours, own_gradient = run()
    assert runs == [0, 1]
    torch.testing.assert_close(ours, logp, atol=2e-5, rtol=1e-5)
    assert (own_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_scattered_parameters_are_refused() -> None:
    weight = torch.zeros(4, 2)
    weight.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(AdapterError, match="ZeRO-3"):
        FusedHead.apply(torch.zeros(1, 2), weight, None, torch.zeros(1, dtype=torch.int64), 1.0, 8)


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


def test_it_trains_as_trl_does_with_the_same_rewards(tmp_path: Path) -> None:
    """The same rollouts and the same update; and the votes are those of whole groups, counted here by hand."""
    given: list[list[float]] = []

    class Kept(LabelFreeReward):
        def __call__(self, **arguments: object) -> list[float]:
            given.append(super().__call__(**arguments))
            return given[-1]

    ours = trainer_of(tmp_path / "ours", Kept("majority_voting", checker=arithmetic.checker()))
    ours.train()
    winners = []

    def replayed(prompts: list[str], completions: list[str], **_: object) -> list[float]:
        values = given.pop(0)
        for start in range(0, len(completions), 8):
            assert len(set(prompts[start : start + 8])) == 1
            answers = [arithmetic.checker().extract(text) for text in completions[start : start + 8]]
            counts = Counter(answer for answer in answers if answer is not None).most_common()
            if len(counts) == 1 or counts[0][1] > counts[1][1]:
                winners.append(counts[0][0])
                assert values[start : start + 8] == [float(answer == winners[-1]) for answer in answers]
        return values

    trl_utils._ChunkedLogProbFunction = ChunkedLogProbFunction
    plain = GRPOTrainer(model=str(bundled_model_path()), reward_funcs=replayed, args=settings(tmp_path / "plain"), train_dataset=data_set())
    plain.train()
    assert len(winners) > 2
    assert not given
    start = AutoModelForCausalLM.from_pretrained(bundled_model_path()).state_dict()
    moved = 0.0
    for (name, a), b in zip(ours.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        moved = max(moved, float((a - start[name]).abs().max()))
    assert moved > 1e-4
    for name in ("entropy", "reward", "grad_norm"):
        mine, theirs = ([line[name] for line in trainer.state.log_history if name in line] for trainer in (ours, plain))
        assert len(mine) == 2
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_a_reward_gets_the_statistics_of_the_policy_that_sampled(tmp_path: Path) -> None:
    """Padded micro-batches against one forward a rollout, at the sampling temperature."""
    batches: list[RolloutBatch] = []

    def keep(batch: RolloutBatch, policy: Policy) -> torch.Tensor:
        batches.append(batch)
        assert policy.likelihood(["1+1="], ["2"])[1].tolist() == [1]
        assert len(policy.generate(["1+1=", "2+2="], 3, temperature=0.5, max_tokens=4)[1]) == 3
        return batch.sequence_mean(batch.self_certainty)

    keep.needs = frozenset({"self_certainty", "prob_gap"})  # type: ignore[attr-defined]
    reward = label_free("self_certainty", columns=("answer",))
    reward.reward = keep
    trainer = trainer_of(tmp_path, reward, settings={"temperature": 0.8, "max_steps": 1}, audit="answer")
    trainer.train()
    (batch,) = batches
    assert batch.columns["answer"][::8] == [str(p.answer) for prompt in batch.prompts[::8] for p in PROBLEMS if p.prompt == prompt]
    assert batch.group_ids.tolist() == [i // 8 for i in range(32)]
    assert batch.temperature == 0.8
    model, where = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32), batch.response_cu_seqlens.tolist()
    for i in range(len(batch)):
        tokens = batch.tokens[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
        prompt = int(batch.prompt_lens[i])
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, prompt - 1 : -1]
        names = {"logp": "sampled_logp", "entropy": "entropy", "self_certainty": "self_certainty", "prob_gap": "prob_gap"}
        expected = token_stats(logits, tokens[prompt:], outputs=tuple(names), temperature=0.8)
        for output, field in names.items():
            torch.testing.assert_close(
                getattr(batch, field)[where[i] : where[i + 1]], getattr(expected, output), atol=1e-4, rtol=1e-4, msg=field
            )
    logged = trainer.state.log_history[0]
    assert logged["urlvr/ground_truth_reward"] > 0
    assert logged["urlvr/actor_entropy"] == pytest.approx(float(batch.entropy.mean()))
    assert logged["reward"] == pytest.approx(float(batch.sequence_mean(batch.self_certainty).mean()), rel=1e-4)


def test_rewards_mix_with_those_of_trl(tmp_path: Path) -> None:
    def short(completions: list[str], **_: object) -> list[float]:
        return [-float(len(text)) for text in completions]

    rewards = [label_free("trajectory_entropy"), short, label_free("majority_voting", threshold=0.4)]
    trainer = trainer_of(tmp_path, rewards, settings={"reward_weights": [1.0, 0.1, 0.5], "max_steps": 1})
    trainer.train()
    line = trainer.state.log_history[0]
    parts = [line[f"rewards/{name}/mean"] for name in ("trajectory_entropy", "short", "majority_voting")]
    assert parts[0] < 0
    assert parts[1] < 0 <= parts[2]
    assert line["reward"] == pytest.approx(parts[0] + 0.1 * parts[1] + 0.5 * parts[2], rel=1e-4)
    assert "urlvr/ground_truth_reward" not in line  # nobody gave it answers


def test_a_run_that_leaves_what_it_was_sure_of_is_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Self-certainty at a rate that ruins the model within a few batches."""
    trainer = trainer_of(
        tmp_path,
        label_free("self_certainty"),
        settings={"learning_rate": 3e-3, "optim": "adamw_torch", "max_steps": 60},
        detectors={"anchor_drift": "stop"},
        anchor_prompts=[p.prompt for p in arithmetic.draw("test", limit=32)],
        anchor_every=3,
    )
    trainer.train()
    ended = trainer._watch.ended
    assert ended is not None
    assert ended.detector == "anchor_drift"
    assert trainer.state.global_step == ended.step - 1 < 50  # the batch that showed it was not trained on
    assert any(ended.message in record.message for record in caplog.records)
    held = [line["urlvr/anchor_agreement"] for line in trainer.state.log_history if "urlvr/anchor_agreement" in line]
    assert held[0] > 0.8  # greedy answers of the start model give its own clear votes
    assert held[-1] < 0.6


def test_a_resumed_run_says_that_it_has_no_start_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"detectors": {"anchor_drift": "warn"}, "anchor_prompts": [p.prompt for p in PROBLEMS]}
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(tmp_path, label_free("majority_voting"), settings=saved, **options).train()
    resumed = trainer_of(tmp_path, label_free("majority_voting"), settings=saved | {"max_steps": 2}, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "resumed at step 1: the detectors begin anew, without anchor_drift" in caplog.text
    assert resumed.state.global_step == 2
    assert "urlvr/anchor_agreement" not in resumed.state.log_history[-2]


def test_evaluation_scores_its_own_groups(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        label_free("majority_voting"),
        settings={"per_device_eval_batch_size": 16, "num_generations_eval": 4, "max_steps": 1},
        eval_dataset=data_set().select(range(8)),
    )
    found = trainer.evaluate()
    assert 0.25 <= found["eval_reward"] <= 1  # a winner holds at least one vote in four
    assert found["eval_rewards/majority_voting/mean"] == found["eval_reward"]


TWO_PROCESSES = """
import sys
sys.path[:0] = {path}
from pathlib import Path
import test_adapter_trl as t
reward = t.label_free("majority_voting")
trainer = t.trainer_of(Path(sys.argv[1]), reward, settings={{"per_device_train_batch_size": 4, "max_steps": 1, "ddp_backend": "gloo"}})
trainer.train()
if trainer.accelerator.is_main_process:
    logs = trainer._logs
    found = {{name: list(logs[name]) for name in ("prompt", "completion")}} | {{"rewards": list(logs["rewards"]["majority_voting"])}}
    found["ratio"] = trainer.state.log_history[0]["urlvr/majority_ratio"]
    Path(sys.argv[1], "logs.json").write_text(t.json.dumps(found))
"""


def test_groups_that_two_processes_share(tmp_path: Path) -> None:
    """Four rollouts a process of groups of eight: every vote is of both processes' rollouts."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(path=[str(Path(__file__).parent)]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = json.loads((tmp_path / "logs.json").read_text())
    assert len(logs["completion"]) == 16  # two processes × two micro-batches × four
    ratios = []
    for start in range(0, 16, 8):
        assert len(set(logs["prompt"][start : start + 8])) == 1
        answers = [arithmetic.checker().extract(text) for text in logs["completion"][start : start + 8]]
        rewards = logs["rewards"][start : start + 8]
        winners = {answer for answer, reward in zip(answers, rewards, strict=True) if reward}
        assert len(winners) == 1
        assert rewards == [float(answer in winners) for answer in answers]
        counts = Counter(answer for answer in answers if answer is not None)
        assert counts[winners.pop()] == counts.most_common()[0][1]
        ratios.append(sum(rewards) / 8)
    assert logs["ratio"] == pytest.approx(sum(ratios) / 2)


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no LabelFreeReward"):
        trainer_of(tmp_path, lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(AdapterError, match="in the place of GRPOTrainer"):
        label_free("majority_voting")(completions=["1"])
    with pytest.raises(RewardError, match="returns advantages"):
        label_free("restrain")
    with pytest.raises(RewardError, match="needs answers"):
        label_free("ground_truth")
    for actions, message in (({"entropy_floor": "rollback"}, "cannot be done in TRL's loop"), ({"anchor_drift": "stop"}, "anchor_prompts")):
        with pytest.raises(AdapterError, match=message):
            Watch(actions, arithmetic.checker(), (), anchor_every=10, anchor_votes=8)
    with pytest.raises(ValueError, match="no detector"):
        Watch({"anchors": "warn"}, arithmetic.checker(), (), anchor_every=10, anchor_votes=8)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("1.17.0", "2.16", "1.1"):
        monkeypatch.setattr(adapters.importlib.metadata, "version", lambda package, found=found: found)
        with pytest.raises(AdapterError, match=rf"trl is {found}, .*pip install 'trl==1.16.\*'"):
            use_fused_ops()
    monkeypatch.undo()
    with pytest.raises(AdapterError, match=r"pip install 'no-such-trainer==3\.\*'"):
        adapters.require("no-such-trainer", "3")
