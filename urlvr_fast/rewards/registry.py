"""From `reward=…` in a configuration to a reward, and the checked call that the training loop makes."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.rewards import STATISTICS, Policy, Reward, RewardError, reward_name, rollout_text
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.certainty import Probability, SelfCertainty, TokenEntropy, TrajectoryEntropy
from urlvr_fast.rewards.ensemble import MajorityVoting
from urlvr_fast.rewards.external import GroundTruth

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

REWARDS: dict[str, Callable[..., Any]] = {
    "majority_voting": MajorityVoting,
    "self_certainty": SelfCertainty,
    "token_entropy": TokenEntropy,
    "trajectory_entropy": TrajectoryEntropy,
    "probability": Probability,
    "ground_truth": GroundTruth,
}
LOCATE_SECONDS = 30.0  # spent at most on finding the rollout on which a reward fails
ALIASES = {"token_level_entropy": "token_entropy", "trajectory_level_entropy": "trajectory_entropy"}  # the released code's names


def build_reward(
    spec: str, *, checker: AnswerChecker, answers: Mapping[int, str] | None = None, options: Mapping[str, Any] | None = None
) -> Reward:
    """The reward that `spec` names: one of `REWARDS` (or `ALIASES`), `package.module.name`, `package.module:name`, `path/to/file.py:name`.

    `options` are keyword arguments: of the constructor for a class, of every call for a function. Only `ground_truth` receives `answers`.
    Raises RewardError: unknown name (with the nearest valid one), nothing to import there, options that do not fit, unknown `needs`.
    """
    options = dict(options or {})
    name = ALIASES.get(spec, spec)
    if name in REWARDS:
        given: dict[str, Any] = {}
        if name in ("majority_voting", "ground_truth"):
            given["checker"] = checker
        if name == "ground_truth":
            given["answers"] = answers
        if name == "ground_truth" and not answers:
            raise RewardError("reward=ground_truth needs answers, and this data has none: check prompts.answer_column")
        reward = construct(spec, REWARDS[name], given, options)
    elif "." in spec or ":" in spec:
        target = import_reward(spec)
        reward = construct(spec, target, {}, options) if inspect.isclass(target) else with_options(spec, target, options)
    else:
        near = difflib.get_close_matches(spec, [*REWARDS, *ALIASES], 1, 0.4)
        raise RewardError(
            f"there is no reward {spec!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f" Valid are {', '.join(REWARDS)}, "
            "a dotted path (package.module.function) or a file (path/to/file.py:function)"
        )
    if unknown := reward_needs(reward) - STATISTICS:
        raise RewardError(f"reward {spec} needs {', '.join(sorted(unknown))}; a batch can have {', '.join(sorted(STATISTICS))}")
    return reward


def construct(spec: str, cls: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> Any:
    """`cls(**given, **options)`, with a clear error when the options do not fit."""
    valid = [name for name in inspect.signature(cls).parameters if name not in given]
    try:
        inspect.signature(cls).bind(**given, **options)
    except TypeError as error:
        raise RewardError(f"reward_options of {spec}: {error}; its options are {', '.join(valid) or 'none'}") from None
    reward = cls(**given, **options)
    if not callable(reward):
        raise RewardError(f"reward {spec} is a class whose objects cannot be called: give it __call__(self, batch, policy)")
    return reward


def with_options(spec: str, function: Any, options: dict[str, Any]) -> Any:
    """A function with its options bound; it keeps its name and its `needs`."""
    if not callable(function):
        raise RewardError(f"reward {spec} is a {type(function).__name__}, not a function or class")
    try:
        inspect.signature(function).bind(None, None, **options)
    except TypeError as error:
        raise RewardError(f"reward {spec} is called as {reward_name(function)}(batch, policy, **reward_options): {error}") from None
    if not options:
        return function
    bound = functools.partial(function, **options)
    functools.update_wrapper(bound, function)
    return bound


def import_reward(spec: str) -> Any:
    """The object at a dotted path or in a file. Importing runs that module: it is the user's own code."""
    if ":" in spec:
        source, _, attribute = spec.rpartition(":")
    else:
        source, _, attribute = spec.rpartition(".")
    try:
        module = import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except (ImportError, SyntaxError) as error:
        raise RewardError(
            f"cannot import {source!r} for reward {spec}: {error}. A module that is not installed is named by its file: "
            f"path/to/file.py:{attribute}"
        ) from error
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        near = difflib.get_close_matches(attribute, public, 1)
        raise RewardError(f"{source} has no {attribute!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return getattr(module, attribute)


def import_file(path: Path) -> Any:
    if not path.is_file():
        raise RewardError(f"there is no file {path} to take a reward from")
    name = f"urlvr_fast_user_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def reward_needs(reward: Any) -> frozenset[str]:
    """The statistics a reward wants filled in before it is called; none when it does not say."""
    return frozenset(getattr(reward, "needs", ()))


def call_reward(reward: Any, batch: RolloutBatch, policy: Policy | None) -> Tensor:
    """`reward(batch, policy)` as (B,) fp32 on the CPU, detached, all finite. A list of numbers will do as well as a tensor.

    Raises RewardError, naming the function and where it can the prompt and the rollout, when a statistic it needs is missing, when it
    raises, and when it returns something else than B finite numbers.
    """
    name = reward_name(reward)
    for field in sorted(reward_needs(reward)):
        if getattr(batch, field) is None:
            raise RewardError(
                f"reward {name} needs batch.{field}, which nobody filled: have it taken while sampling or score the batch first"
            )
    try:
        values = reward(batch, policy)
    except RewardError:
        raise
    except Exception as error:
        culprit = first_failing(reward, batch, policy, type(error))
        where = f" It fails the same way on {rollout_text(batch, culprit)} alone." if culprit is not None else ""
        raise RewardError(f"reward {name} raised {type(error).__name__}: {error}.{where}") from error
    return checked(values, name, batch)


def first_failing(reward: Any, batch: RolloutBatch, policy: Policy | None, error: type[Exception]) -> int | None:
    """The first rollout on which the reward raises the same kind of error by itself; None when it takes several, or LOCATE_SECONDS."""
    deadline = time.monotonic() + LOCATE_SECONDS
    for index in range(len(batch)):
        if time.monotonic() > deadline:
            return None
        try:
            reward(batch.select([index]), policy)
        except error:
            return index
        except Exception:  # noqa: BLE001  we are only looking for a better message about another error
            continue
    return None


def checked(values: Any, name: str, batch: RolloutBatch) -> Tensor:
    """`values` as a tensor, or RewardError."""
    if isinstance(values, Tensor):
        rewards = values.detach()
    elif hasattr(values, "__len__") and not isinstance(values, (str, bytes, Mapping)):
        rewards = numbers_of(list(values), name, batch)
    else:
        raise RewardError(f"reward {name} returned a {type(values).__name__}; it must return one number per rollout, as a tensor or a list")
    if rewards.shape != (len(batch),):
        too_short = rewards.dim() == 1 and len(rewards) < len(batch)
        raise RewardError(
            f"reward {name} returned shape {tuple(rewards.shape)} for {len(batch)} rollouts; it must be ({len(batch)},)."
            + (f" The first without a reward is {rollout_text(batch, len(rewards))}." if too_short else "")
        )
    if rewards.is_complex():
        raise RewardError(f"reward {name} returned complex numbers")
    rewards = rewards.to(device="cpu", dtype=torch.float32)
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise RewardError(
            f"reward {name} returned {rewards[bad[0]].item()} for {rollout_text(batch, bad[0])} ({len(bad)} such rewards in all)"
        )
    return rewards


def numbers_of(values: list[Any], name: str, batch: RolloutBatch) -> Tensor:
    numbers = []
    for index, value in enumerate(values):
        try:
            if isinstance(value, str):
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):
            where = rollout_text(batch, index) if index < len(batch) else f"position {index}"
            raise RewardError(f"reward {name} returned {value!r:.80}, which is not a number, for {where}") from None
    return torch.tensor(numbers, dtype=torch.float64)
