"""The character tokenizer, the imperfect data, pre-training, and the model that ships with the package."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from urlvr_fast.tasks import arithmetic
from urlvr_fast.tasks.arithmetic import Problem
from urlvr_fast.trainer.base_model import (
    BOS,
    EOS,
    PAD,
    UNK,
    WIDTH,
    bundled_model_path,
    character_tokenizer,
    make_base,
    measure,
    snapshot_steps,
    training_batches,
    training_examples,
    without_carry,
    wrong_answer,
)
from urlvr_fast.trainer.config import ConfigError

ASCII = "\n" + "".join(map(chr, range(32, 127)))
tokenizer = character_tokenizer()


@given(st.text(alphabet=ASCII, max_size=60))
def test_ascii_comes_back_as_it_was(text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == BOS
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_special_tokens_written_out_are_plain_text() -> None:
    ids = tokenizer("<eos><bos>").input_ids
    assert len(ids) == 11
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<eos><bos>"


@given(st.text(alphabet=st.characters(exclude_characters=ASCII, exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_every_other_character_is_unknown(text: str) -> None:
    assert tokenizer(text).input_ids == [BOS] + [UNK] * len(text)


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "a<eos>\n 12+3=é" + string.punctuation
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (PAD, BOS, EOS, UNK)
    assert loaded(["1", "234"], padding=True).input_ids[0][:2] == [PAD, PAD]  # on the left, for generation


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "careless"),
    [
        (Problem(27, "+", 45), 62),  # 72 without the carry
        (Problem(21, "+", 45), 66),  # nothing to carry
        (Problem(81, "-", 37), 54),  # 44 without the borrow
        (Problem(37, "-", 81), -54),
        (Problem(7, "*", 46), 282),  # 322 without the 4 of 42
    ],
)
def test_forgotten_carries_by_hand(problem: Problem, careless: int) -> None:
    assert without_carry(problem) == careless


def test_wrong_answers_are_wrong_short_and_varied() -> None:
    rng = random.Random(0)
    for problem in arithmetic.draw("train", limit=2000, seed=0):
        wrong = wrong_answer(problem, rng)
        assert wrong != problem.answer
        assert len(f"{problem.prompt}{wrong}") + 2 <= WIDTH
    assert len({wrong_answer(Problem(27, "+", 45), rng) for _ in range(200)}) >= 5


def test_training_never_sees_the_test_split_and_is_wrong_as_often_as_asked() -> None:
    test_prompts = {problem.prompt for pool in arithmetic.pools("test") for problem in pool}
    examples = list(training_examples(20_000, seed=0, wrong_share=0.4))
    assert not test_prompts & {prompt for prompt, _ in examples}

    def share_wrong(part: list[tuple[str, str]]) -> float:
        wrong = 0
        for prompt, completion in part:
            operation = next(o for o in "+*-" if o in prompt)
            left, right = map(int, prompt[:-1].split(operation))
            wrong += Problem(left, operation, right).answer != int(completion)
        return wrong / len(part)

    assert share_wrong(examples[:10_000]) == 0
    assert share_wrong(examples[-5_000:]) == pytest.approx(0.4, abs=0.03)


def test_batches_hold_the_examples() -> None:
    tokens, prompt_lens = training_batches(steps=3, batch_size=4, seed=5, wrong_share=0.4)
    assert tokens.shape == (3, 4, WIDTH)
    examples = list(training_examples(12, seed=5, wrong_share=0.4))
    for row, length, (prompt, completion) in zip(tokens.view(12, WIDTH).tolist(), prompt_lens.view(12).tolist(), examples, strict=True):
        expected = [*tokenizer(prompt).input_ids, *tokenizer(completion, add_special_tokens=False).input_ids, EOS]
        assert row == expected + [PAD] * (WIDTH - len(expected))
        assert length == len(prompt) + 1


# --- pre-training -----------------------------------------------------------------------------------------------------


def test_a_short_run_is_reproducible_and_learns(tmp_path: Path) -> None:
    lines: list[str] = []
    first = make_base(tmp_path / "a", steps=20, batch_size=16, seed=3, snapshots=2, eval_prompts=8, threads=1, log=lines.append)
    before = torch.random.get_rng_state()
    second = make_base(tmp_path / "b", steps=20, batch_size=16, seed=3, eval_prompts=8, threads=1, log=lines.append)
    assert torch.equal(before, torch.random.get_rng_state())  # a caller's random numbers are its own
    assert first == second == json.loads((tmp_path / "a" / "base.json").read_text())
    weights, again = load_file(tmp_path / "a" / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert first["last_loss"] < first["first_loss"] - 1
    snapshots = sorted((tmp_path / "a" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == [str(step) for step in sorted(snapshot_steps(20, 2), key=str)]
    halfway = load_file(snapshots[0] / "model.safetensors")
    assert any(not torch.equal(halfway[name], weights[name]) for name in weights)
    assert any("greedy accuracy" in line for line in lines)


def test_a_saved_model_is_complete(tmp_path: Path) -> None:
    make_base(tmp_path / "m", steps=2, batch_size=4, eval_prompts=4, threads=1, log=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (EOS, PAD)


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        make_base(tmp_path, steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_snapshot_steps() -> None:
    assert snapshot_steps(1000, 0) == []
    five = snapshot_steps(1000, 5)
    assert five == [300, 450, 600, 800, 1000]
    assert snapshot_steps(1000, 1) == [1000]
    assert snapshot_steps(10, [7, 3]) == [3, 7]
    with pytest.raises(ConfigError, match=r"snapshots at \[11\]: the run has steps 1 to 10"):
        snapshot_steps(10, [3, 11])
    for number in (11, -1):
        with pytest.raises(ConfigError, match=f"snapshots={number}: not a number that a run of 10 steps has room for"):
            snapshot_steps(10, number)


# --- the model that ships ---------------------------------------------------------------------------------------------


def test_the_bundled_model() -> None:
    path = bundled_model_path()
    model, bundled_tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert 0.8e6 <= model.num_parameters() <= 1.1e6
    assert bundled_tokenizer("23+45=").input_ids == tokenizer("23+45=").input_ids
    figures = measure(model, bundled_tokenizer, arithmetic.draw("test", limit=64, seed=1))
    assert 0.4 <= figures["greedy_accuracy"] <= 0.9
    # What training without labels needs: votes that disagree, around a mode that is mostly right.
    assert figures["avg@8"] < figures["greedy_accuracy"] - 0.05
    assert 0.35 <= figures["majority_ratio"] <= 0.7
    record = json.loads((path / "base.json").read_text())
    assert record["test_prompts"] >= 256
    assert 0.5 <= record["greedy_accuracy"] <= 0.8
    assert sum(file.stat().st_size for file in path.iterdir()) < 6e6
