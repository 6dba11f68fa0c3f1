"""The training loop: GRPO with rewards that need no label.

What was left out of GRPO, and why:
  * no KL term unless `loss.kl_coef` asks for one: the paper's default has none, and its ablation found that KL moves collapse without
    preventing it (a copy of the start model is kept to measure the distance; `monitor.kl_every=0` drops it);
  * no ratio and no clipping in effect: one update per batch of rollouts, so the policy that is trained is the one that sampled (`old_logp`
    is absent, which makes every ratio 1), unless `trainer.mini_batch_prompts` cuts the batch into several updates;
  * no importance weights against the engine by default: the log-prob gap between engine and trainer is measured every step instead,
    and the run stops when it is more than rounding;
  * no forward of the old policy: what certainty rewards need is taken while the engine samples (`rollout.stats`), so a step is one
    forward and one backward (but for the first, which checks it);
  * no value model, no replay, no asynchronous rollouts.
What stays: N rollouts a prompt, advantages normalised within the group, a token-level loss over the whole batch, AdamW, gradients
clipped at 1.

A step: prompts -> rollouts -> rewards (which see no answer) -> advantages -> one update -> the engine takes the new weights ->
metrics (which may see answers) -> detectors (which do not), which may stop the run. Run it with `urlvr train configs/quickstart.yaml`.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from urlvr_fast.errors import ExplainedError
from urlvr_fast.monitor.alignment import alignment_metrics
from urlvr_fast.monitor.anchors import Anchors
from urlvr_fast.monitor.detectors import STOP_RULE, Detection, Detectors
from urlvr_fast.monitor.hacking import RewardAlarm
from urlvr_fast.monitor.signals import signals
from urlvr_fast.ops import group_advantages
from urlvr_fast.ops.reference import kl_estimate
from urlvr_fast.report import ReportError, write_report
from urlvr_fast.rewards import Reward
from urlvr_fast.rewards.ensemble import Votes, vote
from urlvr_fast.rewards.external import correct
from urlvr_fast.rewards.registry import build_reward, call_reward, reward_needs
from urlvr_fast.tasks.prompt_set import PromptSet
from urlvr_fast.trainer import run_dir
from urlvr_fast.trainer.batch import RolloutBatch
from urlvr_fast.trainer.checkpoint import load_optimizer, save_checkpoint
from urlvr_fast.trainer.config import Config
from urlvr_fast.trainer.data import load_encoded, load_evaluation
from urlvr_fast.trainer.evaluate import EVAL_SEED, Evaluation, evaluate, sample_batch
from urlvr_fast.trainer.learner import Learner, larger
from urlvr_fast.trainer.logging import RunLog, read_jsonl, sink_modules
from urlvr_fast.trainer.model import LoadedModel, build_rollout, check_engine, load_model, resolve_model
from urlvr_fast.trainer.policy import Policy
from urlvr_fast.trainer.prompts import EncodedPrompts
from urlvr_fast.trainer.rollout import Rollout, RolloutError, Sampling, mixed_seed
from urlvr_fast.trainer.watch import (
    MIN_ANCHORS,
    collapse_summary,
    collapsed,
    detect,
    find_anchors,
    look_back,
    take_up_monitor,
    warn_of_few_anchors,
    went_back,
)

ROOM = 512  # tokens that a reward's own prompts may take beside the prompt and response that are in them


class TrainingStopped(ExplainedError, RuntimeError):
    """The run cannot go on. The message is one sentence that says why; it is also in run.json and in the report."""


@dataclass
class Run:
    """Everything a step needs. `prompts.answers`, the audit map, is read by metrics and by `reward=ground_truth` only."""

    config: Config
    loaded: LoadedModel
    prompts: PromptSet
    encoded: EncodedPrompts
    eval_prompts: PromptSet
    eval_encoded: EncodedPrompts
    reward: Reward
    rollout: Rollout
    learner: Learner
    log: RunLog
    alarm: RewardAlarm
    detectors: Detectors
    anchors: Anchors | None = None  # set by the first evaluation
    stats_checked: bool = False  # whether statistics taken while sampling were compared with the trainer's
    good_weights: dict[str, Tensor] | None = None  # what `rollback` goes back to
    good_step: int = 0
    lines: list[dict[str, float]] = field(default_factory=list)  # of metrics.jsonl, for what looks back


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> str:
    """Train into `config.run_dir` as `config` says. Returns how it ended: "finished", "stopped" (trainer.stop_after, or a detector) or
    "interrupted".

    Raises ConfigError (options or model), DataError, RewardError, RolloutError (no engine, or a log-prob gap), CheckpointError,
    TrainingStopped. Whatever ends a run, run.json says so and the last complete checkpoint stays.
    """
    # Whatever can be wrong is found out before anything is written, and before an old run is deleted.
    check_engine(config)
    checkpoint = run_dir.check(config, resume=resume, overwrite=overwrite)
    sink_modules(config.log.tensorboard, config.log.wandb)
    loaded = load_model(config, str(checkpoint) if checkpoint else resolve_model(config.model))
    prompts, encoded = load_encoded(config, loaded, config.data, config.prompts.split, config.prompts.limit, config.seed)
    eval_prompts, eval_encoded = load_evaluation(config, loaded, (prompts, encoded))
    reward = build_reward(
        config.reward,
        checker=prompts.checker,
        answers=prompts.answers,
        options=config.reward_options,
        verify=prompts.verify,
        verification_prompt=prompts.verification_prompt,
        verdicts=prompts.verdicts,
    )
    learner = Learner(
        loaded.model, trainer=config.trainer, loss=config.loss, dtype=loaded.dtype, max_response_tokens=config.rollout.max_tokens
    )
    done = load_optimizer(checkpoint, loaded.model, learner.optimizer) if checkpoint else 0
    if config.loss.kl_coef or config.monitor.kl_every:
        learner.keep_start(load_model(config, resolve_model(config.model)).model if checkpoint else None)
    longest = max(map(len, encoded.token_ids + eval_encoded.token_ids)) + config.rollout.max_tokens
    if getattr(reward, "generates", False):  # from prompts of its own making
        longest = min(loaded.context, longest + ROOM + getattr(reward, "max_tokens", 0))
    rollout = build_rollout(config, loaded, longest, statistics=bool(statistics_sampled(config, reward)))
    try:
        rollout.sync(learner.weights())
        path = run_dir.create(config, resume=resume)
        with (
            report_at_the_end(path),
            RunLog(
                path,
                total_steps=config.trainer.steps,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                live=config.log.live,
                resume_step=done if resume else None,
            ) as log,
        ):
            detectors = Detectors({STOP_RULE: config.monitor.on_collapse, **config.monitor.actions}, config.monitor.thresholds)
            run = Run(config, loaded, prompts, encoded, eval_prompts, eval_encoded, reward, rollout, learner, log, RewardAlarm(), detectors)
            if done:
                take_up_monitor(run)
            return run_steps(run, done)
    finally:
        rollout.close()


def run_steps(run: Run, done: int) -> str:
    """Steps `done` + 1 … trainer.steps, with evaluations, checkpoints and an orderly end. Returns the status."""
    config, log = run.config, run.log
    step, saved, bad_steps = done, done, 0
    ended: Detection | None = None
    started = time.perf_counter()
    with interrupts() as interrupted:
        if done == 0:
            warn_of_skipped(run)
            metrics = evaluation(run, config.eval.samplings, votes_at=0)
            look_back(run, 0, metrics)
            log.metrics(0, metrics)
            detect(run, 0, metrics)
            saved = -1
        while step < config.trainer.steps and step != config.trainer.stop_after and not interrupted and ended is None:
            step += 1
            metrics = training_step(run, step)
            if step == config.trainer.steps:
                metrics |= evaluation(run, config.eval.samplings, votes_at=step)
            elif config.trainer.eval_every and step % config.trainer.eval_every == 0:
                metrics |= evaluation(run, 1)
            look_back(run, step, metrics)
            log.metrics(step, metrics)
            ended = detect(run, step, metrics)
            ended = ended or collapsed(run, step)
            bad_steps = bad_steps + 1 if metrics["skipped"] else 0
            if bad_steps >= config.trainer.max_bad_steps:
                raise TrainingStopped(f"the gradient was not finite in {bad_steps} steps running, the last of them step {step}")
            if config.trainer.save_every and step % config.trainer.save_every == 0:
                save(run, step)
                saved = step
        # What is left may be the weights of an earlier step, and in any case has not been looked at closely.
        looked = ended is None or (step == config.trainer.steps and ended.action != "rollback")
        after = None if looked else evaluation(run, config.eval.samplings, votes_at=step)
        if saved != step or (ended is not None and ended.action == "rollback"):
            save(run, step)
    for message in run.alarm.final():
        log.warn(step, message)
    if ended is not None:
        status, reason = "stopped", f"step {step}, {ended.message}" + went_back(run, ended)
    elif step == config.trainer.steps:
        status, reason = "finished", f"all {step} steps were made"
    elif interrupted:
        status, reason = "interrupted", f"{interrupted[0]} after step {step}; --resume goes on from here"
    else:
        status, reason = "stopped", f"trainer.stop_after={step}; --resume goes on from here"
    log.summary(
        {
            "before_after": before_after(log, after),
            "collapse": collapse_summary(log),
            "timing": {"training_s": time.perf_counter() - started},
        }
    )
    log.status(status, reason)
    return status


def warn_of_skipped(run: Run) -> None:
    what = [(run.encoded.skipped, "training")]
    if run.eval_prompts is not run.prompts:
        what.append((run.eval_encoded.skipped, "evaluation"))
    for skipped, name in what:
        if skipped:
            run.log.warn(0, f"{skipped} prompts of the {name} data are longer than the context allows and were skipped")


def training_step(run: Run, step: int) -> dict[str, float]:
    """One step, from prompts to synchronised weights. Returns its metrics."""
    config, learner = run.config, run.learner
    seed = mixed_seed(config.seed, step)
    statistics = statistics_sampled(config, run.reward)
    votes_per_prompt = config.rollout.votes or config.rollout.group_size
    sampling = Sampling(votes_per_prompt, config.rollout.temperature, config.rollout.max_tokens, statistics=statistics)
    clock = [time.perf_counter()]

    batch = sample_batch(run.rollout, run.prompts, run.encoded, positions(run, step), sampling, seed, run.loaded.decode)
    if votes_per_prompt > config.rollout.group_size:
        batch.train_mask = torch.arange(len(batch)) % votes_per_prompt < config.rollout.group_size
    clock.append(time.perf_counter())

    figures = fill_statistics(run, batch)
    rewards = call_reward(run.reward, batch, Policy(run.loaded, run.rollout, learner, seed, chat=chat_prompts(run)))
    if getattr(run.reward, "returns_advantages", False):
        advantages = rewards
    else:
        advantages = group_advantages(
            rewards, batch.group_ids, scale=config.loss.advantage_scale, baseline=config.loss.baseline, mask=batch.train_mask
        )
    figures |= start_distance(run, step, batch)
    metrics = learn(run, step, batch, advantages, figures)
    clock.append(time.perf_counter())

    run.rollout.sync(learner.weights())
    clock.append(time.perf_counter())

    votes = vote(batch, run.prompts.checker)
    metrics |= alignment_metrics(batch, rewards, run.prompts.answers, run.prompts.checker, votes=votes)
    metrics |= signals(batch, rewards, votes)
    rollout_s, train_s, sync_s = (b - a for a, b in pairwise(clock))
    tokens = batch.sampled_logp.numel()
    metrics |= {
        "rollout_s": rollout_s,
        "train_s": train_s,
        "sync_s": sync_s,
        "step_s": time.perf_counter() - clock[0],
        "rollout_tokens_per_s": tokens / rollout_s,
        "train_tokens_per_s": tokens / train_s,
    }
    if hasattr(run.prompts.checker, "timeouts"):
        metrics["answer_timeouts"] = run.prompts.checker.timeouts  # so far; each one counts as "different"
    for message in run.alarm.update(step, batch, rewards, metrics["parse_rate"]):
        run.log.warn(step, message)
    if step == 1 or step == config.trainer.steps or (config.trainer.samples_every and step % config.trainer.samples_every == 0):
        run.log.samples(step, sample_rows(run, batch, votes, rewards, advantages))
    return metrics


def learn(run: Run, step: int, batch: RolloutBatch, advantages: Tensor, figures: dict[str, float]) -> dict[str, float]:
    """The batch's optimiser steps: one, or one per `trainer.mini_batch_prompts` prompts. Returns the metrics, `figures` among them.

    Of several, means are weighted by their rollouts; `grad_norm` is the largest and `skipped` says whether any was.
    """
    parts = mini_batches(batch, run.config.trainer.mini_batch_prompts)
    if len(parts) > 1:
        before = run.learner.score(batch, ("logp", "entropy"))
        batch.old_logp, batch.entropy = before["logp"], before["entropy"]
        figures["actor_entropy"] = float(before["entropy"].mean())  # of the policy that sampled, not of later mini-batches
        add_gaps(figures, logp_gaps(batch.old_logp, batch.sampled_logp))
    metrics: dict[str, float] = {}
    for rows in parts:
        part = batch if len(parts) == 1 else batch.select(rows)
        own = run.learner.accumulate(part, advantages if len(parts) == 1 else advantages[rows])
        if len(parts) == 1:
            add_gaps(figures, {name: own[name] for name in LOGP_GAPS})
        check_gaps(run, step, figures)
        own |= run.learner.update(step)
        for name, value in own.items():
            if name in ("grad_norm", "skipped"):
                metrics[name] = larger(metrics.get(name, 0.0), value)
            elif name == "live_rollouts":
                metrics[name] = metrics.get(name, 0.0) + value
            else:
                metrics[name] = metrics.get(name, 0.0) + value * len(rows) / len(batch)
    return metrics | figures


def mini_batches(batch: RolloutBatch, prompts: int | None) -> list[list[int]]:
    """The rollouts of `prompts` groups at a time, in the batch's order; all of them at once when unset."""
    groups = list(batch.groups().values())
    size = prompts or len(groups)
    return [[row for rows in groups[start : start + size] for row in rows] for start in range(0, len(groups), size)]


def start_distance(run: Run, step: int, batch: RolloutBatch) -> dict[str, float]:
    """`kl_start`: KL to the start model of the policy that sampled, k3, mean over response tokens; now and then.

    k3 of samples from the policy itself estimates KL(policy ‖ start) without bias (`kl_estimate`).
    """
    every = run.config.monitor.kl_every
    wanted = every and (step == 1 or step % every == 0)
    if not (wanted or run.config.loss.kl_coef):
        return {}
    batch.ref_logp = run.learner.start_logp(batch)
    return {"kl_start": float(kl_estimate(batch.sampled_logp.double(), batch.ref_logp.double(), "k3").mean())}


def chat_prompts(run: Run) -> bool:
    """Whether the run's prompts go through the tokenizer's chat template."""
    return run.config.prompts.template != "plain" and bool(getattr(run.loaded.tokenizer, "chat_template", None))


def vote_rows(run: Run, found: Evaluation) -> list[dict[str, object]]:
    """The last sampling's vote and the greedy answer on each evaluation prompt."""
    batch, votes = found.sampled[-1]
    assert found.greedy is not None
    greedy = dict(zip(found.greedy.prompt_ids, found.greedy.completions, strict=True))
    return [
        {
            "prompt_id": (prompt_id := batch.prompt_ids[rows[0]]),
            "prompt": batch.prompts[rows[0]],
            "answer": votes.labels[group],
            "share": votes.ratios[group],
            "greedy": run.eval_prompts.checker.extract(greedy[prompt_id]),
        }
        for group, rows in batch.groups().items()
    ]


def positions(run: Run, step: int) -> list[int]:
    """Which prompts step 1, 2, … draws: epochs one after the other, each in an order of its own that the seed decides."""
    n, size = len(run.encoded.token_ids), run.config.trainer.prompts_per_step
    drawn: list[int] = []
    for index in range((step - 1) * size, step * size):
        epoch, place = divmod(index, n)
        drawn.append(epoch_order(n, run.config.seed, epoch)[place] if run.config.prompts.shuffle else place)
    return drawn


@lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed(seed, -epoch - 2))).tolist()


def statistics_wanted(reward: Reward) -> frozenset[str]:
    """What the reward needs. Entropy rides along for the metrics: a second forward for it alone would cost as much again."""
    needs = reward_needs(reward)
    return needs | {"entropy"} if needs else needs


def statistics_sampled(config: Config, reward: Reward) -> frozenset[str]:
    """What the engine is to take while it samples."""
    return statistics_wanted(reward) if config.rollout.stats == "sampling" else frozenset()


def fill_statistics(run: Run, batch: RolloutBatch) -> dict[str, float]:
    """See to it that the batch has what the reward needs from the policy that sampled, while the weights are still its.

    What the engine took while sampling stays, and costs no forward here; in the first step of a run, and after a resume, it is compared
    with the trainer's. What it did not take the trainer does now. Returns the gaps seen: LOGP_GAPS and `stats_gap_max`.
    """
    wanted = sorted(statistics_wanted(run.reward))
    missing = [name for name in wanted if getattr(batch, name) is None]
    if not missing and (run.stats_checked or not wanted):
        return {}
    own = run.learner.score(batch, ("logp", *wanted))
    gaps = logp_gaps(own["logp"], batch.sampled_logp)
    for name in wanted:
        if name in missing:
            setattr(batch, name, own[name])
        else:
            add_gaps(gaps, {"stats_gap_max": float((own[name] - getattr(batch, name)).abs().max())})
    run.stats_checked = True
    return gaps


LOGP_GAPS = ("logp_gap_mean", "logp_gap_max")


def logp_gaps(own: Tensor, sampled: Tensor) -> dict[str, float]:
    """Mean and largest difference of two log-probs of the same tokens, under the names of LOGP_GAPS."""
    gaps = (own - sampled).abs()
    return dict(zip(LOGP_GAPS, (float(gaps.mean()), float(gaps.max())), strict=True))


def add_gaps(seen: dict[str, float], gaps: dict[str, float]) -> None:
    """Keep in `seen` the larger of what it holds and of `gaps`."""
    for name, gap in gaps.items():
        seen[name] = larger(seen.get(name, 0.0), gap)


def check_gaps(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Raise RolloutError when engine and trainer disagree by more than rounding: on what was sampled, or on its statistics.

    metrics: LOGP_GAPS, of the weights that sampled, and `stats_gap_max` where it was measured.
    """
    exact, given = run.loaded.dtype == "float32", run.config.rollout
    # In 16 bit the engine rounds weights, hidden states and logits that the trainer does not: a rare token may be off by over a nat, and
    # only the mean tells that from other weights. In bfloat16 it is 0.006 in the quick start, 0.046 with a model that is nearly random;
    # without a sync it rises from step to step, beyond 0.1 after 11 of the quick start.
    limit = given.logp_gap_limit if given.logp_gap_limit is not None else 1e-3 if exact else 5.0
    mean_limit = given.logp_gap_mean_limit if given.logp_gap_mean_limit is not None else limit if exact else 0.2
    (mean, logp), stats = (metrics[name] for name in LOGP_GAPS), metrics.get("stats_gap_max", 0.0)
    # `not <=` is true for NaN as well.
    if not logp <= limit or not mean <= mean_limit:
        raise RolloutError(
            f"step {step}: the log-probs of sampled tokens differ by up to {logp:.3g}, {mean:.3g} in the mean, between the engine and the "
            f"trainer (rollout.logp_gap_limit={limit:g}, rollout.logp_gap_mean_limit={mean_limit:g}). The engine may hold stale weights, "
            "sample at another temperature or top-p, or return raw instead of processed log-probs; training on would be off-policy without "
            "knowing it"
        )
    if not stats <= limit:
        raise RolloutError(
            f"step {step}: entropy, self-certainty or probability gap of a token differs by {stats:.3g} between what the engine took while "
            f"sampling and the trainer (rollout.logp_gap_limit={limit:g}), though the log-probs agree. The engine may have mixed up its "
            "rows of logits, or leave a part of the vocabulary out; rollout.stats=recompute takes them from the trainer instead"
        )


def evaluation(run: Run, samplings: int, votes_at: int | None = None) -> dict[str, float]:
    """`eval/…` metrics on the fixed prompts; the same seeds every time, so that two evaluations differ by the weights alone.

    votes_at: the step under which votes.jsonl gets each prompt's answer as well; done before training and after it.
    """
    config = run.config
    if not run.eval_encoded.token_ids:
        return {}
    sampling = Sampling(config.eval.group_size, config.eval.temperature, config.rollout.max_tokens, config.eval.top_p)
    found = evaluate(
        run.rollout,
        run.eval_prompts,
        run.eval_encoded,
        run.loaded.decode,
        sampling=sampling,
        ks=[config.eval.group_size],
        samplings=samplings,
        seed=mixed_seed(config.seed, EVAL_SEED),
    )
    figures = dict(found.figures)
    if run.anchors is None:
        run.anchors = find_anchors(run)
        warn_of_few_anchors(run, 0)
    assert found.greedy is not None
    if votes_at is not None:
        run.log.votes(votes_at, vote_rows(run, found))
    if len(run.anchors.labels) >= MIN_ANCHORS:
        agreement = run.anchors.agreement(found.greedy, run.eval_prompts.checker)
        assert agreement is not None
        figures["anchor_agreement"] = agreement
    return {f"eval/{name}": value for name, value in figures.items()}


def save(run: Run, step: int) -> None:
    save_checkpoint(
        run.log.run_dir, step, run.loaded.model, run.loaded.tokenizer, run.learner.optimizer, keep=run.config.trainer.keep_checkpoints
    )


def before_after(log: RunLog, after: dict[str, float] | None) -> list[dict[str, object]]:
    """Rows of the table that ends a run: each evaluation metric at step 0 and `after`, or at the last evaluation."""
    lines = [line for line in read_jsonl(log.run_dir / "metrics.jsonl") if any(key.startswith("eval/") for key in line)]
    if not lines or lines[0]["step"] != 0 or (after is None and len(lines) < 2):
        return []
    before, after = lines[0], lines[-1] if after is None else after
    keys = [key for key in before if key.startswith("eval/") and key in after]
    return [{"metric": key.removeprefix("eval/"), "before": before[key], "after": after[key]} for key in keys]


def sample_rows(run: Run, batch: RolloutBatch, votes: Votes, rewards: Tensor, advantages: Tensor) -> list[dict[str, object]]:
    """The first groups of the batch, as samples.jsonl shows them."""
    truth = correct(batch, run.prompts.answers, run.prompts.checker).tolist() if run.prompts.answers else [math.nan] * len(batch)
    shown = set(list(batch.groups())[: run.config.trainer.samples_prompts])
    lengths = batch.response_lens.tolist()
    return [
        {
            "prompt_id": batch.prompt_ids[b],
            "group": group,
            "prompt": batch.prompts[b],
            "completion": batch.completions[b],
            "answer": votes.answers[b],
            "class": votes.classes[b],
            "in_majority": bool(votes.in_winner[b]),
            "reward": rewards[b].item(),
            "advantage": advantages[b].item(),
            "correct": None if math.isnan(truth[b]) else bool(truth[b]),
            "finish_reason": batch.finish_reasons[b],
            "length": lengths[b],
        }
        for b, group in enumerate(batch.group_ids.tolist())
        if group in shown
    ]


@contextmanager
def report_at_the_end(path: Path) -> Iterator[None]:
    """However a run ends, report.html says so; one that cannot be written must not hide why the run failed."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ReportError):
            write_report([path])
        raise
    write_report([path])


@contextmanager
def interrupts() -> Iterator[list[str]]:
    """Collects the first SIGINT or SIGTERM, so that the step in progress ends whole and a checkpoint is written; a second ends at once."""
    received: list[str] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{received[0]}: finishing this step and writing a checkpoint; once more ends at once\n".encode())

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
