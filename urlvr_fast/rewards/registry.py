"""From `reward=…` in a configuration to a reward, and the checked call that the training loop makes."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from urlvr_fast.rewards import STATISTICS, Reward, RewardError, reward_name
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.certainty import Probability, SelfCertainty, TokenEntropy, TrajectoryEntropy
from urlvr_fast.rewards.checked_call import call_reward as call_reward
from urlvr_fast.rewards.checked_call import reward_needs as reward_needs
from urlvr_fast.rewards.covo import CoVo
from urlvr_fast.rewards.cross_view import CrossViewVoting
from urlvr_fast.rewards.disparity import ProbabilityDisparity
from urlvr_fast.rewards.ensemble import MajorityVoting, WeightedVoting
from urlvr_fast.rewards.external import GroundTruth
from urlvr_fast.rewards.mixture import Mixture
from urlvr_fast.rewards.next_token import NextToken
from urlvr_fast.rewards.procedural import Procedural, Verify
from urlvr_fast.rewards.restrain import Restrain
from urlvr_fast.rewards.self_verification import SelfVerification, VerificationPrompt
from urlvr_fast.rewards.semantic import SemanticClusters

REWARDS: dict[str, Callable[..., Any]] = {
    # from what the rollouts of a prompt agree on
    "majority_voting": MajorityVoting,
    "weighted_voting": WeightedVoting,
    "cross_view_voting": CrossViewVoting,
    "semantic_clusters": SemanticClusters,
    "covo": CoVo,
    "restrain": Restrain,
    # from the sampling distribution alone
    "self_certainty": SelfCertainty,
    "token_entropy": TokenEntropy,
    "trajectory_entropy": TrajectoryEntropy,
    "probability": Probability,
    "probability_disparity": ProbabilityDisparity,
    # from outside
    "self_verification": SelfVerification,
    "procedural": Procedural,
    "next_token": NextToken,
    "ground_truth": GroundTruth,
    "mixture": Mixture,
}
ALIASES = {  # the released codes' names
    "empo": "semantic_clusters",
    "token_level_entropy": "token_entropy",
    "trajectory_level_entropy": "trajectory_entropy",
    "self_verify": "self_verification",
}


def build_reward(
    spec: str,
    *,
    checker: AnswerChecker,
    answers: Mapping[int, str] | None = None,
    options: Mapping[str, Any] | None = None,
    verify: Verify | None = None,
    verification_prompt: VerificationPrompt | None = None,
    verdicts: Sequence[str] = ("True", "False"),
) -> Reward:
    """The reward that `spec` names: one of `REWARDS` (or `ALIASES`), `package.module.name`, `package.module:name`, `path/to/file.py:name`.

    options: keyword arguments: of the constructor for a class, of every call for a function.
    answers: the audit map; only `ground_truth` receives it.
    verify: the task's procedural verifier, of a response and the prompt's columns, for `procedural`; None where the task has none.
    verification_prompt, verdicts: how `self_verification` asks about this task, and the two texts that are its answers.

    Raises RewardError: unknown name (with the nearest valid one), nothing to import there, options that do not fit, unknown `needs`, a
    reward that wants what this task or data has not got.
    """
    options = dict(options or {})
    name = ALIASES.get(spec, spec)
    if name in REWARDS:
        if name == "ground_truth" and not answers:
            raise RewardError("reward=ground_truth needs answers, and this data has none: check prompts.answer_column")
        if name == "procedural" and verify is None:
            raise RewardError("reward=procedural needs a task that brings a verifier, and this data has none: use such a task")

        def build(part: str, part_options: Mapping[str, Any]) -> Reward:  # of a mixture, which keeps neither this nor the answers
            task: dict[str, Any] = {"verify": verify, "verification_prompt": verification_prompt, "verdicts": verdicts}
            return build_reward(part, checker=checker, answers=answers, options=part_options, **task)

        resources: dict[str, Any] = {"checker": checker, "verify": verify, "prompt": verification_prompt, "build": build}
        if name == "ground_truth":
            resources["answers"] = answers
        if "verdicts" not in options:
            resources["verdicts"] = verdicts
        wanted = inspect.signature(REWARDS[name]).parameters
        given = {resource: value for resource, value in resources.items() if resource in wanted}
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
    try:
        reward = cls(**given, **options)
    except RewardError:
        raise
    except (TypeError, ValueError) as error:  # an option of the wrong type
        raise RewardError(f"reward_options of {spec}: {error}") from error
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
