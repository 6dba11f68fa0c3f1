"""The tests of the Triton kernels need TRITON_INTERPRET=1 before Triton is imported, hence a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    "file", ["test_kernels_triton.py", "test_kernel_options.py", "test_ops_group_advantages.py", "test_ops_packed_loss.py"]
)
def test_triton_kernels_interpreted(file):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
