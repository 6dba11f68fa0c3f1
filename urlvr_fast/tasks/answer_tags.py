"""Where a chat model puts its answer: between `<answer>` and `</answer>`."""

from __future__ import annotations

OPENING, CLOSING = "<answer>", "</answer>"


def tagged_answer(completion: str) -> str:
    """The content of the last complete `<answer>…</answer>`, or, without one, the whole completion. Linear time."""
    # Not a regular expression: that takes quadratic time on many opening tags without a closing one.
    end = completion.rfind(CLOSING)
    start = completion.rfind(OPENING, 0, end) if end >= 0 else -1
    return completion[start + len(OPENING) : end] if start >= 0 else completion
