"""The adapter on the real verl: its functions, its FSDP engine on one process without a GPU, and its trainer's own loop over them."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: pip install '.[verl]', in an environment of its own")

import pandas
import ray
import transfer_queue as tq
import verl_on_cpu  # noqa: F401
from hydra import compose, initialize_config_module
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional as verl_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as verl_kernel
from verl.workers.config import FSDPActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from urlvr_fast import adapters, token_stats
from urlvr_fast.adapters import AdapterError, verl_head
from urlvr_fast.adapters.verl_head import use_fused_ops
from urlvr_fast.rewards import RewardError
from urlvr_fast.tasks import arithmetic
from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.rollout import Sampling
from urlvr_fast.trainer.rollout.hf import HFRollout

FUNCTIONS = (
    "logprobs_from_logits",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "calculate_sum_pi_squared_from_logits",
)
VERLS = {name: getattr(verl_functional, name) for name in FUNCTIONS}
PROMPTS, RESPONSES = (3, 5, 4, 2), (6, 2, 7, 4)
VOCABULARY = 301


@pytest.fixture(autouse=True)
def verl_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that `use_fused_ops`, or verl itself for a fused head, writes over."""
    for name, function in VERLS.items():
        monkeypatch.setattr(verl_functional, name, function)
    monkeypatch.setattr(transformer_impl, "logprobs_from_logits", VERLS["logprobs_from_logits"])
    monkeypatch.setattr(verl_kernel, "linear_cross_entropy", verl_kernel.linear_cross_entropy)
    monkeypatch.setattr(FusedLinearForPPO, "forward", FusedLinearForPPO.forward)
    engine = transformer_impl.FSDPEngineWithLMHead
    monkeypatch.setattr(engine, "prepare_model_outputs", engine.prepare_model_outputs)
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", Qwen3ForCausalLM.forward)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("gloo") / "store"
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether embedding and head are one."""
    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            initializer_range=0.2,  # or every distribution would be flat
            tie_word_embeddings=tied,
        )
        folders[tied] = tmp_path_factory.mktemp("model")
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[tied])
    return folders


# ---- the functions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compute_what_verls_do(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 9, VOCABULARY, generator=generator)
    logits = logits.flatten(0, 1) if "chunking" in name else logits
    labels = [torch.randint(VOCABULARY, logits.shape[:-1], generator=generator)] if name == FUNCTIONS[0] else []
    upstream = torch.randn(logits.shape[:-1], generator=generator)
    options = {"inplace_backward": True} if labels else {}

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        leaf = logits.clone().requires_grad_()
        values = getattr(verl_functional, name)(leaf * 1.0, *labels, **options)
        if "squared" not in name:
            (values * upstream).sum().backward()
        return values.detach(), leaf.grad

    expected, gradient = run()
    use_fused_ops()
    assert getattr(verl_functional, name) is getattr(verl_head, name)
    values, own_gradient = run()
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=2e-6)
    if gradient is not None:
        torch.testing.assert_close(own_gradient, gradient, atol=2e-6, rtol=2e-5)
    # A row's bits do not depend on its batch.
    alone = getattr(verl_functional, name)(logits[1:2], *(ids[1:2] for ids in labels))
    assert torch.equal(alone, values[1:2])


def test_verl_may_compile_the_entropy() -> None:
    use_fused_ops()
    logits = torch.randn(5, VOCABULARY)
    entropy = torch.compile(verl_functional.entropy_from_logits, dynamic=True)
    for rows in (logits, logits[:3]):
        leaf = rows.clone().requires_grad_()
        values = entropy(leaf)
        values.sum().backward()
        torch.testing.assert_close(values, VERLS["entropy_from_logits"](rows))
        assert leaf.grad.abs().sum() > 0


def test_modules_that_had_imported_a_name_get_ours() -> None:
    assert transformer_impl.logprobs_from_logits is VERLS["logprobs_from_logits"]
    use_fused_ops()
    use_fused_ops()
    assert transformer_impl.logprobs_from_logits is verl_head.logprobs_from_logits
    assert verl_head._verls_outputs is not verl_head.prepare_model_outputs


def test_the_fused_head_computes_what_verls_does() -> None:
    """In float32; of bfloat16 it is the nearer to that."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 11, 16, generator=generator).bfloat16(), torch.randn(VOCABULARY, 16, generator=generator).bfloat16()
    labels = torch.randint(VOCABULARY, (2, 11), generator=generator)
    upstream = torch.randn(2, 2, 11, generator=generator)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        found = FusedLinearForPPO()(leaves[0] * 1.0, leaves[1], labels, 0.7)
        (found[0] * upstream[0] + found[1] * upstream[1]).sum().backward()
        return [tensor.detach().float() for tensor in (*found, *(leaf.grad for leaf in leaves))]

    expected, theirs = run(torch.float32), run(torch.bfloat16)
    use_fused_ops()
    ours, ours16 = run(torch.float32), run(torch.bfloat16)
    for a, a16, b, b16 in zip(ours, ours16, expected, theirs, strict=True):
        assert a.shape == a16.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert (a16 - b).norm() <= min(3e-3 * b.norm(), (b16 - b).norm())


# ---- the engine ------------------------------------------------------------------------------------------------------------------------


def engine_of(path: Path, *, packed: bool = True, fused: bool = False, dtype: str = "fp32") -> Any:
    model = HFModelConfig(
        path=str(path),
        load_tokenizer=False,
        use_remove_padding=packed,
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "torch"},
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )
    settings = FSDPEngineConfig(
        strategy="fsdp2",
        use_torch_compile=False,
        forward_only=False,
        use_remove_padding=packed,
        use_fused_kernels=fused,
        mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
    )
    engine = EngineRegistry.new(
        "language_model",
        "fsdp2",
        model_config=model,
        engine_config=settings,
        optimizer_config=FSDPOptimizerConfig(lr=1.0, optimizer="SGD", override_optimizer_config={}, total_training_steps=10, clip_grad=1.0),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    engine.options = dict(use_remove_padding=packed, use_fused_kernels=fused)
    return engine


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batches(engine: Any, temperature: float | torch.Tensor, **asked: bool) -> Any:
    """Four rollouts as verl's trainer would send them, two to a micro-batch."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (size,), generator=generator) for size in PROMPTS]
    responses = [torch.randint(VOCABULARY, (size,), generator=generator) for size in RESPONSES]
    mask = nested([torch.ones_like(ids) for ids in responses])
    tensors = {
        "input_ids": nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
        "position_ids": nested([torch.arange(a + b) for a, b in zip(PROMPTS, RESPONSES, strict=True)]),
        "prompts": nested(prompts),
        "responses": nested(responses),
        "response_mask": mask,
        "loss_mask": mask,
    }
    options: dict[str, Any] = dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=2, global_batch_size=4, calculate_entropy=True)
    if isinstance(temperature, torch.Tensor):
        tensors["temperature"] = temperature
    else:
        options["temperature"] = temperature
    return tu.get_tensordict(tensors, options | engine.options | asked)


def trained(engine: Any, temperature: float | torch.Tensor) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor], float]:
    """Statistics before, weights after one step of verl's loss with an entropy bonus, and the gradient's norm."""
    asked = {} if engine.options["use_fused_kernels"] else {"calculate_sum_pi_squared": True}
    with engine.eval_mode():
        before = engine.infer_batch(micro_batches(engine, temperature, **asked), loss_function=None)["model_output"]
    batch = micro_batches(engine, temperature)
    batch["old_log_probs"] = response_from_nested(before["log_probs"], batch["response_mask"])
    batch["advantages"] = nested([torch.full((n,), value) for n, value in zip(RESPONSES, (1.0, -1.0, 0.5, -0.5), strict=True)])
    actor = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=2,
        ppo_mini_batch_size=4,
        ppo_micro_batch_size_per_gpu=2,
        entropy_coeff=0.1,
        optim=engine.optimizer_config,
        fsdp_config=engine.engine_config,
    )
    with engine.train_mode():
        metrics = engine.train_batch(batch, loss_function=functools.partial(ppo_loss, actor))["metrics"]
    weights = dict(engine.get_per_tensor_param()[0])
    return {name: list(values.unbind()) for name, values in before.items()}, weights, metrics["grad_norm"]


EACH_ITS_OWN = torch.tensor([0.5, 1.0, 1.5, 0.8])  # which verl's fused head does not take


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [(kind, t) for kind in ("packed", "padded", "fused", "fused padded") for t in (1.0, 0.7)]
    + [("packed", EACH_ITS_OWN), ("padded", EACH_ITS_OWN)],
)
def test_the_engine_computes_and_trains_as_before(models: dict[bool, Path], kind: str, temperature: float | torch.Tensor) -> None:
    engine = functools.partial(engine_of, models["fused" in kind], packed="padded" not in kind, fused="fused" in kind)
    expected, weights, norm = trained(engine(), temperature)
    use_fused_ops()
    found, own_weights, own_norm = trained(engine(), temperature)
    assert list(found) == list(expected)
    for name, rows in expected.items():
        for i, (a, b) in enumerate(zip(found[name], rows, strict=True)):
            assert len(a) == PROMPTS[i] + RESPONSES[i]
            # The last token of a row has no next one.
            torch.testing.assert_close(a[:-1], b[:-1], atol=1e-5, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
    assert own_norm == pytest.approx(norm, rel=1e-5)
    start = AutoModelForCausalLM.from_pretrained(models["fused" in kind]).state_dict()
    for name, values in own_weights.items():
        moved = (values.float() - start[name]).norm()
        assert moved > 1e-5
        assert (values.float() - weights[name].float()).norm() <= 1e-4 * moved


def test_16_bit_logits_lose_nothing_more(models: dict[bool, Path]) -> None:
    """verl divides them by the temperature in their dtype, and where flash-attn is not there sums in it."""
    truth: list[torch.Tensor] = []

    def kept(engine: Any, measured: Any, *, output: Any, output_args: dict, **others: Any) -> dict:
        logits = output.logits.squeeze(0).double()
        assert output.logits.dtype == torch.bfloat16
        truth.append((logits / 0.7).log_softmax(-1).gather(-1, output_args["input_ids_rmpad_rolled"][:, None])[:, 0])
        return measured(engine, output=output, output_args=output_args, **others)

    errors = []
    for ours in (False, True):
        truth.clear()
        if ours:
            use_fused_ops()
        engine = engine_of(models[False], dtype="bf16")
        measured = type(engine).prepare_model_outputs
        engine.prepare_model_outputs = functools.partial(kept, engine, measured)
        with engine.eval_mode():
            found = engine.infer_batch(micro_batches(engine, 0.7), loss_function=None)["model_output"]["log_probs"]
        errors.append((found.values().double() - torch.cat(truth)).abs().max())
    assert errors[1] < 2e-6
    assert errors[0] > 1e-3


@pytest.mark.parametrize("packed", [True, False])
def test_the_engine_gives_self_certainty(models: dict[bool, Path], packed: bool) -> None:
    use_fused_ops()
    engine = engine_of(models[False], packed=packed)
    batch = micro_batches(engine, 0.7, calculate_self_certainty=True)
    rows = batch["input_ids"].unbind()
    with engine.eval_mode():
        found = engine.infer_batch(batch, loss_function=None)["model_output"]["self_certainty"]
    model = AutoModelForCausalLM.from_pretrained(models[False])
    for ids, values in zip(rows, found.unbind(), strict=True):
        with torch.no_grad():
            expected = token_stats(model(ids[None]).logits[0], None, outputs="self_certainty", temperature=0.7).self_certainty
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


# ---- the trainer -----------------------------------------------------------------------------------------------------------------------

PROBLEMS = arithmetic.draw("train", limit=16)
GROUP = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """verl's data, whose labels are wrong: right ones would hide that somebody uses them."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rows = [
        {
            "data_source": "arithmetic",
            "prompt": [{"role": "user", "content": problem.prompt}],
            "reward_model": {"style": "rule", "ground_truth": str(problem.answer if i % 2 else 10**6)},
            "level": i,
        }
        for i, problem in enumerate(PROBLEMS)
    ]
    pandas.DataFrame(rows).to_parquet(path)
    return path


def config_of(files: Path, *overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            [
                "trainer.v1.trainer_mode=label_free",
                "+urlvr.checker=urlvr_fast.tasks.arithmetic:checker",
                f"actor_rollout_ref.model.path={bundled_model_path()}",
                "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
                "actor_rollout_ref.model.enable_gradient_checkpointing=False",
                "actor_rollout_ref.actor.strategy=fsdp2",
                "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
                "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}",
                "actor_rollout_ref.actor.optim.lr=1e-4",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
                "actor_rollout_ref.rollout.name=vllm",
                f"actor_rollout_ref.rollout.n={GROUP}",
                "actor_rollout_ref.rollout.temperature=0.8",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
                "algorithm.adv_estimator=grpo",
                f"data.train_files={files}",
                f"data.val_files={files}",
                "data.train_batch_size=4",
                "data.max_response_length=8",
                "data.filter_overlong_prompts=False",
                "data.dataloader_num_workers=0",
                "data.shuffle=False",
                "trainer.device=cpu",
                "trainer.n_gpus_per_node=1",
                "trainer.logger=[console]",
                "trainer.val_before_train=False",
                "trainer.total_training_steps=2",
                *overrides,
            ],
        )


@pytest.fixture(scope="module")
def queue(files: Path, one_process: None) -> Iterator[None]:
    """verl's store of rollouts, on a Ray of our own."""
    patch = pytest.MonkeyPatch()
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        patch.setenv(name, value)
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    config = config_of(files, "+urlvr.reward=majority_voting", "transfer_queue.backend.SimpleStorage.num_data_storage_units=1")
    config.transfer_queue.enable = True
    tq.init(config.transfer_queue)
    yield
    tq.close()
    ray.shutdown()
    patch.undo()


class Rollouts:
    """An agent loop manager, which verl lets its users write: prompts in, rollouts into the queue, each with a score as verl's own reward
    function would have left it."""

    SCORE = 100.0

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def generate_sequences(self, prompts: Any) -> None:
        model = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32)
        model.load_state_dict(dict(self.trainer.actor_rollout_wg.worker.actor.engine.get_per_tensor_param()[0]), strict=False)
        tokenizer, seed = self.trainer.tokenizer, self.trainer.global_steps
        messages = [message[0]["content"] for message in prompts["raw_prompt"]]
        ids = [tokenizer(text)["input_ids"] for text in messages]
        engine = HFRollout(model, dtype="float32", stop_token_ids=[tokenizer.eos_token_id], batch_prompts=8)
        for i, group in enumerate(engine.generate(ids, Sampling(GROUP, 0.8, 8), seed)):
            uid, label = prompts["uid"][i], prompts["reward_model"][i]
            rows = []
            for completion in group:
                response, prompt = torch.tensor(completion.token_ids), torch.tensor(ids[i])
                row = {"prompts": prompt, "responses": response, "input_ids": torch.cat([prompt, response])}
                row["position_ids"] = torch.arange(len(row["input_ids"]))
                row["response_mask"] = row["loss_mask"] = torch.ones_like(response)
                row["rm_scores"] = torch.zeros(len(response)).index_fill_(0, torch.tensor([len(response) - 1]), self.SCORE)
                row["rollout_log_probs"] = torch.tensor(completion.logp)
                row |= {"uid": uid, "reward_model": label, "level": prompts["level"][i], "num_turns": 2}
                rows.append(row)
            steps = {"global_steps": seed, "min_global_steps": seed - 1, "max_global_steps": seed - 1}
            tags = [{"status": "success", "seq_len": len(row["input_ids"])} | steps for row in rows]
            keys = [f"{uid}_{session}_0" for session in range(GROUP)]
            tq.kv_batch_put(keys=keys, partition_id="train", fields=tu.list_of_dict_to_tensordict(rows), tags=tags)
            tq.kv_put(key=uid, partition_id="train", tag={"status": "finished"})


class InProcess:
    """verl's worker itself, where its trainer holds a group of them."""

    def __init__(self, config: Any) -> None:
        self.worker = ActorRolloutRefWorker(config=config, role="actor")
        self.worker.init_model()
        self._dispatch_info = {"actor": [0]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)


def run(config: Any) -> tuple[Any, list[dict[str, Any]], list[dict[str, float]]]:
    """verl's own loop. What is left out is what needs a GPU: its rollout servers, and the Ray workers on it. Returns the trainer, what the
    queue held of every batch when the actor was to be updated, and what was logged."""
    from urlvr_fast.adapters.verl import LabelFreeTrainer

    use_fused_ops()
    batches: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    class OnOneProcess(LabelFreeTrainer):
        def _setup(self) -> None:
            self._init_tokenizer()
            self._init_dataloader()
            self._init_dump_executor()
            self._init_resource_pool_mgr()
            self.actor_rollout_wg = InProcess(self.config.actor_rollout_ref)
            self.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
            nothing = lambda *_, **__: None  # noqa: E731
            self.checkpoint_manager = SimpleNamespace(update_weights=nothing, sleep_replicas=nothing)
            self.llm_server_manager = SimpleNamespace(get_replicas=list)
            self.global_steps = 0

        def _update_actor(self, batch: Any, metrics: dict) -> Any:
            fields = ["prompts", "responses", "rm_scores", "advantages", "old_log_probs", "entropy", "uid", "level"]
            data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=fields)
            batches.append({name: list(data[name]) for name in fields} | {"keys": list(batch.keys)})
            return super()._update_actor(batch, metrics)

        def _compute_metrics(self, batch: Any, metrics: dict, *arguments: Any, **options: Any) -> None:
            super()._compute_metrics(batch, metrics, *arguments, **options)
            logged.append(metrics)

    assert get_trainer_cls("label_free") is LabelFreeTrainer
    trainer = OnOneProcess(config)
    assert trainer.trainer_mode == "sync"
    trainer.init()
    trainer.fit(Rollouts(trainer))
    return trainer, batches, logged


def test_its_loop_trains_on_the_votes_of_whole_groups(files: Path, queue: None) -> None:
    trainer, batches, logged = run(config_of(files, "+urlvr.reward=majority_voting"))
    assert len(batches) == 2
    tokenizer, checker, winners = AutoTokenizer.from_pretrained(bundled_model_path()), arithmetic.checker(), 0
    for batch, metrics in zip(batches, logged, strict=True):
        answers = [checker.extract(tokenizer.decode(ids, skip_special_tokens=True)) for ids in batch["responses"]]
        scores = [float(row.sum()) for row in batch["rm_scores"]]
        assert all(int(row.count_nonzero()) == int(bool(row[-1])) for row in batch["rm_scores"])
        labels = [PROBLEMS[level].answer if level % 2 else 10**6 for level in batch["level"]]
        truth = [float(answer is not None and int(answer) == label) for answer, label in zip(answers, labels, strict=True)]
        agreeing = [score == right for score, right in zip(scores, truth, strict=True)]
        assert metrics["urlvr/reward_accuracy"] == pytest.approx(sum(agreeing) / len(agreeing))
        uids, ratios = Counter(batch["uid"]), []
        assert list(uids.values()) == [GROUP] * 4
        for uid in uids:
            rows = [i for i in range(len(scores)) if batch["uid"][i] == uid]
            counts = Counter(answers[i] for i in rows if answers[i] is not None).most_common()
            rewards = torch.tensor([scores[i] for i in rows])
            if len(counts) == 1 or counts[0][1] > counts[1][1]:
                winners += 1
                assert rewards.tolist() == [float(answers[i] == counts[0][0]) for i in rows]
            ratios.append(float(rewards.mean()))
            expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
            for i, value in zip(rows, expected.tolist(), strict=True):
                assert batch["advantages"][i].tolist() == pytest.approx([value] * len(batch["responses"][i]), abs=1e-5)
        assert metrics["urlvr/majority_ratio"] == pytest.approx(sum(ratios) / 4)
        assert metrics["urlvr/replaced_score"] == Rollouts.SCORE
        assert metrics["critic/score/mean"] == pytest.approx(sum(scores) / len(scores))
        assert metrics["urlvr/label_accuracy"] <= 0.5  # every second label is wrong
        assert metrics["actor/grad_norm"] > 0
    assert winners >= 4
    start = AutoModelForCausalLM.from_pretrained(bundled_model_path()).state_dict()
    weights = dict(trainer.actor_rollout_wg.worker.actor.engine.get_per_tensor_param()[0])
    assert max(float((values - start[name]).abs().max()) for name, values in weights.items()) > 1e-5


REWARD = """
def certainty(batch, policy):
    assert list(batch.columns) == ["level"], "a label is seen"
    assert batch.columns["level"] == [0] * 8 + [1] * 8 + [2] * 8
    assert batch.prob_gap.min() >= 0
    return batch.sequence_mean(batch.self_certainty)

certainty.needs = frozenset({"self_certainty", "prob_gap"})
"""


def test_a_reward_gets_statistics_from_the_engine(files: Path, queue: None, tmp_path: Path) -> None:
    """Three prompts where the optimiser takes four: verl adds rows of its own, which are no rollouts."""
    (tmp_path / "own.py").write_text(REWARD)
    reward = [f"+urlvr.reward={tmp_path / 'own.py'}:certainty", "+urlvr.columns=[level]"]
    _, (batch,), (metrics,) = run(config_of(files, *reward, "trainer.total_training_steps=1", "data.train_batch_size=3"))
    model, entropies = AutoModelForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32), []
    assert len(batch["keys"]) == 32
    for i, (prompt, response) in enumerate(zip(batch["prompts"], batch["responses"], strict=True)):
        score = float(batch["rm_scores"][i].sum())
        if batch["uid"][i].startswith("pad"):
            assert score == 0
            continue
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        expected = token_stats(logits, response, outputs=("logp", "entropy", "self_certainty"), temperature=0.8)
        torch.testing.assert_close(batch["old_log_probs"][i], expected.logp, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch["entropy"][i], expected.entropy, atol=1e-4, rtol=1e-4)
        assert score == pytest.approx(float(expected.self_certainty.mean()), rel=1e-4)
        entropies.append(expected.entropy)
    assert len(entropies) == 24
    assert metrics["urlvr/actor_entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)


def test_a_detector_ends_the_run_before_the_batch_is_trained_on(files: Path, queue: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from urlvr_fast.adapters.watch import Watch

    look = Watch.look

    def fires(watch: Watch, *arguments: Any) -> dict[str, float]:
        watch.ended = "it fired"  # type: ignore[assignment]
        return look(watch, *arguments)

    monkeypatch.setattr(Watch, "look", fires)
    trainer, batches, _ = run(config_of(files, "+urlvr.reward=trajectory_entropy"))
    assert trainer.ended == "it fired"
    assert len(batches) == 1
    start = AutoModelForCausalLM.from_pretrained(bundled_model_path()).state_dict()
    for name, values in dict(trainer.actor_rollout_wg.worker.actor.engine.get_per_tensor_param()[0]).items():
        assert torch.equal(values, start[name])


# ---- what is refused -------------------------------------------------------------------------------------------------------------------


def test_what_the_head_cannot_do_is_said(models: dict[bool, Path]) -> None:
    use_fused_ops()
    engine = engine_of(models[False], fused=True)
    with engine.eval_mode(), pytest.raises(AdapterError, match="sharded lm_head by itself"):
        engine.infer_batch(micro_batches(engine, 1.0), loss_function=None)
    engine = engine_of(models[True], fused=True)
    with engine.eval_mode(), pytest.raises(AdapterError, match="need logits"):
        engine.infer_batch(micro_batches(engine, 1.0, calculate_self_certainty=True), loss_function=None)
    hidden, weight, labels = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(AdapterError, match="split by Megatron"):
        verl_kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "none", distributed.group.WORLD)
    with pytest.raises(AdapterError, match="reduction='mean'"):
        verl_kernel.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


def test_a_reward_that_asks_the_policy_is_refused(files: Path, queue: None) -> None:
    with pytest.raises(RewardError, match=r"asks the policy for \w+\(\), and in verl the workers have the policy"):
        run(config_of(files, "+urlvr.reward=self_verification"))
    tq.kv_clear(partition_id="train", keys=list(tq.kv_list("train")["train"]))


def test_rollouts_that_it_does_not_understand_are_refused() -> None:
    from urlvr_fast.adapters.verl import LabelFreeTrainer

    use_fused_ops()
    trainer = object.__new__(LabelFreeTrainer)
    trainer._statistics = ["entropy", "self_certainty"]
    whole, tools = nested([torch.ones(3), torch.ones(2)]), nested([torch.ones(3), torch.tensor([1.0, 0.0])])
    for second, mask, message in (
        ("a_1_1", whole, "several outputs"),
        ("a_1_0", tools, "tools"),
        ("a_1_0", whole, "gave no self_certainty"),
    ):
        batch = SimpleNamespace(keys=["a_0_0", second], tags=[{}, {}])
        with pytest.raises(AdapterError, match=message):
            trainer._rollouts(batch, {"response_mask": mask, "entropy": whole})


def test_verl_loads_it_where_its_environment_says_so() -> None:
    script = """
import verl
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.import_utils import load_extern_object
from verl.utils.torch_functional import logprobs_from_logits
print(get_trainer_cls("label_free").__module__, logprobs_from_logits.__module__)
print(load_extern_object("pkg://urlvr_fast.adapters.verl", "no_reward")("math", "1", "2", extra_info={}))
"""
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "urlvr_fast.adapters.verl"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-3:] == ["urlvr_fast.adapters.verl", "urlvr_fast.adapters.verl_head", "0.0"]


def test_what_the_trainer_cannot_do_is_said_at_once(files: Path) -> None:
    from urlvr_fast.adapters.verl import LabelFreeTrainer

    for overrides, message in (
        ((), "missing 1 required .*'reward'"),
        (("+urlvr.reward=majority_voting", "+urlvr.colunms=[level]"), "unexpected keyword argument 'colunms'"),
        (("+urlvr.reward=majority_voting", "algorithm.filter_groups.enable=True"), "verl's own reward, labels and all"),
        (("+urlvr.reward=majority_voting", "algorithm.rollout_correction.bypass_mode=True"), "no entropies"),
        (("+urlvr.reward=self_certainty", "actor_rollout_ref.model.use_fused_kernels=True"), "self_certainty: of verl's FSDP engine alone"),
        (("+urlvr.reward=majority_voting", "+urlvr.detectors.entropy_floor=rollback"), "rollback"),
        (("+urlvr.reward=majority_voting", "+urlvr.detectors.anchor_drift=stop"), "anchor_prompts"),
    ):
        with pytest.raises(AdapterError, match=message):
            LabelFreeTrainer(config_of(files, *overrides))
    with pytest.raises(RewardError, match="returns advantages"):
        LabelFreeTrainer(config_of(files, "+urlvr.reward=restrain"))
    with pytest.raises(RewardError, match="needs answers"):
        LabelFreeTrainer(config_of(files, "+urlvr.reward=ground_truth"))


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.importlib.metadata, "version", lambda package: "0.10.0")
    with pytest.raises(AdapterError, match=r"verl is 0.10.0, .*pip install 'verl==0.9.\*'"):
        use_fused_ops()
