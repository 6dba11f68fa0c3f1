"""Tests that are a pytest of their own: Triton's interpreter and the simulated GPU must be there before Triton and torch are imported, and
verl has an environment of its own. They are half of the suite's work, so they run beside the other tests, from the beginning (conftest.py);
here their ends are waited for."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

INTERPRETED = {"TRITON_INTERPRET": "1"}
SIMULATED = {"URLVR_FAST_TEST_DEVICE": "simulated"}
VERL = Path(__file__).resolve().parents[1] / ".venv-verl" / "bin" / "python"
OPS = ["test_ops_linear.py", "test_ops_loss_properties.py", "test_ops_policy_loss.py", "test_ops_registered.py", "test_ops_token_stats.py"]


def own(name: str, environment: dict[str, str], arguments: list[str]):
    missing = [] if importlib.util.find_spec("triton") is not None else ["Triton"]
    if environment.get("URLVR_FAST_TEST_DEVICE") and shutil.which("g++") is None:
        missing.append("g++, which builds the device")
    return pytest.param(
        id=name,
        marks=pytest.mark.skip(f"there is no {' and no '.join(missing)}") if missing else pytest.mark.own_process(environment, arguments),
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    (),
    [
        own("Triton: every option", INTERPRETED, ["test_kernel_options.py"]),
        own("Triton: losses of tokens", INTERPRETED, ["test_ops_packed_loss.py"]),
        own("Triton: statistics and gradients", INTERPRETED, ["test_kernels_triton.py"]),
        own("Triton: advantages", INTERPRETED, ["test_ops_group_advantages.py"]),
        # Whole files with plain PyTorch behind the ops, where the host's side is all that there is to see; every kernel in those that ask.
        own("device: ops", SIMULATED | {"URLVR_FAST_BACKEND": "torch"}, [*OPS, "-k", "not triton and not cuda and not compile"]),
        own("device: kernels", SIMULATED | INTERPRETED, ["test_gpu.py"]),
        pytest.param(
            id="verl",
            marks=pytest.mark.own_process({}, ["test_adapter_verl.py"], str(VERL))
            if VERL.exists()
            else pytest.mark.skip("there is no .venv-verl: `make setup-verl`"),
        ),
    ],
)
def test_in_a_process_of_its_own(own_process):
    status, said = own_process
    assert status == 0, said[-7000:]
    assert " passed" in said
