"""The recipe of `bundled:countdown`: the bundled arithmetic model, trained on to solve Countdown badly and to judge it better.

Self-verification lives on that asymmetry. A third of what the model is shown are problems with a well-formed expression, of which
`WRONG_SHARE` miss the target; half are proposed solutions with a verdict; the rest are expressions with their value, which teaches it to
judge sooner. Verdicts and values are always right, and of the training split alone: that a proposal for a held-out problem can be
judged has to be learnt.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3ForCausalLM

from urlvr_fast.tasks import countdown
from urlvr_fast.trainer.base_model import BOS, CHARACTERS, EOS, PAD, SPECIAL_TOKENS, bundled_model_path, character_tokenizer, pretrain
from urlvr_fast.trainer.config import ConfigError

STEPS, BATCH_SIZE, LEARNING_RATE = 2400, 64, 3e-3
WRONG_SHARE = 0.5
VERDICT_SHARE, VALUE_SHARE = 0.5, 0.17
WIDTH = 26  # tokens of the longest example: <bos>20 20 20=60:20-(20-20)?F<eos>
# Sums and differences, which the arithmetic model that this one starts from can do: a judge must be able to.
TASK: dict[str, Any] = {"numbers": 3, "largest": 20, "operators": "+-"}


def wrong_solution(problem: countdown.Problem, rng: random.Random) -> str:
    """An expression that does not solve the problem: mostly of the right numbers with another value, sometimes of a wrong number."""
    while True:
        numbers = list(problem.numbers)
        if rng.random() < 0.2:
            numbers[rng.randrange(len(numbers))] = rng.randint(1, TASK["largest"])
        _, candidate = countdown.random_expression(numbers, TASK["operators"], rng)
        if not countdown.solves(candidate, problem.numbers, problem.target):
            return candidate


def examples(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, completion) in the order of training."""
    rng = random.Random(seed)
    problems = countdown.draw("train", seed=seed, **TASK)
    for _ in range(count):
        problem = rng.choice(problems)
        kind = rng.random()
        if kind < VALUE_SHARE:
            yield f"{problem.solution}=", str(problem.target)
        elif kind < VALUE_SHARE + VERDICT_SHARE:
            right = rng.random() < 0.5
            proposal = problem.solution if right else wrong_solution(problem, rng)
            yield countdown.verification_prompt(problem.prompt, proposal, problem.columns), countdown.VERDICTS[not right]
        else:
            yield problem.prompt, wrong_solution(problem, rng) if rng.random() < WRONG_SHARE else problem.solution


def batches(steps: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token ids (steps, batch_size, WIDTH), padded on the right, and prompt lengths (steps, batch_size), `<bos>` included."""
    # Straight from characters to ids, as the tokenizer would: it takes minutes for this many.
    ids = {character: len(SPECIAL_TOKENS) + index for index, character in enumerate(CHARACTERS)}
    rows, prompt_lens = [], []
    for prompt, completion in examples(steps * batch_size, seed):
        row = [BOS, *(ids[c] for c in prompt + completion), EOS]
        rows.append(bytes(row + [PAD] * (WIDTH - len(row))))
        prompt_lens.append(len(prompt) + 1)
    tokens = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    lengths = torch.tensor(prompt_lens, dtype=torch.uint8)
    return tokens.view(steps, batch_size, WIDTH), lengths.view(steps, batch_size)


def make_countdown_base(out: Path, *, steps: int = STEPS, seed: int = 0, log: Callable[[str], None] = print) -> None:
    """Pre-train into `out`, in bf16 as it is bundled. Raises ConfigError when there is something already."""
    if out.exists():
        raise ConfigError(f"{out} is there already; choose another directory or delete it first")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, tokenizer = Qwen3ForCausalLM.from_pretrained(bundled_model_path(), dtype=torch.float32), character_tokenizer()
        losses: list[float] = []
        started = time.perf_counter()
        for step, loss in pretrain(model, batches(steps, BATCH_SIZE, seed), LEARNING_RATE):
            losses.append(loss)
            if step % max(1, steps // 20) == 0:
                log(f"step {step}/{steps}  loss {fmean(losses[-50:]):.3f}  {step / (time.perf_counter() - started):.1f} steps/s")
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    recipe = {"task": "countdown", **TASK, "seed": seed, "steps": steps, "batch_size": BATCH_SIZE, "peak_lr": LEARNING_RATE}
    recipe |= {"wrong_share": WRONG_SHARE, "verdict_share": VERDICT_SHARE, "value_share": VALUE_SHARE, "last_loss": fmean(losses[-50:])}
    (out / "base.json").write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
