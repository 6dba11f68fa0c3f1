"""The bundled base model: a Qwen3 of about 0.9 M parameters over characters, pre-trained here on arithmetic that is partly wrong.

The wrong answers are the point. A model that has seen each sum right three times in five and wrong in many ways otherwise knows the answer (its
mode, so greedy decoding, is mostly right) and yet samples it only about as often: that is the spread which training
without labels sharpens, and a model that is always right would leave nothing to see. Mistakes are drawn anew each time a
problem is drawn, so that no problem has a wrong answer to memorise. The test split of the task is never trained on.
"""

from __future__ import annotations

import json
import math
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from urlvr_fast.tasks import arithmetic
from urlvr_fast.tasks.arithmetic import Problem

PAD, BOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 1024
WIDTH = 12  # tokens of the longest training sequence: <bos>99*99=9801<eos>

STEPS, BATCH_SIZE, LEARNING_RATE, WRONG_SHARE = 2000, 256, 3e-3, 0.4


def bundled_model_path() -> Path:
    """The directory of the base model that ships with the package, for `from_pretrained` and for vLLM."""
    return Path(__file__).resolve().parents[1] / "bundled" / "arithmetic"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and the newline. Any other character is `<unk>`; `<bos>` goes in front.

    Decoding (without special tokens) gives ASCII text back exactly. Text such as `<eos>` in a prompt is five characters, never the token.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False))
    backend.decoder = decoders.Fuse()  # the default would put a space between two tokens
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def architecture() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(SPECIAL_TOKENS) + len(CHARACTERS),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.02,
        dtype="float32",
    )


# --- the data: problems with answers, some of them wrong --------------------------------------------------------------


def wrong_answer(problem: Problem, rng: random.Random) -> int:
    """An answer that a careless person would give: a digit off by one, two digits swapped, or a carry forgotten. Never the right one."""
    answer = problem.answer
    mistakes = [*digit_off_by_one(abs(answer)), *neighbours_swapped(abs(answer))]
    signed = [-m if answer < 0 else m for m in mistakes]
    if (forgotten := without_carry(problem)) != answer:
        signed += [forgotten, forgotten]  # twice as likely as any other single mistake
    return rng.choice([m for m in signed if m != answer])


def digit_off_by_one(number: int) -> Iterator[int]:
    digits = str(number)
    for place, digit in enumerate(digits):
        for other in (int(digit) - 1, int(digit) + 1):
            if 0 <= other <= 9 and not (place == 0 and other == 0 and len(digits) > 1):
                yield int(digits[:place] + str(other) + digits[place + 1 :])


def neighbours_swapped(number: int) -> Iterator[int]:
    digits = str(number)
    for place in range(len(digits) - 1):
        swapped = digits[:place] + digits[place + 1] + digits[place] + digits[place + 2 :]
        if swapped[0] != "0" and swapped != digits:
            yield int(swapped)


def without_carry(problem: Problem) -> int:
    """The answer with the carry (for a difference: the borrow) out of the last digit forgotten."""
    left, right = problem.left % 10, problem.right % 10
    if problem.operation == "+":
        return problem.answer - 10 * ((left + right) // 10)
    if problem.operation == "*":
        return problem.answer - 10 * ((left * right) // 10)
    if problem.answer < 0:  # computed as −(right − left)
        left, right = right, left
    borrowed = 10 if left < right else 0
    return problem.answer + (borrowed if problem.answer >= 0 else -borrowed)


def training_batches(steps: int, batch_size: int, seed: int, wrong_share: float) -> tuple[Tensor, Tensor]:
    """Token ids (steps, batch_size, WIDTH) uint8, padded on the right, and prompt lengths (steps, batch_size) uint8, `<bos>` included."""
    rng = random.Random(seed)
    rows, lengths = [], []
    for problem in islice(arithmetic.stream("train", seed), steps * batch_size):
        answer = wrong_answer(problem, rng) if rng.random() < wrong_share else problem.answer
        prompt = problem.prompt
        # Bytes 1 and 2 stand for <bos> and <eos>, 0 for padding; the table below turns bytes into token ids.
        rows.append(f"\x01{prompt}{answer}\x02".encode("ascii").ljust(WIDTH, b"\x00"))
        lengths.append(len(prompt) + 1)
    table = torch.zeros(128, dtype=torch.uint8)
    table[:3] = torch.tensor([PAD, BOS, EOS])
    for index, character in enumerate(CHARACTERS):
        table[ord(character)] = len(SPECIAL_TOKENS) + index
    raw = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8)
    return table[raw.int()].view(steps, batch_size, WIDTH), torch.tensor(lengths, dtype=torch.uint8).view(steps, batch_size)


# --- pre-training -----------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def completion_loss(model: Qwen3ForCausalLM, tokens: Tensor, prompt_lens: Tensor) -> Tensor:
    """Mean cross-entropy of the completion tokens, `<eos>` included. Padding stands on the right of a causal model: no mask is needed."""
    targets = tokens[:, 1:]
    is_completion = (torch.arange(1, tokens.shape[1]) >= prompt_lens[:, None]) & (targets != PAD)
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_completion]), targets[is_completion])


def pretrain(
    model: Qwen3ForCausalLM,
    batches: tuple[Tensor, Tensor],
    *,
    peak_lr: float,
    after_step: Callable[[int, float], None],
) -> None:
    """One AdamW step per batch. `after_step(step, loss)` is called with the number of steps done, from 1."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=peak_lr, betas=(0.9, 0.98), fused=True
    )
    steps = len(batches[0])
    model.train()
    for step, (tokens, prompt_lens) in enumerate(zip(*batches, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        loss = completion_loss(model, tokens.long(), prompt_lens.long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(step + 1, loss.item())
