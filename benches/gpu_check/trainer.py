"""The trainer on the GPU: does it run, does it learn, what does a step cost and what does the fused head save.

`python -m benches.gpu_check.trainer --device cuda --out FILE.json` takes about 80 s and needs no network, no vLLM and no TRL.
`--device cpu --size tiny` is the same on a model so small that it shows only that everything runs.

Its parts, in this order; the JSON is written after each of them, so that a run that is killed leaves what it had:

* pretrain: a Qwen3 with a vocabulary large enough for the head to matter learns arithmetic here, as the bundled model did.
* learner: forward and backward of given rollouts with `linear_policy_loss` and with all the logits of a micro-batch at once, in turns. Both
  must have the same gradient. In 16 bit each rounds its logits in its own way, so the strict comparison is one in fp32.
* quickstart: `configs/quickstart.yaml` on that model through `urlvr_fast.trainer.loop.train`.
* paths: what the quick start does not use: statistics taken while sampling, mini-batches, one ratio a sequence, a KL term, gradient
  checkpointing, a checkpoint and its resumption. That it gets through is the result.
* trl: the step of TRL's GRPOTrainer beside ours, in turns, in a process each, where TRL is installed.

A part that fails leaves its error in the JSON, the others go on, and the exit status says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from benches.gpu_check import FOUND_WRONG, RIGHT, UNCHECKED
from benches.grpo_step import ours, trl
from benches.grpo_step.material import Material
from benches.grpo_step.worker import GRADIENT, STEP, Worker
from benches.machine import ROOT, describe
from benches.memory import Allocated, Resident
from urlvr_fast import policy_loss, token_stats
from urlvr_fast.ops.backend import choose_backend
from urlvr_fast.tasks import arithmetic
from urlvr_fast.trainer import base_model, learner, loop
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.config import Config
from urlvr_fast.trainer.data import load_encoded
from urlvr_fast.trainer.logging import read_jsonl, versions, write_json
from urlvr_fast.trainer.model import LoadedModel, load_model
from urlvr_fast.trainer.rollout import RolloutError
from urlvr_fast.trainer.rollout.vllm import require_vllm

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
PRETRAINING = 0.25  # of all seconds
TRIAL = 12  # steps of pre-training that say how many there is time for
WARM_UP = 2  # steps of the quick start that compile, allocate and are not in its medians
TRL_STARTS = 25  # seconds that two more processes take until their first step
# The largest ‖Δ‖/‖g‖ between two gradients of the same rollouts.
AGREE = {"float32": 1e-4, "bfloat16": 0.1}  # the plain head's logits are rounded to bf16
FUSED, PLAIN = "fused", "plain"
OURS, TRL = "urlvr_fast", "TRL"
SAMPLED = (
    *("step_s", "rollout_s", "train_s", "sync_s", "rollout_tokens_per_s", "train_tokens_per_s"),
    *("logp_gap_mean", "logp_gap_max", "stats_gap_max", "kl_start"),
    *("reward", "ground_truth_reward", "actor_entropy", "response_length", "live_rollouts", "grad_norm", "skipped"),
)


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int
    batch: int  # problems in a step of pre-training
    most_steps: int  # of pre-training
    wrong_share: float
    eval_prompts: int
    steps: int  # of the quick start, the warm-up among them
    quickstart: tuple[str, ...]  # its options that are changed
    response: int  # tokens of the learner's rollouts
    rounds: int  # in which the learner's heads take turns, and TRL and we


# Every majority is trained on: this model agrees on little.
SMALLER = (
    *("trainer.prompts_per_step=4", "rollout.group_size=8", "reward_options={}", "trainer.micro_batch_tokens=256"),
    *("eval.prompts=32", "eval.samplings=1"),
)
SIZES = {
    "tiny": Size(2, 128, 4, 32, 256, 64, 500, 0.0, 256, 4, SMALLER, 16, 2),
    "small": Size(4, 640, 10, 64, 16384, 512, 4000, base_model.WRONG_SHARE, 512, 20, (), 128, 7),  # 32 M parameters
    "large": Size(8, 768, 12, 64, 32768, 512, 4000, base_model.WRONG_SHARE, 512, 20, (), 128, 7),  # 88 M
}


@dataclass
class Bench:
    device: torch.device
    size: Size
    folder: Path
    model: Path  # directory of the model that all parts but the first use
    engine: str
    seconds: float
    began: float

    def left(self) -> float:
        return self.began + self.seconds - time.perf_counter()

    def config(self, *options: str) -> Config:
        # The gap of a model that is fresh from its pre-training is reported; it must not end what is timed.
        own = [f"model={self.model}", f"trainer.device={self.device}", "log.live=off", "rollout.logp_gap_mean_limit=1.0"]
        return configuration.load(QUICKSTART, [*self.size.quickstart, *own, *options])


class GradientsDiffer(RuntimeError):
    """The two sides do not compute the same, so their times mean nothing."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak(device: torch.device, otherwise: type[Allocated] | type[Resident]) -> Iterator[Callable[[], int]]:
    """Most memory beyond what was held at the start, in bytes, once the context is left: of torch on a GPU, else as `otherwise` counts."""
    if device.type != "cuda":
        with otherwise() as probe:
            yield lambda: probe.value
        return
    gc.collect()
    torch.cuda.empty_cache()  # what another process may use: vLLM's share is of the whole GPU
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield lambda: torch.cuda.max_memory_allocated(device) - before


# ---- pretrain --------------------------------------------------------------------------------------------------------------------------


def pretrain(bench: Bench, found: dict[str, Any]) -> None:
    size, autocast, began = bench.size, bench.device.type == "cuda", time.perf_counter()
    seconds = PRETRAINING * bench.seconds
    torch.manual_seed(0)
    model = base_model.Qwen3ForCausalLM(architecture(size)).to(bench.device)
    found |= {"parameters": model.num_parameters(), "vocabulary": size.vocabulary, "dtype": "bfloat16 autocast" if autocast else "float32"}
    rate = base_model.LEARNING_RATE * min(1.0, base_model.architecture().hidden_size / size.hidden)
    each = seconds_per_step(bench, model, rate, autocast)
    steps = max(TRIAL, min(size.most_steps, int((seconds - (time.perf_counter() - began)) / each)))
    batches = drawn(bench, steps)
    losses, ends = [], [time.perf_counter()]
    for _, loss in base_model.pretrain(model, batches, rate, autocast=autocast):
        losses.append(loss)
        ends.append(time.perf_counter())
        if ends[-1] - began > 2 * seconds:  # a trial that promised too much
            break
    tokens = int((batches[0][: len(losses)] != base_model.PAD).sum())
    found |= {
        "steps": len(losses),
        "planned_steps": steps,
        "batch": size.batch,
        "lr": rate,
        "loss": [round(loss, 4) for loss in losses],
        "step_s": [round(b - a, 5) for a, b in pairwise(ends)],
        "tokens_per_s": tokens / (ends[-1] - ends[0]),
        "training_s": ends[-1] - ends[0],
    }
    problems = arithmetic.draw("test", limit=size.eval_prompts)
    commonest = Counter(problem.answer for problem in problems).most_common(1)[0][1]
    recipe = {"seed": 0, "step": len(losses), "batch_size": size.batch, "peak_lr": rate, "data": base_model.data_recipe(size.wrong_share)}
    tokenizer = base_model.character_tokenizer()
    found |= base_model.write_model(bench.model, model, tokenizer, recipe, size.eval_prompts, lambda line: print(line, file=sys.stderr))
    found["chance"] = commonest / len(problems)  # of who always gives the commonest answer
    name_all_tokens(bench.model / "tokenizer.json", size.vocabulary)


def architecture(size: Size) -> Any:
    config = base_model.architecture()
    config.update(
        {
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 3 * size.hidden,
            "num_hidden_layers": size.layers,
            "layer_types": ["full_attention"] * size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "head_dim": size.head_dim,
            "initializer_range": config.initializer_range * (config.hidden_size / size.hidden) ** 0.5,
        }
    )
    return config


def drawn(bench: Bench, steps: int) -> tuple[Tensor, Tensor]:
    tokens, prompt_lens = base_model.training_batches(steps, bench.size.batch, 0, bench.size.wrong_share)
    return tokens.to(bench.device), prompt_lens.to(bench.device)


def seconds_per_step(bench: Bench, model: Any, rate: float, autocast: bool) -> float:
    """Of pre-training, the drawing of its problems included; on a copy, so that the model stays as it was."""
    drawn(bench, 1)  # makes the pools of problems
    began = time.perf_counter()
    batches = drawn(bench, TRIAL)
    drawing = (time.perf_counter() - began) / TRIAL
    ends = [time.perf_counter() for _ in base_model.pretrain(copy.deepcopy(model), batches, rate, autocast=autocast)]
    return drawing + median([b - a for a, b in pairwise(ends)][TRIAL // 3 :])


def name_all_tokens(path: Path, vocabulary: int) -> None:
    """Give the ids beyond the characters a name in a tokenizer.json: one that is sampled then shows in the text, instead of nothing."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    names = tree["model"]["vocab"]
    names |= {f"<unused{i}>": i for i in range(len(names), vocabulary)}
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")


# ---- learner ---------------------------------------------------------------------------------------------------------------------------


def learn(bench: Bench, found: dict[str, Any]) -> None:
    config = bench.config(f"rollout.max_tokens={bench.size.response}")
    loaded = load_model(config, str(bench.model))
    material = given(bench, config, loaded, ())
    batch = ours.given_rollouts(material)
    advantages = ours.advantages_of(batch)
    heads = {FUSED: learner.linear_policy_loss, PLAIN: plain_head}
    found |= {
        "rollouts": len(batch),
        "response_tokens": int(batch.response_lens.sum()),
        "micro_batch_tokens": config.trainer.micro_batch_tokens,
        "vocabulary": bench.size.vocabulary,
        "dtype": loaded.dtype,
        "loss": config.loss.loss_type,
        "gradient_difference": {},
    }

    def made(dtype: str) -> learner.Learner:
        return learner.Learner(
            loaded.model, trainer=config.trainer, loss=config.loss, dtype=dtype, max_response_tokens=config.rollout.max_tokens
        )

    def accumulate(one: learner.Learner, name: str) -> None:
        one.optimizer.zero_grad(set_to_none=True)
        with head(heads[name]):
            one.accumulate(batch, advantages)
        synchronize(bench.device)

    for dtype in dict.fromkeys(("float32", loaded.dtype)):
        one = made(dtype)
        gradients = {}
        for name in heads:
            accumulate(one, name)
            gradients[name] = {key: p.grad for key, p in loaded.model.named_parameters() if p.grad is not None}
        found["gradient_difference"][dtype] = difference(gradients[FUSED], gradients[PLAIN])
        gradients.clear()
    found["samples_s"], found["peak_bytes"] = {name: [] for name in heads}, {}
    for turn in range(bench.size.rounds):
        for name in (FUSED, PLAIN) if turn % 2 else (PLAIN, FUSED):
            one.optimizer.zero_grad(set_to_none=True)
            began = time.perf_counter()
            accumulate(one, name)
            found["samples_s"][name].append(time.perf_counter() - began)
    for name in heads:
        one.optimizer.zero_grad(set_to_none=True)
        with peak(bench.device, Allocated) as most:
            accumulate(one, name)
        found["peak_bytes"][name] = most()
    check_agreement(found["gradient_difference"])


def given(bench: Bench, config: Config, loaded: LoadedModel, options: tuple[str, ...]) -> Material:
    """The quick start's prompts, and random characters as rollouts of them."""
    count, group = config.trainer.prompts_per_step, config.rollout.group_size
    _, encoded = load_encoded(config, loaded, config.data, config.prompts.split, count, config.seed)
    shape = (count * group, config.rollout.max_tokens)
    responses = torch.randint(base_model.UNK + 1, len(base_model.character_tokenizer()), shape, generator=torch.Generator().manual_seed(1))
    return Material(
        model=str(bench.model),
        options=(*bench.size.quickstart, f"trainer.device={bench.device}", f"prompts.limit={count}", "reward_options={}", *options),
        yaml=str(QUICKSTART),
        prompts=tuple(encoded.texts),
        prompt_ids=tuple(map(tuple, encoded.token_ids)),
        group_size=group,
        response=config.rollout.max_tokens,
        responses=responses,
        stop_token_id=base_model.EOS,
        full_length=False,
    )


@contextmanager
def head(loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Iterator[None]:
    """The learner with this in the place of `linear_policy_loss`."""
    own, learner.linear_policy_loss = learner.linear_policy_loss, loss
    try:
        yield
    finally:
        learner.linear_policy_loss = own


def plain_head(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float,
    chunk_bytes: int,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    **loss: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with every logit of the micro-batch in memory and autograd's own log_softmax. Entropy is for the log, as in the fused."""
    assert bias is None
    assert softcap is None
    assert scale == temperature == 1
    logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), dim=-1)
    with torch.no_grad():
        entropy = torch.cat([-(rows.exp() * rows).sum(-1) for rows in logp.split(1024)])
    return policy_loss(logp.gather(-1, ids[:, None])[:, 0], entropy=entropy, **loss)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖Δ‖/‖g‖ over all parameters. Raises GradientsDiffer when the parameters are not the same."""
    if one.keys() != other.keys() or not other:
        raise GradientsDiffer(f"parameters that have a gradient on one side alone: {sorted(one.keys() ^ other.keys())}")
    norm = sum(float(g.double().square().sum()) for g in other.values()) ** 0.5
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in other) ** 0.5 / norm


def check_agreement(found: dict[str, float]) -> None:
    """Differences by dtype. Raises GradientsDiffer where one is more than rounding; after what was measured is kept, which may say why."""
    for dtype, value in found.items():
        if not value <= AGREE[dtype]:
            raise GradientsDiffer(f"in {dtype} the two gradients of the same rollouts differ by {value:.3g} of their norm")


# ---- quickstart and paths --------------------------------------------------------------------------------------------------------------


def quickstart(bench: Bench, found: dict[str, Any]) -> None:
    engines = [bench.engine] if bench.engine == "hf" else [bench.engine, "hf"]
    for engine in engines:
        run_dir = bench.folder / f"quickstart-{engine}"
        config = bench.config(f"run_dir={run_dir}", f"rollout.engine={engine}", f"trainer.steps={bench.size.steps}")
        try:
            with peak(bench.device, Resident) as most, halted(time.perf_counter() + 0.6 * bench.left()):
                status = loop.train(config)
        except Exception:
            if engine == engines[-1]:
                raise
            found[f"{engine}_error"] = traceback.format_exc()
            continue
        lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["step"] > 0]
        found |= {
            "engine": engine,
            "status": status,
            "steps": len(lines),
            "warm_up": WARM_UP,
            "rollouts": config.trainer.prompts_per_step * config.rollout.group_size,
            "peak_bytes": most(),
            "samples": {name: [line.get(name) for line in lines] for name in SAMPLED},
            **json.loads((run_dir / "summary.json").read_text()),
            "report": (run_dir / "report.html").is_file(),
        }
        return


@contextmanager
def halted(deadline: float) -> Iterator[None]:
    """Past the deadline the training loop's next step is its last, evaluation and checkpoint included."""
    step = loop.training_step

    def bounded(run: Any, number: int) -> dict[str, float]:
        metrics = step(run, number)
        if time.perf_counter() > deadline and number > WARM_UP:
            run.config.trainer.steps = number
        return metrics

    loop.training_step = bounded
    try:
        yield
    finally:
        loop.training_step = step


def paths(bench: Bench, found: dict[str, Any]) -> None:
    run_dir = bench.folder / "paths"
    options = (
        *("reward=self_certainty", "loss.loss_type=gspo", "loss.kl_coef=0.005", "trainer.gradient_checkpointing=true"),
        *("trainer.steps=2", "eval.prompts=16", "eval.samplings=1", "rollout.engine=hf", f"run_dir={run_dir}"),
        f"trainer.mini_batch_prompts={bench.config().trainer.prompts_per_step // 2}",
    )
    first = loop.train(bench.config(*options, "trainer.stop_after=1"))
    second = loop.train(bench.config(*options), resume=True)
    lines = [line for line in read_jsonl(run_dir / "metrics.jsonl") if line["step"] > 0]
    found |= {"options": options, "status": [first, second], "samples": {name: [line.get(name) for line in lines] for name in SAMPLED}}


# ---- trl -------------------------------------------------------------------------------------------------------------------------------


def beside_trl(bench: Bench, found: dict[str, Any]) -> None:
    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        found["absent"] = f"not installed: {' and '.join(missing)}; pip install 'urlvr_fast[bench]'"
        return
    if bench.left() < TRL_STARTS:
        found["absent"] = f"{max(0.0, bench.left()):.0f} s were left and it takes {TRL_STARTS}; give more --seconds"
        return
    config = bench.config()
    # What TRL does not do in these settings is left out of our step, too.
    material = given(bench, config, load_model(config, str(bench.model)), ("monitor.kl_every=0",))
    dtype, threads = "bfloat16" if bench.device.type == "cuda" else "float32", torch.get_num_threads()
    workers = {
        OURS: Worker(OURS, bench.folder / "ours.log", ours.main, material, bench.folder / "ours", threads, "hf"),
        TRL: Worker(TRL, bench.folder / "trl.log", trl_on, material, bench.folder / "trl", threads, bench.device.type),
    }
    try:
        found["about"] = {name: one.about() for name, one in workers.items()}
        gradients = [torch.load(one.ask(GRADIENT)["path"], weights_only=True, map_location="cpu") for one in workers.values()]
        found["gradient_difference"] = {dtype: difference(*gradients)}
        for one in workers.values():  # whatever is made at the first call is made
            one.ask(STEP)
        found["samples_s"] = {name: [] for name in workers}
        for turn in range(bench.size.rounds):
            for name in (OURS, TRL) if turn % 2 else (TRL, OURS):
                found["samples_s"][name].append(workers[name].ask(STEP))
            if bench.left() < 0:
                break
    finally:
        for one in workers.values():
            one.stop()
    check_agreement(found["gradient_difference"])


def trl_on(pipe: Connection, material: Material, folder: Path, threads: int, device: str) -> None:
    """TRL's side of `benches.grpo_step`, on a GPU in the precision that our trainer takes there."""
    on_cpu = trl.settings
    trl.settings = lambda *arguments: on_cpu(*arguments) | {"use_cpu": device == "cpu", "bf16": device != "cpu"}
    trl.main(pipe, material, folder, threads, False)


# ---- all of it -------------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench, dict[str, Any]], None]] = {
    "pretrain": pretrain,
    "learner": learn,
    "quickstart": quickstart,
    "paths": paths,
    "trl": beside_trl,
}


def run(bench: Bench, about: dict[str, Any], out: Path) -> dict[str, Any]:
    result = {**about, "device": str(bench.device), "machine": describe(bench.device), "versions": versions(), "parts": {}}
    result["backend"] = choose_backend(None, bench.device)
    for name, part in PARTS.items():
        print(f"[{time.perf_counter() - bench.began:5.1f} s] {name}", file=sys.stderr, flush=True)
        found: dict[str, Any] = {}
        result["parts"][name] = found
        began = time.perf_counter()
        try:
            part(bench, found)
        except Exception as error:  # noqa: BLE001 (the next part goes on, and the exit status says so)
            found["error"] = traceback.format_exc()
            found["wrong"] = isinstance(error, GradientsDiffer)
            print(found["error"], file=sys.stderr)
        found["seconds"] = time.perf_counter() - began
        result["seconds"] = time.perf_counter() - bench.began
        write_json(out, result)
        if (name == "pretrain" and "error" in found) or "interrupted" in found.get("status", ""):
            break  # there is no model, or the training loop has taken a signal that was meant for all of this
    return result


def of(values: Sequence[float | None], what: Callable[[list[float]], float]) -> float:
    """A median or maximum of what is known."""
    known = [value for value in values if value is not None]
    return what(known) if known else math.nan


def text(result: dict[str, Any]) -> str:
    parts = result["parts"]
    lines = [f"{result['machine']['device']}, torch {result['machine']['torch']}, backend {result['backend']}, size {result['size']}"]
    for name, found in parts.items():
        if "error" in found:
            lines.append(f"{name:<11}FAILED: {found['error'].strip().splitlines()[-1]}")
        elif "absent" in found:
            lines.append(f"{name:<11}not measured: {found['absent']}")
        else:
            lines += [f"{name if number == 0 else '':<11}{line}" for number, line in enumerate(LINES[name](found))]
    return "\n".join(lines)


def _pretrain_lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"{found['parameters'] / 1e6:.1f} M parameters, {found['steps']} steps, {found['tokens_per_s']:,.0f} tokens/s"
    yield f"loss {found['loss'][0]:.2f} -> {fmean(found['loss'][-20:]):.2f}, greedy accuracy {found['greedy_accuracy']:.3f}"


def _learner_lines(found: dict[str, Any]) -> Iterator[str]:
    seconds = {name: median(samples) for name, samples in found["samples_s"].items()}
    yield f"{found['response_tokens']:,} response tokens × {found['vocabulary']:,}, {found['dtype']}"
    for name in (FUSED, PLAIN):
        yield f"{name:<6}{seconds[name]:8.4f} s {found['peak_bytes'][name] / 2**20:10,.1f} MiB"
    saved = found["peak_bytes"][PLAIN] / max(1, found["peak_bytes"][FUSED])
    yield f"plain / fused: {seconds[PLAIN] / seconds[FUSED]:.2f}× time, {saved:.2f}× memory"
    yield "gradients differ by " + ", ".join(f"{value:.1e} ({dtype})" for dtype, value in found["gradient_difference"].items())


def _quickstart_lines(found: dict[str, Any]) -> Iterator[str]:
    samples = {name: values[WARM_UP:] for name, values in found["samples"].items()}
    medians = {name: of(values, median) for name, values in samples.items()}
    yield f"{found['engine']}, {found['steps']} steps of {found['rollouts']} rollouts, peak {found['peak_bytes'] / 2**20:,.0f} MiB"
    yield f"step {medians['step_s']:.3f} s (rollout {medians['rollout_s']:.3f}, learner {medians['train_s']:.3f})"
    yield f"rollout {medians['rollout_tokens_per_s']:,.0f} tokens/s, learner {medians['train_tokens_per_s']:,.0f} tokens/s"
    mean, largest = (of(found["samples"][name], max) for name in ("logp_gap_mean", "logp_gap_max"))
    yield f"{medians['live_rollouts']:,.0f} rollouts had a gradient; log-prob gap {mean:.2g} in a step's mean, {largest:.2g} at most"
    for row in found["before_after"]:
        yield f"{row['metric']:<24}{row['before']:.3f} -> {row['after']:.3f}"
    for name in (name for name in found if name.endswith("_error")):  # an engine that was tried before this one
        yield f"{name.removesuffix('_error')} FAILED: {found[name].strip().splitlines()[-1]}"


def _paths_lines(found: dict[str, Any]) -> Iterator[str]:
    gaps = ", ".join(f"{name} {of(found['samples'][name], max):.2g}" for name in ("logp_gap_mean", "logp_gap_max", "stats_gap_max"))
    yield f"{' then '.join(found['status'])}; {gaps}"


def _trl_lines(found: dict[str, Any]) -> Iterator[str]:
    seconds = {name: median(sample["total"] for sample in samples) for name, samples in found["samples_s"].items()}
    yield f"step {seconds[OURS]:.3f} s, TRL's {seconds[TRL]:.3f} s ({seconds[TRL] / seconds[OURS]:.2f}×), both with transformers' generate"


LINES = {"pretrain": _pretrain_lines, "learner": _learner_lines, "quickstart": _quickstart_lines, "paths": _paths_lines, "trl": _trl_lines}


def why_not_vllm() -> str:
    try:
        require_vllm()
    except RolloutError as error:
        return str(error)
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.perf_counter()
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check.trainer", description=__doc__, formatter_class=raw)
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seconds", type=float, default=80, help="about as long as it may take (default %(default)s)")
    parser.add_argument(
        "--engine", choices=("auto", "hf", "vllm"), default="auto", help="auto: vLLM, which takes a minute to start, if there"
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write the JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} sees no CUDA device, so nothing was measured. Run this where `nvidia-smi` shows a GPU, with a CUDA "
            "build of torch; `--device cpu --size tiny` shows on any machine that the check itself works"
        )
    try:
        token_stats(torch.zeros(1, 64, device=device), torch.zeros(1, dtype=torch.int64, device=device), outputs=("logp",))
    except ImportError as error:
        raise SystemExit(f"{error}: the kernels are not where urlvr_fast looks for them. Install it: pip install -e .") from error
    absent = why_not_vllm()
    engine = options.engine if options.engine != "auto" else "hf" if absent or options.size == "tiny" else "vllm"
    about = {
        "size": options.size,
        "engine": engine,
        "vllm_absent": absent,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bench = Bench(device, SIZES[options.size], folder, folder / "model", engine, options.seconds, began)
        result = run(bench, about, options.out)
    print(text(result))
    return exit_status(result)


def exit_status(result: dict[str, Any]) -> int:
    parts = result["parts"]
    if any(found.get("wrong") for found in parts.values()):
        return FOUND_WRONG
    failed = any(name.endswith("error") for found in parts.values() for name in found)  # that of an engine that was tried first, too
    return RIGHT if all(name in parts for name in PARTS) and not failed else UNCHECKED


if __name__ == "__main__":
    sys.exit(main())
