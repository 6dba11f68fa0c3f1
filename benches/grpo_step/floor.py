"""What the learner cannot do without, alone in a process: the body's forward and backward, three products, an optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from benches.grpo_step import worker
from benches.grpo_step.material import Material

CHUNK_BYTES = 256 << 20  # of logits at a time: the trainer's own default

# (rows (n, H), weight (V, H), logits (n, V), their gradients): one chunk's three products.
Products = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def main(pipe: Connection, material: Material, threads: int) -> None:
    torch.set_num_threads(threads)
    floor = _Floor(material)
    pipe.send(worker.about_threads())
    while True:
        pipe.recv()
        pipe.send(floor())


class _Floor:
    def __init__(self, material: Material) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(material.model, dtype=torch.float32)
        self._model.train()
        self._ids, self._mask, self._predicting = padded(material)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-12, weight_decay=0.01, fused=True)
        vocabulary, hidden = self._model.get_output_embeddings().weight.shape
        self._rows = min(int(self._predicting.sum()), max(1, CHUNK_BYTES // (4 * vocabulary)))
        # Not allocated while the clock runs: a fresh page costs more than the arithmetic on it.
        self._upstream = torch.randn(*self._ids.shape, hidden)
        self._logits = torch.randn(self._rows, vocabulary)
        self._grad_hidden = torch.randn(int(self._predicting.sum()), hidden)
        self._grad_weight = torch.zeros(vocabulary, hidden)
        ways = [_mm, _onednn, _mixed] if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") else [_mm]
        self._products = min(ways, key=self._seconds)  # which library is faster depends on the processor

    def __call__(self) -> dict[str, float]:
        with worker.Seconds() as body:
            states = self._model.base_model(input_ids=self._ids, attention_mask=self._mask, use_cache=False).last_hidden_state
            states.backward(self._upstream)
        with worker.Seconds() as head:
            self._head(states.detach()[self._predicting], self._products)
        with worker.Seconds() as optimizer:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        parts = {"body": body.value, "head": head.value, "optimizer": optimizer.value}
        return {"total": sum(parts.values()), **parts}

    def _head(self, hidden: Tensor, products: Products) -> None:
        weight = self._model.get_output_embeddings().weight.detach()
        for start in range(0, len(hidden), self._rows):
            rows = hidden[start : start + self._rows]
            products(rows, weight, self._logits[: len(rows)], self._grad_hidden[start : start + self._rows], self._grad_weight)

    def _seconds(self, products: Products) -> float:
        """Of the second call: the first one compiles."""
        for _ in range(2):
            with worker.Seconds() as seconds:
                self._head(torch.ones_like(self._grad_hidden), products)
        return seconds.value


def _mm(rows: Tensor, weight: Tensor, logits: Tensor, grad_rows: Tensor, grad_weight: Tensor) -> None:
    torch.mm(rows, weight.t(), out=logits)
    torch.mm(logits, weight, out=grad_rows)
    grad_weight.addmm_(logits.t(), rows)


def _onednn(rows: Tensor, weight: Tensor, logits: Tensor, grad_rows: Tensor, grad_weight: Tensor) -> None:
    """In memory of its own, which it takes and gives back: it has no way to use what is there."""
    linear = torch.ops.mkldnn._linear_pointwise
    logits = linear(rows, weight, None, "none", [], "")
    grad_rows.copy_(linear(logits, weight.t(), None, "none", [], ""))
    grad_weight.add_(linear(logits.t(), rows.t(), None, "none", [], ""))


def _mixed(rows: Tensor, weight: Tensor, logits: Tensor, grad_rows: Tensor, grad_weight: Tensor) -> None:
    """oneDNN's, but for the product that is added to what is there."""
    linear = torch.ops.mkldnn._linear_pointwise
    logits = linear(rows, weight, None, "none", [], "")
    grad_rows.copy_(linear(logits, weight.t(), None, "none", [], ""))
    grad_weight.addmm_(logits.t(), rows)


def padded(material: Material) -> tuple[Tensor, Tensor, Tensor]:
    """The given rollouts as one batch, padded on the right: ids and mask (B, width), and where a response token is predicted."""
    prompts = [torch.tensor(ids) for ids in material.prompt_ids for _ in range(material.group_size)]
    sequences = [torch.cat([prompt, response]) for prompt, response in zip(prompts, material.responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    column = torch.arange(ids.shape[1])
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    mask = column < lengths + material.response
    predicting = mask & (column >= lengths - 1) & (column < lengths + material.response - 1)
    return ids, mask.long(), predicting
