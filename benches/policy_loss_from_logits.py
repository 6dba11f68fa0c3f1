"""The measures of policy_loss_from_logits: forward and backward of a policy loss together, in place and into a new tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benches import exact
from benches.data import Rows
from benches.measure import Case, Target
from benches.peers import Provider

IN_PLACE = "policy loss, forward + backward in place"
NEW = "policy loss, forward + backward"


def _case(rows: Rows, provider: Provider, inplace: bool, size: int) -> Case:
    def prepare(run: Callable) -> Callable[[], Tensor]:
        logits = rows.overwritable() if inplace else rows.leaf()
        return lambda: torch.autograd.grad(run(rows, logits), logits)[0]

    def load() -> Callable:
        return provider.policy(inplace)

    def check(gradient: Tensor) -> dict[str, float]:
        return exact.policy_gradient_error(rows, gradient)

    return Case(IN_PLACE if inplace else NEW, provider.name, load, size, prepare, check)


def cases(rows: Rows, providers: Sequence[Provider]) -> list[Case]:
    """Everything that these providers can do on these rows."""
    s = rows.scenario
    row = s.columns * rows.logits.element_size()
    size = (rows.live + s.rows) * row
    out = []
    for provider in (p for p in providers if p.policy is not None):
        out += [
            _case(rows, provider, inplace, size) for inplace in ((True, False) if provider.inplace and not provider.brief else (False,))
        ]
    for case in out:
        mine = case.measure == IN_PLACE and case.provider in ("urlvr_fast triton", "urlvr_fast cuda")
        if mine and rows.device.type == "cuda" and (s.rows, s.columns, s.dtype, s.data, s.masked) == (8192, 151936, "bf16", "random", 0.0):
            case.targets = (Target("copy_", 1.15),)
    return out
