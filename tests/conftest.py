"""Shared by the tests: a tiny real model on disk, and the folder of contest problems where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with random weights large enough that its distributions are far from uniform, with a character tokenizer."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from urlvr_fast.trainer.base_model import character_tokenizer

    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def contest_data() -> Path:
    """The real problems (aime.json, amc.json, math.json), which are not part of the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("URLVR_FAST_CONTEST_DATA", default))
    if not (path / "amc.json").is_file():
        pytest.skip(f"no contest problems in {path}; URLVR_FAST_CONTEST_DATA names their folder")
    return path


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter replaces all of Triton's language at each call of a device function: two thirds of the time of these tests. A
    launch does so for our modules, and Triton's own need it once."""
    from triton.runtime import interpreter

    done = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith("urlvr_fast.") and module not in done:
            done.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def tiny_triton(quick_interpreter, monkeypatch):
    """Interpreted Triton kernels with 4 lanes, 2 vectors deep: tiles of 32 (fp32) or 64 columns; segments of 64. Rollouts are
    compared 4 with 8."""
    from urlvr_fast.kernels import targets

    tiles = {2: targets.RowTiles(4, 4, 2, 64), 4: targets.RowTiles(4, 4, 2, 64)}
    for name in ("STATISTICS", "POLICY", "POLICY_MORE_SUMS"):
        monkeypatch.setattr(targets, name, tiles)
    monkeypatch.setattr(targets, "POLICY_GRADIENT", 64)
    monkeypatch.setattr(targets, "GRADIENT", {2: targets.Block(4, 64), 4: targets.Block(4, 64)})
    monkeypatch.setattr(targets, "BIAS", targets.Block(4, 64))
    monkeypatch.setattr(targets, "BIAS_ROWS", 4)
    monkeypatch.setattr(targets, "KEEP", targets.Block(4, 16))
    monkeypatch.setattr(targets, "KEEP_LANES", 8)
    monkeypatch.setattr(targets, "ADVANTAGES", targets.Pairs(4, 4, 8))
