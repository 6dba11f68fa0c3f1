"""The output head of TRL's trainers on `linear_token_stats`: `use_fused_ops()`, once, before or after a trainer is made.

TRL 1.16 gives the models of its GRPO, RLOO, DPO, KTO and SFT trainers one fused head (`add_fused_lm_head`), which ends in one autograd
function over hidden states. That function is what is replaced, so whatever TRL does around it stays as it is: PEFT, FSDP, softcaps, scales,
autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from urlvr_fast.adapters import AdapterError, require
from urlvr_fast.ops import TokenStats, linear_token_stats

TRL = "1.16"  # tested with
OURS = {"log_probs": "logp", "entropy": "entropy", "log_sum_sq_probs": "sum_p2", "mean_logits": "mean_logit", "is_top1": "argmax"}


@dataclass
class Taken:
    """What `taking` asks of the head, and what it gave: one TokenStats a forward, in order."""

    outputs: tuple[str, ...]
    temperature: float
    stats: list[TokenStats] = field(default_factory=list)


_asked: ContextVar[Taken | None] = ContextVar("urlvr_fast_trl_statistics", default=None)


def use_fused_ops(save: str = "recompute") -> None:
    """Make every fused head of TRL's compute with `linear_token_stats`, in this process, from now on.

    Log-probs and entropies stay what they were, to rounding. save: of `linear_token_stats`. "recompute" holds no logits from the forward to
    the backward, as TRL's own head, and makes their product once more there; "auto" saves it where the logits take no more than 2 GiB.
    Raises AdapterError for a version of TRL that this was not tested with.
    """
    require("trl", TRL)
    from trl.trainer import utils

    FusedHead.save = save
    utils._ChunkedLogProbFunction = FusedHead


@contextmanager
def taking(outputs: Sequence[str], temperature: float) -> Iterator[list[TokenStats]]:
    """Within it every forward through the head computes these outputs of `token_stats`, at this temperature, and adds them to the list."""
    taken = Taken(tuple(outputs), temperature)
    token = _asked.set(taken)
    try:
        yield taken.stats
    finally:
        _asked.reset(token)


class FusedHead:
    """In the place of TRL's `ChunkedLogProbFunction`."""

    save = "recompute"

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,  # columns at a time, which is TRL's way; ours goes by rows
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = ("log_probs",),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """log_probs, and where they are in `outputs` entropy, log_sum_sq_probs, mean_logits and is_top1, (N,) each. The first two are
        differentiable. Raises AdapterError for parameters that DeepSpeed's ZeRO-3 has scattered: a backward would find them gone."""
        if hasattr(weight, "ds_id"):
            raise AdapterError("the fused head does not gather what ZeRO-3 has scattered: use ZeRO-2, FSDP, or TRL's own head")
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        if bias is not None and logit_scale != 1:
            bias = bias * logit_scale  # the ops add it after scaling, models before
        asked = _asked.get()
        wanted = {OURS[name] for name in outputs} | {"logp"}
        stats = linear_token_stats(
            hidden,
            weight,
            targets,
            outputs=sorted(wanted.union(asked.outputs) if asked else wanted),
            temperature=asked.temperature if asked else temperature,
            softcap=final_logit_softcapping,
            scale=logit_scale,
            bias=bias,
            save=FusedHead.save,
        )
        if asked:
            asked.stats.append(stats)
        assert stats.logp is not None
        return (
            stats.logp,
            stats.entropy,
            None if stats.sum_p2 is None else stats.sum_p2.log(),
            None if stats.mean_logit is None else stats.mean_logit.detach(),
            None if stats.argmax is None else stats.argmax == targets,
        )
