"""Our side: `loop.train` as it is, halted before every step until the benchmark asks for one."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.grpo_step import worker
from benches.grpo_step.material import LEARNING_RATE, Material, reward


def trained_value(batch: Any, policy: Any) -> list[float]:
    """`reward` for `urlvr train`."""
    responses = batch.tokens.split(batch.cu_seqlens.diff().tolist())
    return [reward(ids[prompt:].tolist()) for ids, prompt in zip(responses, batch.prompt_lens.tolist(), strict=True)]


def options(material: Material, folder: Path, threads: int, engine: str) -> list[str]:
    """What the configuration is changed in. Nothing that a user's step would do is left out but samples.jsonl, evaluations and checkpoints,
    which are not made in every step."""
    return [
        *material.options,
        f"model={material.model}",
        f"reward={__name__}.{trained_value.__name__}",
        f"run_dir={folder / 'run'}",
        f"rollout.engine={engine}",
        f"rollout.stop_token_ids=[{material.stop_token_id}]",
        "prompts.shuffle=false",
        f"trainer.threads={threads}",
        f"trainer.lr={LEARNING_RATE}",
        "trainer.steps=1000000",
        "trainer.samples_every=0",
        "trainer.eval_every=0",
        "trainer.save_every=0",
        "eval.prompts=0",
        "log.live=off",
    ]


def given_rollouts(material: Material) -> Any:
    """The given rollouts as a `RolloutBatch`."""
    from urlvr_fast.trainer.batch import build_batch
    from urlvr_fast.trainer.rollout import Completion

    groups = material.responses.split(material.group_size)
    return build_batch(
        prompt_token_ids=[list(ids) for ids in material.prompt_ids],
        prompt_texts=list(material.prompts),
        prompt_ids=list(range(len(material.prompts))),
        completions=[[Completion(ids, [0.0] * len(ids), "length") for ids in group.tolist()] for group in groups],
        decode=lambda responses: [""] * len(responses),
        temperature=1.0,
    )


def advantages_of(batch: Any) -> Tensor:
    """(B,)"""
    from urlvr_fast.ops import group_advantages

    return group_advantages(torch.tensor(trained_value(batch, None)), batch.group_ids)


def main(pipe: Connection, material: Material, folder: Path, threads: int, engine: str) -> None:
    from urlvr_fast.trainer import config as configuration
    from urlvr_fast.trainer import loop

    folder.mkdir(parents=True)
    config = configuration.load(material.yaml, options(material, folder, threads, engine))
    loop.training_step = _Halted(pipe, material, folder, loop.training_step)
    loop.train(config)


class _Halted:
    """Stands in for `training_step`. A step lasts from the command that asks for it until the loop asks for the next one."""

    def __init__(self, pipe: Connection, material: Material, folder: Path, step: Callable[..., dict[str, float]]) -> None:
        self._pipe, self._folder, self._step = pipe, folder, step
        self._batch = given_rollouts(material)
        self._advantages = advantages_of(self._batch)
        self._spent: dict[str, float] = {}  # seconds by part of the step in progress
        self._begun: float | None = None

    def __call__(self, run: Any, step: int) -> dict[str, float]:
        if self._begun is None:
            run.rollout.generate = self._timed("generate", run.rollout.generate)
            run.rollout.sync = self._timed("sync", run.rollout.sync)
            run.learner.accumulate = self._timed("accumulate", run.learner.accumulate)
            run.learner.update = self._timed("update", run.learner.update)
            self._pipe.send(self._about(run))
        else:
            self._pipe.send({"total": time.perf_counter() - self._begun, **self._spent})
        while (command := self._pipe.recv()) != worker.STEP:
            self._pipe.send(self._other(run, command))
        self._spent.clear()
        self._begun = time.perf_counter()
        return self._step(run, step)

    def _about(self, run: Any) -> dict[str, Any]:
        from urlvr_fast.trainer.rollout.vllm import VLLMRollout, vllm_version

        vllm = isinstance(run.rollout, VLLMRollout)
        engine = f"vLLM {vllm_version()} in the trainer's process" if vllm else "transformers' generate on the trainer's model"
        return {"engine": engine, **worker.about_threads()}

    def _other(self, run: Any, command: str) -> dict[str, Any]:
        if command == worker.PEAK:
            return worker.peak()
        if command == worker.GRADIENT:
            run.learner.accumulate(self._batch, self._advantages)
            path = self._folder / "gradient.pt"
            torch.save({name: p.grad for name, p in run.loaded.model.named_parameters()}, path)
            run.learner.optimizer.zero_grad(set_to_none=True)
            return {"path": str(path)}
        self._spent.clear()
        with worker.probe(command) as found:
            run.learner.accumulate(self._batch, self._advantages)
            run.learner.update(1)
        answer = {"total": found.value, **self._spent}
        run.rollout.sync(run.learner.weights())  # the loop finds the engine with the weights that it left there
        return answer

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with worker.Seconds() as seconds:
                result = function(*arguments, **keywords)
            self._spent[name] = self._spent.get(name, 0.0) + seconds.value
            return result

        return timed
