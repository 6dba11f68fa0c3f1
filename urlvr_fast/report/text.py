"""Values as the text of the page."""

from __future__ import annotations

import html
import math
from typing import Any

from urlvr_fast.trainer.live_view import CONTROL_PICTURES

LONGEST_TEXT = 4000  # characters shown of a prompt or completion


def finite(value: Any) -> float | None:
    """A number as a float; None for what is no number, NaN, or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond what a float holds
        return None


def esc(value: Any) -> str:
    """Any value as HTML text that is also safe inside a quoted attribute; control characters become visible."""
    return html.escape(str(value).translate(CONTROL_PICTURES), quote=True)


def number(value: Any) -> str:
    """Four digits; the script on the page writes numbers in the same way."""
    if finite(value) is None:
        return "–" if value is None else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if value and abs(value) < 1e-3 else f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {s} s"


def clip(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT:,} more characters in samples.jsonl)"
