"""`python -m benches.verl`: the step of verl's FSDP engine from logits to log-probs and entropies, forward and backward, verl's own against
ours, on one core of the CPU. verl's entropy both as it compiles it, its default, and in eager.

Both are the engine's `prepare_model_outputs` on a packed micro-batch at temperature 0.7, which verl divides the logits by. Without
flash-attn, which needs a GPU, verl's log-probs are torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from benches.data import DTYPES, Rows, Scenario
from urlvr_fast.adapters.verl_head import prepare_model_outputs

CPU = torch.device("cpu")
Outputs = Callable[..., dict[str, torch.Tensor]]


def engine(compiled: bool) -> FSDPEngineWithLMHead:
    """What of an engine the step looks at."""
    made = object.__new__(FSDPEngineWithLMHead)
    made.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    entropy = torch_functional.entropy_from_logits
    made.compute_entropy_from_logits = torch.compile(entropy, dynamic=True) if compiled else entropy
    made.use_ulysses_sp = False
    return made


def once(outputs: Outputs, made: FSDPEngineWithLMHead, rows: Rows) -> tuple[float, torch.Tensor]:
    """Milliseconds, and the gradient."""
    offsets = torch.arange(0, rows.scenario.rows + 1, rows.length)
    batch = tu.get_tensordict(
        {"input_ids": torch.nested.nested_tensor_from_jagged(rows.ids, offsets)}, {"use_remove_padding": True, "calculate_entropy": True}
    )
    arguments = {"input_ids_rmpad_rolled": rows.ids, "temperature_rmpad": torch.full((len(rows.ids),), 0.7), "pad_size": 0}
    logits = rows.overwritable()
    begin = time.perf_counter()
    found = outputs(made, SimpleNamespace(logits=logits[None]), arguments, batch, None)
    values = [found["log_probs"].values(), found["entropy"].values()]
    upstream = [rows.upstream[name].to(value.dtype) for name, value in zip(("logp", "entropy"), values, strict=True)]
    (gradient,) = torch.autograd.grad(values, logits, upstream)
    return (time.perf_counter() - begin) * 1e3, gradient


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.verl", description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    theirs = FSDPEngineWithLMHead.prepare_model_outputs
    cases = {
        "ours": (prepare_model_outputs, engine(False)),
        "verl, compiled": (theirs, engine(True)),
        "verl, eager": (theirs, engine(False)),
    }
    for dtype in ("bf16", "fp32"):
        rows = Rows(Scenario(options.rows, options.columns, dtype), CPU)
        assert rows.logits.dtype == DTYPES[dtype]
        gradients = {name: once(*case, rows)[1].to(torch.float32, copy=True) for name, case in cases.items()}
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, case in cases.items():
                samples[name].append(once(*case, rows)[0])
        ours = statistics.median(samples["ours"])
        for name, taken in samples.items():
            gap = float((gradients[name] - gradients["ours"]).norm() / gradients["ours"].norm())
            median = statistics.median(taken)
            times = f"{median:9.1f} ms ({min(taken):.1f} to {max(taken):.1f}), {median / ours:5.2f}× ours"
            print(f"{options.rows} × {options.columns} {dtype}  {name:15} {times}, ‖Δgradient‖ / ‖gradient‖ {gap:.0e}")


if __name__ == "__main__":
    main()
