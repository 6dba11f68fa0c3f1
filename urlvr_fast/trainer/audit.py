"""What every reward would have said about rollouts that are there already, and how well it agrees with the answers where there are any.

How to read the table. Training on a reward makes the rollouts that it ranks high likelier: it sharpens what the model prefers already, and
that helps exactly where the preferred rollout is right more often than the rest (paper, section 2). So look at `top`, the accuracy of the
rollout with the highest reward of each prompt, against `mean`, the accuracy of all of them: `gain` is what the reward knows. An interval
above 0 is a reward that is aligned with the truth on these prompts, and training on it should help until what it knows is used up. An
interval around 0 is noise that training would amplify; one below 0 prefers wrong rollouts, and training on it will do harm. `flat` is the
share of prompts without any signal. `r in group` says how well it ranks all the rollouts of a prompt, which is what GRPO sees; `r` also
counts that some prompts earn more than others, which no training can use. `ground_truth` is the ceiling. A reward's mean says nothing by
itself, and all of this is about these rollouts: a reward that is aligned today can be learnt to be fooled.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from urlvr_fast.monitor.alignment import point_biserial
from urlvr_fast.monitor.pass_at_k import bootstrap_interval
from urlvr_fast.rewards import Policy, RewardError, reward_name
from urlvr_fast.rewards.answers import AnswerChecker, ExactAnswers, MathAnswers, extract_boxed
from urlvr_fast.rewards.ensemble import label_of, vote
from urlvr_fast.rewards.external import correct
from urlvr_fast.rewards.procedural import Verify
from urlvr_fast.rewards.registry import ALIASES, REWARDS, build_reward, call_reward, reward_needs
from urlvr_fast.tasks.prompt_set import PROCEDURAL_TASKS, DataError
from urlvr_fast.trainer.batch import PER_TOKEN, RolloutBatch
from urlvr_fast.trainer.live_view import printable
from urlvr_fast.trainer.rollout_file import RolloutFile, Verdict, load_rollouts
from urlvr_fast.trainer.run_dir import CONFIG_FILE

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "majority_voting soft": ("majority_voting", {"soft": True}),
    "token_entropy sum": ("token_entropy", {"aggregate": "sum"}),
    "trajectory_entropy sum": ("trajectory_entropy", {"aggregate": "sum"}),
    "probability paper_exact": ("probability", {"paper_exact": True}),
}
# What a reward of the registry wants beyond the statistics in its `needs`.
NEEDS_MODEL = ("covo", "self_verification")  # known beforehand: covo builds all its questions before it asks the first
NEEDS_LOGP = ("trajectory_entropy", "probability")  # votes break ties by it, and do without
NEEDS_COLUMN = {"weighted_voting": "model", "cross_view_voting": "question", "next_token": "continuation"}
RESAMPLINGS = 2_000_000  # prompts drawn for one interval, at most


class NeedsModel(RewardError):
    """A reward asked the policy something, and there is none."""


class _NoPolicy:
    """Stands where a policy would: whatever a reward asks of it, the answer is that there is no model."""

    def __getattr__(self, name: str) -> NoReturn:
        raise NeedsModel("needs the model")


@dataclass(frozen=True)
class AuditRow:
    """One reward on one set of rollouts. Groups of different sizes weigh the same; all rollouts count, also those not trained on."""

    name: str
    missing: str | None = None  # why there are no numbers, such as "needs entropy"; everything below is then None
    reward_mean: float | None = None  # over all rollouts
    reward_std: float | None = None  # mean over groups of the unbiased standard deviation within; 0 for a group of one
    flat_groups: float | None = None  # share of groups whose rewards are all alike
    # From the groups whose prompts have answers; None when none does.
    top_accuracy: float | None = None  # the rollout with the highest reward is right (several of them: the share that is)
    mean_accuracy: float | None = None
    gain: float | None = None  # top_accuracy − mean_accuracy
    gain_interval: tuple[float, float] | None = None  # 95 %, prompts drawn again
    point_biserial: float | None = None  # of reward and truth over all rollouts; 0 when either does not vary
    point_biserial_within: float | None = None  # mean over groups with right and wrong rollouts (constant reward: 0); None without such
    reward_accuracy: float | None = None  # share of rollouts whose reward equals the truth; only when all rewards are 0 or 1
    label_accuracy: float | None = None  # the answer that won the vote is right; only for majority and weighted voting


# ---- one set of rollouts ---------------------------------------------------------------------------------------------------------------


def audit(
    batch: RolloutBatch,
    answers: Mapping[int, str],
    checker: AnswerChecker,
    *,
    rewards: Sequence[str] | None = None,
    verify: Verify | None = None,
) -> list[AuditRow]:
    """Every reward on these rollouts, the largest gain first; those that cannot be computed last, with what they need.

    rewards: names as for `build_reward`, or of `VARIANTS`; None takes all of `REWARDS` and `VARIANTS`. Options are the defaults.
    answers: the audit map, prompt id -> answer, of all, some or none of the prompts. verify: the task's verifier, for `procedural`.
    NaN in `sampled_logp` means that nobody knows it. The order of the rollouts changes nothing.

    Raises ValueError for an empty batch, RewardError for a reward that does not exist, DataError for answers that the checker cannot read.
    """
    if len(batch) == 0:
        raise ValueError("an empty batch cannot be audited")
    batch = in_one_order(batch)
    has_logp = not bool(batch.sampled_logp.isnan().any())
    # Votes break ties by it and can do without; what is not of the registry gets the NaN, and is found out when it reads it.
    tied = batch if has_logp else replace(batch, sampled_logp=torch.zeros_like(batch.sampled_logp))
    try:
        truth = correct(batch, answers, checker).double()
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the answers are not of the kind that {type(checker).__name__} reads: {type(error).__name__}: {error!s:.200}"
        ) from None
    rows = []
    for name in all_names() if rewards is None else rewards:
        spec, options = VARIANTS.get(name, (ALIASES.get(name, name), {}))
        missing = what_is_missing(spec, batch, truth, has_logp, verify)
        if missing is None:
            reward = build_reward(spec, checker=checker, answers=answers, options=options, verify=verify)
            values = rewards_of(reward, tied if spec in REWARDS else batch)
            if isinstance(values, Tensor):
                rows.append(measured(name, values, tied, truth, label_accuracy(spec, values, tied, answers, checker)))
                continue
            missing = values
        rows.append(AuditRow(name, missing))
    return sorted(rows, key=lambda row: (row.missing is not None, -(row.gain or 0.0)))  # stable: equals stay in their order


def all_names() -> list[str]:
    """The registry's rewards, each followed by its variants."""
    return [name for spec in REWARDS for name in (spec, *(variant for variant, (of, _) in VARIANTS.items() if of == spec))]


def what_is_missing(spec: str, batch: RolloutBatch, truth: Tensor, has_logp: bool, verify: Verify | None) -> str | None:
    """What a reward of the registry lacks here, as far as can be told without calling it."""
    if spec in NEEDS_MODEL:
        return "needs the model"
    if spec == "mixture":
        return "needs its list of rewards"
    if spec == "ground_truth" and bool(truth.isnan().any()):
        return "needs answers" if bool(truth.isnan().all()) else "needs an answer for every prompt"
    if spec == "procedural" and verify is None:
        return "needs a task with a verifier"
    if spec in NEEDS_LOGP and not has_logp:
        return "needs logp"
    if spec in NEEDS_COLUMN and NEEDS_COLUMN[spec] not in batch.columns:
        return f"needs column {NEEDS_COLUMN[spec]}"
    absent = sorted(name for name in reward_needs(REWARDS.get(spec)) if getattr(batch, name) is None)
    return f"needs {' and '.join(absent)}" if absent else None


def rewards_of(reward: Any, batch: RolloutBatch) -> Tensor | str:
    """(B,) float64, or in a few words why not."""
    absent = sorted(name for name in reward_needs(reward) if getattr(batch, name) is None)
    if absent:
        return f"needs {' and '.join(absent)}"
    policy: Policy = _NoPolicy()
    try:
        return call_reward(reward, batch, policy).double()
    except NeedsModel as error:
        return str(error)
    except RewardError as error:
        message = str(error).removeprefix(f"reward {reward_name(reward)} ")
        return printable(f"{message[:120]}…" if len(message) > 121 else message)


def in_one_order(batch: RolloutBatch) -> RolloutBatch:
    """The rollouts in an order of their own, so that sums do not depend on a file's, not even in their last bit."""
    bounds = batch.response_cu_seqlens.tolist()
    taken = [values.numpy() for name in PER_TOKEN if (values := getattr(batch, name)) is not None]
    trained = [True] * len(batch) if batch.train_mask is None else batch.train_mask.tolist()
    groups = batch.group_ids.tolist()

    def key(b: int) -> tuple[Any, ...]:
        numbers = [values[bounds[b] : bounds[b + 1]].tobytes() for values in taken]
        columns = repr([values[b] for _, values in sorted(batch.columns.items())])
        return batch.prompt_ids[b], groups[b], batch.prompts[b], batch.completions[b], trained[b], numbers, columns

    return batch.select(sorted(range(len(batch)), key=key))


def measured(name: str, rewards: Tensor, batch: RolloutBatch, truth: Tensor, label: float | None) -> AuditRow:
    """The figures of one reward; rewards and truth (B,) float64, truth NaN where there is no answer."""
    groups = batch.groups()
    row = AuditRow(
        name=name,
        reward_mean=mean(rewards.tolist()),
        reward_std=mean([rewards[rows].std().item() if len(rows) > 1 else 0.0 for rows in groups.values()]),
        flat_groups=mean([float(is_constant(rewards[rows])) for rows in groups.values()]),
    )
    labelled = {group: rows for group, rows in groups.items() if not bool(truth[rows].isnan().any())}
    if not labelled:
        return row
    top = [truth[rows][rewards[rows] == rewards[rows].max()].mean().item() for rows in labelled.values()]
    average = [truth[rows].mean().item() for rows in labelled.values()]
    flat = [b for rows in labelled.values() for b in rows]
    mixed = [point_biserial(truth[rows], rewards[rows]) for rows in labelled.values() if not is_constant(truth[rows])]
    zero_one = bool(((rewards == 0) | (rewards == 1)).all())
    return replace(
        row,
        top_accuracy=mean(top),
        mean_accuracy=mean(average),
        gain=mean(top) - mean(average),
        gain_interval=gain_interval(
            [a - b for a, b in zip(top, average, strict=True)], [batch.prompt_ids[rows[0]] for rows in labelled.values()]
        ),
        point_biserial=point_biserial(truth[flat], rewards[flat]),
        point_biserial_within=mean(mixed) if mixed else None,
        reward_accuracy=mean([(rewards[rows] == truth[rows]).double().mean().item() for rows in labelled.values()]) if zero_one else None,
        label_accuracy=label,
    )


def gain_interval(gains: Sequence[float], prompt_ids: Sequence[int]) -> tuple[float, float]:
    """The 95 % interval of the mean over groups of top − mean, each pair kept together, when prompts are drawn again.

    The groups of one prompt are drawn together: they are not independent. Their sum is scaled such that the mean over prompts is the mean
    over groups.
    """
    of_prompt: dict[int, list[float]] = {}
    for prompt_id, gain in zip(prompt_ids, gains, strict=True):
        of_prompt.setdefault(prompt_id, []).append(gain)
    values = [math.fsum(own) * len(of_prompt) / len(gains) for own in of_prompt.values()]
    return bootstrap_interval(values, draws=max(200, min(2000, RESAMPLINGS // len(values))))


def label_accuracy(spec: str, rewards: Tensor, batch: RolloutBatch, answers: Mapping[int, str], checker: AnswerChecker) -> float | None:
    """Share of prompts with an answer whose elected label is it; None for a reward that elects none."""
    if spec not in ("majority_voting", "weighted_voting"):
        return None
    votes = vote(batch, checker)
    labels = dict(votes.labels)
    is_right = getattr(checker, "correct", checker.equivalent)
    right = []
    for group, rows in batch.groups().items():
        if spec == "weighted_voting":  # every rollout of the elected class has reward 1, and no other
            elected = [b for b in rows if rewards[b] == 1]
            labels[group] = label_of(elected, votes.answers) if elected else None
        answer, label = answers.get(batch.prompt_ids[rows[0]]), labels[group]
        if answer is not None:
            right.append(float(label is not None and is_right(label, answer)))
    return mean(right) if right else None


def is_constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# ---- a file ----------------------------------------------------------------------------------------------------------------------------


def audit_file(
    path: str | Path, *, answers_kind: str = "auto", data_task: str | None = None, rewards: Sequence[str] | None = None
) -> list[AuditRow]:
    """`audit` of a file that `rollout_file` describes, or of a run directory's samples.

    answers_kind: how answers are found and compared: "math" (\\boxed{}, by math-verify), "exact" (the whole completion), or "auto": as the
        task does it; without a task "math" where any completion has a box, otherwise "exact".
    data_task: the procedural task that the rollouts answer, for its checker and verifier; for samples, by default, the run's own.

    A run's samples come without answers, and whether each rollout is right is what the run wrote down. Raises DataError, RewardError.
    """
    if answers_kind not in ("auto", "math", "exact"):
        raise DataError(f"answers={answers_kind!r}: valid are auto, math, exact")
    if data_task is not None and data_task not in PROCEDURAL_TASKS:
        near = difflib.get_close_matches(data_task, PROCEDURAL_TASKS, 1, 0.5)
        raise DataError(
            f"there is no task {data_task!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Valid are {', '.join(PROCEDURAL_TASKS)}"
        )
    loaded = load_rollouts(path)
    own = run_task(Path(path).expanduser()) if loaded.verdicts is not None else None
    task = PROCEDURAL_TASKS[name] if (name := data_task or own) else None
    checker: AnswerChecker
    if answers_kind == "auto" and task is not None:
        checker = task.checker()
    elif answers_kind == "math" or (answers_kind == "auto" and any(extract_boxed(text) is not None for text in loaded.batch.completions)):
        checker = MathAnswers()
    else:
        checker = ExactAnswers(r"(?s)(.+)")
    answers = loaded.answers
    try:
        asked = checker
        if loaded.verdicts is not None:
            asked, answers = KnownVerdicts(checker, loaded.verdicts), right_answers(loaded)
        return audit(loaded.batch, answers, asked, rewards=rewards, verify=getattr(task, "verify", None))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    finally:
        if isinstance(checker, MathAnswers):
            checker.close()


def run_task(path: Path) -> str | None:
    """The procedural task of the run that these samples are of; None when it has another kind of data, or nothing says."""
    import yaml

    try:
        text = (path if path.is_dir() else path.parent).joinpath(CONFIG_FILE).read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    data = config.get("data") if isinstance(config, dict) else None
    return data if isinstance(data, str) and data in PROCEDURAL_TASKS else None


class KnownVerdicts:
    """A checker that has seen these completions before: it repeats what a run found in them, and leaves equivalence to `checker`.

    An answer of the audit map is here a JSON list of the answers that are right.
    """

    def __init__(self, checker: AnswerChecker, verdicts: Sequence[Verdict]) -> None:
        self.checker = checker
        self.given = {verdict.completion: verdict.given for verdict in verdicts}

    def extract(self, completion: str) -> str | None:
        return self.given[completion] if completion in self.given else self.checker.extract(completion)

    def canonical(self, answer: str) -> str:
        return getattr(self.checker, "canonical", str.strip)(answer)

    def equivalent(self, a: str, b: str) -> bool:
        return self.checker.equivalent(a, b)

    def correct(self, given: str, answer: str) -> bool:
        return given in json.loads(answer)


def right_answers(loaded: RolloutFile) -> dict[int, str]:
    """Prompt id -> the right ones of the answers that were given, in JSON; none of a prompt that the run could not judge."""
    right: dict[int, Counter[str]] = {}
    for prompt_id, verdict in zip(loaded.batch.prompt_ids, loaded.verdicts or [], strict=True):
        if verdict.correct is not None:
            of_prompt = right.setdefault(prompt_id, Counter())
            if verdict.correct and verdict.given is not None:
                of_prompt[verdict.given] += 1
    return {prompt_id: json.dumps(sorted(given)) for prompt_id, given in right.items()}


# ---- what a person sees ----------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[AuditRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells, as many in every row. Columns that would be empty throughout are left out, but for the first three."""
    columns: dict[str, list[str]] = {
        "reward": [row.name for row in rows],
        "value": [number(row.reward_mean, "4g") for row in rows],
        "std in group": [number(row.reward_std, "4g") for row in rows],
        "flat": [number(row.flat_groups, "3f") for row in rows],
        "top": [number(row.top_accuracy, "3f") for row in rows],
        "mean": [number(row.mean_accuracy, "3f") for row in rows],
        "gain": [number(row.gain, "3f", sign="+") for row in rows],
        "95 %": [" … ".join(number(end, "3f", sign="+") for end in row.gain_interval or ()) for row in rows],
        "r in group": [number(row.point_biserial_within, "3f", sign="+") for row in rows],
        "r": [number(row.point_biserial, "3f", sign="+") for row in rows],
        "reward acc.": [number(row.reward_accuracy, "3f") for row in rows],
        "label acc.": [number(row.label_accuracy, "3f") for row in rows],
        "note": [row.missing or "" for row in rows],
    }
    shown = [name for position, (name, cells) in enumerate(columns.items()) if position < 3 or any(cells)]
    return tuple(shown), list(zip(*(columns[name] for name in shown), strict=True))


def number(value: float | None, form: str, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{form}}"
