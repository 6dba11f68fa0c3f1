"""The one object that goes through a training step: the rollouts of a batch of prompts, ragged and grouped.

Conventions: B rollouts, T tokens in all, R response tokens in all. Per-rollout tensors are (B,), per-response-token tensors are (R,) in
rollout order, so rollout b owns rows `response_cu_seqlens[b] : response_cu_seqlens[b + 1]`. Everything lives on the CPU; the learner moves
what it needs. Nothing assumes that groups are contiguous, equal or complete: `group_ids` alone says who belongs together.

Answers are not in here. They live in an audit map (prompt id -> answer) that only metrics and the ground-truth oracle receive, so that a
label-free reward cannot see one even by mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from urlvr_fast.trainer.rollout import Completion

PER_TOKEN = ("sampled_logp", "entropy", "self_certainty", "prob_gap", "old_logp", "ref_logp")  # fields that are (R,)


@dataclass
class RolloutBatch:
    tokens: Tensor  # (T,) int64: prompt then response of each rollout, end to end; the response keeps its end-of-sequence token
    cu_seqlens: Tensor  # (B + 1,) int64: offsets of the rollouts in `tokens`
    prompt_lens: Tensor  # (B,) int64
    group_ids: Tensor  # (B,) int64: rollouts of one prompt share one; a prompt drawn twice in a batch makes two groups
    prompt_ids: list[int]  # (B,) row of the prompt in its data set: the key of the audit map
    prompts: list[str]  # (B,) prompt text as the model saw it
    completions: list[str]  # (B,) decoded response without special tokens
    finish_reasons: list[str]  # (B,) "stop" or "length"
    sampled_logp: Tensor  # (R,) fp32: log-probability of each sampled token under the distribution it was drawn from
    temperature: float  # of the sampling distribution; every statistic below is taken at this temperature
    columns: dict[str, list[Any]] = field(default_factory=dict)  # the prompts' other columns, each (B,)
    train_mask: Tensor | None = None  # (B,) bool: False marks votes that are not trained on; None means all are
    # Statistics of the sampling distribution, (R,) fp32, present where somebody took them.
    entropy: Tensor | None = None
    self_certainty: Tensor | None = None
    prob_gap: Tensor | None = None
    # Log-probs of the response tokens, (R,) fp32, under the trainer's weights before the batch's first update, and under the start model's.
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def response_lens(self) -> Tensor:  # (B,) int64
        return self.cu_seqlens.diff() - self.prompt_lens

    @property
    def response_cu_seqlens(self) -> Tensor:  # (B + 1,) int64
        return torch.cat([self.cu_seqlens.new_zeros(1), self.response_lens.cumsum(0)])

    @property
    def token_rollout(self) -> Tensor:
        """(R,) int64: which rollout each response token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.response_lens)

    def sequence_sum(self, per_token: Tensor) -> Tensor:
        """Sum a (R,) tensor over the response tokens of each rollout: (B,), in the input's dtype."""
        return per_token.new_zeros(len(self)).index_add_(0, self.token_rollout, per_token)

    def sequence_mean(self, per_token: Tensor) -> Tensor:
        """Mean of a (R,) tensor over the response tokens of each rollout: (B,). An empty response gives 0."""
        return self.sequence_sum(per_token) / self.response_lens.clamp(min=1)

    def groups(self) -> dict[int, list[int]]:
        """Group id -> indices of its rollouts, in order of first appearance."""
        members: dict[int, list[int]] = {}
        for index, group in enumerate(self.group_ids.tolist()):
            members.setdefault(group, []).append(index)
        return members

    def select(self, rows: list[int]) -> RolloutBatch:
        """The sub-batch of these rollouts, in the given order."""
        starts, ends = self.cu_seqlens[:-1].tolist(), self.cu_seqlens[1:].tolist()
        response = self.response_cu_seqlens.tolist()
        index = torch.tensor(rows, dtype=torch.int64)

        def spans(tensor: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
            return torch.cat([tensor[a:b] for a, b in offsets]) if offsets else tensor[:0]

        token_spans = [(starts[r], ends[r]) for r in rows]
        response_spans = [(response[r], response[r + 1]) for r in rows]
        changes: dict[str, Any] = {
            "tokens": spans(self.tokens, token_spans),
            "cu_seqlens": torch.cat([self.cu_seqlens.new_zeros(1), self.cu_seqlens.diff()[index].cumsum(0)]),
            "columns": {name: [values[r] for r in rows] for name, values in self.columns.items()},
        }
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in changes or f.name == "temperature" or value is None:
                continue
            if isinstance(value, list):
                changes[f.name] = [value[r] for r in rows]
            elif f.name in PER_TOKEN:
                changes[f.name] = spans(value, response_spans)
            else:
                changes[f.name] = value[index]
        return replace(self, **changes)


def build_batch(
    *,
    prompt_token_ids: list[list[int]],
    prompt_texts: list[str],
    prompt_ids: list[int],
    completions: list[list[Completion]],
    decode: Callable[[list[list[int]]], list[str]],
    temperature: float,
    columns: dict[str, list[Any]] | None = None,
) -> RolloutBatch:
    """One batch from an engine's completions: `completions[i]` are those of prompt i, and they make group i.

    decode: token ids of many responses -> their texts, special tokens left out. columns: the prompts' other columns, one value a prompt.
    Statistics that the engine took while sampling, the same ones for every completion, fill the batch's fields of their names.
    Raises ValueError when an engine returned an empty completion, which no sampler can mean.
    """
    owner = [i for i, group in enumerate(completions) for _ in group]
    flat = [c for group in completions for c in group]
    for i, c in zip(owner, flat, strict=True):
        if not c.token_ids or len(c.token_ids) != len(c.logp):
            raise ValueError(f"prompt {prompt_ids[i]}: a completion of {len(c.token_ids)} tokens came with {len(c.logp)} log-probs")
        for name, values in c.statistics.items():
            if len(values) != len(c.token_ids):
                raise ValueError(f"prompt {prompt_ids[i]}: a completion of {len(c.token_ids)} tokens came with {len(values)} of {name}")
    sequences = [prompt_token_ids[i] + c.token_ids for i, c in zip(owner, flat, strict=True)]
    lengths = torch.tensor([0] + [len(s) for s in sequences], dtype=torch.int64)
    return RolloutBatch(
        tokens=torch.tensor([t for s in sequences for t in s], dtype=torch.int64),
        cu_seqlens=lengths.cumsum(0),
        prompt_lens=torch.tensor([len(prompt_token_ids[i]) for i in owner], dtype=torch.int64),
        group_ids=torch.tensor(owner, dtype=torch.int64),
        prompt_ids=[prompt_ids[i] for i in owner],
        prompts=[prompt_texts[i] for i in owner],
        completions=decode([c.token_ids for c in flat]),
        finish_reasons=[c.finish_reason for c in flat],
        sampled_logp=torch.tensor([p for c in flat for p in c.logp], dtype=torch.float32),
        temperature=temperature,
        columns={name: [values[i] for i in owner] for name, values in (columns or {}).items()},
        **{name: torch.cat([c.statistics[name] for c in flat]) for name in (flat[0].statistics if flat else ())},
    )
