"""TRL's `GRPOTrainer` with rewards that need no label, on the fused ops, watched for collapse.

    from trl import GRPOConfig
    from urlvr_fast.adapters.trl import LabelFreeGRPOTrainer, LabelFreeReward

    trainer = LabelFreeGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=LabelFreeReward("majority_voting"),
        args=GRPOConfig(num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=8),
        train_dataset=dataset,  # a column `prompt` is all that it takes
        detectors={"anchor_drift": "stop"},
        anchor_prompts=dataset["prompt"][:64],
    )
    trainer.train()

A reward function of TRL's sees completions, and of a group that several processes generated a part. This trainer gives a reward what it
takes: whole groups; the log-prob, entropy and self-certainty of every sampled token under the weights that sampled it, from one forward
without gradient; and the policy itself, for rewards that ask it. Everything else is TRL's: configuration, engines, losses, checkpoints.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.adapters import AdapterError, require
from urlvr_fast.adapters.trl_head import TRL, taking, use_fused_ops
from urlvr_fast.adapters.watch import Watch
from urlvr_fast.monitor.detectors import Detection
from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import AnswerChecker, MathAnswers
from urlvr_fast.rewards.registry import build_reward, call_reward, reward_needs
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.policy import Policy
from urlvr_fast.trainer.rollout import Completion, Sampling, mixed_seed
from urlvr_fast.trainer.rollout.hf import HFRollout

require("trl", TRL)  # says what to install, which the imports do not

from accelerate.utils import gather_object  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

STATE = "urlvr_watch.json"  # in a checkpoint


class LabelFreeReward:
    """One of `urlvr_fast.rewards` among the `reward_funcs` of a LabelFreeGRPOTrainer; `GRPOConfig.reward_weights` mixes it with others.

    spec, options: what `reward=` and `reward_options=` are for `urlvr train`: a name such as "self_certainty", a dotted path, a file.
    checker: how answers are read and compared; by default MathAnswers, `\\boxed{}` by math-verify.
    columns: columns of the data set that the reward may see in `batch.columns`. None by default, so that no label is seen by mistake.
    name: what TRL logs it as, the spec by default; two of one spec need one each.

    Raises RewardError as `build_reward` does, and for a reward that returns advantages, which TRL would normalise again.
    """

    def __init__(
        self,
        spec: str,
        *,
        checker: AnswerChecker | None = None,
        columns: Sequence[str] = (),
        name: str | None = None,
        **options: Any,
    ) -> None:
        self.checker: AnswerChecker = MathAnswers() if checker is None else checker
        self.reward = build_reward(spec, checker=self.checker, options=options)
        self.columns = tuple(columns)
        self.values: list[float] | None = None  # of this process's rollouts, put here before TRL asks
        self.__name__ = name or spec
        if getattr(self.reward, "returns_advantages", False):
            raise RewardError(f"reward {spec} returns advantages, and GRPOTrainer takes rewards: `urlvr train` can train with it")

    def __call__(self, **_: Any) -> list[float]:
        """What GRPOTrainer calls."""
        if self.values is None:
            raise AdapterError(f"{self.__name__} takes whole groups and log-probs: use LabelFreeGRPOTrainer in the place of GRPOTrainer")
        values, self.values = self.values, None
        return values


class LabelFreeGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose `reward_funcs` hold one LabelFreeReward or more; all other arguments are GRPOTrainer's.

    detectors: detector of `urlvr_fast.monitor.detectors` -> "warn" (what each does by default), "stop" or "off". They look at the rollouts
        that are trained on, some 16 prompts at a time, and of several LabelFreeRewards at the first one's. What ended a run is `ended`.
    anchor_prompts: prompts, as in the data set's column, for the detector `anchor_drift`: what the model that training starts from is sure
        of on them, by `anchor_votes` rollouts, and every `anchor_every` batches whether it still says so.
    audit: a column with true answers, which only metrics see: Reward Accuracy and its like are then logged too, under `urlvr/`.

    Statistics are those of the whole tempered distribution, also where top_p, top_k or min_p cut it. Anchors, and rewards that ask the
    policy, are the work of every process on all rollouts, with `transformers` where the policy writes.

    Raises AdapterError for another version of TRL than was tested; for images, tools and environments; for ZeRO-3; and under FSDP, where no
    process has the weights, for anchors and for rewards that have the policy write.
    """

    def __init__(
        self,
        *args: Any,
        detectors: Mapping[str, str] | None = None,
        anchor_prompts: Sequence[Any] = (),
        anchor_every: int = 10,
        anchor_votes: int = 16,
        audit: str | None = None,
        **kwargs: Any,
    ) -> None:
        use_fused_ops()
        super().__init__(*args, **kwargs)
        self._rewards = [function for function in self.reward_funcs if isinstance(function, LabelFreeReward)]
        if not self._rewards:
            raise AdapterError("reward_funcs holds no LabelFreeReward: what you want is GRPOTrainer after use_fused_ops()")
        if len({function.__name__ for function in self._rewards}) < len(self._rewards):
            raise AdapterError("two LabelFreeRewards have one name, so TRL would log them as one: give them a name= each")
        if self.tools or self.environment_factories is not None:
            raise AdapterError("label-free rewards of rollouts with tools or environments are not built")
        if any(hasattr(parameter, "ds_id") for parameter in self.model.parameters()):
            raise AdapterError("DeepSpeed's ZeRO-3 is not supported: use ZeRO-2 or FSDP")
        if self.is_fsdp_enabled and anchor_prompts:
            raise AdapterError("anchor_prompts need a model that can write, and under FSDP no process has all of it: leave them out")
        known = getattr(self.train_dataset, "column_names", None)
        if audit is not None and known is not None and audit not in known:
            raise AdapterError(f"audit={audit!r} is no column of the training data, which has {', '.join(known)}")
        self._audit = audit
        self._watch = Watch(
            detectors or {},
            self._rewards[0].checker,
            anchor_prompts,
            anchor_every=anchor_every,
            anchor_votes=anchor_votes,
            says=self.accelerator.is_main_process,
        )
        self._generated: list[tuple[list[int], Completion]] = []

    @property
    def ended(self) -> Detection | None:
        """What a detector that was to stop the run has seen, on this process."""
        return self._watch.ended

    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, _, logps, _, images, _ = generated
        if tool_mask is not None or images is not None:
            raise AdapterError("label-free rewards of rollouts with images or an environment's tokens are not built")
        self._generated = []
        for i, (prompt, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            logp = [math.nan] * len(ids) if logps is None else [math.nan if value is None else value for value in logps[i]]
            reason = "stop" if ids[-1] in self.eos_token_ids else "length"
            self._generated.append((list(prompt), Completion(list(ids), logp, reason)))
        return generated

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]) -> Tensor:
        self._take_statistics()
        batch, answers = self._gathered(inputs, prompts)
        seed = mixed_seed(self.args.seed, self.state.global_step)
        policy = _TRLPolicy(self, seed, chat=not isinstance(prompts[0], str))
        rewards = [call_reward(function.reward, batch, policy) for function in self._rewards]
        first = self.accelerator.process_index * len(prompts)
        for function, values in zip(self._rewards, rewards, strict=True):
            function.values = values[first : first + len(prompts)].tolist()
        figures = self._look(batch, rewards[0], answers, seed) if self.model.training else self._watch.figures(batch, rewards[0], answers)
        for name, value in figures.items():
            self._log_metric(f"urlvr/{name}", value)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _take_statistics(self) -> None:
        """Fill this process's completions with what the rewards need of the weights that sampled them, in one forward."""
        needs = sorted({"entropy"}.union(*(reward_needs(function.reward) for function in self._rewards)))
        rows = [prompt + completion.token_ids for prompt, completion in self._generated]
        stats = self._score(rows, [len(prompt) for prompt, _ in self._generated], ("logp", *needs), self.temperature)
        lengths = [len(completion.token_ids) for _, completion in self._generated]
        parts = {name: values.split(lengths) for name, values in stats.items()}
        for i, (_, completion) in enumerate(self._generated):
            # The engine's own, where it gave one.
            own = parts["logp"][i].tolist()
            completion.logp = [mine if math.isnan(given) else given for given, mine in zip(completion.logp, own, strict=True)]
            # Copies: of a view all of the memory behind it would be sent.
            completion.statistics = {name: parts[name][i].clone() for name in needs}

    def _gathered(self, inputs: list[dict], prompts: list) -> tuple[RolloutBatch, dict[int, str]]:
        """The rollouts of all processes, and for the metrics the answers to their prompts."""
        names = sorted({name for function in self._rewards for name in function.columns})
        columns = [{name: row[name] for name in names} for row in inputs]
        texts = prompts if isinstance(prompts[0], str) else self._tokenizer.batch_decode([prompt for prompt, _ in self._generated])
        answers = [row.get(self._audit) if self._audit else None for row in inputs]
        rows = gather_object(list(zip(self._generated, columns, texts, answers, strict=True)))
        # TRL's own groups: so many rollouts of each prompt, one after the other, from all processes.
        size = self.num_generations if self.model.training else self.num_generations_eval
        firsts = rows[::size]
        batch = build_batch(
            prompt_token_ids=[generated[0] for generated, *_ in firsts],
            prompt_texts=[text for _, _, text, _ in firsts],
            prompt_ids=list(range(len(firsts))),
            completions=[[generated[1] for generated, *_ in rows[start : start + size]] for start in range(0, len(rows), size)],
            decode=self._described().decode,
            temperature=self.temperature,
            columns={name: [values[name] for _, values, _, _ in firsts] for name in names},
        )
        return batch, {prompt: str(answer) for prompt, (*_, answer) in enumerate(firsts) if answer is not None}

    def _look(self, batch: RolloutBatch, rewards: Tensor, answers: dict[int, str], seed: int) -> dict[str, float]:
        self._watch.begin(self.state.global_step)
        if self._watch.wants_anchors:
            encoded, _, _ = self._tokenize_prompts(list(self._watch.anchor_prompts))
            decode = self._described().decode
            self._watch.look_at_anchors(self, encoded, decode, self.temperature, self.max_completion_length, seed)
        figures = self._watch.look(batch, rewards, answers)
        # One process for all: their anchors may differ by rounding, and one that stops alone leaves the others waiting.
        if any(gather_object([self._watch.ended is not None])):
            self.control.should_training_stop = True
        return figures

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps(self._watch.state()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / STATE).is_file():
            self._watch.restore(json.loads(path.read_text()))

    # ---- what `Policy` asks of an engine and of a learner ----------------------------------------------------------------------------

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """As `HFRollout.generate`, from the present weights."""
        if self.is_fsdp_enabled:
            raise AdapterError("a policy whose parameters are sharded by FSDP cannot write here: take another reward")
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT, which gives it the wrapper's settings
        # No more rows at once than this process samples for a batch.
        rows = self.args.per_device_train_batch_size * self.args.steps_per_generation
        engine = HFRollout(
            model,
            dtype="bfloat16" if self.args.bf16 else "float32",
            stop_token_ids=list(self.eos_token_ids),
            batch_prompts=max(1, rows // sampling.n),
        )
        settings = base.generation_config
        try:
            return engine.generate(prompts, sampling, seed)
        finally:
            base.generation_config = settings

    def score(self, batch: RolloutBatch, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of `token_stats` on a batch's response tokens under the present weights, (R,) fp32 on the CPU each."""
        rows = [batch.tokens[start:end].tolist() for start, end in pairwise(batch.cu_seqlens.tolist())]
        return self._score(rows, batch.prompt_lens.tolist(), outputs, batch.temperature)

    @torch.no_grad()
    def _score(self, rows: list[list[int]], prompt_lens: list[int], outputs: Sequence[str], temperature: float) -> dict[str, Tensor]:
        size, found = self.args.per_device_train_batch_size, []
        for start in range(0, len(rows), size):
            lengths = torch.tensor([len(row) for row in rows[start : start + size]])[:, None]
            position = torch.arange(int(lengths.max()))
            there = position < lengths
            response = there & (position >= torch.tensor(prompt_lens[start : start + size])[:, None])
            ids = torch.full(there.shape, self._tokenizer.pad_token_id)
            ids[there] = torch.tensor([token for row in rows[start : start + size] for token in row])
            labels = ids.masked_fill(~response, -100)
            device = self.accelerator.device
            with self.accelerator.autocast(), taking(outputs, temperature) as taken:
                inputs = {"input_ids": ids, "attention_mask": there.long(), "labels": labels}
                output = self.model(**{name: value.to(device) for name, value in inputs.items()}, fused_lm_head=True)
            (stats,) = taken
            values = torch.stack([getattr(stats, name).float() for name in outputs]).cpu()
            # TRL gives the head the labelled positions on a GPU and all of them elsewhere.
            labelled = output.label_mask.flatten().cpu()
            found.append(values[:, labelled] if values.shape[1] == len(labelled) else values)
        return dict(zip(outputs, torch.cat(found, dim=1), strict=True))

    def _described(self) -> LoadedModel:
        """The model, as `Policy` knows one."""
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        dtype = "bfloat16" if self.args.bf16 else "float32"
        stop = list(self.eos_token_ids)
        return LoadedModel("", self.model, self._tokenizer, self.accelerator.device, dtype, stop, context)


class _TRLPolicy(Policy):
    """The policy as a reward may ask it; the trainer is its engine and its learner."""

    def __init__(self, trainer: LabelFreeGRPOTrainer, seed: int, chat: bool) -> None:
        super().__init__(trainer._described(), trainer, trainer, seed, chat)
        self._trainer = trainer

    def render(self, message: str) -> str:
        if not self._chat:
            return message
        turn, trainer = [{"role": "user", "content": message}], self._trainer
        given = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
        return str(trainer._tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, **given))
