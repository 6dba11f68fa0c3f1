"""From the configuration to prompts with token ids."""

from __future__ import annotations

from urlvr_fast.tasks.prompt_set import PromptSet, load_prompts
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.prompts import EncodedPrompts, encode_prompts


def load_encoded(config: Config, loaded: LoadedModel, spec: str, split: str, limit: int | None) -> tuple[PromptSet, EncodedPrompts]:
    """The prompts of `spec` and their token ids, as `config.prompts` and `config.answers` say.

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
        seed=config.seed,
        prompt_column=options.prompt_column,
        answer_column=options.answer_column,
        answers=config.answers.kind,
        timeout_s=config.answers.timeout_s,
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
