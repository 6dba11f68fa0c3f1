"""The call that a training loop makes: a reward's result is B finite numbers, or an error that names function, prompt and rollout."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from urlvr_fast.rewards import Policy, RewardError, reward_name, rollout_text

if TYPE_CHECKING:
    from urlvr_fast.trainer.batch import RolloutBatch

LOCATE_SECONDS = 30.0  # spent at most on finding the rollout on which a reward fails


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
