"""What the monitor does in a run: it looks at every step, and stops, goes back or lowers the rate as was asked for.

The rules are in `urlvr_fast.monitor`; this is their hand in the loop. Nothing here sees an answer but `collapsed` and `collapse_summary`,
which measure the Model Collapse Step.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from urlvr_fast.monitor.anchors import ANCHORED_MAJORITY, Anchors, anchored_majority
from urlvr_fast.monitor.collapse import collapse_steps, model_collapse_step, reward_accuracy_series
from urlvr_fast.monitor.detectors import STOP_RULE, Detection
from urlvr_fast.rewards.ensemble import vote
from urlvr_fast.trainer.evaluate import EVAL_SEED, sample_batch
from urlvr_fast.trainer.logging import RunLog, read_jsonl, write_json
from urlvr_fast.trainer.rollout import Sampling, mixed_seed

if TYPE_CHECKING:
    from urlvr_fast.trainer.loop import Run

ANCHOR_SEED = EVAL_SEED - 1
MIN_ANCHORS = 8  # fewer clear votes say nothing when they change


def look_back(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Add to the step's metrics what follows from the steps before."""
    run.lines.append({"step": step, **metrics})
    if step and "eval/anchor_agreement" in metrics:
        metrics[ANCHORED_MAJORITY] = run.lines[-1][ANCHORED_MAJORITY] = anchored_majority(run.lines)[step]


def detect(run: Run, step: int, metrics: dict[str, float]) -> Detection | None:
    """Let the detectors look at a step, and do what was asked for what they find. Returns the detection that ends the run, if one does."""
    config, ended = run.config.monitor, None
    readings = anchored_majority(run.lines) if ANCHORED_MAJORITY in metrics else {}
    if 0 in readings and len(readings) == 2:  # what the start read is known only now
        run.detectors.update(0, {ANCHORED_MAJORITY: readings[0]})
    for detection in run.detectors.update(step, metrics):
        run.log.detect(detection)
        if detection.action == "lower_rate":
            run.learner.rate_scale *= config.rate_factor
        elif detection.action == "rollback" or (detection.action == "stop" and ended is None):
            ended = detection
    if ended is not None and ended.action == "rollback" and run.good_weights is not None:
        run.loaded.model.load_state_dict(run.good_weights)
        run.learner.optimizer.state.clear()  # its moments belong to the weights that are left behind
        run.rollout.sync(run.learner.weights())
    elif (
        run.detectors.calm
        and any(name.startswith("eval/") for name in metrics)
        and readings.get(step, 0.0) >= max(readings.values(), default=0.0)
    ):
        keep_good(run, step)
    return ended


def keep_good(run: Run, step: int) -> None:
    """Remember the present weights, in host memory, where a rollback may be asked for."""
    if run.detectors.may_roll_back:
        run.good_weights = {name: value.detach().to("cpu", copy=True) for name, value in run.loaded.model.state_dict().items()}
        run.good_step = step


def collapsed(run: Run, step: int) -> Detection | None:
    """The end of a run that `monitor.stop_at_collapse` asked to end at its Model Collapse Step. It is exact, so it needs answers."""
    threshold = run.config.monitor.stop_at_collapse
    if threshold is None:
        return None
    steps, accuracy = reward_accuracy_series(run.lines)
    reached = model_collapse_step(steps, accuracy, threshold) if steps else None
    if reached is None or reached.persistent is None or reached.windowed is None:
        return None
    sentence = f"Reward Accuracy has stayed below {threshold:g} since step {reached.persistent} (monitor.stop_at_collapse)"
    return Detection(step, "stop_at_collapse", "stop", accuracy[-1], threshold, sentence)


def went_back(run: Run, ended: Detection) -> str:
    if ended.action != "rollback":
        return ""
    if run.good_weights is None:
        return "; there was no earlier evaluation to go back to"
    return f"; the weights in the last checkpoint are those of step {run.good_step}"


def take_up_monitor(run: Run) -> None:
    """Bring the monitor of a resumed run to where it was, from its log: what fired stays fired, rates stay lowered."""
    path, step = run.log.run_dir / "anchors.json", 0
    # Anchors made now would be those of a model that is half trained.
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run.anchors = Anchors({int(id): answer for id, answer in saved.items()})
    run.lines = read_jsonl(run.log.run_dir / "metrics.jsonl")
    readings = anchored_majority(run.lines)
    for line in run.lines:
        step = int(line["step"])
        reading = {ANCHORED_MAJORITY: readings[step]} if step in readings else {}
        for detection in run.detectors.update(step, line | reading):
            if detection.action == "lower_rate":
                run.learner.rate_scale *= run.config.monitor.rate_factor
            elif detection.action in ("stop", "rollback"):
                run.log.warn(step, f"{detection.detector} has ended this run before and will not do so again")
    # The weights at the best reading are gone; those of the checkpoint are the best that there is to go back to.
    if run.detectors.calm:
        keep_good(run, step)
    warn_of_few_anchors(run, step)


def warn_of_few_anchors(run: Run, step: int) -> None:
    """The default stop rule without anything to hold on to must not look like one that is content."""
    assert run.anchors is not None
    if len(run.anchors.labels) < MIN_ANCHORS and run.detectors.watches(STOP_RULE) and run.config.trainer.eval_every:
        run.log.warn(
            step,
            f"{STOP_RULE} cannot look: the start model has a clear vote on {len(run.anchors.labels)} of the evaluation prompts, and it "
            f"takes {MIN_ANCHORS}. Use more evaluation prompts (eval.prompts), or see whether its answers can be read at all",
        )


def collapse_summary(log: RunLog) -> dict[str, dict[str, object]]:
    """The Model Collapse Step at every threshold, as summary.json keeps it; empty where there are no answers to tell."""
    steps, accuracy = reward_accuracy_series(read_jsonl(log.run_dir / "metrics.jsonl"))
    return {name: asdict(step) for name, step in collapse_steps(steps, accuracy).items()} if steps else {}


def find_anchors(run: Run) -> Anchors:
    """The clear votes of the present weights, those that training starts from, on the evaluation prompts; written to anchors.json.

    None are looked for where nobody would look at them again: the stop rule is off, or there is no evaluation until the end.
    """
    config = run.config
    if not (run.detectors.watches(STOP_RULE) and config.trainer.eval_every):
        return Anchors({})
    sampling = Sampling(config.monitor.anchor_votes, config.rollout.temperature, config.rollout.max_tokens)
    everyone = range(len(run.eval_encoded))
    seed = mixed_seed(config.seed, ANCHOR_SEED)
    batch = sample_batch(run.rollout, run.eval_prompts, run.eval_encoded, everyone, sampling, seed, run.loaded.decode)
    anchors = Anchors.of(batch, vote(batch, run.eval_prompts.checker))
    write_json(run.log.run_dir / "anchors.json", anchors.labels)
    return anchors
