"""A backend that was asked for is used or refused, never exchanged."""

import pytest
import torch

from urlvr_fast import group_advantages, linear_policy_loss, linear_token_stats, policy_loss, policy_loss_from_logits, token_stats
from urlvr_fast.ops.backend import BACKENDS, available_backends, choose_backend

LOGITS, IDS, A = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.ones(3)
CALLS = {
    "token_stats": lambda **k: token_stats(LOGITS, IDS, outputs="logp", **k),
    "linear_token_stats": lambda **k: linear_token_stats(torch.randn(3, 2), torch.randn(5, 2), IDS, outputs="logp", **k),
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
    missing = [name for name, reason in available_backends().items() if reason != "available"]
    for name in missing:
        with pytest.raises(RuntimeError, match=rf"backend='{name}' is not in this build.*This build has: torch"):
            CALLS[op](backend=name)
    with pytest.raises(ValueError, match=r"'mps' is not a backend; the names are torch, cpp, triton, cuda"):
        CALLS[op](backend="mps")
    CALLS[op](backend="torch")
    monkeypatch.setenv("URLVR_FAST_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="URLVR_FAST_BACKEND='nonsense'"):
        CALLS[op]()
    CALLS[op](backend="torch")  # the argument goes first


def test_an_empty_variable_is_no_request(monkeypatch):
    monkeypatch.setenv("URLVR_FAST_BACKEND", "")
    assert choose_backend() == "torch"


def test_group_advantages_needs_no_backend():
    assert group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).shape == (2,)
