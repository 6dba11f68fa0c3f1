"""The adapter on the real TRL: its head against TRL's own, whole runs of a small model, and two processes that share groups."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl.trainer.utils as trl_utils
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from urlvr_fast import adapters, token_stats
from urlvr_fast.adapters import AdapterError
from urlvr_fast.adapters.trl import LabelFreeGRPOTrainer, LabelFreeReward
from urlvr_fast.adapters.trl_head import FusedHead, taking, use_fused_ops
from urlvr_fast.adapters.watch import Watch
from urlvr_fast.rewards import RewardError
from urlvr_fast.tasks import arithmetic
from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.policy import Policy
from urlvr_fast.trainer.rollout import Completion, Sampling

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
    # What processes send one another is that and no more, since pickle takes all of the memory behind a view.
    for value in (value for _, completion in trainer._generated for value in completion.statistics.values()):
        assert value.untyped_storage().nbytes() == 4 * len(value)
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
    ended = trainer.ended
    assert ended is not None
    assert ended.detector == "anchor_drift"
    assert trainer.state.global_step == ended.step < 50  # before the batch that was looked at last
    assert any(ended.message in record.message for record in caplog.records)
    held = [line["urlvr/anchor_agreement"] for line in trainer.state.log_history if "urlvr/anchor_agreement" in line]
    assert held[0] > 0.8  # greedy answers of the start model give its own clear votes
    assert held[-1] < 0.6


def test_a_resumed_run_watches_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"detectors": {"anchor_drift": "warn"}, "anchor_every": 1}
    options["anchor_prompts"] = [p.prompt for p in arithmetic.draw("test", limit=48)]
    saved = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 8}  # 16 prompts a batch
    first = trainer_of(tmp_path, label_free("majority_voting"), settings=saved | {"max_steps": 2}, **options)
    first.train()
    resumed = trainer_of(tmp_path, label_free("majority_voting"), settings=saved | {"max_steps": 3}, **options)
    resumed.train(resume_from_checkpoint=True)
    kept, state = first._watch.state(), json.loads(json.dumps(resumed._watch.state()))
    assert len(kept["anchors"]) >= 8
    assert {int(prompt): answer for prompt, answer in state["anchors"].items()} == kept["anchors"]
    assert state["batches"] == 3
    assert [list(reading) for reading in kept["readings"]] == state["readings"][: len(kept["readings"])]
    assert len(state["readings"]) > len(kept["readings"]) >= 3
    assert not caplog.records or "without this watch's state" not in caplog.text
    (tmp_path / "checkpoint-3" / "urlvr_watch.json").unlink()
    without = trainer_of(tmp_path, label_free("majority_voting"), settings=saved | {"max_steps": 4}, **options)
    without.train(resume_from_checkpoint=True)
    assert "without this watch's state: anchor_drift, which needs the start, is off" in caplog.text
    assert without._watch.state()["anchors"] is None


def test_small_batches_are_pooled_before_anything_is_concluded() -> None:
    """A prompt a batch, TRL's default: majority ratios anywhere from 2/8 to 1 and anchors that hold must not look like a collapse."""
    draw = random.Random(0)
    watch = Watch({"anchor_drift": "stop", "unanimity": "stop", "entropy_rise": "stop"}, arithmetic.checker(), ["p"] * 20, anchor_every=5)

    class Steady:
        def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
            # The anchors are all "1"; now and then a greedy answer is another.
            return [[Completion([2 if sampling.n == 1 and draw.random() < 0.05 else 1], [-0.1], "stop")] * sampling.n for _ in prompts]

    def decode(tokens: list[list[int]]) -> list[str]:
        return [str(ids[0]) for ids in tokens]

    for _ in range(300):
        if watch.wants_anchors:
            watch.look_at_anchors(Steady(), [[0]] * 20, decode, 1.0, 8, 0)
        agreeing = draw.randint(2, 8)
        group = [Completion([1 if i < agreeing else 10 + i], [-0.1], "stop", {"entropy": torch.rand(1)}) for i in range(8)]
        batch = build_batch(prompt_token_ids=[[0]], prompt_texts=["p"], prompt_ids=[0], completions=[group], decode=decode, temperature=1.0)
        figures = watch.look(batch, torch.tensor([float(i < agreeing) for i in range(8)]), {})
        assert figures["majority_ratio"] == agreeing / 8
    assert watch.ended is None
    readings = watch.state()["readings"]
    assert len([0 for _, shown in readings if "majority_ratio" in shown]) == 300 // 16
    assert len([0 for _, shown in readings if "eval/anchored_majority" in shown]) > 40


def test_log_probs_of_an_engine_are_kept_and_its_gaps_filled(tmp_path: Path) -> None:
    batches: list[RolloutBatch] = []

    def keep(batch: RolloutBatch, policy: Policy) -> torch.Tensor:
        batches.append(batch)
        return batch.sequence_mean(batch.sampled_logp)

    def rollout(prompts: list[str], trainer: LabelFreeGRPOTrainer) -> dict[str, list]:
        """TRL's way to bring an engine of one's own; vLLM's missing log-probs come as None."""
        ids = trainer.processing_class(text=prompts)["input_ids"]
        end = trainer.eos_token_ids[0]
        return {"prompt_ids": ids, "completion_ids": [[7, end]] * len(ids), "logprobs": [[-1.25, None]] * len(ids)}

    reward = label_free("trajectory_entropy")
    reward.reward = keep
    trainer = trainer_of(tmp_path, reward, settings={"max_steps": 1}, rollout_func=rollout)
    trainer.train()
    logp = batches[0].sampled_logp.view(-1, 2)
    assert (logp[:, 0] == -1.25).all()
    assert ((logp[:, 1] < 0) & logp[:, 1].isfinite()).all()


def test_conversations(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if twice %}={% endif %}"
    seen: list[tuple[list[str], str]] = []

    def keep(batch: RolloutBatch, policy: Policy) -> torch.Tensor:
        seen.append((batch.prompts, policy.render("1+1=")))
        return batch.sequence_mean(batch.sampled_logp)

    reward = label_free("trajectory_entropy")
    reward.reward = keep
    trainer = LabelFreeGRPOTrainer(
        model=str(bundled_model_path()),
        reward_funcs=reward,
        args=settings(tmp_path, max_steps=1, chat_template_kwargs={"twice": True}),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p.prompt}]} for p in PROBLEMS]),
        processing_class=tokenizer,
        anchor_prompts=[[{"role": "user", "content": p.prompt}] for p in PROBLEMS],
    )
    trainer.train()
    ((prompts, rendered),) = seen
    assert rendered == "1+1=="
    assert all(prompt.endswith("==") and prompt[:-1] in {p.prompt for p in PROBLEMS} for prompt in prompts)
    assert trainer._watch.state()["anchors"]


def test_evaluation_scores_its_own_groups(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        label_free("majority_voting"),
        settings={"per_device_eval_batch_size": 16, "num_generations_eval": 4, "max_steps": 1},
        eval_dataset=data_set().select(range(8)),
        audit="answer",
    )
    found = trainer.evaluate()
    assert 0 <= found["eval_urlvr/reward_accuracy"] <= 1
    assert trainer._watch.state()["batches"] == 0  # nothing that is not trained on counts
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
# A detector that fires in one process alone ends the run in both.
again = t.trainer_of(Path(sys.argv[1]), reward, settings={{"per_device_train_batch_size": 4, "max_steps": 5, "ddp_backend": "gloo"}})
if again.accelerator.process_index == 1:
    again._watch.ended = "it fired"
again.train()
assert again.state.global_step < 2
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
    for actions, message in (
        ({"entropy_floor": "rollback"}, "cannot be done in another trainer's loop"),
        ({"anchor_drift": "stop"}, "anchor_prompts"),
    ):
        with pytest.raises(AdapterError, match=message):
            Watch(actions, arithmetic.checker())
    with pytest.raises(AdapterError, match="not measured in another trainer's loop"):
        Watch({"kl_spike": "stop"}, arithmetic.checker())
    with pytest.raises(AdapterError, match="audit='answr' is no column of the training data, which has prompt, answer"):
        trainer_of(tmp_path, label_free("majority_voting"), audit="answr")
    with pytest.raises(AdapterError, match="give them a name= each"):
        trainer_of(tmp_path, [label_free("majority_voting"), label_free("majority_voting", threshold=0.5)])
    with pytest.raises(ValueError, match="no detector"):
        Watch({"anchors": "warn"}, arithmetic.checker())


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in ("1.17.0", "2.16", "1.1"):
        monkeypatch.setattr(adapters.importlib.metadata, "version", lambda package, found=found: found)
        with pytest.raises(AdapterError, match=rf"trl is {found}, .*pip install 'trl==1.16.\*'"):
            use_fused_ops()
    monkeypatch.undo()
    with pytest.raises(AdapterError, match=r"pip install 'no-such-trainer==3\.\*'"):
        adapters.require("no-such-trainer", "3")
