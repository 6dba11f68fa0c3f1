"""What a reward may ask of the policy that is being trained: to write, and to judge tokens. It cannot reach an answer through it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from urlvr_fast.rewards import RewardError
from urlvr_fast.trainer.batch import RolloutBatch
from urlvr_fast.trainer.learner import Learner
from urlvr_fast.trainer.model import LoadedModel
from urlvr_fast.trainer.rollout import Rollout, Sampling


class Policy:
    """chat: whether the run puts prompts through the tokenizer's chat template, whose business the beginning-of-sequence token then is."""

    def __init__(self, loaded: LoadedModel, rollout: Rollout, learner: Learner, seed: int, chat: bool = False) -> None:
        self._loaded = loaded
        self._rollout = rollout
        self._learner = learner
        self._seed = seed
        self._chat = chat
        self._calls = 0

    def generate(self, prompts: Sequence[str], n: int, *, temperature: float, max_tokens: int) -> list[list[str]]:
        """`n` completions of each prompt, as text. The prompts go in as they are: `render` makes one of a message.

        max_tokens is cut to what the model's context leaves beside the longest prompt. Raises RewardError when that is nothing.
        """
        self._calls += 1
        token_ids = [self._context_ids(prompt) for prompt in prompts]
        longest = max(map(len, token_ids), default=0)
        if longest >= self._loaded.context:
            prompt = next(prompt for prompt, ids in zip(prompts, token_ids, strict=True) if len(ids) == longest)
            raise RewardError(
                f"policy.generate: a prompt takes {longest} tokens and the model has room for {self._loaded.context}; "
                f"it begins with {prompt[:80]!r}. Lower rollout.max_tokens, or use a model with a longer context"
            )
        sampling = Sampling(n, temperature, min(max_tokens, self._loaded.context - longest))
        completions = self._rollout.generate(token_ids, sampling, self._seed + self._calls)
        return [self._loaded.decode([c.token_ids for c in group]) for group in completions]

    def score(self, batch: RolloutBatch, outputs: Sequence[str]) -> dict[str, Tensor]:
        """Statistics of a batch's response tokens under the present weights, (R,) each: `logp`, `entropy`, `self_certainty` …"""
        return self._learner.score(batch, outputs)

    def likelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) float64 of the continuations after their contexts, at temperature 1, and their token counts (n,) int64.

        The log-probability is the sum over the continuation's tokens; no end-of-sequence token is added. Context and continuation are
        tokenised apart and joined, so the boundary stays where it is, and a beginning-of-sequence token stands in front where prompts have
        one. A pair that comes several times is computed once. Raises RewardError for a continuation without tokens, for a context without
        any (there is nothing to predict from), and for a pair that is longer than the model's context.
        """
        pairs = {pair: row for row, pair in enumerate(dict.fromkeys(zip(contexts, continuations, strict=True)))}
        if not pairs:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        batch = self._pairs_batch(list(pairs))
        logp = self._learner.score(batch, ("logp",))["logp"].double()
        where = torch.tensor([pairs[pair] for pair in zip(contexts, continuations, strict=True)])
        return batch.sequence_sum(logp)[where], batch.response_lens[where]

    def render(self, message: str) -> str:
        """What a user says, as the run presents prompts: through the chat template when it uses one, else as it is."""
        if not self._chat:
            return message
        turn = [{"role": "user", "content": message}]
        return str(self._loaded.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def token_span(self, batch: RolloutBatch, index: int, start: int, end: int) -> tuple[int, int]:
        """The response tokens [first, last) of rollout `index` whose text overlaps the characters `start:end` of its completion.

        A tokenizer gives no offsets for tokens that a model sampled, so prefixes of the response are decoded, by bisection: some 2·log₂ of
        its length. A token that covers a border belongs to the span; tokens that make up one character all do; special tokens at its
        beginning do not. An empty span of characters gives an empty span of tokens.
        """
        text = batch.completions[index]
        ids = batch.tokens[batch.cu_seqlens[index] : batch.cu_seqlens[index + 1]][int(batch.prompt_lens[index]) :].tolist()
        special = set(self._loaded.tokenizer.all_special_ids)

        def characters(count: int) -> int:
            """How many characters of the completion the first `count` tokens are sure to make."""
            decoded = self._loaded.decode([ids[:count]])[0]
            # Half of a character decodes as U+FFFD, which the next token takes back.
            while decoded and not text.startswith(decoded) and decoded.endswith("\ufffd"):
                decoded = decoded[:-1]
            return len(decoded)

        counts = range(len(ids) + 1)
        first = bisect_left(counts, start, key=characters)
        if first and characters(first) > start:
            first -= 1  # this token begins before the span and reaches into it
        last = max(first, min(bisect_left(counts, end, key=characters), len(ids))) if end > start else first
        while first < last and ids[first] in special:
            first += 1
        return first, last

    def _context_ids(self, text: str) -> list[int]:
        """Token ids of a prompt as `encode_prompts` makes them: a beginning-of-sequence token, and no end-of-sequence token."""
        tokenizer = self._loaded.tokenizer
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        bos = tokenizer.bos_token_id
        adds_bos = not self._chat and bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]
        return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids

    def _pairs_batch(self, pairs: list[tuple[str, str]]) -> RolloutBatch:
        """A batch whose prompts are the contexts and whose responses are the continuations, for the learner to score."""
        tokenizer, context = self._loaded.tokenizer, self._loaded.context
        prompt_ids = [self._context_ids(prompt) for prompt, _ in pairs]
        response_ids = [list(tokenizer(response, add_special_tokens=False).input_ids) for _, response in pairs]
        for (prompt, response), before, after in zip(pairs, prompt_ids, response_ids, strict=True):
            if not before or not after:
                which, text = ("context", prompt) if not before else ("continuation", response)
                raise RewardError(f"policy.likelihood: the {which} {text[:80]!r} has no tokens, so its likelihood means nothing")
            if len(before) + len(after) > context:
                raise RewardError(
                    f"policy.likelihood: context and continuation take {len(before)} + {len(after)} tokens and the model has room for "
                    f"{context}; the context begins with {prompt[:80]!r}. Lower rollout.max_tokens, or use a model with a longer context"
                )
        sequences = [before + after for before, after in zip(prompt_ids, response_ids, strict=True)]
        return RolloutBatch(
            tokens=torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64),
            cu_seqlens=torch.tensor([0, *map(len, sequences)], dtype=torch.int64).cumsum(0),
            prompt_lens=torch.tensor([len(before) for before in prompt_ids], dtype=torch.int64),
            group_ids=torch.arange(len(pairs)),
            prompt_ids=list(range(len(pairs))),
            prompts=[prompt for prompt, _ in pairs],
            completions=[response for _, response in pairs],
            finish_reasons=["stop"] * len(pairs),
            sampled_logp=torch.zeros(sum(map(len, response_ids))),
            temperature=1.0,
        )
