"""The bundled base model: a Qwen3 of about 0.9 M parameters over characters, pre-trained here on arithmetic that is partly wrong.

The wrong answers are the point. A model that saw each sum right three times in five, and otherwise wrong in many ways, knows the answer
(its mode, so greedy decoding, is mostly right) and yet samples it only about that often. This is the spread that training without labels
sharpens; a model that is always right would leave nothing to see. Mistakes are drawn anew each time a problem is drawn, so that no
problem has one wrong answer to memorise. The test split of the task is never trained on.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from urlvr_fast.tasks import arithmetic
from urlvr_fast.tasks.arithmetic import Problem
from urlvr_fast.trainer.config import ConfigError

PAD, BOS, EOS, UNK = range(4)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 1024
WIDTH = 12  # tokens of the longest training sequence: <bos>99*99=9801<eos>

# The recipe of the bundled model. Correct answers come first, because arithmetic is learnt several times faster without noise. The easier
# problems bring carrying within 1000 steps instead of 2000, and three wide layers learn faster than four narrow ones.
STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 64, 6e-3
FIRST_LESSON, EASIER_SHARE, WRONG_SHARE = 0.6, 0.3, 0.4


def bundled_model_path(name: str = "arithmetic") -> Path:
    """The directory of a base model that ships with the package, for `from_pretrained` and for vLLM.

    name: `arithmetic`, the model of the quick start; `arithmetic-800` … `arithmetic-3000`, the same recipe cut to fewer steps, so weaker
    and weaker; `countdown` (`countdown_base`). Raises ConfigError for any other.
    """
    folder = Path(__file__).resolve().parents[1] / "bundled"
    if not (folder / name / "config.json").is_file():
        raise ConfigError(f"no model called {name!r} is bundled; there are {', '.join(bundled_models())}")
    return folder / name


def bundled_models() -> list[str]:
    """The names that `bundled_model_path` takes."""
    return sorted(path.parent.name for path in (Path(__file__).resolve().parents[1] / "bundled").glob("*/config.json"))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: printable ASCII and the newline. Any other character is `<unk>`; `<bos>` goes in front.

    Decoding (without special tokens) gives ASCII text back exactly. Text such as `<eos>` in a prompt is five characters, never the token.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=False))
    backend.decoder = decoders.Fuse()  # the default would put a space between two tokens
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)])
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
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
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


def easier_problem(rng: random.Random) -> Problem:
    """A problem of the training split with small numbers: where sums and products begin. Most have an operand of one digit."""
    while True:
        operation = rng.choice("+-*")
        left, right = (rng.randint(2, 9) if rng.random() < 0.6 else rng.randint(10, 99) for _ in range(2))
        problem = Problem(left, operation, right)
        if problem.split == "train" and not (operation == "*" and left > 9 and right > 9):
            return problem


def training_examples(count: int, seed: int, wrong_share: float) -> Iterator[tuple[str, str]]:
    """(prompt, completion) in the order of training: correct answers and easier problems among them first, then the task with mistakes."""
    rng = random.Random(seed)
    task = arithmetic.stream("train", seed)
    for index in range(count):
        first_lesson = index < FIRST_LESSON * count
        problem = easier_problem(rng) if first_lesson and rng.random() < EASIER_SHARE else next(task)
        is_wrong = not first_lesson and rng.random() < wrong_share
        yield problem.prompt, str(wrong_answer(problem, rng) if is_wrong else problem.answer)


def training_batches(steps: int, batch_size: int, seed: int, wrong_share: float) -> tuple[Tensor, Tensor]:
    """Token ids (steps, batch_size, WIDTH) uint8, padded on the right, and prompt lengths (steps, batch_size) uint8, `<bos>` included."""
    rows, lengths = [], []
    for prompt, completion in training_examples(steps * batch_size, seed, wrong_share):
        # Bytes 1 and 2 stand for <bos> and <eos>, 0 for padding; the table below turns bytes into token ids.
        rows.append(f"\x01{prompt}{completion}\x02".encode("ascii").ljust(WIDTH, b"\x00"))
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
    is_completion = (torch.arange(1, tokens.shape[1], device=tokens.device) >= prompt_lens[:, None]) & (targets != PAD)
    hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[is_completion]), targets[is_completion])


def pretrain(
    model: Qwen3ForCausalLM, batches: tuple[Tensor, Tensor], peak_lr: float, *, autocast: bool = False
) -> Iterator[tuple[int, float]]:
    """One AdamW step per batch. Yields the number of steps done and the loss, after each.

    batches: of `training_batches`, on the model's device. autocast: the products in bfloat16.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), fused=True)
    steps = len(batches[0])
    for step, (tokens, prompt_lens) in enumerate(zip(*batches, strict=True)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = completion_loss(model, tokens.long(), prompt_lens.long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step + 1, loss.item()


def make_base(
    out_dir: str | Path,
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    snapshots: int | Sequence[int] = 0,
    peak_lr: float = LEARNING_RATE,
    wrong_share: float = WRONG_SHARE,
    eval_prompts: int = 512,
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Pre-train a base model and write it to `out_dir` for `from_pretrained` and vLLM, with `base.json` beside it; returns what that holds.

    snapshots: also keep that many checkpoints of the run, weak to strong (or at exactly these steps), in `out_dir/snapshots/<step>`. Those
        of the first 60 % have not seen a wrong answer: they are unsure where they have not learnt, not where they know.
    wrong_share: share of wrong answers in the second part of the training data.
    eval_prompts: held-out prompts on which each checkpoint is measured.
    threads: CPU threads, restored afterwards; None leaves torch's setting. The same seed, threads and versions give the same bits.

    Raises ConfigError when `out_dir` holds something already or a number is out of range.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already; choose another directory or delete it first")
    if steps < 1 or batch_size < 1 or eval_prompts < 1 or not 0 <= wrong_share < 1:
        raise ConfigError("make_base needs steps, batch_size and eval_prompts of at least 1 and a wrong_share from 0 to below 1")
    snapshot_at = snapshot_steps(steps, snapshots)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, tokenizer = Qwen3ForCausalLM(architecture()), character_tokenizer()
            log(f"pre-training {model.num_parameters():,} parameters on {steps * batch_size:,} problems")
            recipe = {"task": "arithmetic", "seed": seed, "steps": steps, "batch_size": batch_size, "peak_lr": peak_lr}
            recipe |= {"threads": torch.get_num_threads(), "data": data_recipe(wrong_share)}
            batches = training_batches(steps, batch_size, seed, wrong_share)
            window = max(1, steps // 20)
            losses: list[float] = []
            started = time.perf_counter()
            for step, loss in pretrain(model, batches, peak_lr):
                losses.append(loss)
                if step % window == 0:
                    log(f"step {step}/{steps}  loss {fmean(losses[-window:]):.3f}  {step / (time.perf_counter() - started):.1f} steps/s")
                if step in snapshot_at:
                    write_model(out / "snapshots" / str(step), model, tokenizer, {**recipe, "step": step}, eval_prompts, log)
            recipe |= {"step": steps, "first_loss": losses[0], "last_loss": fmean(losses[-window:])}
            return write_model(out, model, tokenizer, recipe, eval_prompts, log)
    finally:
        torch.set_num_threads(threads_before)


def snapshot_steps(steps: int, snapshots: int | Sequence[int]) -> list[int]:
    """The steps to keep, in order. Of a number of them, three in five fall into the first lesson, where accuracy rises from nothing, none
    at the start of the second, where the first mistakes set it back for a while, and one at the end.
    """
    if not isinstance(snapshots, int):
        if wrong := [step for step in snapshots if not 1 <= step <= steps]:
            raise ConfigError(f"snapshots at {wrong}: the run has steps 1 to {steps}")
        return sorted(set(snapshots))
    first = snapshots * 3 // 5
    shares = [FIRST_LESSON * (0.25 + 0.75 * (n + 1) / first) for n in range(first)]
    shares += [FIRST_LESSON + (1 - FIRST_LESSON) * (n + 1) / (snapshots - first) for n in range(snapshots - first)]
    at = sorted({max(1, round(steps * share)) for share in shares})
    if len(at) != snapshots:
        raise ConfigError(f"snapshots={snapshots}: not a number that a run of {steps} steps has room for")
    return at


def data_recipe(wrong_share: float) -> dict[str, Any]:
    return {
        "prompts": "training split of urlvr_fast.tasks.arithmetic",
        "first_lesson": f"first {FIRST_LESSON:.0%} of the problems: correct answers, {EASIER_SHARE:.0%} easier problems",
        "second_lesson": f"then the task alone, {wrong_share:.0%} of the answers wrong: digit off by one, digits swapped, carry forgotten",
    }


def write_model(
    directory: Path,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: dict[str, Any],
    eval_prompts: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Save weights, tokenizer and `base.json`, with the accuracy measured now."""
    measured = measure(model, tokenizer, arithmetic.draw("test", limit=eval_prompts), seed=recipe["seed"])
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    disable_progress_bar()  # it would show one for each checkpoint
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)}
    record = {**recipe, "parameters": model.num_parameters(), "test_prompts": eval_prompts, **measured, "versions": versions}
    (directory / "base.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    log(f"step {recipe['step']}: greedy accuracy {measured['greedy_accuracy']:.3f} on {eval_prompts} held-out prompts -> {directory}")
    return record


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], *, samples: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Greedy accuracy, and avg@k, maj@k and majority ratio of k samples at temperature 1, overall and per operation."""
    model.eval()
    checker = arithmetic.checker()
    prompts = [problem.prompt for problem in problems]
    encoded = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)

    def answers(**sampling: Any) -> list[str | None]:
        out = model.generate(**encoded, **sampling, max_new_tokens=WIDTH, pad_token_id=PAD, eos_token_id=EOS)
        texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        return [checker.extract(text) for text in texts]

    greedy = answers(do_sample=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sampled = answers(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=samples)
    rows = [
        vote_figures(problem.answer, greedy[index], sampled[index * samples : (index + 1) * samples])
        for index, problem in enumerate(problems)
    ]
    names = ("greedy_accuracy", f"avg@{samples}", f"maj@{samples}", "majority_ratio")

    def means(of: list[tuple[float, ...]]) -> dict[str, float]:
        return {name: round(sum(values) / len(of), 4) for name, values in zip(names, zip(*of, strict=True), strict=True)}

    by_operation = {
        operation: means([row for row, problem in zip(rows, problems, strict=True) if problem.operation == operation])
        for operation in sorted({problem.operation for problem in problems})
    }
    return {**means(rows), "by_operation": by_operation}


def vote_figures(answer: int, greedy: str | None, votes: list[str | None]) -> tuple[float, ...]:
    """Whether greedy is right, share of right samples, whether the commonest answer is right, its share. Ties go to the first sampled."""
    right = str(answer)
    counts = Counter(vote for vote in votes if vote is not None)
    winner, count = counts.most_common(1)[0] if counts else (None, 0)
    return float(greedy == right), votes.count(right) / len(votes), float(winner == right), count / len(votes)
