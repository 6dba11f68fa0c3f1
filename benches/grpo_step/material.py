"""What both sides are given: a model directory, prompts, and rollouts of fixed lengths, all made here from a seed, nothing downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# AdamW moves a parameter by its learning rate whatever the gradient: this one is lost in rounding, so that the hundredth step samples and
# learns what the first did, and does all of its work.
LEARNING_RATE = 1e-12
HEAD = 64  # size of an attention head


@dataclass(frozen=True)
class Shape:
    """A random Qwen3 with a tokenizer of as many words, and a batch of rollouts that all reach their full length."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 49152
    prompts: int = 4
    group_size: int = 8
    response: int = 128  # tokens
    shortest_prompt: int = 8  # tokens; the others are up to twice as long


@dataclass(frozen=True)
class Material:
    """Of one scenario, as it travels to the workers."""

    model: str  # directory with model and tokenizer
    options: tuple[str, ...]  # of `urlvr train`, beside the model
    yaml: str | None  # the configuration that they are put on
    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    group_size: int
    response: int  # tokens, at most
    responses: Tensor  # (prompts · group_size, response) int64: the given rollouts, prompt after prompt
    stop_token_id: int
    full_length: bool  # no rollout ends before `response`, so that those of a step are as long as the given ones

    @property
    def rollouts(self) -> int:
        return len(self.prompts) * self.group_size


def reward(ids: list[int]) -> float:
    """Of one response: its mean token. It costs nothing, and two rollouts of a group hardly ever share it, so that none has advantage 0
    and is left out."""
    return sum(ids) / len(ids)


def of_shape(shape: Shape, folder: Path) -> Material:
    """A model, a tokenizer and prompts, written to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, shape.vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD,
        num_key_value_heads=shape.hidden // HEAD,
        head_dim=HEAD,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    # All embeddings share a direction, which then is in every hidden state, and the end of sequence has its opposite: with the head tied to
    # them its probability is next to nothing, and no rollout ends early.
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 1.0
        embeddings[fast.eos_token_id] = 0.0
        embeddings[fast.eos_token_id, 0] = -1.0
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    lengths = [shape.shortest_prompt + i * shape.shortest_prompt // max(1, shape.prompts - 1) for i in range(shape.prompts)]
    prompt_ids = [torch.randint(2, shape.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    prompts = [" ".join(f"w{i}" for i in ids) for ids in prompt_ids]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    responses = torch.randint(2, shape.vocabulary, (shape.prompts * shape.group_size, shape.response), generator=generator)
    return Material(
        model=str(folder),
        options=(
            f"data={data}",
            f"rollout.group_size={shape.group_size}",
            f"rollout.max_tokens={shape.response}",
            f"trainer.prompts_per_step={shape.prompts}",
        ),
        yaml=None,
        prompts=tuple(prompts),
        prompt_ids=tuple(map(tuple, prompt_ids)),
        group_size=shape.group_size,
        response=shape.response,
        responses=responses,
        stop_token_id=fast.eos_token_id,
        full_length=True,
    )


def of_quickstart(yaml: Path) -> Material:
    """The model, the first prompts, the group size and the lengths of `make train`."""
    from urlvr_fast.trainer import config as configuration
    from urlvr_fast.trainer.data import load_encoded
    from urlvr_fast.trainer.model import load_model, resolve_model

    config = configuration.load(yaml)
    source = resolve_model(config.model)
    loaded = load_model(config, source)
    count = config.trainer.prompts_per_step
    _, encoded = load_encoded(config, loaded, config.data, config.prompts.split, count, config.seed)
    shape = (count * config.rollout.group_size, config.rollout.max_tokens)
    responses = torch.randint(3, loaded.model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    (stop,) = loaded.stop_token_ids
    return Material(
        model=source,
        options=(f"prompts.limit={count}", "reward_options={}"),
        yaml=str(yaml),
        prompts=tuple(encoded.texts),
        prompt_ids=tuple(map(tuple, encoded.token_ids)),
        group_size=config.rollout.group_size,
        response=config.rollout.max_tokens,
        responses=responses,
        stop_token_id=stop,
        full_length=False,
    )
