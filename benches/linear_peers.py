"""Everybody with a kernel for the lm_head: what to call. Nobody is imported before it is called.

A peer makes one of two kinds of function of a problem (hidden states (N, H), a weight (V, H), ids (N,), advantages (N,)):

    tokens(problem, entropy) -> log-probs (N,), and the entropy (N,) where it is asked for and the peer has it
    loss(problem) -> scalar                     where nothing but a loss comes out

Log-probs become the on-policy DAPO loss, −mean(ratio · A) with a ratio that is 1 and has the gradient of logp, by torch. `mean`: the loss
is a mean cross entropy and takes no advantages, so its gradients are those of that loss with every advantage 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benches.peers import module_alone

if TYPE_CHECKING:
    from benches.linear import Problem

Tokens = Callable[["Problem", bool], tuple[Tensor, Tensor | None]]
Loss = Callable[["Problem"], Tensor]
TRL_COLUMNS = 32768  # of the vocabulary at a time, as its trainers have it
EVERYWHERE, GPU = ("cpu", "cuda"), ("cuda",)


@dataclass(frozen=True)
class Peer:
    name: str
    package: str  # the distribution whose version is recorded
    tokens: Callable[[], Tokens] | None = None
    loss: Callable[[], Loss] | None = None
    mean: bool = False
    devices: tuple[str, ...] = GPU
    needs: str = ""  # why it does not take part

    def absent(self, device: torch.device) -> str:
        """Why it does not take part on this device; "" where it does."""
        return self.needs or ("" if device.type in self.devices else f"needs {' or '.join(self.devices)}")

    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def training(self) -> Loss:
        """What is differentiated."""
        if self.loss is not None:
            return self.loss()
        tokens = self.tokens()
        return lambda p: on_policy(tokens(p, False)[0], p.advantages)


def on_policy(logp: Tensor, advantages: Tensor) -> Tensor:
    return -(torch.exp(logp - logp.detach()) * advantages).mean()


# ---- torch -----------------------------------------------------------------------------------------------------------------------------


def _logp(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def eager(p: Problem) -> Tensor:
    return on_policy(_logp(p.hidden, p.weight, p.ids), p.advantages)


def _compiled() -> Loss:
    @torch.compile(dynamic=False, fullgraph=True)
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
        return on_policy(_logp(hidden, weight, ids), advantages)

    return lambda p: loss(p.hidden, p.weight, p.ids, p.advantages)


def _torch_chunked() -> Loss:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy, 2.13 does")
    options = torch.nn.LinearCrossEntropyOptions()  # without options it is the plain product and cross entropy
    return lambda p: torch.nn.functional.linear_cross_entropy(p.hidden, p.weight, p.ids, options=options)


# ---- per-token log-probs ---------------------------------------------------------------------------------------------------------------


def _trl() -> Tokens:
    from trl.kernels import ChunkedLogProbFunction

    def tokens(p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        wanted = ("entropy",) if entropy else ()
        return ChunkedLogProbFunction.apply(p.hidden, p.weight, None, p.ids, 1.0, TRL_COLUMNS, None, 1.0, wanted)[:2]

    return tokens


def _flsce() -> Tokens:
    """Its CuTe kernels on Hopper (which need nvidia-cutlass-dsl), a loop in torch on everything else."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def tokens(p: Problem, entropy: bool) -> tuple[Tensor, Tensor | None]:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(p.hidden, p.weight, p.ids, return_entropy=entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    return tokens


def _cce() -> Tokens:
    """With its default filter, which drops the tiles of the gradient that are small."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda p, entropy: (-linear_cross_entropy(p.hidden, p.weight, p.ids, reduction="none"), None)


def _verl() -> Tokens:
    linear_cross_entropy = module_alone("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return lambda p, entropy: linear_cross_entropy(p.hidden, p.weight, p.ids, 1.0, "none")


# ---- losses ----------------------------------------------------------------------------------------------------------------------------


def _liger_grpo() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", chunk_size=1)

    def run(p: Problem) -> Tensor:
        ids = p.ids.view(p.sequences, -1)
        advantages = p.advantages.view(p.sequences, -1)[:, 0]
        return loss(p.hidden.view(*ids.shape, -1), p.weight, ids, torch.ones_like(ids), advantages)[0]

    return run


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda p: chunked_linear_cross_entropy(p.hidden, p.weight, p.ids)


def _fla() -> Loss:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss()
    return lambda p: loss(p.hidden, p.ids, p.weight)


def peers(compiled: bool) -> list[Peer]:
    """In the order of the table's rows; those that compile much or may break something come last."""
    return [
        Peer("torch eager", "torch", loss=lambda: eager, devices=EVERYWHERE),
        Peer("Liger chunked GRPO", "liger-kernel", loss=_liger_grpo, devices=EVERYWHERE),
        Peer("TRL chunked log-prob", "trl", tokens=_trl, devices=EVERYWHERE),
        Peer("torch linear_cross_entropy (mean CE)", "torch", loss=_torch_chunked, mean=True, devices=EVERYWHERE),
        Peer("verl", "verl", tokens=_verl),
        Peer("Liger FLSCE", "liger-kernel", tokens=_flsce),
        Peer("QuACK linear CE (mean CE)", "quack-kernels", loss=_quack, mean=True),
        Peer("fla fused linear CE (mean CE)", "flash-linear-attention", loss=_fla, mean=True),
        Peer("torch.compile", "torch", loss=_compiled, devices=EVERYWHERE, needs="" if compiled else "measured with --compile"),
        Peer("CCE", "cut-cross-entropy", tokens=_cce),
    ]
