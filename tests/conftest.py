"""Shared by the tests: a tiny real model on disk, the folder of contest problems where there is one, and the device that ops are tested on.

URLVR_FAST_TEST_DEVICE=cuda puts every tensor that a test makes on the GPU; `simulated` does so without one (see `simulated_gpu`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # cuda_on_cpu and simulated_gpu, which several files take part in
DEVICE = os.environ.get("URLVR_FAST_TEST_DEVICE", "cpu")
if DEVICE == "simulated":  # before torch is imported
    import simulated_gpu

    simulated_gpu.install()

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402


class DrawnOnHost(TorchFunctionMode):
    """What a test draws with a generator are the same numbers on every device."""

    FACTORIES = (torch.rand, torch.randn, torch.randint, torch.randperm)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in self.FACTORIES and "generator" in options and "device" not in options:
            return function(*arguments, **options, device="cpu").to("cuda")
        return function(*arguments, **options)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "host: a promise for tensors on the host, where looking at a number makes nobody wait")
    config.addinivalue_line("markers", "real: needs a device, or none; the simulated one will not do")
    config.addinivalue_line("markers", "own_process(environment, arguments[, python]): is a pytest of its own, run beside the others")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if DEVICE != "cpu" and item.get_closest_marker("host"):
            item.add_marker(pytest.mark.skip(reason="a promise for tensors on the host"))
        if DEVICE == "simulated" and item.get_closest_marker("real"):
            item.add_marker(pytest.mark.skip(reason="the simulated device will not do"))
    items.sort(key=lambda item: item.get_closest_marker("own_process") is not None)  # last: they are waited for


class OwnProcesses:
    """The tests marked `own_process`: one at a time on all cores but one, and behind the others, some of which watch the clock."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1))
        self._running: set[subprocess.Popen[str]] = set()

    def start(self, environment: dict[str, str], arguments: list[str], python: str = sys.executable) -> Future[tuple[int, str]]:
        """The exit status and what was said, when there is one."""
        return self._threads.submit(self._run, environment, arguments, python)

    def _run(self, environment: dict[str, str], arguments: list[str], python: str) -> tuple[int, str]:
        command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, cwd=Path(__file__).parent, env={**os.environ, **environment}, **output) as child:
            self._running.add(child)
            os.setpriority(os.PRIO_PROCESS, child.pid, 10)
            said = child.communicate()[0]
            self._running.remove(child)
        return child.returncode, said

    def stop(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for child in list(self._running):
            child.kill()


OWN_PROCESSES = pytest.StashKey[OwnProcesses]()
OWN_PROCESS = pytest.StashKey[Future[tuple[int, str]]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    chosen = [(item, marker) for item in session.items if (marker := item.get_closest_marker("own_process"))]
    if chosen and not session.config.option.collectonly:
        session.config.stash[OWN_PROCESSES] = processes = OwnProcesses()
        for item, marker in chosen:
            if "PYTEST_XDIST_WORKER" not in os.environ:  # each of those collects all tests and runs some
                item.stash[OWN_PROCESS] = processes.start(*marker.args)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (processes := session.config.stash.get(OWN_PROCESSES, None)) is not None:
        processes.stop()


@pytest.fixture
def own_process(request: pytest.FixtureRequest) -> tuple[int, str]:
    if OWN_PROCESS not in request.node.stash:
        marker = request.node.get_closest_marker("own_process")
        request.node.stash[OWN_PROCESS] = request.config.stash[OWN_PROCESSES].start(*marker.args)
    return request.node.stash[OWN_PROCESS].result()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line for each test to URLVR_FAST_TEST_LOG, as they end: a run that is killed leaves what it had."""
    log = os.environ.get("URLVR_FAST_TEST_LOG")
    if log is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.outcome == "passed"):
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
    if report.failed:
        line["said"] = str(report.longrepr)[-1500:]
    with open(log, "a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logfinish() -> None:
    """After an error of the device nothing works any more in a process: one of several gives up, and another takes its place."""
    if DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


if DEVICE != "cpu":
    torch.set_default_device("cuda")
    DrawnOnHost().__enter__()


@pytest.fixture(scope="session")
def same_but_rounded():
    """Asserts that a 16-bit gradient is the fp32 gradient, rounded once. On a GPU the lanes of a row of 16-bit logits hold other columns
    than those of the same row in fp32, so that its statistics may differ in the last bit and a number may fall to the neighbour."""

    def check(narrow: torch.Tensor, wide: torch.Tensor) -> None:
        if DEVICE == "cpu":
            assert torch.equal(narrow, wide.to(narrow.dtype))
        else:  # two neighbours: the interpreter of Triton's kernels does not round to 16 bits, it cuts off
            digits = 7 if narrow.dtype == torch.bfloat16 else 10
            torch.testing.assert_close(narrow.float(), wide, rtol=2.0**-digits, atol=1e-7)

    return check


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with random weights large enough that its distributions are far from uniform, with a character tokenizer."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from urlvr_fast.trainer.base_model import character_tokenizer

    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def contest_data() -> Path:
    """The real problems (aime.json, amc.json, math.json), which are not part of the project."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("URLVR_FAST_CONTEST_DATA", default))
    if not (path / "amc.json").is_file():
        pytest.skip(f"no contest problems in {path}; URLVR_FAST_CONTEST_DATA names their folder")
    return path


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter replaces all of Triton's language at each call of a device function: two thirds of the time of these tests. A
    launch does so for our modules, and Triton's own need it once."""
    from triton.runtime import interpreter

    done = set()

    def call(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith("urlvr_fast.") and module not in done:
            done.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def tiny_triton(quick_interpreter, monkeypatch):
    """Interpreted Triton kernels with 4 lanes, 2 vectors deep: tiles of 32 (fp32) or 64 columns; segments of 64. Rollouts are
    compared 4 with 8."""
    from urlvr_fast.kernels import targets

    tiles = {2: targets.RowTiles(4, 4, 2, 64), 4: targets.RowTiles(4, 4, 2, 64)}
    for name in ("STATISTICS", "POLICY"):
        monkeypatch.setattr(targets, name, tiles)
    monkeypatch.setattr(targets, "POLICY_GRADIENT", 64)
    monkeypatch.setattr(targets, "GRADIENT", {2: targets.Block(4, 64), 4: targets.Block(4, 64)})
    monkeypatch.setattr(targets, "BIAS", targets.Block(4, 64))
    monkeypatch.setattr(targets, "BIAS_ROWS", 4)
    monkeypatch.setattr(targets, "KEEP", targets.Block(4, 16))
    monkeypatch.setattr(targets, "KEEP_LANES", 8)
    monkeypatch.setattr(targets, "ADVANTAGES", targets.Pairs(4, 4, 8))
