"""verl's PPO trainer with rewards that need no label, on the fused ops, watched for collapse. Importing this module is what does it, so
verl is asked to, in its driver and in every worker, on every node:

    export VERL_USE_EXTERNAL_MODULES=urlvr_fast.adapters.verl
    python -m verl.trainer.main_ppo trainer.v1.trainer_mode=label_free +urlvr.reward=majority_voting algorithm.adv_estimator=grpo …

It calls `use_fused_ops()` and registers `LabelFreeTrainer` as the trainer mode `label_free`; with another mode, the ops are all that
changes.

A reward function of verl's sees one rollout at a time. This trainer gives a reward what it takes before advantages are computed: whole
groups, and log-prob, entropy and self-certainty of every sampled token, from the forward that verl makes for its old log-probs. Everything
else is verl's: configuration, engines, rollout, advantages, losses, checkpoints.

Settings, below `urlvr` in verl's configuration:
    reward          what `reward=` is for `urlvr train`: a name such as self_certainty, a dotted path, a file
    reward_options  its options
    checker         dotted path of a function that makes an AnswerChecker; by default MathAnswers, `\\boxed{}` by math-verify
    columns         columns of the data that the reward may see. None by default, so that no label is seen by mistake
    detectors       detector of `urlvr_fast.monitor.detectors` -> warn (what each does by default), stop or off

verl's own reward function runs all the same, since validation is scored by it. What it says of a rollout that is trained on is logged and
replaced. For data without labels, `no_reward` is one that asks for none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.adapters import AdapterError, require
from urlvr_fast.adapters.verl_head import VERL, use_fused_ops
from urlvr_fast.adapters.watch import Watch
from urlvr_fast.monitor.detectors import Detection
from urlvr_fast.rewards import RewardError
from urlvr_fast.rewards.answers import AnswerChecker, MathAnswers
from urlvr_fast.rewards.registry import build_reward, call_reward, import_reward, reward_needs
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.rollout import Completion

require("verl", VERL)  # says what to install, which the imports do not

import transfer_queue as tq  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from tensordict import NonTensorData, TensorDict  # noqa: E402
from verl.trainer.ppo.v1.trainer_base import register_trainer  # noqa: E402
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync  # noqa: E402
from verl.workers.utils.padding import response_from_nested  # noqa: E402

MODE = "label_free"


@dataclass
class Settings:
    """`urlvr` in verl's configuration; see above."""

    reward: str
    reward_options: dict[str, Any] = field(default_factory=dict)
    checker: str | None = None
    columns: list[str] = field(default_factory=list)
    detectors: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Raises AdapterError where there is no reward, and for a name that is none of these."""
        given = OmegaConf.to_container(config.get("urlvr") or OmegaConf.create(), resolve=True)
        assert isinstance(given, dict)
        try:
            return cls(**given)
        except TypeError as error:
            raise AdapterError(
                f"urlvr in verl's configuration: {error}. It takes {', '.join(cls.__dataclass_fields__)}; +urlvr.reward=majority_voting"
            ) from None


@register_trainer(MODE)
class LabelFreeTrainer(PPOTrainerSync):
    """verl's synchronous trainer, `trainer.v1.trainer_mode=sync`, with a label-free reward in the place of its `rm_scores`.

    What the detectors see is logged under `urlvr/`, and where the data have `reward_model.ground_truth`, Reward Accuracy and its like,
    which only metrics see. A detector that is to stop the run ends it before the batch that it fired on is trained on; it is `ended` then,
    and the last checkpoint is the last that was due. A run that is resumed is watched anew.

    Raises AdapterError for what cannot be had, at the start where that can be known: rewards that ask the policy, rollouts with tools or of
    several outputs, `rollout_correction.bypass_mode`, which has no entropies, and `filter_groups`, which would choose by verl's own reward.
    """

    def __init__(self, config: Any) -> None:
        settings = Settings.of(config)
        checker: AnswerChecker = MathAnswers() if settings.checker is None else import_reward(settings.checker)()
        self._reward = build_reward(settings.reward, checker=checker, options=settings.reward_options)
        if getattr(self._reward, "returns_advantages", False):
            raise RewardError(f"reward {settings.reward} returns advantages, and verl takes rewards: `urlvr train` can train with it")
        self._statistics = sorted({"entropy"} | reward_needs(self._reward))
        self._columns = settings.columns
        self._watch = Watch(settings.detectors, checker)
        _refuse(config, self._statistics)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # which is what it is to the rest of verl
        super().__init__(config)

    @property
    def ended(self) -> Detection | None:
        """What a detector that was to stop the run has seen."""
        return self._watch.ended

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        extra = [f"calculate_{name}" for name in self._statistics if name != "entropy"]  # entropy is always asked for
        batch.extra_info.update(dict.fromkeys(extra, True))
        batch = super()._compute_old_log_prob(batch, metrics)
        for name in extra:  # not of the reference model, nor in training
            batch.extra_info.pop(name, None)
        return batch

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        wanted = ["prompts", "responses", "response_mask", "rm_scores", "old_log_probs", "rollout_log_probs", "reward_model"]
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=sorted({*wanted, *self._statistics, *self._columns})
        )
        rollouts, order, answers = self._rollouts(batch, data)
        rewards = call_reward(self._reward, rollouts, _NoPolicy())
        theirs = data["rm_scores"].unbind()
        metrics["urlvr/replaced_score"] = sum(float(theirs[row].sum()) for row in order) / len(order)
        scores = [torch.zeros(len(row)) for row in theirs]
        for row, reward in zip(order, rewards.tolist(), strict=True):
            scores[row][-1] = reward
        nested = torch.nested.as_nested_tensor(scores, layout=torch.jagged)
        extra = batch.extra_info
        batch = tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict({"rm_scores": nested}, batch_size=len(scores))
        )
        batch.extra_info = extra
        for name, value in self._watch.look(rollouts, rewards, answers).items():
            metrics[f"urlvr/{name}"] = value
        if self.ended is not None:
            self.total_training_steps = self.global_steps
        return super()._compute_advantage(batch, metrics)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        return batch if self.ended is not None else super()._update_actor(batch, metrics)

    def _rollouts(self, batch: Any, data: Any) -> tuple[RolloutBatch, list[int], dict[int, str]]:
        """The batch's rollouts, group by group; which of its rows each is; and for the metrics the answers to the prompts."""
        groups: dict[str, list[int]] = {}
        masks = data["response_mask"].unbind()
        for row, (key, tag) in enumerate(zip(batch.keys, batch.tags, strict=True)):
            if tag.get("is_padding", False):  # made up by verl, for a round number
                continue
            uid, _, index = key.rsplit("_", 2)
            if index != "0" or not masks[row].all():
                raise AdapterError("label-free rewards of rollouts with tools, or of several outputs, are not built")
            groups.setdefault(uid, []).append(row)
        rows = {name: self._per_row(data, name) for name in self._statistics}
        logp = data["rollout_log_probs" if "rollout_log_probs" in data else "old_log_probs"].unbind()
        prompts, responses = ([ids.tolist() for ids in data[name].unbind()] for name in ("prompts", "responses"))
        firsts = [members[0] for members in groups.values()]
        prompts = [prompts[row] for row in firsts]
        order = [row for members in groups.values() for row in members]

        def completion(row: int) -> Completion:
            cut = len(responses[row]) >= self.config.data.max_response_length and responses[row][-1] != self.tokenizer.eos_token_id
            statistics = {name: values[row].float() for name, values in rows.items()}
            return Completion(responses[row], logp[row].tolist(), "length" if cut else "stop", statistics)

        rollouts = build_batch(
            prompt_token_ids=prompts,
            prompt_texts=self.tokenizer.batch_decode(prompts),
            prompt_ids=list(range(len(prompts))),
            completions=[[completion(row) for row in members] for members in groups.values()],
            decode=lambda ids: self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            temperature=self.config.actor_rollout_ref.rollout.temperature,
            columns={name: [_plain(data[name][row]) for row in firsts] for name in self._columns},
        )
        labels = [_plain(data["reward_model"][row]) if "reward_model" in data else {} for row in firsts]
        truths = [label.get("ground_truth") if isinstance(label, Mapping) else None for label in labels]
        return rollouts, order, {prompt: str(truth) for prompt, truth in enumerate(truths) if truth not in (None, "")}

    def _per_row(self, data: Any, name: str) -> tuple[Tensor, ...]:
        if name not in data:
            raise AdapterError(
                f"verl's workers gave no {name}: set VERL_USE_EXTERNAL_MODULES={__name__} where they start, on every node of the cluster"
            )
        # verl itself has cut the entropy to the responses.
        return (data[name] if name == "entropy" else response_from_nested(data[name], data["response_mask"])).unbind()


class _NoPolicy:
    def __getattr__(self, name: str) -> Any:
        raise AdapterError(f"it asks the policy for {name}(), and in verl the workers have the policy: `urlvr train` can train with it")


def _plain(value: Any) -> Any:
    """Out of tensordict's wrapping."""
    if isinstance(value, NonTensorData):
        return value.data
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def _refuse(config: Any, statistics: list[str]) -> None:
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        raise AdapterError("algorithm.filter_groups chooses groups by verl's own reward, labels and all: set it off")
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        raise AdapterError(
            "algorithm.rollout_correction.bypass_mode makes no forward for old log-probs, so there are no entropies: set it off"
        )
    asked = [name for name in statistics if name != "entropy"]
    actor = config.actor_rollout_ref
    if asked and (actor.actor.strategy not in ("fsdp", "fsdp2") or actor.model.use_fused_kernels):
        raise AdapterError(f"{', '.join(asked)}: of verl's FSDP engine alone, with model.use_fused_kernels=False")


def no_reward(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
    """For `reward.custom_reward_function`, path=pkg://urlvr_fast.adapters.verl, name=no_reward: 0 for every rollout, whatever its label."""
    return 0.0


use_fused_ops()
