"""The learner: turns rollouts and advantages into gradients, and gradients into an update.

Only the model's body sees padding. Rollouts are sorted by length and cut into micro-batches under a token budget, the body runs on
the padded micro-batch, and the hidden states of the response tokens alone go to the loss, which never holds the logits of a whole
batch. Denominators are those of the whole batch, so the gradient does not depend on where micro-batches were cut.

Parameters are fp32 always; with `trainer.dtype=bfloat16` the products run under autocast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from urlvr_fast.ops import linear_policy_loss, linear_token_stats
from urlvr_fast.trainer.batch import RolloutBatch
from urlvr_fast.trainer.config import ConfigError, LossConfig, TrainerConfig

# Losses divided by tokens; the others are divided by sequences (the table of `urlvr_fast.policy_loss`). Both are counted over the whole
# batch, which is what `bnpo` means here by its call.
PER_TOKEN = ("reinforce", "dapo", "bnpo", "cispo")


@dataclass
class Head:
    """What a model does between its last hidden state and its logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float

    def options(self) -> dict[str, Any]:
        """Of the ops, which add the bias after scaling: models add it before."""
        bias = self.bias if self.bias is None or self.scale == 1 else self.bias * self.scale
        return {"bias": bias, "softcap": self.softcap, "scale": self.scale}


def find_head(model: Any) -> Head:
    """The output head of a causal LM, checked against the model's own logits. Raises ConfigError when they differ."""
    text_config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    scale = float(getattr(text_config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(text_config, "logits_scaling", None) or 1.0)  # Granite divides
    head = Head(layer.weight, layer.bias, getattr(text_config, "final_logit_softcapping", None), scale)
    probe = torch.arange(8, device=layer.weight.device).remainder(layer.weight.shape[0])[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0]
        logits = nn.functional.linear(hidden, layer.weight, layer.bias) * scale
        if head.softcap:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        own = model(input_ids=probe, use_cache=False).logits[0]
    if not torch.allclose(logits.float(), own.float(), atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"{type(model).__name__} does something between hidden states and logits that the trainer does not know "
            f"(largest difference {(logits - own).abs().max().item():.3g}), so its log-probs would be wrong"
        )
    return head


class Learner:
    """model: a causal LM with fp32 parameters on its device. dtype: "float32" or "bfloat16", of the products."""

    def __init__(self, model: Any, *, trainer: TrainerConfig, loss: LossConfig, dtype: str, max_response_tokens: int) -> None:
        self.model = model
        self._trainer = trainer
        self._loss = loss
        self._max_response_tokens = max_response_tokens
        self._autocast = dtype == "bfloat16"
        self._device = next(model.parameters()).device
        _disable_dropout(model)
        model.train()
        if trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._head = find_head(model)
        self._start: tuple[Any, Head] | None = None
        self.rate_scale = 1.0  # what a detector has lowered the learning rate by
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=trainer.lr, weight_decay=trainer.weight_decay, betas=(0.9, 0.999)
        )

    def keep_start(self, start: Any = None) -> None:
        """Keep a frozen copy of `start`, or of the present weights, for `start_logp`: the reference of every KL."""
        start = copy.deepcopy(self.model) if start is None else start
        start.requires_grad_(False).eval()
        self._start = start, find_head(start)

    @torch.no_grad()
    def start_logp(self, batch: RolloutBatch) -> Tensor:
        """(R,) fp32: log-probs of the response tokens under the model that training started from, at the batch's temperature."""
        if self._start is None:
            raise RuntimeError("keep_start was not called: there is no copy of the start model")
        own = self.model, self._head
        self.model, self._head = self._start
        try:
            return self.score(batch, ("logp",))["logp"]
        finally:
            self.model, self._head = own

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, as an engine takes them: a tied weight comes under each of its names, since engines may keep copies of it."""
        return self.model.named_parameters(remove_duplicate=False)

    @torch.no_grad()
    def score(self, batch: RolloutBatch, outputs: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Statistics of the response tokens under the present weights, at the batch's temperature: each (R,) fp32 on the CPU.

        rows: only these rollouts; the tokens of the others are left NaN.
        """
        count = int(batch.response_lens.sum())
        result = {name: torch.full((count,), math.nan) for name in outputs}
        for micro in self._micro_batches(batch, range(len(batch)) if rows is None else rows):
            hidden, ids, where = self._response_hidden(batch, micro)
            with self._precision():
                stats = linear_token_stats(
                    hidden,
                    self._head.weight,
                    ids,
                    outputs=tuple(outputs),
                    temperature=batch.temperature,
                    chunk_bytes=self._trainer.chunk_bytes,
                    **self._head.options(),
                )
            for name in outputs:
                result[name][where] = getattr(stats, name).float().cpu()
        return result

    def accumulate(self, batch: RolloutBatch, advantages: Tensor) -> dict[str, float]:
        """Forward and backward of one batch; gradients are left in `.grad`.

        advantages: (B,). Rollouts whose advantage is 0 have no gradient unless a bonus asks for one; they go through the body without
        gradient, for the metrics alone, and not at all when the statistics are in the batch already. Returns the batch's metrics:
        `actor_entropy` over all response tokens, `logp_gap_max` and `logp_gap_mean` over those whose log-probs were computed, `loss`,
        clip fractions, counts.
        """
        trained = torch.ones(len(batch), dtype=torch.bool) if batch.train_mask is None else batch.train_mask
        regularised = bool(self._loss.entropy_coef or self._loss.self_certainty_coef or self._loss.kl_coef)
        live = trained if regularised else trained & (advantages != 0)
        response_tokens = int(batch.response_lens.sum())
        tokens = int(batch.response_lens[trained].sum())
        totals = _Totals()
        for micro in self._micro_batches(batch, live.nonzero().flatten().tolist()):
            hidden, ids, where = self._response_hidden(batch, micro)
            rows = torch.tensor(micro)
            lengths = batch.response_lens[rows]
            with self._precision():
                loss, metrics = linear_policy_loss(
                    hidden,
                    self._head.weight,
                    ids,
                    advantages=self._sent(advantages[rows]),
                    cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),  # on the host: it says where chunks may be cut
                    rollout_logp=self._sent(batch.sampled_logp[where]),
                    old_logp=None if batch.old_logp is None else self._sent(batch.old_logp[where]),
                    ref_logp=self._sent(batch.ref_logp[where]) if batch.ref_logp is not None and self._loss.kl_coef else None,
                    temperature=batch.temperature,
                    chunk_bytes=self._trainer.chunk_bytes,
                    **self._loss_options(tokens, int(trained.sum())),
                    **self._head.options(),
                )
            loss.backward()
            totals.add(loss, metrics, int(lengths.sum()))
        silent = (~live).nonzero().flatten().tolist()
        if silent:
            self._measure(batch, silent, totals)
        result = totals.result()
        result["actor_entropy"] = result.pop("entropy_sum") / max(1, response_tokens)
        result["live_rollouts"] = float(live.sum())
        return result

    def update(self, step: int) -> dict[str, float]:
        """Clip the gradient and take the step; a gradient that is not finite is dropped. Returns `grad_norm`, `lr` and `skipped`."""
        rate = learning_rate(step, self._trainer) * self.rate_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._trainer.grad_clip))
        finite = math.isfinite(norm)
        # When every group is unanimous no parameter has a gradient, and AdamW leaves it alone rather than drift on old momentum.
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "lr": rate, "skipped": float(not finite)}

    def _measure(self, batch: RolloutBatch, rows: list[int], totals: _Totals) -> None:
        """Entropy and log-prob gap of rollouts that take no part in the gradient."""
        wanted = torch.isin(batch.token_rollout, torch.tensor(rows))
        if batch.entropy is not None:
            totals.entropy_sum += float(batch.entropy[wanted].sum())
            return
        stats = self.score(batch, ("logp", "entropy"), rows)
        totals.entropy_sum += float(stats["entropy"][wanted].sum())
        gaps = (stats["logp"] - batch.sampled_logp)[wanted].abs()
        totals.add_gaps(float(gaps.mean()), float(gaps.max()), len(gaps))

    def _loss_options(self, tokens: int, sequences: int) -> dict[str, Any]:
        loss = self._loss
        denominator = tokens if loss.loss_type in PER_TOKEN else sequences
        if loss.loss_type == "dr_grpo":
            denominator *= self._max_response_tokens
        return {
            "loss_type": loss.loss_type,
            "denominator": denominator,
            "token_denominator": tokens,
            "max_length": self._max_response_tokens,
            "eps_low": loss.eps_low,
            "eps_high": loss.eps_high,
            "beta": loss.kl_coef,
            "kl": loss.kl,
            "entropy_coef": loss.entropy_coef,
            "self_certainty_coef": loss.self_certainty_coef,
            "rollout_correction": loss.rollout_correction,
        }

    def _sent(self, value: Tensor) -> Tensor:
        """On the model's device. The host goes on: the next micro-batch is made ready while this one runs."""
        return value.to(self._device, non_blocking=True)

    def _precision(self) -> Any:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def _micro_batches(self, batch: RolloutBatch, rows: Sequence[int]) -> Iterator[list[int]]:
        """Cut rollouts, longest first, into runs whose padded size fits the token budget; one rollout always fits."""
        lengths = batch.cu_seqlens.diff().tolist()
        micro: list[int] = []
        for row in sorted(rows, key=lambda r: (-lengths[r], r)):
            if micro and (len(micro) + 1) * lengths[micro[0]] > self._trainer.micro_batch_tokens:
                yield micro
                micro = []
            micro.append(row)
        if micro:
            yield micro

    def _response_hidden(self, batch: RolloutBatch, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict the response tokens of these rollouts: (n, H), the tokens (n,), and their places in (R,)."""
        starts, lengths = batch.cu_seqlens[rows], batch.cu_seqlens.diff()[rows]
        prompts, responses = batch.prompt_lens[rows], batch.response_lens[rows]
        width = int(lengths.max())
        column = torch.arange(width)
        present = column < lengths[:, None]  # (b, width)
        padded = torch.zeros(len(rows), width, dtype=torch.int64)
        padded[present] = batch.tokens[_spans(starts, lengths)]
        # The hidden state at position t predicts the token at t + 1.
        flat = _spans(torch.arange(len(rows)) * width + prompts - 1, responses)
        with self._precision():
            hidden = self.model.base_model(
                input_ids=self._sent(padded), attention_mask=self._sent(present.long()), use_cache=False
            ).last_hidden_state
        hidden = hidden.flatten(0, 1)[self._sent(flat)]
        ids = self._sent(padded.flatten()[flat + 1])
        return hidden, ids, _spans(batch.response_cu_seqlens[:-1][rows], responses)


class _Totals:
    """Sums over micro-batches, read from the device once at the end."""

    def __init__(self) -> None:
        self.entropy_sum = 0.0
        self._gap_sum, self._gap_max, self._gap_tokens = 0.0, 0.0, 0
        self._rows: list[tuple[int, dict[str, Tensor]]] = []

    def add(self, loss: Tensor, metrics: dict[str, Tensor], tokens: int) -> None:
        self._rows.append((tokens, {"loss": loss.detach(), **metrics}))

    def add_gaps(self, mean: float, largest: float, tokens: int) -> None:
        self._gap_sum += mean * tokens
        self._gap_max = larger(self._gap_max, largest)
        self._gap_tokens += tokens

    def result(self) -> dict[str, float]:
        tokens = sum(count for count, _ in self._rows)
        totals = {"loss": 0.0, "clip_frac_low": 0.0, "clip_frac_high": 0.0}
        names = (*totals, "entropy", "rollout_gap_mean", "rollout_gap_max")
        numbers = torch.stack([metrics[name] for _, metrics in self._rows for name in names]).tolist() if self._rows else []
        for i, (count, _) in enumerate(self._rows):
            loss, low, high, entropy, gap_mean, gap_max = numbers[i * len(names) : (i + 1) * len(names)]
            totals["loss"] += loss
            totals["clip_frac_low"] += low * count / tokens
            totals["clip_frac_high"] += high * count / tokens
            self.entropy_sum += entropy * count
            self.add_gaps(gap_mean, gap_max, count)
        totals |= {"logp_gap_mean": self._gap_sum / max(1, self._gap_tokens), "logp_gap_max": self._gap_max}
        return totals | {"entropy_sum": self.entropy_sum}


def larger(a: float, b: float) -> float:
    """The larger of two, and NaN when either is: Python's max would let a NaN pass for a small number."""
    return b if not b <= a else a


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Learning rate of step 1, 2, …: linear warm-up, then constant or a cosine to a tenth of the peak."""
    if step <= trainer.warmup_steps:
        return trainer.lr * step / trainer.warmup_steps
    if trainer.lr_schedule == "constant":
        return trainer.lr
    progress = (step - trainer.warmup_steps) / max(1, trainer.steps - trainer.warmup_steps)
    return trainer.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenated aranges: starts[0] … starts[0] + lengths[0] − 1, starts[1] …"""
    first = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - first, lengths)


def _disable_dropout(model: nn.Module) -> None:
    """The policy that is trained must be the policy that sampled, so nothing in it may be random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  nn.Module's attributes have no types
