"""Entropy, self-certainty and probability gap of the rows that vLLM samples from, taken by a logits processor while it samples.

vLLM keeps the requests in flight as the rows of one batch. Between steps rows are added, removed, moved down and swapped; a step makes
one row of logits for each. A row is known here by its request's number, which travels in `SamplingParams.extra_args`, and its place by
how many tokens that request has so far. What was taken for a token that vLLM then threw away (a part of a long prompt was read, or the
request was preempted) is taken again at the same place, and the last one counts.

vLLM's sampler goes: penalties, division by each request's temperature, processors that leave the argmax alone, top-k and top-p. This
processor is one of those, so it sees what the learner's statistics are of: the tempered distribution over the full vocabulary. Rows of
one batch may have temperatures of their own. A batch that is greedy throughout never comes here, and `Sampling` refuses to ask for it.

Only `vllm.py` imports this file, when an engine that takes statistics is built. Speculative decoding, which makes several rows a request,
is refused by vLLM itself beside any processor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from urlvr_fast.ops import token_stats
from urlvr_fast.trainer.rollout import RolloutError

NUMBER = "urlvr_fast_request"  # the key in SamplingParams.extra_args


class StatisticsRecorder:
    """What the processor of one engine takes. `start`, then let the engine generate, then `finish`.

    Nothing is read from the device before `finish`. (vLLM itself, once it has a processor of this kind, waits in every step for the tokens
    of the one before.)
    """

    def __init__(self) -> None:
        self._outputs: tuple[str, ...] = ()
        self._numbers = range(0)
        self._values: list[Tensor] = []  # (outputs, rows) fp32 a step
        self._rows_taken = 0
        # One entry for each row of a numbered request.
        self._row: list[int] = []  # among all rows of `_values`
        self._number: list[int] = []
        self._position: list[int] = []  # of the token that this row drew, in its completion

    def start(self, outputs: Iterable[str], count: int) -> range:
        """Forget what was taken, take these outputs of `token_stats` from now on, and give out `count` numbers never given before."""
        self._outputs = tuple(outputs)
        self._numbers = range(self._numbers.stop, self._numbers.stop + count)
        self._values, self._rows_taken = [], 0
        self._row, self._number, self._position = [], [], []
        return self._numbers

    def take(self, logits: Tensor, rows: dict[int, tuple[int, list[int]]]) -> None:
        """One step. logits: (rows, V), divided by the temperature. rows: row -> request's number, its tokens so far."""
        stats = token_stats(logits, None, outputs=self._outputs)
        self._values.append(torch.stack([getattr(stats, name) for name in self._outputs]))
        for row, (number, tokens) in rows.items():
            self._row.append(self._rows_taken + row)
            self._number.append(number)
            self._position.append(len(tokens))
        self._rows_taken += len(logits)

    def finish(self, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Each output for the tokens of all completions, end to end, fp32 on the CPU. lengths: tokens of each, in the order of the numbers.

        Raises RolloutError when a token has none: then this vLLM moves its rows in a way that is not known here.
        """
        values = torch.cat(self._values, dim=1).cpu() if self._values else torch.empty(len(self._outputs), 0)
        length = torch.tensor(lengths, dtype=torch.int64)
        row, number, position = (torch.tensor(v, dtype=torch.int64) for v in (self._row, self._number, self._position))
        number = number - self._numbers.start
        # A request of an earlier call that was broken off may still be there; asynchronous scheduling samples once more after the end.
        ours = number >= 0
        ours &= position < length[number.clamp(min=0)]
        place = (length.cumsum(0) - length)[number[ours]] + position[ours]
        last = torch.full((int(length.sum()),), -1).scatter_reduce(0, place, row[ours], "amax")
        if missing := int((last < 0).sum()):
            raise RolloutError(
                f"vLLM sampled {missing} of {len(last)} tokens from rows of logits that were not seen. This version of vLLM may keep its "
                "batch in another way; rollout.stats=recompute takes the statistics from the trainer instead"
            )
        return dict(zip(self._outputs, values[:, last], strict=True))


def processor_class(recorder: StatisticsRecorder) -> type[LogitsProcessor]:
    """A class, since vLLM builds the object itself, whose objects hand their rows to `recorder`."""

    class TokenStatistics(LogitsProcessor):
        def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
            self._rows: dict[int, tuple[int, list[int]]] = {}  # row of the batch -> request's number, its tokens so far (vLLM's own list)

        def is_argmax_invariant(self) -> bool:
            return True  # places it after the temperature

        def update_state(self, batch_update: BatchUpdate | None) -> None:
            process_dict_updates(self._rows, batch_update, _numbered)

        def apply(self, logits: Tensor) -> Tensor:
            if self._rows:
                recorder.take(logits, self._rows)
            return logits

    return TokenStatistics


def _numbered(params: SamplingParams, prompt: list[int] | None, tokens: list[int]) -> tuple[int, list[int]] | None:
    """What is kept of a request that enters the batch; None for one that asks for no statistics."""
    number = (params.extra_args or {}).get(NUMBER)
    return None if number is None else (number, tokens)
