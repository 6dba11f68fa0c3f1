"""Evaluation on fixed prompts: avg@k, unbiased pass@k, maj@k, greedy accuracy and the Majority Voting Reward.

Answers are used here and nowhere in training. Without answers only the Majority Voting Reward is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from urlvr_fast.monitor.pass_at_k import avg_at_k, maj_at_k, pass_at_k
from urlvr_fast.rewards import STATISTICS
from urlvr_fast.rewards.ensemble import Votes, vote
from urlvr_fast.rewards.external import correct
from urlvr_fast.tasks.prompt_set import PromptSet
from urlvr_fast.trainer import config as configuration
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.checkpoint import checkpoints
from urlvr_fast.trainer.config import ConfigError, EvalConfig
from urlvr_fast.trainer.data import EVALUATION_DRAW, load_encoded, load_evaluation
from urlvr_fast.trainer.model import build_rollout, check_engine, load_model, resolve_model
from urlvr_fast.trainer.prompts import EncodedPrompts
from urlvr_fast.trainer.rollout import Rollout, Sampling, mixed_seed
from urlvr_fast.trainer.run_dir import CONFIG_FILE

EVAL_SEED = 1 << 20  # far from the seeds of training steps


def sample_batch(
    rollout: Rollout,
    prompt_set: PromptSet,
    encoded: EncodedPrompts,
    positions: Sequence[int],
    sampling: Sampling,
    seed: int,
    decode: Callable[[list[list[int]]], list[str]],
) -> RolloutBatch:
    """Rollouts of the prompts at these positions of `encoded`, one group each."""
    token_ids = [encoded.token_ids[p] for p in positions]
    ids = [encoded.ids[p] for p in positions]
    row = {prompt_id: i for i, prompt_id in enumerate(prompt_set.ids)}
    return build_batch(
        prompt_token_ids=token_ids,
        prompt_texts=[encoded.texts[p] for p in positions],
        prompt_ids=ids,
        completions=rollout.generate(token_ids, sampling, seed),
        decode=decode,
        temperature=sampling.temperature,
        columns={name: [values[row[i]] for i in ids] for name, values in prompt_set.columns.items()},
    )


@dataclass(frozen=True)
class Evaluation:
    figures: dict[str, float]  # means over prompts and samplings
    per_prompt: dict[str, list[float]]  # of those that are means over prompts: one figure a prompt, the mean of its samplings
    sampled: list[tuple[RolloutBatch, Votes]]  # one a sampling
    greedy: RolloutBatch | None  # one completion a prompt


def evaluate(
    rollout: Rollout,
    prompt_set: PromptSet,
    encoded: EncodedPrompts,
    decode: Callable[[list[list[int]]], list[str]],
    *,
    sampling: Sampling,
    ks: Sequence[int],
    samplings: int = 1,
    seed: int = 0,
    greedy: bool = True,
) -> Evaluation:
    """Mean over prompts and over `samplings` samplings of `sampling.n` rollouts a prompt.

    Figures: `majority_voting_reward` and, where the prompts have answers, `avg@k`, `pass@k`, `maj@k` for each k ≤ sampling.n, and
    `greedy_accuracy`. The same seed samples the same way before and after training.
    """
    positions = range(len(encoded.token_ids))
    columns: dict[str, list[list[float]]] = {}  # name -> samplings × prompts
    sampled = []
    for repeat in range(samplings):
        batch = sample_batch(rollout, prompt_set, encoded, positions, sampling, seed + repeat, decode)
        votes = vote(batch, prompt_set.checker)
        sampled.append((batch, votes))
        columns.setdefault("majority_voting_reward", []).append([votes.ratios[group] for group in batch.groups()])
        if prompt_set.answers:
            for name, values in _accuracy_at_k(batch, votes.classes, prompt_set, ks).items():
                columns.setdefault(name, []).append(values)
    greedy_batch = None
    if greedy:
        once = Sampling(n=1, temperature=0.0, max_tokens=sampling.max_tokens)
        greedy_batch = sample_batch(rollout, prompt_set, encoded, positions, once, seed, decode)
        truth = correct(greedy_batch, prompt_set.answers, prompt_set.checker)
        if not truth.isnan().all():  # some of the prompts may have an answer, and none of those that fit the context
            columns["greedy_accuracy"] = [truth[~truth.isnan()].tolist()]
    per_prompt = {name: [sum(of) / len(of) for of in zip(*values, strict=True)] for name, values in columns.items()}
    figures = {name: sum(values) / len(values) for name, values in per_prompt.items()}
    return Evaluation(figures, per_prompt, sampled, greedy_batch)


def _accuracy_at_k(batch: RolloutBatch, classes: Sequence[int], prompt_set: PromptSet, ks: Sequence[int]) -> dict[str, list[float]]:
    """avg@k, pass@k and maj@k of each prompt that has an answer."""
    truth = correct(batch, prompt_set.answers, prompt_set.checker)
    columns: dict[str, list[float]] = {}
    for members in batch.groups().values():
        if truth[members[0]].isnan():
            continue
        right = [bool(truth[m]) for m in members]
        group_classes = [classes[m] for m in members]
        # Equivalence is not always transitive, so members of a class can differ in the verdict; a vote stands or falls with its first.
        verdict = {c: r for c, r in zip(reversed(group_classes), reversed(right), strict=True)}
        class_right = [verdict[c] for c in group_classes]
        for k in ks:
            if k <= len(members):
                columns.setdefault(f"avg@{k}", []).append(avg_at_k(right, k))
                columns.setdefault(f"pass@{k}", []).append(pass_at_k(len(right), sum(right), k))
                columns.setdefault(f"maj@{k}", []).append(maj_at_k(group_classes, class_right, k))
    return columns


def evaluate_model(
    name: str,
    *,
    data: str | None,
    split: str | None,
    limit: int | None,
    ks: Sequence[int],
    overrides: Sequence[str] = (),
    statistics: bool = False,
) -> tuple[Evaluation, PromptSet]:
    """What `urlvr eval` prints: `evaluate` for a run (its newest checkpoint), a model directory, a hub id, or `bundled`; and its prompts.

    data: as for training; None takes what a run evaluates itself on, and the arithmetic task otherwise. max(ks) completions are sampled.
    statistics: take entropy, self-certainty and probability gap of every sampled token as well, which needs eval.top_p=1.
    Raises ConfigError, DataError, RolloutError.
    """
    path = Path(name)
    run = path if (path / CONFIG_FILE).is_file() else None
    config = configuration.load(run / CONFIG_FILE if run else None, overrides)
    if run:
        saved = checkpoints(run)
        if not saved:
            raise ConfigError(f"{run} has no complete checkpoint to evaluate")
        source = str(saved[-1])
    else:
        source = resolve_model(name)
    check_engine(config)
    loaded = load_model(config, source)
    if data is not None:
        prompts, encoded = load_encoded(config, loaded, data, split or config.eval.split, limit, EVALUATION_DRAW)
    else:
        config.eval.prompts = limit or config.eval.prompts or EvalConfig().prompts
        config.eval.split = split or config.eval.split
        prompts, encoded = load_evaluation(config, loaded)
    try:
        taken = STATISTICS if statistics else frozenset()
        sampling = Sampling(max(ks), config.eval.temperature, config.rollout.max_tokens, config.eval.top_p, statistics=taken)
    except ValueError as error:
        raise ConfigError(f"{error}; set eval.top_p=1") from None
    rollout = build_rollout(config, loaded, max(map(len, encoded.token_ids)) + config.rollout.max_tokens, statistics=statistics)
    try:
        seed = mixed_seed(config.seed, EVAL_SEED)
        found = evaluate(rollout, prompts, encoded, loaded.decode, sampling=sampling, ks=ks, samplings=config.eval.samplings, seed=seed)
        return found, prompts
    finally:
        rollout.close()
