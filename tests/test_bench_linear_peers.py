"""How the benchmarks call other people's code. Kernels that need a GPU are replaced by the same in torch, which takes what their real
signature takes and nothing else; who is not installed is skipped."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benches import exact, linear, linear_peers
from benches import peers as on_logits
from benches.data import Rows, Scenario

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PEERS = {peer.name: peer for peer in linear_peers.peers(compiled=True)}
PROVIDERS = {provider.name: provider for provider in on_logits.providers()}


def problem(dtype: torch.dtype = torch.float32) -> linear.Problem:
    return linear.Problem.of((256, 16, 301), dtype, CPU)


def gradient_errors(peer: linear_peers.Peer, p: linear.Problem) -> dict[str, float]:
    peer.training()(p).backward()
    return p.gradient_errors(p.hidden.grad, p.weight.grad, torch.ones_like(p.advantages) if peer.mean else p.advantages)


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, ids, reduction="none", ignore_index=-100)


def takes(real: Callable, fake: Callable, *before: Any) -> Callable:
    """`fake`, called with the arguments of a call that `real` takes, defaults included; `before` stands for a ctx or self."""
    signature = inspect.signature(real)

    def call(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*before, *arguments, **options)
        bound.apply_defaults()
        return fake(SimpleNamespace(**bound.arguments))

    return call


# ---- hidden states and a weight --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch eager", "Liger chunked GRPO", "TRL chunked log-prob", "Liger FLSCE"])
def test_who_runs_on_a_cpu_differentiates_the_same_loss(name: str) -> None:
    pytest.importorskip({"T": "trl", "L": "liger_kernel", "t": "torch"}[name[0]])
    assert max(gradient_errors(PEERS[name], problem()).values()) <= 1e-5
    assert max(gradient_errors(PEERS[name], problem(torch.bfloat16)).values()) <= 3e-2


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_the_chunked_cross_entropy_of_torch_has_the_gradients_of_its_mean() -> None:
    assert max(gradient_errors(PEERS["torch linear_cross_entropy (mean CE)"], problem()).values()) <= 1e-5


def test_an_older_torch_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    with pytest.raises(ImportError, match=r"has no linear_cross_entropy, 2\.13 does"):
        PEERS["torch linear_cross_entropy (mean CE)"].training()


def test_the_compiled_loss_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{**k, "backend": "eager"}))
    assert max(gradient_errors(PEERS["torch.compile"], problem()).values()) <= 1e-5


@pytest.mark.parametrize("name", ["TRL chunked log-prob", "Liger FLSCE"])
def test_log_probs_and_entropies_have_their_sign(name: str) -> None:
    pytest.importorskip({"T": "trl", "L": "liger_kernel"}[name[0]])
    p, tokens = problem(), PEERS[name].tokens()
    with torch.no_grad():
        logp, entropy = tokens(p, True)
    assert max(p.statistics_errors({"logp": logp, "entropy": entropy}).values()) <= 1e-5
    assert tokens(p, False)[1] is None


def test_cce_is_called_as_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cce = pytest.importorskip("cut_cross_entropy")

    def fake(call: SimpleNamespace) -> Tensor:
        assert call.reduction == "none"
        return nll(call.e @ call.c.T, call.targets)

    monkeypatch.setattr(cce, "linear_cross_entropy", takes(cce.linear_cross_entropy, fake))
    assert max(gradient_errors(PEERS["CCE"], problem()).values()) <= 1e-5


def test_fla_is_called_as_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = pytest.importorskip("fla.modules").FusedLinearCrossEntropyLoss
    assert loss().reduction == "mean"
    fake = takes(loss.forward, lambda call: nll(call.x @ call.weight.T, call.target).mean(), None)
    monkeypatch.setattr(loss, "forward", lambda self, *arguments: fake(*arguments))
    assert max(gradient_errors(PEERS["fla fused linear CE (mean CE)"], problem()).values()) <= 1e-5


def test_flsce_has_one_signature_on_all_devices() -> None:
    """What is called on a GPU takes what was called on the CPU above."""
    module = pytest.importorskip("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    public = list(inspect.signature(module.LigerFusedLinearScaledCrossEntropyFunction.apply).parameters)
    assert public[:3] == ["_input", "weight", "target"]
    assert "return_entropy" in public


def test_verl_is_called_as_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    module = on_logits.module_alone("verl.utils.kernel.linear_cross_entropy")

    def fake(call: SimpleNamespace) -> tuple[Tensor, Tensor]:
        assert (call.temperature, call.reduction) == (1.0, "none")
        logits = call.hidden @ call.weight.T
        return -nll(logits, call.labels), torch.zeros(len(logits))

    monkeypatch.setattr(module, "linear_cross_entropy", takes(module.LinearCrossEntropy.forward, fake, None))
    assert max(gradient_errors(PEERS["verl"], problem()).values()) <= 1e-5


def test_quack_is_called_as_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("quack.linear_cross_entropy")

    def fake(call: SimpleNamespace) -> Tensor:
        assert call.reduction == "mean"
        return nll(call.x @ call.weight.T, call.target).mean()

    monkeypatch.setattr(module, "chunked_linear_cross_entropy", takes(module.chunked_linear_cross_entropy, fake))
    assert max(gradient_errors(PEERS["QuACK linear CE (mean CE)"], problem()).values()) <= 1e-5


def test_a_peer_says_why_it_is_absent() -> None:
    assert PEERS["verl"].absent(CPU) == "needs cuda"
    assert PEERS["torch.compile"].absent(CPU) == ""
    assert next(p for p in linear_peers.peers(compiled=False) if p.name == "torch.compile").absent(CPU) == "measured with --compile"
    assert not any(peer.absent(GPU) for peer in PEERS.values())
    assert PEERS["torch eager"].version() == torch.__version__
    assert linear_peers.Peer("", "no such distribution").version() is None


def test_a_module_is_imported_without_what_its_package_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "needy" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "needy" / "__init__.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "needy" / "other.py").write_text("NUMBER = 41\n")
    (inner / "__init__.py").write_text("raise RuntimeError('runs')\n")
    (inner / "kernels.py").write_text("from needy.other import NUMBER\nANSWER = NUMBER + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("needy", "needy.inner", "needy.other", "needy.inner.kernels"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert on_logits.module_alone("needy.inner.kernels").ANSWER == 42
    with pytest.raises(ModuleNotFoundError, match="needy_too"):
        on_logits.module_alone("needy_too.kernels")


# ---- logits ----------------------------------------------------------------------------------------------------------------------------

SCENARIOS = [Scenario(16, 203, "fp32", "random", 0.4), Scenario(5, 64, "fp32")]


def policy_error(name: str, rows: Rows, inplace: bool) -> float:
    logits = rows.overwritable() if inplace else rows.leaf()
    loss = PROVIDERS[name].policy(inplace)(rows, logits)
    return exact.policy_gradient_error(rows, torch.autograd.grad(loss, logits)[0])["gradient"]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_liger_on_logits_is_called_as_it_is_installed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = pytest.importorskip("liger_kernel.ops.grpo_loss")
    loss = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    rows = Rows(scenario, CPU)

    def log_softmax(call: SimpleNamespace) -> Tensor:
        assert call.temperature == 1.0
        found = -nll(call.logits[0, :-1], call.input_ids[0])[None]
        return found if call.mask is None else found * call.mask

    def grpo(call: SimpleNamespace) -> tuple[Tensor, list]:
        assert (call.old_logp, call.ref_logp, call.beta, call.loss_type, call.reduce) == (None, None, 0.0, "dapo", True)
        ids = call.completion_ids
        logp = -nll(call.logits[:, :-1].flatten(0, 1), ids.flatten()).view(ids.shape)
        ratio = torch.exp(logp - logp.detach())
        return -(ratio * call.advantages[:, None] * call.completion_mask).sum() / call.num_items_in_batch, []

    monkeypatch.setattr(statistics, "fused_selective_log_softmax", takes(statistics.fused_selective_log_softmax, log_softmax))
    monkeypatch.setattr(loss, "triton_grpo_loss", takes(loss.triton_grpo_loss, grpo))
    values = PROVIDERS["Liger"].statistics(("logp",), False)(rows.logits, rows.ids, rows.mask)
    assert exact.statistics_errors(rows, ("logp",), values)["logp"] <= 1e-5
    assert policy_error("Liger", rows, False) <= 1e-5
    assert policy_error("Liger", rows, True) <= 1e-5


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_the_cross_entropy_of_liger_is_called_as_it_is_installed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("liger_kernel.ops.cross_entropy")

    def fake(call: SimpleNamespace) -> tuple[Tensor, None, None, None]:
        assert (call.reduction, call.label_smoothing, call.lse_square_scale, call.ignore_index) == ("none", 0.0, 0.0, -100)
        return nll(call._input, call.target), None, None, None

    stand_in = SimpleNamespace(apply=takes(module.LigerCrossEntropyFunction.forward, fake, None))
    monkeypatch.setattr(module, "LigerCrossEntropyFunction", stand_in)
    assert policy_error("Liger CE", Rows(scenario, CPU), True) <= 1e-5
    with pytest.raises(ValueError, match="writes over the logits"):
        PROVIDERS["Liger CE"].policy(False)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_fla_on_logits_is_called_as_it_is_installed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = pytest.importorskip("fla.modules.fused_cross_entropy.ops")
    grpo = pytest.importorskip("fla.modules.grpo")
    ops = importlib.import_module("fla.modules.grpo.ops")
    rows = Rows(scenario, CPU)

    def loss(call: SimpleNamespace) -> Tensor:
        assert (call.beta, call.save_kl) == (0.0, False)
        return ops.grpo_loss_torch(call.logits, call.ref_logp, call.input_ids, call.advantages, call.beta, call.completion_mask)

    monkeypatch.setattr(
        entropy, "cross_entropy_loss", takes(entropy.cross_entropy_loss, lambda call: (nll(call.logits, call.target), None))
    )
    monkeypatch.setattr(grpo, "fused_grpo_loss", takes(grpo.fused_grpo_loss, loss))
    values = PROVIDERS["fla"].statistics(("logp",), False)(rows.logits, rows.ids, rows.mask)
    assert exact.statistics_errors(rows, ("logp",), values)["logp"] <= 1e-5
    assert policy_error("fla", rows, False) <= 1e-5


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_quack_on_logits_is_called_as_it_is_installed(scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("quack.cross_entropy")
    rows = Rows(scenario, CPU)

    def fake(call: SimpleNamespace) -> Tensor:
        assert call.reduction == "none"
        return nll(call.x, call.target)

    monkeypatch.setattr(module, "cross_entropy", takes(module.cross_entropy, fake))
    values = PROVIDERS["QuACK"].statistics(("logp",), False)(rows.logits, rows.ids, rows.mask)
    assert exact.statistics_errors(rows, ("logp",), values)["logp"] <= 1e-5
    assert policy_error("QuACK", rows, False) <= 1e-5


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_verl_on_logits_runs_as_it_is_installed(scenario: Scenario) -> None:
    pytest.importorskip("tensordict")
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    rows = Rows(scenario, CPU)
    names = ("logp", "entropy")
    values = PROVIDERS["verl"].statistics(names, False)(rows.logits, rows.ids, rows.mask)
    assert max(exact.statistics_errors(rows, names, values).values()) <= 1e-5
    assert policy_error("verl", rows, False) <= 1e-5


def test_a_single_row_is_not_scored_by_who_drops_the_last() -> None:
    pytest.importorskip("liger_kernel")
    rows = Rows(Scenario(1, 64, "fp32"), CPU)
    with pytest.raises(ValueError, match="no log-prob"):
        PROVIDERS["Liger"].statistics(("logp",), False)(rows.logits, rows.ids, rows.mask)
    with pytest.raises(ValueError, match="no loss"):
        policy_error("Liger", rows, True)
