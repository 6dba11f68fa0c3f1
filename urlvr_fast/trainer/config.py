"""The configuration: dataclasses, filled from one YAML file and `a.b=c` overrides. Every option is documented where it is declared.

Unknown keys and values of the wrong type are refused with the nearest valid name. `save` writes the resolved configuration, defaults
included, and `load` reads it back to the same object, which is how a run resumes.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from urlvr_fast.errors import ExplainedError
from urlvr_fast.monitor.detectors import STOP_RULE, Detectors


class ConfigError(ExplainedError, ValueError):
    """A configuration that cannot be used. The message names the key, what was found and what is valid."""

    exit_status = 2


def option(default: Any, doc: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass
class PromptsConfig:
    limit: int | None = option(None, "Use only the first so many prompts. Procedural tasks draw 4096 when unset.")
    prompt_column: str = option("prompt", "Column with the prompt: text, or a list of chat messages.")
    answer_column: str = option(
        "answer", "Column with the answer, if there is one. Only metrics, `monitor.stop_at_collapse` and `reward=ground_truth` ever see it."
    )
    split: str = option("train", "Split of a `datasets` data set, or of a procedural task.")
    template: str = option("auto", "`auto`: the tokenizer's chat template when it has one; `chat`: insist on it; `plain`: never.")
    suffix: str = option("", "Text appended to every prompt, such as an instruction to box the answer.")
    overlong: str = option("skip", "A prompt longer than the context: `skip` counts and warns, `refuse` is an error.")
    max_tokens: int | None = option(None, "Longest prompt, in tokens. Unset: the model's context less rollout.max_tokens.")
    shuffle: bool = option(True, "New order every epoch, from the seed. The paper keeps the file's order.")


@dataclass
class AnswersConfig:
    kind: str = option(
        "auto", "`math`: \\boxed{} compared by math-verify; `exact`: text; `auto`: math for files, exact for procedural tasks."
    )
    timeout_s: float = option(5.0, "Longest time for one comparison of two answers; over it they count as different.")


@dataclass
class RolloutConfig:
    engine: str = option("vllm", "`vllm`, or `hf` (transformers with a KV cache: slower, for where vLLM cannot be installed).")
    group_size: int = option(8, "Rollouts per prompt that are trained on (the paper's N).")
    votes: int | None = option(
        None, "Rollouts per prompt that vote, at least group_size; those beyond it are not trained on (TTRL: 64 vote, 32 are trained on)."
    )
    temperature: float = option(1.0, "Sampling temperature; the losses use the same.")
    max_tokens: int = option(512, "Longest response, in tokens.")
    stop_token_ids: list[int] = option([], "End-of-sequence ids. Empty: the model's own.")
    logp_gap_limit: float | None = option(
        None,
        "Stop when a sampled token's log-prob, or a statistic taken while sampling, differs by more than this between engine and trainer. "
        "Unset: 1e-3 in fp32, 5.0 in 16 bit.",
    )
    logp_gap_mean_limit: float | None = option(
        None, "Stop when the sampled tokens' log-probs differ by more than this in the mean of a step. Unset: 0.2 in 16 bit, none in fp32."
    )
    stats: str = option(
        "sampling",
        "Where the entropy or self-certainty that a reward needs comes from. `sampling`: the engine's logits, while it samples; a run's "
        "first step checks them against the trainer's. `recompute`: a forward of the trainer's own in every step.",
    )
    max_sequences: int = option(256, "vLLM: sequences decoded at once.")
    kv_cache_gib: float = option(1.0, "vLLM on CPU: memory for the KV cache.")
    gpu_memory: float = option(0.45, "vLLM on GPU: share of the GPU's memory, weights included; the trainer needs the rest.")
    batch_prompts: int = option(64, "hf engine: prompts generated at once.")


@dataclass
class LossConfig:
    loss_type: str = option("dapo", "Policy loss; `urlvr_fast.policy_loss` lists them. One update per batch makes their ratios 1.")
    advantage_scale: str = option(
        "group", "Divide centred rewards by the standard deviation of the `group`, the `batch`, or by 1 (`none`)."
    )
    baseline: str = option("mean", "`mean` of the group, or `leave_one_out`.")
    eps_low: float = option(0.2, "Lower clip range of the ratio.")
    eps_high: float = option(0.28, "Upper clip range of the ratio.")
    entropy_coef: float = option(0.0, "Weight of the entropy bonus.")
    self_certainty_coef: float = option(0.0, "Weight of the self-certainty bonus.")
    kl_coef: float = option(
        0.0, "Weight of the KL to the model that training started from (the paper's ablation: 0.005). Costs a copy of it."
    )
    kl: str = option("k3", "Estimator of that KL: `k1`, `k2` or `k3`.")
    rollout_correction: str | None = option(None, "Importance weights against the engine's log-probs: `truncate`, `mask`, or unset.")


@dataclass
class TrainerConfig:
    steps: int = option(300, "Optimiser steps; a step is one batch of rollouts.")
    prompts_per_step: int = option(64, "Prompts in a batch.")
    mini_batch_prompts: int | None = option(
        None,
        "Prompts per optimiser step. Unset: all of the batch, so one step, on-policy; fewer make several steps, later ones off-policy.",
    )
    lr: float = option(1e-6, "Peak learning rate of AdamW.")
    lr_schedule: str = option("constant", "`constant` or `cosine` (to a tenth of the peak).")
    warmup_steps: int = option(0, "Linear warm-up.")
    weight_decay: float = option(0.01, "AdamW's weight decay.")
    grad_clip: float = option(1.0, "Largest norm of the gradient.")
    micro_batch_tokens: int = option(16384, "Tokens, padding included, that go through the model at once.")
    chunk_bytes: int = option(256 << 20, "Most memory for logits at any one time.")
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: less memory, a third more time.")
    dtype: str = option("auto", "`float32`, `bfloat16`, or `auto`: float32 on CPU, bfloat16 on GPU.")
    device: str = option("auto", "`cpu`, `cuda`, or `auto`.")
    threads: int | None = option(None, "CPU threads of the trainer. Unset: torch's default.")
    eval_every: int = option(20, "Evaluate every so many steps; 0: only before and after.")
    save_every: int = option(50, "Write a checkpoint every so many steps; 0: only at the end.")
    keep_checkpoints: int = option(3, "Keep the newest so many checkpoints; 0 keeps all.")
    stop_after: int | None = option(None, "End after this many steps of the schedule, with a checkpoint; `--resume` goes on.")
    samples_every: int = option(10, "Write sampled rollouts to samples.jsonl every so many steps.")
    samples_prompts: int = option(4, "Prompts whose rollouts are written then.")
    max_bad_steps: int = option(3, "Steps in a row whose gradient is not finite (they are skipped) before the run stops.")


@dataclass
class EvalConfig:
    prompts: int = option(256, "Fixed prompts to evaluate on.")
    data: str | None = option(None, "Their data set. Unset: a procedural task's held-out split, otherwise the training prompts themselves.")
    split: str = option("test", "Split of eval.data, and of a procedural task.")
    samplings: int = option(3, "Samplings averaged before and after training; the evaluations in between use one.")
    group_size: int = option(8, "Rollouts per prompt in each sampling: the k of avg@k, pass@k and maj@k.")
    temperature: float = option(1.0, "Sampling temperature of the evaluation (the paper: 0.6).")
    top_p: float = option(1.0, "Nucleus sampling of the evaluation (the paper: 0.95).")


@dataclass
class MonitorConfig:
    on_collapse: str = option(
        "warn",
        "What the default stop rule, `anchor_drift`, does when it fires: `warn`, `stop`, `lower_rate`, `rollback` (to the "
        "evaluation at which the anchors held best; then stop), `off`. It looks at evaluations: trainer.eval_every sets how soon.",
    )
    actions: dict[str, str] = option({}, "The same of other detectors, by name (`urlvr_fast.monitor.detectors.RULES`); unnamed ones warn.")
    thresholds: dict[str, float] = option({}, "Thresholds of detectors, by name, in the place of their own.")
    anchor_votes: int = option(
        16, "Rollouts of each evaluation prompt, before training, whose clear votes `anchor_drift` holds later answers against."
    )
    stop_at_collapse: float | None = option(
        None, "Stop once Reward Accuracy has stayed below this for five steps: the Model Collapse Step, exact, so it needs answers."
    )
    rate_factor: float = option(0.3, "What `lower_rate` multiplies the learning rate by.")
    kl_every: int = option(
        0, "Measure the KL (k3, nats per token) to the model that training started from every so many steps; 0: never. Costs a copy of it."
    )


@dataclass
class LogConfig:
    live: str = option("auto", "Live view in the terminal: `auto`, `on`, `off`.")
    tensorboard: bool = option(False, "Write TensorBoard events beside metrics.jsonl.")
    wandb: bool = option(False, "Log to Weights & Biases.")


@dataclass
class Config:
    model: str = option(
        "bundled", "What to train: a directory or hub id for `AutoModelForCausalLM.from_pretrained`, `bundled` or `bundled:NAME`."
    )
    data: str = option("arithmetic", "Prompts: a .jsonl, .json or .parquet file, a `datasets` directory or hub name, or a procedural task.")
    data_options: dict[str, Any] = option({}, "Keyword arguments of a procedural task's draw, such as its difficulty.")
    reward: str = option("majority_voting", "A reward's name, a dotted path, or `file.py:function`.")
    reward_options: dict[str, Any] = option(
        {}, "Keyword arguments for the reward. A `reward=…` on the command line drops those of the file."
    )
    run_dir: str | None = option(None, "Where the run goes. Unset: runs/<name of the YAML>-<date and time>.")
    seed: int = option(0, "Seed of prompt order and sampling.")
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    answers: AnswersConfig = field(default_factory=AnswersConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    log: LogConfig = field(default_factory=LogConfig)


CHOICES = {
    "prompts.template": ("auto", "chat", "plain"),
    "prompts.overlong": ("skip", "refuse"),
    "answers.kind": ("auto", "math", "exact"),
    "rollout.engine": ("vllm", "hf"),
    "rollout.stats": ("sampling", "recompute"),
    "loss.loss_type": ("reinforce", "grpo", "dapo", "bnpo", "dr_grpo", "gspo", "luspo", "gmpo", "cispo", "sapo"),
    "loss.advantage_scale": ("group", "batch", "none"),
    "loss.baseline": ("mean", "leave_one_out"),
    "loss.kl": ("k1", "k2", "k3"),
    "monitor.on_collapse": ("off", "warn", "stop", "lower_rate", "rollback"),
    "loss.rollout_correction": ("truncate", "mask", None),
    "trainer.lr_schedule": ("constant", "cosine"),
    "trainer.dtype": ("auto", "float32", "bfloat16"),
    "log.live": ("auto", "on", "off"),
}
# (key, smallest value); None is never compared.
MINIMUM = {
    "rollout.group_size": 1,
    "rollout.max_tokens": 1,
    "rollout.max_sequences": 1,
    "rollout.batch_prompts": 1,
    "prompts.max_tokens": 1,
    "answers.timeout_s": 0.1,
    "trainer.steps": 0,
    "trainer.prompts_per_step": 1,
    "trainer.mini_batch_prompts": 1,
    "rollout.votes": 1,
    "loss.kl_coef": 0,
    "monitor.kl_every": 0,
    "monitor.anchor_votes": 1,
    "monitor.stop_at_collapse": 0,
    "trainer.micro_batch_tokens": 1,
    "trainer.stop_after": 1,
    "trainer.lr": 0,
    "trainer.warmup_steps": 0,
    "trainer.weight_decay": 0,
    "trainer.chunk_bytes": 1,
    "trainer.threads": 1,
    "trainer.eval_every": 0,
    "trainer.save_every": 0,
    "trainer.keep_checkpoints": 0,
    "trainer.samples_every": 0,
    "trainer.samples_prompts": 0,
    "trainer.max_bad_steps": 1,
    "eval.prompts": 0,
    "eval.samplings": 1,
    "eval.group_size": 1,
    "prompts.limit": 1,
}


def load(yaml_file: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (values are YAML) and check everything. Raises ConfigError."""
    tree: dict[str, Any] = {}
    if yaml_file is not None:
        path = Path(yaml_file)
        if not path.is_file():
            raise ConfigError(f"there is no configuration file {path}")
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{path} must hold `key: value` lines, not a {type(tree).__name__}")
    # The file's options belong to the file's reward: another one, named on the command line, starts without.
    if any(o.startswith("reward=") and o != f"reward={tree.get('reward')}" for o in overrides):
        tree.pop("reward_options", None)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"cannot read {override!r}: overrides look like trainer.steps=300")
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {section} is a value, not a section")
        node[leaf] = _yaml_value(key, text)
    config = _build(Config, tree, "")
    check(config)
    return config


def check(config: Config) -> None:
    """Refuse values outside their range, before anything slow starts. Raises ConfigError."""
    values = flatten(config)
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            near = difflib.get_close_matches(str(values[key]), [str(c) for c in choices], 1)
            raise ConfigError(
                f"{key}={values[key]!r}: valid are {', '.join(map(str, choices))}" + (f"; did you mean {near[0]}?" if near else "")
            )
    for key, minimum in MINIMUM.items():
        if values[key] is not None and values[key] < minimum:
            raise ConfigError(f"{key}={values[key]!r} must be at least {minimum}")
    if config.rollout.temperature <= 0:
        raise ConfigError("rollout.temperature must be above 0: greedy rollouts of one prompt are all alike and carry no signal")
    if config.eval.temperature <= 0 or not 0 < config.eval.top_p <= 1:
        raise ConfigError("eval.temperature must be above 0 and eval.top_p in (0, 1]; greedy accuracy is measured in any case")
    if not 0 < config.rollout.gpu_memory <= 1 or config.rollout.kv_cache_gib <= 0 or config.trainer.grad_clip <= 0:
        raise ConfigError("rollout.gpu_memory must be in (0, 1], rollout.kv_cache_gib and trainer.grad_clip above 0")
    if config.rollout.votes is not None and config.rollout.votes < config.rollout.group_size:
        raise ConfigError(
            f"rollout.votes={config.rollout.votes} is fewer than rollout.group_size={config.rollout.group_size}, and all of those vote"
        )
    acting = {
        name for name, action in {STOP_RULE: config.monitor.on_collapse, **config.monitor.actions}.items() if action not in ("off", "warn")
    }
    if STOP_RULE in acting and not (config.eval.prompts and config.trainer.eval_every):
        raise ConfigError(f"monitor: {STOP_RULE} looks at evaluations, and there are none: set eval.prompts and trainer.eval_every")
    if "kl_spike" in acting and not (config.monitor.kl_every or config.loss.kl_coef):
        raise ConfigError("monitor: kl_spike looks at the KL to the start model, which nobody measures: set monitor.kl_every")
    if not 0 < config.monitor.rate_factor < 1:
        raise ConfigError(f"monitor.rate_factor={config.monitor.rate_factor} must be between 0 and 1")
    try:
        Detectors(config.monitor.actions, config.monitor.thresholds)
    except ValueError as error:
        raise ConfigError(f"monitor.actions or monitor.thresholds: {error}") from None
    if config.trainer.device == "auto" or config.trainer.device.split(":")[0] in ("cpu", "cuda"):
        return
    raise ConfigError(f"trainer.device={config.trainer.device!r}: valid are auto, cpu, cuda, cuda:N")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"trainer.steps": 300, …}` in order of declaration."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value, f"{prefix}{f.name}."))
        else:
            flat[prefix + f.name] = value
    return flat


def documentation() -> str:
    """Every option with its default and its text, as `urlvr train --options` prints it."""

    def lines(cls: Any, prefix: str) -> typing.Iterator[str]:
        instance = cls()
        for f in dataclasses.fields(cls):
            value = getattr(instance, f.name)
            if dataclasses.is_dataclass(value):
                yield from lines(type(value), f"{prefix}{f.name}.")
            else:
                yield f"{prefix}{f.name} = {value!r}\n    {f.metadata['doc']}"

    return "\n".join(lines(Config, ""))


def save(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _yaml_value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: cannot read the value {text!r}; put quotes around it") from None


def _build(cls: Any, tree: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(_unknown_key(prefix + str(key)))
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{prefix}{key} is a section with options of its own, such as {prefix}{key}.{dataclasses.fields(hint)[0].name}"
                )
            values[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            values[key] = _typed(prefix + key, hint, value)
    return cls(**values)


def _unknown_key(key: str) -> str:
    valid = list(flatten(Config()))
    # A right name in the wrong section is the commonest slip, then a typing error.
    same_leaf = [name for name in valid if name.split(".")[-1] == key.split(".")[-1]]
    near = same_leaf or difflib.get_close_matches(key, valid, 1, 0.5)
    return f"there is no option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "") + " (`urlvr train --options` lists them all)"


def _typed(key: str, hint: Any, value: Any) -> Any:
    """`value` as the declared type, accepting only what loses nothing (an int for a float, `1e-4` that YAML read as text)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = typing.get_args(hint)
        if value is None and type(None) in members:
            return None
        (hint,) = (m for m in members if m is not type(None))
    wanted = typing.get_origin(hint) or hint
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif wanted is str and isinstance(value, bool):
        return "on" if value else "off"  # what YAML makes of a bare on or off
    elif wanted is str and isinstance(value, (int, float)):
        return str(value)
    elif isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        if wanted is list:
            return [_typed(f"{key}[{i}]", typing.get_args(hint)[0], v) for i, v in enumerate(value)]
        return value
    raise ConfigError(f"{key}={value!r} is a {type(value).__name__}; it must be {_type_name(wanted)}")


def _type_name(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a section of key: value"}
    return names.get(wanted, str(wanted))
