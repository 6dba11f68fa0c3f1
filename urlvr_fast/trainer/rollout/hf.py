"""`transformers` generation with its KV cache, on the trainer's own model: for where vLLM cannot be installed.

It shares the weights, so there is nothing to synchronise, and it is several times slower than vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from urlvr_fast.ops import token_stats
from urlvr_fast.trainer.rollout import Completion, Sampling, seeded


class HFRollout:
    """model: the trainer's causal LM. dtype: "float32" or "bfloat16", of the products, as in the trainer. stop_token_ids: what ends a
    completion. batch_prompts: prompts generated at once."""

    def __init__(self, model: Any, *, dtype: str, stop_token_ids: list[int], batch_prompts: int = 64) -> None:
        self._model = model
        self._autocast = dtype == "bfloat16"
        self._stop_token_ids = stop_token_ids
        self._batch_prompts = batch_prompts

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[Completion]]:
        # The model's own generation defaults (min_p, suppressed tokens …) must not shape the distribution.
        was_training, own_defaults = self._model.training, self._model.generation_config
        self._model.eval()
        self._model.generation_config = GenerationConfig()
        completions = []
        try:
            with seeded(seed), torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=self._autocast):
                for start in range(0, len(prompts), self._batch_prompts):
                    completions += self._generate_batch(prompts[start : start + self._batch_prompts], sampling)
        finally:
            self._model.generation_config = own_defaults
            self._model.train(was_training)
        return completions

    def sync(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing to do: the engine samples from the trainer's own parameters."""

    def close(self) -> None:
        self._model = None

    def _generate_batch(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[Completion]]:
        width = max(map(len, prompts))
        pad = self._stop_token_ids[0] if self._stop_token_ids else 0  # any id will do: the attention mask hides it
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self._model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self._model.device)
        recorder = _Recorder(("logp", *sorted(sampling.statistics)))
        processors = LogitsProcessorList(_truncation(sampling))
        processors.append(recorder)
        greedy = sampling.temperature == 0
        sequences = self._model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=1 if greedy else sampling.n,
            do_sample=not greedy,
            temperature=1.0,  # `processors` says all there is to say
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            logits_processor=processors,
            eos_token_id=self._stop_token_ids or None,
            pad_token_id=pad,
            use_cache=True,
        )
        taken = recorder.finish(sequences)
        rows = [self._cut(ids, {name: v[i] for name, v in taken.items()}) for i, ids in enumerate(sequences[:, width:].tolist())]
        n = len(rows) // len(prompts)
        return [rows[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _cut(self, token_ids: list[int], taken: dict[str, Tensor]) -> Completion:
        """End a padded row at its first stop token."""
        length = next((i + 1 for i, token in enumerate(token_ids) if token in self._stop_token_ids), None)
        reason = "length" if length is None else "stop"
        cut = {name: values[:length] for name, values in taken.items()}
        return Completion(token_ids[:length], cut.pop("logp").tolist(), reason, cut)


def _truncation(sampling: Sampling) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = []
    if sampling.temperature not in (0, 1):
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


class _Recorder(LogitsProcessor):
    """Last in the list, it sees the scores that are sampled from. The token drawn from one call's scores is known at the next call, so one
    (rows, V) tensor is held, not one a step."""

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self._outputs = outputs  # of `token_stats`
        self._scores: Tensor | None = None
        self._taken: list[Tensor] = []  # one (outputs, rows) a step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._scores = scores
        return scores

    def finish(self, sequences: Tensor) -> dict[str, Tensor]:
        """Each output, (rows, generated tokens) on the CPU; what stands after a row's end is meaningless."""
        self._take(sequences)
        return dict(zip(self._outputs, torch.stack(self._taken, dim=2).cpu(), strict=True))

    def _take(self, input_ids: Tensor) -> None:
        if self._scores is not None:
            stats = token_stats(self._scores, input_ids[:, -1], outputs=self._outputs)
            self._taken.append(torch.stack([getattr(stats, name) for name in self._outputs]))
