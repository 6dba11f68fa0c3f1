"""TRL's `GRPOTrainer` with rewards that need no label, on the fused ops, watched for collapse.

    from trl import GRPOConfig
    from urlvr_fast.adapters.trl import LabelFreeGRPOTrainer, LabelFreeReward

    trainer = LabelFreeGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=LabelFreeReward("majority_voting"),
        args=GRPOConfig(num_generations=8),
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

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from urlvr_fast.adapters import AdapterError
from urlvr_fast.adapters.trl_head import taking, use_fused_ops
from urlvr_fast.adapters.trl_watch import Watch
from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import AnswerChecker, MathAnswers
from urlvr_fast.rewards.registry import build_reward, call_reward, reward_needs
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.policy import Policy
from urlvr_fast.trainer.rollout import Completion, Sampling
from urlvr_fast.trainer.rollout.hf import HFRollout


class LabelFreeReward:
    """One of `urlvr_fast.rewards` among the `reward_funcs` of a LabelFreeGRPOTrainer; `GRPOConfig.reward_weights` mixes it with others.

    spec, options: what `reward=` and `reward_options=` are for `urlvr train`: a name such as "self_certainty", a dotted path, a file.
    checker: how answers are read and compared; by default MathAnswers, `\\boxed{}` by math-verify.
    columns: columns of the data set that the reward may see in `batch.columns`. None by default, so that no label is seen by mistake.

    Raises RewardError as `build_reward` does, and for a reward that returns advantages, which TRL would normalise again.
    """

    def __init__(self, spec: str, *, checker: AnswerChecker | None = None, columns: Sequence[str] = (), **options: Any) -> None:
        self.checker: AnswerChecker = MathAnswers() if checker is None else checker
        self.reward = build_reward(spec, checker=self.checker, options=options)
        self.columns = tuple(columns)
        self.values: list[float] | None = None  # of this process's rollouts, put here before TRL asks
        self.__name__ = spec
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

    detectors: detector of `urlvr_fast.monitor.detectors` -> "warn" (what each does by default), "stop" or "off". They look at every batch
        of rollouts that is trained on, and of several LabelFreeRewards at the first one's.
    anchor_prompts: prompts, as in the data set's column, for the detector `anchor_drift`: what the model that training starts from is sure
        of on them, by `anchor_votes` rollouts, and every `anchor_every` batches whether it still says so. Each process samples them all,
        with `transformers`.
    audit: a column with true answers, which only metrics see: Reward Accuracy and its like are then logged too, under `urlvr/`.

    Raises AdapterError for another version of TRL than was tested; for images, tools and environments; and where parameters are sharded
    (FSDP, ZeRO-3) for anchors and for rewards that have the policy write.
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
        self._audit = audit
        self._watch = Watch(detectors or {}, self._rewards[0].checker, anchor_prompts, anchor_every=anchor_every, anchor_votes=anchor_votes)
        self._generated: list[tuple[list[int], Completion]] = []

    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        prompt_ids, completion_ids, tool_mask, _, logps, _, images, _ = generated
        if tool_mask is not None or images is not None:
            raise AdapterError("label-free rewards of rollouts with images, tools or environments are not built")
        self._generated = []
        for i, (prompt, ids) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            logp = [] if logps is None else [math.nan if value is None else value for value in logps[i]]
            reason = "stop" if ids[-1] in self.eos_token_ids else "length"
            self._generated.append((list(prompt), Completion(list(ids), logp, reason)))
        return generated

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]) -> Tensor:
        self._take_statistics()
        batch, answers = self._gathered(inputs, prompts)
        seed = self.args.seed + self.state.global_step
        policy = Policy(self._described(), self, self, seed, chat=not isinstance(prompts[0], str))
        rewards = [call_reward(function.reward, batch, policy) for function in self._rewards]
        first = self.accelerator.process_index * len(prompts)
        for function, values in zip(self._rewards, rewards, strict=True):
            function.values = values[first : first + len(prompts)].tolist()
        if self.model.training:
            self._look(batch, rewards[0], answers, seed)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _take_statistics(self) -> None:
        """Fill this process's completions with what the rewards need of the weights that sampled them, in one forward."""
        needs = sorted({"entropy"}.union(*(reward_needs(function.reward) for function in self._rewards)))
        rows = [prompt + completion.token_ids for prompt, completion in self._generated]
        stats = self._score(rows, [len(prompt) for prompt, _ in self._generated], ("logp", *needs), self.temperature)
        lengths = [len(completion.token_ids) for _, completion in self._generated]
        parts = {name: values.split(lengths) for name, values in stats.items()}
        for i, (_, completion) in enumerate(self._generated):
            completion.logp = completion.logp or parts["logp"][i].tolist()  # the engine's own, where it gave them
            completion.statistics = {name: parts[name][i] for name in needs}

    def _gathered(self, inputs: list[dict], prompts: list) -> tuple[RolloutBatch, dict[int, str]]:
        """The rollouts of all processes, and for the metrics the answers to their prompts."""
        names = sorted({name for function in self._rewards for name in function.columns})
        columns = [{name: row[name] for name in names} for row in inputs]
        texts = prompts if isinstance(prompts[0], str) else self._tokenizer.batch_decode([prompt for prompt, _ in self._generated])
        answers = [row[self._audit] if self._audit else None for row in inputs]
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

    def _look(self, batch: RolloutBatch, rewards: Tensor, answers: dict[int, str], seed: int) -> None:
        self._watch.begin(self.state.global_step)
        if self._watch.wants_anchors:
            encoded, _, _ = self._tokenize_prompts(list(self._watch.anchor_prompts))
            decode = self._described().decode
            self._watch.look_at_anchors(self, encoded, decode, self.temperature, self.max_completion_length, seed)
        for name, value in self._watch.look(batch, rewards, answers).items():
            self._log_metric(f"urlvr/{name}", value)
        if self._watch.ended is not None:
            self.control.should_training_stop = True

    # ---- what `Policy` asks of an engine and of a learner ----------------------------------------------------------------------------

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        """As `HFRollout.generate`, from the present weights."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or hasattr(next(model.parameters()), "ds_id"):
            raise AdapterError("a policy whose parameters are sharded cannot write here: take another reward, and no anchor_prompts")
        dtype = "bfloat16" if self.args.bf16 else "float32"
        return HFRollout(model, dtype=dtype, stop_token_ids=list(self.eos_token_ids)).generate(prompts, sampling, seed)

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
                self.model(input_ids=ids.to(device), attention_mask=there.long().to(device), labels=labels.to(device), fused_lm_head=True)
            (stats,) = taken
            values = torch.stack([getattr(stats, name).float() for name in outputs]).cpu()
            # TRL gives the head the labelled positions on a GPU and all of them elsewhere.
            found.append(values if values.shape[1] == int(response.sum()) else values[:, response[:, 1:].flatten()])
        return dict(zip(outputs, torch.cat(found, dim=1), strict=True))

    def _described(self) -> LoadedModel:
        """The model, as `Policy` knows one."""
        config = self.model.config.get_text_config()
        dtype = "bfloat16" if self.args.bf16 else "float32"
        stop = list(self.eos_token_ids)
        return LoadedModel("", self.model, self._tokenizer, self.accelerator.device, dtype, stop, config.max_position_embeddings)
