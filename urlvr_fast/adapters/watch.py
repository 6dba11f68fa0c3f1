"""The detectors of `urlvr_fast.monitor` on a run of another trainer's."""

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
UNMEASURED = "kl_spike"  # needs log-probs under the start model
# The detectors' limits are for figures of a batch of `urlvr train`. TRL's default is one prompt a batch, whose figures jump by more than
# that: batches are pooled until they hold so many prompts.
PROMPTS = 16


class Watch:
    """Looks at every batch of rollouts before it is trained on. `ended` is the detection that was to stop the run, once there is one.

    actions: detector -> one of ACTIONS; those that are not named warn. anchor_prompts: for `anchor_drift`, looked at before the first batch
    and every `anchor_every` batches. says: whether this process is the one that speaks for all.

    Raises AdapterError for other actions, a rule without its prompts and one that cannot be measured here; ValueError for a name that is no
    detector.
    """

    def __init__(
        self,
        actions: Mapping[str, str],
        checker: AnswerChecker,
        anchor_prompts: Sequence[Any] = (),
        *,
        anchor_every: int = 10,
        anchor_votes: int = 16,
        says: bool = True,
    ) -> None:
        for name, action in actions.items():
            if action not in ACTIONS:
                raise AdapterError(f"detector {name}: {action!r} cannot be done in another trainer's loop; {', '.join(ACTIONS)} can")
        if actions.get(UNMEASURED, "off") != "off":
            raise AdapterError(
                f"detector {UNMEASURED} looks at the distance from the start model, which is not measured in another trainer's loop"
            )
        if actions.get(STOP_RULE) == "stop" and not anchor_prompts:
            raise AdapterError(f"{STOP_RULE} looks at anchor_prompts, and there are none: give some prompts, which need no answers")
        self.ended: Detection | None = None
        self._detectors = Detectors(actions)
        self.anchor_prompts = list(anchor_prompts) if self._detectors.watches(STOP_RULE) else []
        self._checker = checker
        self._every, self._votes, self._says = anchor_every, anchor_votes, says
        self._anchors: Anchors | None = None
        self._lines: list[dict[str, Any]] = []  # for `anchored_majority`, as in a metrics.jsonl
        self._readings: list[tuple[int, dict[str, float]]] = []  # all that the detectors were shown
        self._pool: list[tuple[int, dict[str, float]]] = []  # batches that wait for others: prompts, figures
        self._batches = 0

    # ---- a run that goes on ------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        labels = None if self._anchors is None else dict(self._anchors.labels)
        return {"batches": self._batches, "anchors": labels, "lines": self._lines, "readings": self._readings}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What fired stays fired; a rule that ended the run before does not do so again."""
        self._batches, self._lines = state["batches"], list(state["lines"])
        if state["anchors"] is not None:
            self._set_anchors({int(prompt): answer for prompt, answer in state["anchors"].items()})
        for step, figures in state["readings"]:
            self._show(step, figures, again=True)

    def begin(self, global_step: int) -> None:
        """Before a batch. A run that was taken up in the middle without its state has no start to compare with, and says so."""
        if self._batches == 0 and global_step > 0 and self.anchor_prompts:
            self._warn(
                f"resumed at step {global_step} from a checkpoint without this watch's state: {STOP_RULE}, which needs the start, is off"
            )
            self.anchor_prompts = []

    # ---- anchors -----------------------------------------------------------------------------------------------------------------------

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
            self._set_anchors(Anchors.of(batch, vote(batch, self._checker)).labels)
        if self._anchors is not None and self.anchor_prompts:
            agreement = self._anchors.agreement(sample(Sampling(1, 0.0, max_tokens)), self._checker)
            self._lines.append({"step": self._batches, "eval/anchor_agreement": agreement})

    def _set_anchors(self, labels: Mapping[int, str]) -> None:
        self._anchors = Anchors(labels)
        if len(labels) < MIN_ANCHORS:
            self._warn(
                f"{STOP_RULE} cannot look: the start model has a clear vote on {len(labels)} of the anchor prompts, and it takes "
                f"{MIN_ANCHORS}. Give more prompts, or see whether its answers can be read at all"
            )
            self.anchor_prompts = []

    # ---- batches -----------------------------------------------------------------------------------------------------------------------

    def figures(self, batch: RolloutBatch, rewards: Tensor, answers: Mapping[int, str]) -> dict[str, float]:
        """Of `alignment_metrics`, those against the truth where there are answers, and of `signals`."""
        assert batch.entropy is not None
        votes = vote(batch, self._checker)
        found = alignment_metrics(batch, rewards, answers, self._checker, votes=votes) | signals(batch, rewards, votes)
        return found | {"actor_entropy": float(batch.entropy.mean())}

    def look(self, batch: RolloutBatch, rewards: Tensor, answers: Mapping[int, str]) -> dict[str, float]:
        """The figures of a batch that is to be trained on, and of the anchors where they were just looked at."""
        figures = self.figures(batch, rewards, answers) | self._anchor_figures()
        self._batches += 1
        self._pool.append((len(batch.groups()), figures))
        prompts = sum(count for count, _ in self._pool)
        if prompts >= PROMPTS:
            names = set.intersection(*(set(of_batch) for _, of_batch in self._pool))
            pooled = {name: sum(count * of_batch[name] for count, of_batch in self._pool) / prompts for name in sorted(names)}
            self._pool = []
            self._lines.append({"step": self._batches, "majority_ratio": pooled["majority_ratio"]})
            self._show(self._batches, pooled)
        return figures

    def _anchor_figures(self) -> dict[str, float]:
        """Where the anchors were just looked at, before this batch: their agreement, and the reading that the stop rule is shown."""
        last = self._lines[-1] if self._lines else {}
        if last.get("step") != self._batches or "eval/anchor_agreement" not in last:
            return {}
        figures, readings = {"anchor_agreement": last["eval/anchor_agreement"]}, anchored_majority(self._lines)
        if self._batches > 0 and self._batches in readings:
            if len(readings) == 2 and 0 in readings:  # what the start read is known only now
                self._show(0, {ANCHORED_MAJORITY: readings[0]})
            figures["anchored_majority"] = readings[self._batches]
            self._show(self._batches, {ANCHORED_MAJORITY: readings[self._batches]})
        return figures

    def _show(self, step: int, figures: dict[str, float], *, again: bool = False) -> None:
        self._readings.append((step, figures))
        for detection in self._detectors.update(step, figures):
            if not again:
                self._warn(f"after {step} batches: {detection.message}")
                if detection.action == "stop" and self.ended is None:
                    self.ended = detection

    def _warn(self, message: str) -> None:
        if self._says:
            logger.warning(message)
