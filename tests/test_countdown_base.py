"""The bundled base models besides the quick start's: the graded ones, and the one for Countdown with its recipe."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from urlvr_fast.tasks import countdown
from urlvr_fast.trainer.base_model import BOS, EOS, PAD, bundled_model_path, bundled_models, character_tokenizer
from urlvr_fast.trainer.config import ConfigError
from urlvr_fast.trainer.countdown_base import TASK, WIDTH, batches, examples, make_countdown_base, wrong_solution
from urlvr_fast.trainer.model import resolve_model

GRADED = ["arithmetic-1300", "arithmetic-1600", "arithmetic-2000", "arithmetic-3000", "arithmetic-800"]


def test_bundled_models_are_found_by_name():
    assert bundled_models() == ["arithmetic", *GRADED, "countdown"]
    assert resolve_model("bundled") == resolve_model("bundled:arithmetic")
    with pytest.raises(ConfigError, match=r"no model called '\.\./x' is bundled; there are arithmetic, arithmetic-1300"):
        resolve_model("bundled:../x")


@torch.no_grad()
def right_sums(name: str) -> float:
    """Greedy accuracy on sums, which separates the models."""
    path = bundled_model_path(name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    rng = random.Random(0)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(128)]
    encoded = tokenizer([f"{a}+{b}=" for a, b in pairs], padding=True, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**encoded, do_sample=False, max_new_tokens=6, pad_token_id=PAD, eos_token_id=EOS)
    texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(text == str(a + b) for text, (a, b) in zip(texts, pairs, strict=True)) / len(pairs)


def test_the_graded_models_are_graded():
    weak, middle, strong = (right_sums(name) for name in ("arithmetic-800", "arithmetic-1600", "arithmetic"))
    assert weak < middle - 0.2 < strong
    assert weak < 0.4
    assert strong > 0.9


# ---- Countdown


def test_what_the_countdown_model_is_shown():
    """Verdicts and values are always right, half of the verdicts are yes, solutions are wrong about as often as the recipe says, and no
    problem is of the test split."""
    verdicts, solutions = [], []
    for prompt, completion in examples(3000, seed=3):
        if prompt.endswith("?"):
            question, _, proposal = prompt[:-1].partition(":")
            numbers, _, target = question.partition("=")
            right = countdown.solves(proposal, [int(n) for n in numbers.split()], int(target))
            assert completion == ("T" if right else "F"), prompt
            verdicts.append(right)
        elif prompt.endswith(":"):
            numbers, _, target = prompt[:-1].partition("=")
            given = [int(n) for n in numbers.split()]
            problem = countdown.Problem(tuple(given), int(target), "")
            assert problem.split == "train"
            solutions.append(countdown.solves(completion, given, int(target)))
        else:
            parsed = countdown.expressions.parse(prompt[:-1])
            assert parsed is not None
            assert parsed.value == int(completion)
    assert sum(verdicts) / len(verdicts) == pytest.approx(0.5, abs=0.05)
    assert sum(solutions) / len(solutions) == pytest.approx(0.5, abs=0.06)
    assert len(verdicts) == pytest.approx(1500, abs=120)


def test_wrong_solutions_are_wrong():
    rng = random.Random(0)
    for problem in countdown.draw("train", limit=200, seed=9, **TASK):
        assert not countdown.solves(wrong_solution(problem, rng), problem.numbers, problem.target)


def test_batches_are_what_the_tokenizer_makes():
    tokens, lengths = batches(2, 8, seed=1)
    assert tokens.shape == (2, 8, WIDTH)
    tokenizer = character_tokenizer()
    for row, length, (prompt, completion) in zip(tokens.view(-1, WIDTH), lengths.view(-1), examples(16, seed=1), strict=True):
        ids = [*tokenizer(prompt).input_ids, *tokenizer(completion, add_special_tokens=False).input_ids, EOS]
        assert row.tolist() == ids + [PAD] * (WIDTH - len(ids))
        assert row[0] == BOS
        assert length == len(prompt) + 1


@torch.no_grad()
def test_the_countdown_model_judges_better_than_it_solves():
    path = bundled_model_path("countdown")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)
    problems = countdown.draw("test", limit=64, seed=5, **TASK)
    encoded = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(0)
    out = model.generate(**encoded, do_sample=True, top_k=0, num_return_sequences=4, max_new_tokens=16, pad_token_id=PAD, eos_token_id=EOS)
    proposals = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    asked = [problems[i // 4] for i in range(len(proposals))]
    right = torch.tensor([countdown.verify(text, p.columns) for text, p in zip(proposals, asked, strict=True)])
    questions = [countdown.verification_prompt(p.prompt, text, p.columns) for text, p in zip(proposals, asked, strict=True)]
    logits = model(**tokenizer(questions, padding=True, return_tensors="pt", return_token_type_ids=False)).logits[:, -1]
    yes, no = tokenizer("TF", add_special_tokens=False).input_ids
    says = (logits[:, yes] > logits[:, no]).float()
    assert 0.15 < right.mean() < 0.5
    assert (says == right).float().mean() > 0.7


def test_the_recipe_runs_and_does_not_overwrite(tmp_path):
    out = tmp_path / "base"
    make_countdown_base(out, steps=3, log=lambda line: None)
    assert AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).num_parameters() == 954272
    with pytest.raises(ConfigError, match="there already"):
        make_countdown_base(out, steps=3)
