"""The detectors of `urlvr_fast.monitor` on a run of TRL's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from urlvr_fast.adapters import AdapterError
from urlvr_fast.monitor.alignment import alignment_metrics
from urlvr_fast.monitor.anchors import ANCHORED_MAJORITY, Anchors, anchored_majority
from urlvr_fast.monitor.detectors import STOP_RULE, Detection, Detectors
from urlvr_fast.monitor.signals import signals
from urlvr_fast.rewards.answers import AnswerChecker
from urlvr_fast.rewards.ensemble import vote
from urlvr_fast.trainer.batch import RolloutBatch, build_batch
from urlvr_fast.trainer.rollout import Rollout, Sampling
from urlvr_fast.trainer.watch import MIN_ANCHORS

logger = logging.getLogger(__name__)
ACTIONS = ("off", "warn", "stop")


class Watch:
    """Looks at every batch of rollouts before it is trained on. `ended` once a detector that is to stop the run has fired.

    actions: detector -> one of ACTIONS; those that are not named warn. anchor_prompts: for `anchor_drift`, looked at before the first batch
    and every `anchor_every` batches. Raises AdapterError for other actions and for a rule without its prompts, ValueError for a name that
    is no detector.
    """

    def __init__(
        self, actions: Mapping[str, str], checker: AnswerChecker, anchor_prompts: Sequence[Any], *, anchor_every: int, anchor_votes: int
    ) -> None:
        for name, action in actions.items():
            if action not in ACTIONS:
                raise AdapterError(f"detector {name}: {action!r} cannot be done in TRL's loop; {', '.join(ACTIONS)} can")
        if actions.get(STOP_RULE) == "stop" and not anchor_prompts:
            raise AdapterError(f"{STOP_RULE} looks at anchor_prompts, and there are none: give some prompts, which need no answers")
        self.detectors = Detectors(actions)
        self.anchor_prompts = list(anchor_prompts) if self.detectors.watches(STOP_RULE) else []
        self.ended: Detection | None = None
        self._checker = checker
        self._every, self._votes = anchor_every, anchor_votes
        self._anchors: Anchors | None = None
        self._lines: list[dict[str, Any]] = []  # as in a metrics.jsonl
        self._batches = 0

    def begin(self, global_step: int) -> None:
        """Before a batch. A run that was taken up in the middle has no start to compare with, and says so."""
        if self._batches == 0 and global_step > 0:
            logger.warning("resumed at step %d: the detectors begin anew, without %s, which needs the start model", global_step, STOP_RULE)
            self.anchor_prompts = []

    @property
    def wants_anchors(self) -> bool:
        return bool(self.anchor_prompts) and self._batches % self._every == 0

    def look_at_anchors(
        self,
        rollout: Rollout,
        token_ids: list[list[int]],
        decode: Callable[[list[list[int]]], list[str]],
        temperature: float,
        max_tokens: int,
        seed: int,
    ) -> None:
        """What the weights say now on the anchor prompts, whose tokens these are; the first time, what they are sure of."""

        def sample(sampling: Sampling) -> RolloutBatch:
            return build_batch(
                prompt_token_ids=token_ids,
                prompt_texts=decode(token_ids),
                prompt_ids=list(range(len(token_ids))),
                completions=rollout.generate(token_ids, sampling, seed),
                decode=decode,
                temperature=sampling.temperature,
            )

        if self._anchors is None:
            batch = sample(Sampling(self._votes, temperature, max_tokens))
            self._anchors = Anchors.of(batch, vote(batch, self._checker))
            if len(self._anchors.labels) < MIN_ANCHORS:
                logger.warning(
                    "%s cannot look: the model has a clear vote on %d of the anchor prompts, and it takes %d. Give more prompts, or see "
                    "whether its answers can be read at all",
                    STOP_RULE,
                    len(self._anchors.labels),
                    MIN_ANCHORS,
                )
                self.anchor_prompts = []
                return
        agreement = self._anchors.agreement(sample(Sampling(1, 0.0, max_tokens)), self._checker)
        self._lines.append({"step": self._batches, "eval/anchor_agreement": agreement})

    def look(self, batch: RolloutBatch, rewards: Tensor, answers: Mapping[int, str]) -> dict[str, float]:
        """The batch's figures, of `alignment_metrics`, `signals` and the anchors, after the detectors have seen them."""
        assert batch.entropy is not None
        votes = vote(batch, self._checker)
        figures = alignment_metrics(batch, rewards, answers, self._checker, votes=votes) | signals(batch, rewards, votes)
        figures["actor_entropy"] = float(batch.entropy.mean())
        if self._lines and self._lines[-1].get("eval/anchor_agreement") is not None:
            figures["anchor_agreement"] = self._lines[-1]["eval/anchor_agreement"]
        known = anchored_majority(self._lines)
        self._batches += 1
        self._lines.append({"step": self._batches, "majority_ratio": figures["majority_ratio"]})
        before = self._batches - 1
        if before in known and before > 0:
            figures["anchored_majority"] = known[before]
            if len(known) == 2:  # what the start read is known only now
                self.detectors.update(0, {ANCHORED_MAJORITY: known[0]})
        for detection in self.detectors.update(self._batches, figures | {ANCHORED_MAJORITY: figures.get("anchored_majority")}):
            logger.warning("batch %d: %s", self._batches, detection.message)
            if detection.action == "stop" and self.ended is None:
                self.ended = detection
        return figures
