"""TRL's side: `GRPOTrainer.train` as it is, halted before every step until the benchmark asks for one.

Settings that cost TRL nothing it could do without: one update a batch of rollouts (`num_iterations` 1 and `steps_per_generation` as many as
micro-batches, so it makes no old log-probs), fused AdamW, no gradient checkpointing, no 16 bit (slower than fp32 on CPUs without AMX), no
log, no workers in the data loader, no importance correction against the engine. It takes no Liger kernels: they need Triton. Four
micro-batches a step are no slower than one and take a fraction of its memory; a static cache is not faster.

TRL takes and gives back gigabytes in a step, and with glibc's defaults every one of these pages is fetched and cleared anew. Who tunes
PyTorch on CPUs has another allocator or `KEEP_PAGES`, which halves TRL's step; it takes part with and without.
"""

from __future__ import annotations

import importlib.metadata
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benches.grpo_step import worker
from benches.grpo_step.material import LEARNING_RATE, Material, reward

MICRO_BATCHES = 4
KEEP_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}


def settings(material: Material, folder: Path, vllm: bool) -> dict[str, Any]:
    """Of `GRPOConfig`, all that is not left at its default."""
    engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": False} if vllm else {}
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": material.rollouts // MICRO_BATCHES,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "steps_per_generation": MICRO_BATCHES,
        "num_iterations": 1,
        "num_generations": material.group_size,
        "max_completion_length": material.response,
        "temperature": 1.0,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "max_steps": 1_000_000,
        "shuffle_dataset": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32"},
        **engine,
    }


def trained_value(prompts: Any, completions: Any, completion_ids: list[list[int]], **_: Any) -> list[float]:
    """`reward` for GRPOTrainer."""
    return [reward(ids) for ids in completion_ids]


def main(pipe: Connection, material: Material, folder: Path, threads: int, vllm: bool) -> None:
    torch.set_num_threads(threads)
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Observed(GRPOTrainer):
        """Says when a batch is prepared and how long the engine took."""

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            inputs = super()._prepare_inputs(generation_batch)
            halted.prepared()
            return inputs

        def _generate_single_turn(self, *arguments: Any, **keywords: Any) -> Any:
            with worker.Seconds() as seconds:
                generated = super()._generate_single_turn(*arguments, **keywords)
            halted.spent["generate"] = seconds.value
            return generated

    class Callback(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if halted.begun is None:
                halted.next()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            halted.differentiated()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            halted.ended()
            halted.next()

    arguments = settings(material, folder, vllm)
    trainer = Observed(
        model=material.model,
        args=GRPOConfig(**arguments),
        reward_funcs=trained_value,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in material.prompts]),
        callbacks=[Callback()],
    )
    if [tuple(ids) for ids in trainer.processing_class(text=list(material.prompts))["input_ids"]] != list(material.prompt_ids):
        raise ValueError("TRL makes other tokens of the prompts")
    halted = _Halted(pipe, material, folder, trainer, arguments, vllm)
    trainer.train()


class _Halted:
    """What the trainer tells, and the next thing it is to do. A step lasts from the command that asks for it until the trainer has made it,
    the fetching of its prompts included."""

    def __init__(self, pipe: Connection, material: Material, folder: Path, trainer: Any, arguments: dict[str, Any], vllm: bool) -> None:
        self.spent: dict[str, float] = {}
        self.begun: float | None = None
        self._pipe, self._material, self._folder, self._trainer = pipe, material, folder, trainer
        self._command = ""
        self._probe: Any = None
        self._greeting = self._about(arguments, vllm)

    def next(self) -> None:
        """Wait for a command that takes a step of the trainer. `learn` and its like take one whose rollouts are given."""
        if self.begun is None:
            self._pipe.send(self._greeting)
        while (command := self._pipe.recv()) == worker.PEAK:
            self._pipe.send(worker.peak())
        self._command = command
        self._trainer.rollout_func = None if command == worker.STEP else self._given
        self._trainer.args.max_grad_norm = 0.0 if command == worker.GRADIENT else 1.0
        self.spent.clear()
        self.begun = time.perf_counter()

    def prepared(self) -> None:
        """Rollouts have become tensors with advantages: the learner begins, with the first micro-batch."""
        if self._command not in (worker.STEP, worker.GRADIENT) and self._probe is None:
            self._probe = worker.probe(self._command)
            self._probe.__enter__()

    def differentiated(self) -> None:
        if self._command == worker.GRADIENT:
            path = self._folder / "gradient.pt"
            torch.save({name: p.grad for name, p in self._trainer.model.named_parameters()}, path)

    def ended(self) -> None:
        assert self.begun is not None
        if self._command == worker.STEP:
            self._pipe.send({"total": time.perf_counter() - self.begun, **self.spent})
        elif self._command == worker.GRADIENT:
            self._pipe.send({"path": str(self._folder / "gradient.pt")})
        else:
            assert self._probe is not None
            self._probe.__exit__(None, None, None)
            self._pipe.send({"total": self._probe.value})
            self._probe = None

    def _given(self, prompts: list[str], _trainer: Any) -> dict[str, Any]:
        """A `rollout_func` that hands out the given rollouts."""
        if len(prompts) != self._material.rollouts:
            raise ValueError(f"TRL asks for {len(prompts)} rollouts, {self._material.rollouts} are given")
        repeated = [list(ids) for ids in self._material.prompt_ids for _ in range(self._material.group_size)]
        return {"prompt_ids": repeated, "completion_ids": self._material.responses.tolist(), "logprobs": None}

    def _about(self, arguments: dict[str, Any], vllm: bool) -> dict[str, Any]:
        engine = "vLLM in the trainer's process" if vllm else "transformers' generate on the trainer's model"
        shown = {name: value for name, value in arguments.items() if name != "output_dir"}
        return {"engine": engine, "version": importlib.metadata.version("trl"), "settings": shown, **worker.about_threads()}
