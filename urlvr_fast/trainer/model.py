"""The model, its tokenizer and the engine that samples from it, as the configuration asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from urlvr_fast.trainer.base_model import bundled_model_path
from urlvr_fast.trainer.config import Config, ConfigError
from urlvr_fast.trainer.rollout import Rollout
from urlvr_fast.trainer.rollout.vllm import VLLMRollout, require_vllm


@dataclass
class LoadedModel:
    source: str  # directory or hub id
    model: Any  # AutoModelForCausalLM, fp32 parameters, on `device`
    tokenizer: Any
    device: torch.device
    dtype: str  # "float32" or "bfloat16": of the products, and of the engine's weights
    stop_token_ids: list[int]
    context: int  # longest sequence, in tokens

    def decode(self, token_ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)


def resolve_model(name: str) -> str:
    """`bundled`, `bundled:NAME`, a directory, or a hub id -> what `from_pretrained` and vLLM take.

    Raises ConfigError for a path or a bundled model that is not there.
    """
    if name == "bundled":
        return str(bundled_model_path())
    if name.startswith("bundled:"):
        return str(bundled_model_path(name.removeprefix("bundled:")))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model={name}: {path} has no config.json, so it is not a model directory")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"model={name}: there is no such directory")
    return name


def load_model(config: Config, source: str) -> LoadedModel:
    """Load `source`, a directory or hub id. Raises ConfigError with what to do when it cannot be loaded or has no end of sequence."""
    device = torch.device(pick_device(config.trainer.device))
    dtype = config.trainer.dtype
    if dtype == "auto":
        # GPUs before sm_80 have no bfloat16 products, and vLLM refuses it there.
        dtype = "bfloat16" if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    disable_progress_bar()  # a bar for every shard would break the live view
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={source} cannot be loaded: {error}") from error
    stop = config.rollout.stop_token_ids or stop_token_ids(model, tokenizer)
    if not stop:
        raise ConfigError(f"model={source} names no end-of-sequence token; give it as rollout.stop_token_ids=[…]")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not context:
        raise ConfigError(f"model={source}: its config has no max_position_embeddings, so the longest sequence is unknown")
    return LoadedModel(source, model.to(device), tokenizer, device, dtype, stop, context)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """End-of-sequence ids: the generation config's and the tokenizer's, which in chat models may differ. A pad token is never needed:
    padding is masked by position."""
    generation = getattr(model.generation_config, "eos_token_id", None) if model.generation_config else None
    found = [generation] if isinstance(generation, int) else list(generation or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.append(tokenizer.eos_token_id)
    return found


def pick_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"trainer.device={device}, but torch sees no CUDA device (`urlvr doctor` says more)")
    return device


def check_engine(config: Config) -> None:
    """Raise now, before anything slow: RolloutError when the engine that is asked for is not there, ConfigError when it would be on another
    GPU than the model."""
    if config.rollout.engine != "vllm":
        return
    require_vllm()
    if torch.device(config.trainer.device if config.trainer.device != "auto" else "cpu").index:
        raise ConfigError(
            f"trainer.device={config.trainer.device}: vLLM runs on the first GPU that it sees. Set CUDA_VISIBLE_DEVICES to the one you "
            "mean and trainer.device=cuda, or sample with rollout.engine=hf"
        )


def build_rollout(config: Config, loaded: LoadedModel, max_model_len: int, *, statistics: bool = False) -> Rollout:
    """The engine `rollout.engine` names; its weights are the loaded model's. max_model_len: longest prompt plus response, in tokens.
    statistics: it will be asked for `Sampling.statistics`."""
    if config.rollout.engine == "hf":
        from urlvr_fast.trainer.rollout.hf import HFRollout

        return HFRollout(loaded.model, dtype=loaded.dtype, stop_token_ids=loaded.stop_token_ids, batch_prompts=config.rollout.batch_prompts)
    return VLLMRollout(
        loaded.source,
        dtype=loaded.dtype,
        max_model_len=max_model_len,
        stop_token_ids=loaded.stop_token_ids,
        max_sequences=config.rollout.max_sequences,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory=config.rollout.gpu_memory,
        seed=config.seed,
        statistics=statistics,
    )
