"""`python -m benches.gpu_check`: see the package for what is done. `--stages a,b` does a part of it, `--seconds` is for all of it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from benches.gpu_check import FOUND_WRONG, RIGHT, UNCHECKED, WRONG, summary
from benches.gpu_check.rates import clocks
from benches.machine import ROOT, commit, describe, slug, write_whole

TAIL = 6000  # characters of a stage's output that are kept
GRACE = 15  # seconds that a stage may take beyond its share before it is killed
TESTS = ("test_gpu", "test_kernel_options", "test_ops_group_advantages", "test_ops_linear", "test_ops_loss_properties")
TESTS += ("test_ops_policy_loss", "test_ops_registered", "test_ops_token_stats")


def environment() -> dict[str, str]:
    """Of the stages: fp32 products are fp32, and nobody asks a hub that cannot be reached."""
    return {name: value for name, value in os.environ.items() if name != "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"} | {"HF_HUB_OFFLINE": "1"}


@dataclass
class Check:
    """What the stages share."""

    out: Path  # folder
    quick: bool
    pytest: list[str]  # further arguments
    environment: dict[str, str] = field(default_factory=environment)
    architecture: str = ""

    def path(self, name: str) -> Path:
        return self.out / f"{name}.json"


@dataclass(frozen=True)
class Stage:
    name: str
    weight: float  # of the time that is left
    command: Callable[[Check, float], list[str]]  # for so many seconds
    variables: Callable[[Check], dict[str, str]] = lambda check: {}
    least: float = 0  # seconds that it may take whatever its share


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _build(check: Check, seconds: float) -> list[str]:
    return _module("pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-e", ".")


def _rates(check: Check, seconds: float) -> list[str]:
    return _module("benches.gpu_check.rates", "--out", str(check.path("rates")), *(["--quick"] if check.quick else []))


def _tests(check: Check, seconds: float) -> list[str]:
    files = [f"tests/{name}.py" for name in TESTS]
    parallel = ["-n", str(max(2, min(12, (os.cpu_count() or 2) - 2))), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    # One that hangs is named, and the process that it hangs in is given up.
    limited = ["--timeout", "120", "--timeout-method", "thread"] if importlib.util.find_spec("pytest_timeout") else []
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return _module("pytest", *options, *limited, *parallel, *files, *check.pytest)


def _sanitized(check: Check, seconds: float) -> list[str]:
    return _module("benches.gpu_check.sanitized", "--out", str(check.path("sanitized")), "--seconds", f"{seconds:.0f}")


def _ops(check: Check, seconds: float) -> list[str]:
    quick = ["--only", "4,64", "--providers", "urlvr_fast,eager", "--rounds", "1"] if check.quick else ["--seconds", "1.5"]
    return _module("benches", "--no-memory", "--budget", f"{seconds:.0f}", "--out", str(check.path("ops")), *quick)


def _linear(check: Check, seconds: float) -> list[str]:
    quick = ["--quick", "--peers", "eager", "--rounds", "1"] if check.quick else ["--seconds", "3"]
    return _module("benches.linear", "--budget", f"{seconds:.0f}", "--out", str(check.path("linear")), *quick)


def _grid(check: Check, seconds: float) -> list[str]:
    quick = ["--only", "2,64", "--only", "3,96", "--providers", "urlvr_fast,eager", "--rounds", "1"] if check.quick else ["--rounds", "15"]
    return _module("benches", "--grid", "--seconds", "0.4", "--budget", f"{seconds:.0f}", "--out", str(check.path("grid")), *quick)


def _trainer(check: Check, seconds: float) -> list[str]:
    size = "tiny" if check.quick else "small"
    engine = ["--engine", "hf"] if seconds < 150 else []  # vLLM takes a minute to start
    return _module("benches.gpu_check.trainer", "--size", size, "--seconds", f"{seconds:.0f}", "--out", str(check.path("trainer")), *engine)


def _counters(check: Check, seconds: float) -> list[str]:
    return _module("benches.gpu_check.counters", "--out", str(check.path("counters")), "--seconds", f"{seconds:.0f}")


STAGES = (
    Stage("build", 45, _build, variables=lambda check: {"TORCH_CUDA_ARCH_LIST": check.architecture}, least=200),
    Stage("rates", 15, _rates),
    Stage(
        "tests",
        180,
        _tests,
        variables=lambda check: {
            "URLVR_FAST_TEST_DEVICE": os.environ.get("URLVR_FAST_TEST_DEVICE", "cuda"),
            "URLVR_FAST_TEST_LOG": str(check.out / "tests.jsonl"),
            **{"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},  # of each of a dozen processes
        },
        least=200,
    ),
    Stage("sanitized", 80, _sanitized),
    Stage("ops", 90, _ops),
    Stage("linear", 70, _linear),
    Stage("grid", 45, _grid),
    Stage("trainer", 75, _trainer),
    Stage("counters", 35, _counters),
)
# What xdist says of a test whose worker is gone: over the limit of a test, or by a fault that says nothing of a result.
ENDED = re.compile(r"worker '\w+' crashed")
# Where csrc does not compile: Triton's kernels are there through an installation too.
WITHOUT_CSRC = Stage("build without csrc", 0, _build, variables=lambda check: {"URLVR_FAST_BUILD": "0"})


def missing(building: bool) -> list[str]:
    """What this machine lacks, each with what to do."""
    found = []
    if torch.version.cuda is None and not torch.cuda.is_available():
        found.append(f"torch {torch.__version__} is a build without CUDA: install one with it")
    elif not torch.cuda.is_available():
        found.append("torch sees no GPU: run this where `nvidia-smi` shows one")
    if tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 11):
        found.append(f"torch {torch.__version__} is too old: 2.11 or newer")
    if building and int(metadata.version("setuptools").split(".")[0]) < 77:
        found.append("setuptools is older than 77: a newer one may lie in the folder of --wheels")
    for module in ("triton", "pytest", "hypothesis", "pip"):
        if importlib.util.find_spec(module) is None:
            found.append(f"{module} is not installed: its wheel may lie in the folder of --wheels")
    return found


def install_wheels(folder: Path, check: Check) -> list[str]:
    """Put a folder's wheels on the path of this process and of the stages. Their names."""
    wheels = sorted(folder.glob("*.whl"))
    if wheels and importlib.util.find_spec("pip") is not None:
        target = ROOT / "build" / "gpu_check" / "site"
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(target)]
        subprocess.run(_module("pip", "install", "-q", "--disable-pip-version-check", *options, *map(str, wheels)), check=True)
        check.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), check.environment.get("PYTHONPATH", "")]))
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()
    return [wheel.name for wheel in wheels]


def run_stage(stage: Stage, check: Check, seconds: float) -> dict:
    """Its record: how it ended, how long it took, and the end of what it printed."""
    command = stage.command(check, max(1.0, seconds - GRACE / 2))
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        environment = check.environment | stage.variables(check) | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it left running would disturb the next one
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    ended = {"status": status, "killed": status is None, "seconds": round(time.monotonic() - begin, 1), "allowed": round(seconds, 1)}
    return {"command": [Path(command[0]).name, *command[1:]], **ended, "tail": said[-TAIL:]}


def collect(stage: Stage, check: Check, record: dict) -> dict:
    """The record with what a stage wrote that has no file of its own."""
    if stage.name in ("rates", "sanitized", "trainer", "counters") and check.path(stage.name).exists():
        with contextlib.suppress(ValueError):  # of a stage that was killed while it wrote
            record["result"] = json.loads(check.path(stage.name).read_text())
        check.path(stage.name).unlink()
    log = check.out / "tests.jsonl"
    if stage.name == "tests" and log.exists():
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        ended = [line for line in lines if ENDED.search(line.get("said", ""))]
        lines = [line for line in lines if line not in ended]
        counts = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in ("passed", "failed", "skipped")}
        failures = shortened([line for line in lines if line["outcome"] == "failed"])
        record["result"] = counts | {"failures": failures, "ended": [line["test"] for line in ended]}
        log.unlink()
    return record


def shortened(failures: list[dict], whole: int = 3) -> list[dict]:
    """All of them: the first few of each test and backend with what they said, the others with its last line."""
    seen: Counter[tuple] = Counter()
    out = []
    for failure in failures:
        function, _, parameters = failure["test"].partition("[")
        kind = function, *sorted({"triton", "cuda", "torch"} & set(re.split(r"\W", parameters)))
        seen[kind] += 1
        said = failure.get("said", "")
        out.append(failure | {"said": said if seen[kind] <= whole else said.strip().rpartition("\n")[2]})
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benches.gpu_check", description=__doc__, formatter_class=raw)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", default=",".join(names), help="some of these, with commas between (default: all)")
    parser.add_argument("--seconds", type=float, default=530, help="for all stages together (default %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results", help="folder for the JSON (default %(default)s)")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels for the path (default %(default)s)")
    parser.add_argument("--commit", help="of the checkout, where it is a copy without .git")
    parser.add_argument("--pytest", action="append", default=[], metavar="ARGUMENT", help="for the tests; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to try the command itself")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    chosen = [stage for stage in STAGES if stage.name in options.stages.split(",")]
    if unknown := set(options.stages.split(",")) - set(names):
        parser.error(f"--stages: no such stage: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    check = Check(options.out, options.quick, options.pytest)
    if options.commit:
        check.environment["URLVR_FAST_COMMIT"] = os.environ["URLVR_FAST_COMMIT"] = options.commit
    wheels = install_wheels(options.wheels, check)
    if lacking := missing(building=any(stage.name == "build" for stage in chosen)):
        print("gpu-check cannot run here:\n" + "\n".join(f"  {line}" for line in lacking), file=sys.stderr)
        return UNCHECKED

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability()
    check.architecture = f"{major}.{minor}" + ("a" if major >= 9 else "")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {"machine": describe(device), "clocks": clocks(), "time": now, "wheels": wheels, "stages": {}}
    name = re.sub(r"[^\w.-]", "-", f"{slug(device)}-{now[:10]}-{commit() or 'unknown'}")
    path = check.out / f"gpu-check-{name}.json"
    for number, stage in enumerate(chosen):
        left = options.seconds - (time.monotonic() - begin)
        share = min(left, max(stage.least, left * stage.weight / sum(other.weight for other in chosen[number:])))
        if share < 3:
            result["stages"][stage.name] = {"absent": "no time was left"}
            continue
        print(f"[{time.monotonic() - begin:5.0f} s] {stage.name}, {share:.0f} s", file=sys.stderr, flush=True)
        record = collect(stage, check, run_stage(stage, check, share))
        result["stages"][stage.name] = record
        if record["status"] != 0:
            print(record["tail"][-1500:], file=sys.stderr, flush=True)
            if stage.name == "build":
                for stale in (ROOT / "urlvr_fast").glob("_C*.so"):
                    stale.unlink()
                result["stages"][WITHOUT_CSRC.name] = run_stage(WITHOUT_CSRC, check, min(60, left))
        write_whole(path, result)
    result["seconds"] = round(time.monotonic() - begin)
    for kind, prefix in (("ops", ""), ("linear", "linear-"), ("grid", "grid-")):
        if check.path(kind).exists():
            result["stages"].get(kind, {})["file"] = f"{prefix}{name}.json"
            check.path(kind).rename(check.out / f"{prefix}{name}.json")
    result["verdict"] = verdict(result, chosen, check.out)
    write_whole(path, result)
    print(summary.text(result, check.out))
    print(f"\nwritten: {path}", file=sys.stderr)
    return {"right": RIGHT, "wrong": WRONG, "unchecked": UNCHECKED}[result["verdict"]["all"]]


def verdict(result: dict, chosen: Sequence[Stage], folder: Path) -> dict:
    """What is wrong, what was not checked, and one word for all of it."""
    wrong, unchecked = summary.wrong_numbers(result, folder), []
    for stage in chosen:
        record = result["stages"].get(stage.name, {"absent": "an earlier stage failed"})
        tests = record.get("result", {}) if stage.name == "tests" else {}
        if ended := tests.get("ended"):
            unchecked.append(f"tests: the process of {len(ended)} ended, or its time did, the first {ended[0]}")
        if failures := tests.get("failures"):
            wrong.append(f"tests: {len(failures)} failed, the first {failures[0]['test']}")
        elif record.get("status") == FOUND_WRONG:
            wrong.append(f"{stage.name}: failed; its tail says how")
        elif record.get("status") != 0 and not ended:
            unchecked.append(f"{stage.name}: {record.get('absent') or ('killed' if record.get('killed') else 'did not run to its end')}")
    return {"all": "wrong" if wrong else "unchecked" if unchecked else "right", "wrong": wrong, "unchecked": unchecked}


if __name__ == "__main__":
    sys.exit(main())
