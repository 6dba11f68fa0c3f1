"""A backend that was asked for is used or refused, never exchanged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from urlvr_fast import group_advantages, linear_policy_loss, linear_token_stats, policy_loss, policy_loss_from_logits, token_stats
from urlvr_fast.ops import backend
from urlvr_fast.ops.backend import BACKENDS, available_backends, choose_backend

LOGITS, IDS, A = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.ones(3)
CALLS = {
    "token_stats": lambda **k: token_stats(LOGITS, IDS, outputs="logp", **k),
    "linear_token_stats": lambda **k: linear_token_stats(torch.randn(3, 2), torch.randn(5, 2), IDS, outputs="logp", **k),
    "group_advantages": lambda **k: group_advantages(A, IDS, **k),
    "policy_loss": lambda **k: policy_loss(torch.zeros(3), advantages=A, **k),
    "policy_loss_from_logits": lambda **k: policy_loss_from_logits(LOGITS, IDS, advantages=A, **k),
    "linear_policy_loss": lambda **k: linear_policy_loss(torch.randn(3, 2), torch.randn(5, 2), IDS, advantages=A, **k),
}


def test_every_backend_is_available_or_says_why_not():
    backends = available_backends()
    assert list(backends) == list(BACKENDS)
    assert backends["torch"] == "available"
    assert all(reason for reason in backends.values())


@pytest.mark.parametrize("op", CALLS)
def test_ops_refuse_what_they_cannot_honour(op, monkeypatch):
    for name in ("triton", "cuda"):
        if available_backends()[name] == "available":
            continue
        with pytest.raises(
            RuntimeError, match=rf"backend='{name}' (takes cuda tensors; these are on cpu|is not in this build|is not installed)"
        ):
            CALLS[op](backend=name)
    with pytest.raises(ValueError, match=r"'mps' is not a backend; the names are torch, cpp, triton, cuda"):
        CALLS[op](backend="mps")
    CALLS[op](backend="torch")
    CALLS[op](backend="cpp")
    monkeypatch.setenv("URLVR_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="URLVR_FAST_BACKEND='nonsense'"):
        CALLS[op]()
    CALLS[op](backend="torch")  # the argument goes first


def test_an_empty_variable_is_no_request(monkeypatch):
    monkeypatch.setenv("URLVR_FAST_BACKEND", "")
    assert choose_backend() == "cpp"


def test_the_backend_that_was_named_is_the_one_that_runs(monkeypatch):
    used = []
    original = backend.kernels
    monkeypatch.setattr("urlvr_fast.ops.row_ops.kernels", lambda name: used.append(name) or original(name))
    for name in ("torch", "cpp"):
        for op in ("token_stats", "linear_token_stats", "policy_loss_from_logits", "linear_policy_loss"):
            used.clear()
            CALLS[op](backend=name)
            assert set(used) == {name}, op
            used.clear()
            monkeypatch.setenv("URLVR_FAST_BACKEND", name)
            CALLS[op]()
            assert set(used) == {name}, op
            monkeypatch.delenv("URLVR_FAST_BACKEND")


def test_what_does_not_compute_in_a_dtype_says_so():
    with pytest.raises(RuntimeError, match=r"'triton' (does not compute in torch.float64|takes|is not)"):
        choose_backend("triton", "cuda", torch.float64)
    assert choose_backend(None, "cuda", torch.float64) == "torch"
    assert choose_backend(None, "mps") == "torch"


def test_without_the_compiled_library(tmp_path):
    """An installation without a compiler runs on `torch` and says what is missing; one whose library is broken says that."""
    package = Path(backend.__file__).parents[1]
    copy = tmp_path / "urlvr_fast"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__", "bundled"))
    ask = "from urlvr_fast.ops.backend import *; print(available_backends()['cpp']); print(choose_backend())"

    def run():
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    said = run().stdout.splitlines()
    assert said[0].startswith("not in this build: there was no C++ compiler")
    assert said[1] == "torch"
    (copy / "_C.so").write_bytes(b"not a library")
    broken = run()
    assert broken.stdout.startswith("broken: _C.so does not load")
    assert "install urlvr_fast again, or set URLVR_FAST_BACKEND=torch" in broken.stderr


def test_a_variable_for_the_models_device_does_not_speak_of_rewards_on_the_host(monkeypatch):
    monkeypatch.setattr(backend, "_MISSING", dict.fromkeys(BACKENDS, ""))
    for name in ("triton", "cuda"):
        monkeypatch.setenv("URLVR_FAST_BACKEND", name)
        assert choose_backend(None, "cpu", off_model=True) == "cpp"
        assert choose_backend(None, "cuda", off_model=True) == name
        assert torch.equal(group_advantages(torch.tensor([0.0, 2.0]), torch.tensor([0, 0]), scale="none"), torch.tensor([-1.0, 1.0]))
        with pytest.raises(RuntimeError, match="takes cuda tensors"):
            choose_backend(None, "cpu")
        with pytest.raises(RuntimeError, match="takes cuda tensors"):
            group_advantages(A, IDS, backend=name)
    monkeypatch.setenv("URLVR_FAST_BACKEND", "torch")
    assert choose_backend(None, "cpu", off_model=True) == "torch"


def test_there_is_no_cuda_kernel_for_group_advantages(monkeypatch):
    monkeypatch.setattr(sys.modules["urlvr_fast.ops.group_advantages"], "choose_backend", lambda *_, **__: "cuda")
    with pytest.raises(RuntimeError, match=r"backend='cuda' has no kernel for group_advantages: pass backend='triton' or 'torch'"):
        group_advantages(A, IDS)
