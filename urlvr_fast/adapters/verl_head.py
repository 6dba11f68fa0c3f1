"""verl's engines on the fused ops: `use_fused_ops()` in every process that has an engine, before or after the engine is made.

Of verl's FSDP engine the step from logits to per-token statistics is replaced as a whole: log-prob, entropy, Σπ² and self-certainty come
from one pass, at each token's own temperature, and one backward over the logits in place. Everywhere else in verl the functions of those
names are replaced, and the head behind `use_fused_kernels`. What verl does around them stays as it is: packing, sequence parallelism,
nested tensors, losses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from urlvr_fast.adapters import AdapterError, require
from urlvr_fast.ops import linear_token_stats, token_stats

VERL = "0.9"  # tested with
# What a micro-batch may ask of the engine -> the engine's name for it and ours. The last two are not verl's.
ASKED = {
    "calculate_entropy": ("entropy", "entropy"),
    "calculate_sum_pi_squared": ("sum_pi_squared", "sum_p2"),
    "calculate_self_certainty": ("self_certainty", "self_certainty"),
    "calculate_prob_gap": ("prob_gap", "prob_gap"),
}

_verls_outputs: Callable[..., dict[str, Tensor]] | None = None  # the engine's method, before


def use_fused_ops() -> None:
    """Make verl compute log-probs and entropies with `token_stats` and `linear_token_stats`, in this process, from now on.

    Results are what they were, to rounding, but always fp32, also of 16-bit logits, which verl divides by the temperature and sums in 16
    bits. An engine that was made before keeps the entropy function that it had, which it takes in distillation. Raises AdapterError for a
    version of verl that this was not tested with.
    """
    require("verl", VERL)
    from verl.utils import torch_functional
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as kernel
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    global _verls_outputs
    if FSDPEngineWithLMHead.prepare_model_outputs is not prepare_model_outputs:
        _verls_outputs = FSDPEngineWithLMHead.prepare_model_outputs
    FSDPEngineWithLMHead.prepare_model_outputs = prepare_model_outputs
    FusedLinearForPPO.forward = fused_head
    for home, ours in (
        (torch_functional, logprobs_from_logits),
        (torch_functional, entropy_from_logits),
        (torch_functional, entropy_from_logits_with_chunking),
        (torch_functional, calculate_sum_pi_squared_from_logits),
        (kernel, linear_cross_entropy),
    ):
        _replace(ours.__name__, getattr(home, ours.__name__), ours)


def _replace(name: str, theirs: object, ours: object) -> None:
    """In every module of verl's that has imported the name."""
    for title, module in list(sys.modules.items()):
        if title.partition(".")[0] == "verl" and vars(module).get(name) is theirs:
            setattr(module, name, ours)


# ---- the FSDP engine -------------------------------------------------------------------------------------------------------------------


def prepare_model_outputs(engine: Any, output: Any, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any) -> dict:
    """In the place of `FSDPEngineWithLMHead.prepare_model_outputs`: log_probs, and what the micro-batch asks for of `ASKED`; nested
    (B, prompt + response) fp32 each, of the next token at every position. Log-probs, entropy and self-certainty are differentiable. What
    is not verl's is not to be had with `use_fused_kernels` or distillation: AdapterError."""
    from verl.utils import tensordict_utils as tu

    def option(key: str, default: bool = False) -> bool:
        return tu.get_non_tensor_data(data=micro_batch, key=key, default=default)

    if option("use_fused_kernels") or option("distillation_use_topk") or option("distillation_only"):
        if option("calculate_self_certainty") or option("calculate_prob_gap"):
            raise AdapterError("self-certainty and prob_gap need logits: set model.use_fused_kernels=False, and no distillation")
        assert _verls_outputs is not None
        return _verls_outputs(engine, output, output_args, micro_batch, logits_processor_func)
    wanted = {"log_probs": "logp"} | dict(names for key, names in ASKED.items() if option(key))
    logits = output.logits.full_tensor() if isinstance(output.logits, DTensor) else output.logits
    ids, offsets, there = output_args["input_ids_rmpad_rolled"], micro_batch["input_ids"].offsets(), None
    if option("use_remove_padding", True):
        logits, temperature = logits.squeeze(0), output_args["temperature_rmpad"]  # (T, V), (T,)
    else:
        there = torch.arange(logits.shape[1], device=logits.device) < offsets.diff()[:, None]  # (B, S)
        ids = torch.zeros_like(there, dtype=ids.dtype).masked_scatter(there, ids)
        temperature = output_args["temperature"][:, None].expand(there.shape)
    stats = token_stats(
        logits,
        ids,
        outputs=list(wanted.values()),
        temperature=temperature.clamp(min=1e-8),  # verl's reading of 0
        mask=there,
        inplace_backward=logits.grad_fn is not None,  # nobody reads them afterwards
    )
    found = {}
    for name, ours in wanted.items():
        values = getattr(stats, ours)
        values = engine._gather_and_unpad_packed(values, output_args["pad_size"]) if there is None else values[there]
        found[name] = torch.nested.nested_tensor_from_jagged(values, offsets)
    return found


# ---- functions of verl's, by their names and arguments ---------------------------------------------------------------------------------


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = False) -> Tensor:
    """(…) fp32 log-probs of labels (…) under logits (…, V). The backward writes over logits that some operation made where the caller says
    so; in verl it may do so by default, but there only flash-attn does, and some that call it read the logits elsewhere too."""
    inplace = inplace_backward and logits.grad_fn is not None
    logp = token_stats(logits, labels, outputs="logp", inplace_backward=inplace).logp
    assert logp is not None
    return logp


def entropy_from_logits(logits: Tensor) -> Tensor:
    """(…) fp32 of logits (…, V)."""
    entropy = token_stats(logits, None, outputs="entropy").entropy
    assert entropy is not None
    return entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As `entropy_from_logits`, which has nothing to chunk."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Σπ², (…) fp32 of logits (…, V); not differentiable, as verl takes it for a baseline."""
    sum_p2 = token_stats(logits, None, outputs="sum_p2").sum_p2
    assert sum_p2 is not None
    return sum_p2


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of labels (…) and entropies, (…) fp32 each, of hidden (…, H) @ weight (V, H)ᵀ; both differentiable.

    Raises AdapterError for a reduction, for a vocabulary that Megatron has split, and for a weight that FSDP2 has sharded by itself: it is
    gathered in the head's own forward alone, which verl passes by.
    """
    if reduction.lower() != "none":
        raise AdapterError(f"linear_cross_entropy with reduction={reduction!r} is not built")
    if dist_process_group is not None:
        raise AdapterError("the fused head of a vocabulary split by Megatron is not built: set use_fused_kernels=False")
    if isinstance(weight, DTensor):
        raise AdapterError("FSDP2 has sharded lm_head by itself, so its fused head has a part of it: set use_fused_kernels=False")
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    stats = linear_token_stats(hidden, weight, labels, outputs=("logp", "entropy"), temperature=temperature)
    assert stats.logp is not None
    assert stats.entropy is not None
    return stats.logp, stats.entropy


def fused_head(
    module: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """In the place of `FusedLinearForPPO.forward`: as `linear_cross_entropy`."""
    return linear_cross_entropy(hidden_states, vocab_weights, input_ids, temperature)
