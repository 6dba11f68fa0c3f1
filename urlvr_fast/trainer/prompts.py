"""From prompts to token ids: chat template or plain text, the suffix, and what happens to prompts that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from urlvr_fast.tasks.prompt_set import Messages, PromptSet
from urlvr_fast.tasks.readers import DataError


@dataclass
class EncodedPrompts:
    token_ids: list[list[int]]  # what the model is given, beginning-of-sequence token included
    texts: list[str]  # the same as text, as the template made it
    ids: list[int]  # `PromptSet.ids` of the prompts that were kept: the keys of the audit map
    skipped: int = 0  # prompts that were too long

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, positions: Sequence[int]) -> EncodedPrompts:
        """The prompts at these positions, in this order. `skipped` stays the count of the whole set."""
        return EncodedPrompts(
            token_ids=[self.token_ids[p] for p in positions],
            texts=[self.texts[p] for p in positions],
            ids=[self.ids[p] for p in positions],
            skipped=self.skipped,
        )


def encode_prompts(
    prompt_set: PromptSet,
    tokenizer: Any,
    *,
    template: str = "auto",
    suffix: str = "",
    max_prompt_tokens: int | None = None,
    overlong: str = "skip",
) -> EncodedPrompts:
    """Token ids of every prompt, for any `transformers` tokenizer.

    template: `chat` puts a prompt through the tokenizer's chat template (text becomes one user message) and asks for the assistant's
        turn; `plain` never does, and joins the contents of chat messages with blank lines; `auto` is `chat` where the tokenizer
        has a template and `plain` otherwise.
    suffix: appended to the text, or to the last user message.
    max_prompt_tokens, overlong: a longer prompt is left out and counted (`skip`), or an error (`refuse`).

    A plain prompt begins with exactly one beginning-of-sequence token where the tokenizer adds one, and never ends with an
    end-of-sequence token; in a chat prompt such tokens are the template's business. Raises DataError.
    """
    for option, value, valid in (("template", template, ("auto", "chat", "plain")), ("overlong", overlong, ("skip", "refuse"))):
        if value not in valid:
            raise DataError(f"{option}={value!r}: valid are {', '.join(valid)}")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_template:
        raise DataError("template=chat, but this tokenizer has no chat template; use template=plain (or auto)")
    chat = has_template and template != "plain"
    bos = [] if chat else _added_bos(tokenizer)
    encoded = EncodedPrompts([], [], [])
    longest = 0
    for id, prompt in zip(prompt_set.ids, prompt_set.prompts, strict=True):
        where = f"{prompt_set.name}, row {id}"
        text = _chat_text(prompt, suffix, tokenizer, where) if chat else _plain_text(prompt, suffix, where)
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if tokens[: len(bos)] != bos:
            tokens = bos + tokens
        if not tokens:
            raise DataError(f"{where}: the tokenizer makes no token of {text!r}")
        longest = max(longest, len(tokens))
        if max_prompt_tokens is not None and len(tokens) > max_prompt_tokens:
            if overlong == "refuse":
                raise DataError(f"{where}: the prompt has {len(tokens)} tokens, {max_prompt_tokens} fit; shorten it or use overlong=skip")
            encoded.skipped += 1
            continue
        encoded.token_ids.append(tokens)
        encoded.texts.append(text)
        encoded.ids.append(id)
    if not encoded.ids:
        raise DataError(
            f"{prompt_set.name}: none of the {len(prompt_set)} prompts is short enough: {max_prompt_tokens} tokens fit, "
            f"the longest has {longest}; raise the limit or use other prompts"
        )
    return encoded


def _added_bos(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token, as a list of one, when the tokenizer puts it in front of plain text by itself."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos] else []


def _plain_text(prompt: str | Messages, suffix: str, where: str) -> str:
    if isinstance(prompt, str):
        return prompt + suffix
    return "\n\n".join(message["content"] for message in _with_suffix(prompt, suffix, where))


def _chat_text(prompt: str | Messages, suffix: str, tokenizer: Any, where: str) -> str:
    messages: Messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = _with_suffix(messages, suffix, where)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs: they raise what they like
        raise DataError(f"{where}: the tokenizer's chat template refuses these messages ({type(error).__name__}: {error})") from error


def _with_suffix(messages: Messages, suffix: str, where: str) -> Messages:
    if not suffix:
        return messages
    for position in reversed(range(len(messages))):
        if messages[position]["role"] == "user":
            changed = {**messages[position], "content": messages[position]["content"] + suffix}
            return [*messages[:position], changed, *messages[position + 1 :]]
    raise DataError(f"{where}: there is no user message that the suffix could be appended to")
