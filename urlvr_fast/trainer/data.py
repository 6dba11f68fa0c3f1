"""From the configuration to prompts with token ids."""

from __future__ import annotations

from urlvr_fast.tasks.prompt_set import PromptSet, is_procedural, load_prompts
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.prompts import EncodedPrompts, encode_prompts

Loaded = tuple[PromptSet, EncodedPrompts]


EVALUATION_DRAW = 0  # seed of a procedural task's evaluation prompts: the same for every run, whatever its seed


def load_evaluation(config: Config, loaded: LoadedModel, training: Loaded | None = None) -> Loaded:
    """The `eval.prompts` prompts that a run evaluates itself on: `eval.data`; without it the held-out split of a procedural task, or the
    first of the training prompts."""
    if config.eval.prompts and (config.eval.data or is_procedural(config.data)):
        return load_encoded(config, loaded, config.eval.data or config.data, config.eval.split, config.eval.prompts, EVALUATION_DRAW)
    prompts, encoded = training or load_encoded(config, loaded, config.data, config.prompts.split, config.prompts.limit, config.seed)
    return prompts, encoded.select(range(min(config.eval.prompts, len(encoded))))


def load_encoded(config: Config, loaded: LoadedModel, spec: str, split: str, limit: int | None, seed: int) -> Loaded:
    """The prompts of `spec` and their token ids, as `config.prompts` and `config.answers` say. seed: of a procedural task's draw.

    Raises DataError (the data), ConfigError (no room for a prompt in the model's context).
    """
    options = config.prompts
    longest = loaded.context - config.rollout.max_tokens
    if longest < 1:
        raise ConfigError(
            f"rollout.max_tokens={config.rollout.max_tokens} leaves no room for a prompt in a context of {loaded.context} tokens"
        )
    prompts = load_prompts(
        spec,
        split=split,
        limit=limit,
        seed=seed,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        answers=config.answers.kind,
        timeout_s=config.answers.timeout_s,
        options=config.data_options if spec == config.data else None,
    )
    encoded = encode_prompts(
        prompts,
        loaded.tokenizer,
        template=options.template,
        suffix=options.suffix,
        max_prompt_tokens=min(longest, options.max_tokens or longest),
        overlong=options.overlong,
    )
    return prompts, encoded
