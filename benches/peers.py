"""Everybody who takes part: what to call, what it can do, what it needs. Nobody is imported before it is called.

A provider makes one or both of two kinds of function:

    statistics(names, inplace)(logits (N, V), ids (N,), mask (N,) | None) -> one (N,) tensor per name
    policy(inplace)(rows, logits) -> loss

The loss is the on-policy DAPO loss, −Σ mask · A · ratio / tokens with a ratio that is 1 and has the gradient of logp: the one loss that
all of them can compute. Who cannot be imported or does not run is listed with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from benches.data import STATISTICS, Rows

Statistics = Callable[[Tensor, Tensor, Tensor | None], Sequence[Tensor]]
Policy = Callable[[Rows, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    package: str  # the distribution whose version is recorded
    statistics: Callable[[tuple[str, ...], bool], Statistics] | None = None
    names: tuple[str, ...] = ()  # the statistics it has
    differentiable: bool = True
    policy: Callable[[bool], Policy] | None = None
    inplace: bool = False  # whether it can write the gradient over the logits
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: str = ""  # why it cannot take part at all
    per_logit: tuple[int, int] = (0, 0)  # bytes of intermediates for each logit, about: in a forward, in a backward
    ours: bool = False
    brief: bool = False  # a few measures are enough

    def absent(self, device: torch.device) -> str:
        """Why it does not take part on this device; "" where it does."""
        if self.needs:
            return self.needs
        return "" if device.type in self.devices else f"needs {' or '.join(self.devices)}"

    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def module_alone(name: str) -> ModuleType:
    """A module of a package; where the package as a whole does not import, without running what its `__init__` files ask for."""
    try:
        return importlib.import_module(name)
    except Exception:  # a package that needs what is not there may raise anything
        parents = name.split(".")[:-1]
        for parent in (".".join(parents[: i + 1]) for i in range(len(parents))):
            if parent not in sys.modules:
                spec = importlib.util.find_spec(parent)
                if spec is None:
                    raise
                sys.modules[parent] = importlib.util.module_from_spec(spec)
        return importlib.import_module(name)


# ---- ours ------------------------------------------------------------------------------------------------------------------------------


def _own(backend: str) -> Provider:
    from urlvr_fast import policy_loss_from_logits, token_stats
    from urlvr_fast.ops.backend import available_backends

    def statistics(names: tuple[str, ...], inplace: bool) -> Statistics:
        def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
            values = token_stats(logits, ids, outputs=names, mask=mask, inplace_backward=inplace, backend=backend)
            return [getattr(values, name) for name in names]

        return run

    def policy(inplace: bool) -> Policy:
        def run(rows: Rows, logits: Tensor) -> Tensor:
            return policy_loss_from_logits(
                logits,
                rows.ids,
                advantages=rows.advantages,
                mask=rows.mask,
                denominator=rows.live,
                inplace_backward=inplace,
                backend=backend,
            )[0]

        return run

    status = available_backends()[backend]
    return Provider(
        f"urlvr_fast {backend}",
        "urlvr_fast",
        statistics,
        STATISTICS,
        policy=policy,
        inplace=True,
        devices={"torch": ("cpu", "cuda"), "cpp": ("cpu",)}.get(backend, ("cuda",)),
        needs="" if status == "available" or "no CUDA GPU" in status else status,
        ours=True,
        brief=backend == "torch",
    )


# ---- plain torch -----------------------------------------------------------------------------------------------------------------------


def _eager_statistics(names: tuple[str, ...], inplace: bool = False) -> Statistics:
    """The usual way: an fp32 log-softmax, and every statistic from it."""

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
        values = [_from_log_softmax(name, log_p, ids) for name in names]
        return values if mask is None else [torch.where(mask, value, 0) for value in values]

    return run


def _from_log_softmax(name: str, log_p: Tensor, ids: Tensor) -> Tensor:
    if name == "logp":
        return log_p.gather(-1, ids[:, None])[:, 0]
    if name == "entropy":
        return -(log_p.exp() * log_p).sum(-1)
    return -log_p.mean(-1) - math.log(log_p.shape[-1])


def _on_policy(logp: Tensor, advantages: Tensor, tokens: float) -> Tensor:
    """Of logp that is 0 on masked rows: there the ratio is the constant 1."""
    return -(torch.exp(logp - logp.detach()) * advantages).sum() / tokens


def _from_logp(statistics: Callable[[tuple[str, ...], bool], Statistics]) -> Callable[[bool], Policy]:
    """Log-probs from a provider, the loss in torch."""

    def policy(inplace: bool) -> Policy:
        logp = statistics(LOGP, inplace)
        return lambda rows, logits: _on_policy(logp(logits, rows.ids, rows.mask)[0], rows.advantages, rows.live)

    return policy


def _compiled_statistics(names: tuple[str, ...], inplace: bool = False) -> Statistics:
    return torch.compile(_eager_statistics(names), dynamic=False, fullgraph=True)


def _compiled_policy(inplace: bool = False) -> Policy:
    logp = _eager_statistics(("logp",))

    @torch.compile(dynamic=False, fullgraph=True)
    def loss(logits: Tensor, ids: Tensor, mask: Tensor | None, advantages: Tensor, tokens: int) -> Tensor:
        return _on_policy(logp(logits, ids, mask)[0], advantages, tokens)

    return lambda rows, logits: loss(logits, rows.ids, rows.mask, rows.advantages, rows.live)


# ---- TRL -------------------------------------------------------------------------------------------------------------------------------


def _trl_statistics(names: tuple[str, ...], inplace: bool = False) -> Statistics:
    """Its public functions, on one sequence of N tokens. They choose TRL's Triton kernel themselves where it runs."""
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        batch = logits[None], ids[None]
        row_mask = None if mask is None else mask[None]
        if names == ("logp",):
            return [selective_log_softmax(*batch, row_mask=row_mask)[0]]
        logp, entropy = selective_log_softmax_and_entropy(*batch, row_mask=row_mask)
        return [logp[0], entropy[0]]

    return run


# ---- verl ------------------------------------------------------------------------------------------------------------------------------


def _verl_statistics(names: tuple[str, ...], inplace: bool) -> Statistics:
    """Its actor's functions: flash-attn's cross entropy where that is installed, else a loop over rows in torch."""
    functional = module_alone("verl.utils.torch_functional")
    if inplace and importlib.util.find_spec("flash_attn") is None:
        raise ImportError("in place by flash-attn, which is not installed")

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        values = [functional.logprobs_from_logits(logits, ids, inplace_backward=inplace)]
        if "entropy" in names:
            values.append(functional.entropy_from_logits(logits))
        return values if mask is None else [torch.where(mask, value, 0) for value in values]

    return run


# ---- Triton kernels of others ----------------------------------------------------------------------------------------------------------


def _sequences(rows: Rows, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L + 1, V) logits, (B, L) ids and mask of functions that give a sequence's last logits no loss."""
    if rows.length == 1:
        raise ValueError("gives the last row of a sequence no loss")
    batch = logits.view(rows.sequences, rows.length, -1)
    mask = torch.ones_like(rows.ids) if rows.mask is None else rows.mask.long()
    ids, mask = (value.view(rows.sequences, -1)[:, :-1].contiguous() for value in (rows.ids, mask))
    return batch, ids, mask


def _liger_statistics(names: tuple[str, ...], inplace: bool = False) -> Statistics:
    """The forward of its GRPO loss. It wants a row more than it reads, so the last row comes back as 0."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        if len(logits) == 1:
            raise ValueError("gives the last row no log-prob")
        mask = None if mask is None else mask[None, :-1].long()
        logp = fused_selective_log_softmax(logits[None], ids[None, :-1], 1.0, mask)
        return [torch.nn.functional.pad(logp[0], (0, 1))]

    return run


def _liger_policy(inplace: bool) -> Policy:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(rows: Rows, logits: Tensor) -> Tensor:
        batch, ids, mask = _sequences(rows, logits)
        return triton_grpo_loss(
            batch,
            None,
            None,
            ids,
            rows.advantages_of_sequences,
            mask,
            temperature=1.0,
            beta=0.0,
            inplace=inplace,
            loss_type="dapo",
            reduce=True,
            num_items_in_batch=rows.live,
        )[0]

    return run


def _liger_ce_policy(inplace: bool) -> Policy:
    """Cross entropy whose forward overwrites the logits with its gradient."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    if not inplace:
        raise ValueError("writes over the logits in its forward")

    def run(rows: Rows, logits: Tensor) -> Tensor:
        labels = rows.ids if rows.mask is None else torch.where(rows.mask, rows.ids, -100)
        losses = LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "none")[0]
        return _on_policy(-losses, rows.advantages, rows.live)

    return run


def _fla_statistics(names: tuple[str, ...], inplace: bool) -> Statistics:
    from fla.modules.fused_cross_entropy.ops import cross_entropy_loss

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        labels = ids if mask is None else torch.where(mask, ids, -100)
        return [-cross_entropy_loss(logits, labels, inplace_backward=inplace)[0]]

    return run


def _fla_policy(inplace: bool) -> Policy:
    from fla.modules.grpo import fused_grpo_loss

    def run(rows: Rows, logits: Tensor) -> Tensor:
        batch, ids, mask = _sequences(rows, logits)
        reference = torch.zeros(ids.shape, device=ids.device)
        losses = fused_grpo_loss(
            batch, reference, ids, rows.advantages_of_sequences, beta=0.0, completion_mask=mask, save_kl=False, inplace=inplace
        )
        return losses.sum() / rows.live

    return run


def _quack_statistics(names: tuple[str, ...], inplace: bool) -> Statistics:
    from quack.cross_entropy import cross_entropy

    def run(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Sequence[Tensor]:
        labels = ids if mask is None else torch.where(mask, ids, -100)
        return [-cross_entropy(logits, labels, reduction="none", inplace_backward=inplace)]

    return run


LINEAR = "takes hidden states and a weight, not logits"
LOGP = ("logp",)
GPU = ("cuda",)


def providers() -> list[Provider]:
    """In the order of the table's columns, ours first."""
    own = [_own(backend) for backend in ("cpp", "triton", "cuda", "torch")]
    others = [
        Provider("torch eager", "torch", _eager_statistics, STATISTICS, policy=_from_logp(_eager_statistics), per_logit=(12, 28)),
        Provider("torch.compile", "torch", _compiled_statistics, STATISTICS, policy=_compiled_policy, per_logit=(0, 12)),
        Provider("TRL", "trl", _trl_statistics, ("logp", "entropy"), policy=_from_logp(_trl_statistics), per_logit=(4, 24)),
        Provider(
            "verl",
            "verl",
            _verl_statistics,
            ("logp", "entropy"),
            policy=_from_logp(_verl_statistics),
            inplace=True,
            devices=GPU,
            per_logit=(8, 24),
        ),
        Provider("Liger", "liger-kernel", _liger_statistics, LOGP, False, _liger_policy, inplace=True, devices=GPU),
        Provider("Liger CE", "liger-kernel", policy=_liger_ce_policy, inplace=True, devices=GPU, per_logit=(0, 2)),
        Provider("fla", "flash-linear-attention", _fla_statistics, LOGP, policy=_fla_policy, inplace=True, devices=GPU),
        Provider("QuACK", "quack-kernels", _quack_statistics, LOGP, policy=_from_logp(_quack_statistics), inplace=True, devices=GPU),
        Provider("CCE", "cut-cross-entropy", needs=LINEAR),
        Provider("Liger fused linear", "liger-kernel", needs=LINEAR),
    ]
    return own + others
