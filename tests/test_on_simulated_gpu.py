"""The tests of the ops on a simulated GPU, in a process of their own: the device must be there before torch is imported."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = ["test_ops_linear.py", "test_ops_loss_properties.py", "test_ops_policy_loss.py", "test_ops_registered.py", "test_ops_token_stats.py"]
# Whole files with plain PyTorch behind the ops, where the host's side is all that there is to see; every kernel in those that ask for it.
RUNS = {
    "the ops": ({"URLVR_FAST_BACKEND": "torch"}, [*OPS, "-k", "not triton and not cuda and not compile"]),
    "the kernels": ({"TRITON_INTERPRET": "1"}, ["test_gpu.py"]),
}


@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH: the device cannot be built")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("run", RUNS)
def test_on_the_simulated_gpu(run):
    variables, chosen = RUNS[run]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, "URLVR_FAST_TEST_DEVICE": "simulated", **variables}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
