"""Ops that torch knows, `torch.ops.urlvr_fast.<name>`: one function for all devices and a fake kernel, so that torch.compile sees one node.

On plain tensors in eager mode nobody needs to see that node, and the way through torch's dispatcher to a Python function takes longer than
a small kernel runs. The function is called directly there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

library = torch.library.Library("urlvr_fast", "FRAGMENT")


def define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register `run` as an op, and return what calls it, by the shorter way where there is one."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"urlvr_fast::{name}", fake, lib=library)
    op = getattr(torch.ops.urlvr_fast, name).default

    def call(*arguments: Any) -> Any:
        return op(*arguments) if torch.compiler.is_compiling() or _watched(arguments) else run(*arguments)

    return call


def _watched(arguments: tuple) -> bool:
    """Whether someone has a say between us and the kernel: autograd, a mode (fake tensors, tracing), torch.func, a subclass."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
