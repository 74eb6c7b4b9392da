"""Numbers and foreign text, as people may see them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

from lorazor.measure.metrics import METRICS
from lorazor.measure.stats import Interval

_MOST_WORDS = 600
"""Longer texts are not compared: the time grows with the square of their length."""

_VISIBLE = {code: f"\\u{code:04x}" for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_VISIBLE |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}  # their pictures
_VISIBLE |= {0x7F: "\u2421"} | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def visible(text: str) -> str:
    """Text in which nothing can act on a terminal or turn the reading direction around.

    Control characters become their pictures or their escapes, line breaks and tabs stay, half characters become the
    replacement character, without which no file can be written.
    """
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of paths, or of other names with slashes, that differ."""
    names: list[str] = []
    for n_parts in range(1, 1 + max((len(Path(path).parts) for path in paths), default=0)):
        names = ["/".join(Path(path).parts[-n_parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def decimals(metric: str) -> int:
    """Digits after the point: metrics in percent have 2, those in nats or fractions 4."""
    return 2 if metric in METRICS and METRICS[metric].needs_text else 4


def number(value: float | None, metric: str) -> str:
    """A value of a metric; the same digits for all, so that columns align."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{decimals(metric)}f}".replace("-", "−")


def signed(value: float, metric: str) -> str:
    """A difference of a metric, with its sign; the minus is as wide as the plus."""
    if not math.isfinite(value):
        return "–"
    return f"{value:+.{decimals(metric)}f}".replace("-", "−")


def bounds(difference: Interval, metric: str) -> str:
    """The 95 % interval of a difference."""
    return f"{signed(difference.low, metric)} to {signed(difference.high, metric)}"


def worse(lost: float, metric: str) -> str:
    """How much worse an adapter is, or better."""
    return f"{'better' if lost < 0 else 'worse'} by {number(abs(lost), metric)}"


def most(lost: float, metric: str) -> str:
    """An upper bound of how much worse it is."""
    if lost < 0:
        return f"at least {number(-lost, metric)} better (95 %)"
    return f"at most {number(lost, metric)} worse (95 %)"


def count(value: float | None) -> str:
    """A whole number with its thousands marked."""
    return "–" if value is None else f"{value:,.0f}"


def share(part: float | None, whole: float | None) -> str:
    """A part in percent of the whole."""
    return "–" if part is None or not whole else f"{100 * part / whole:.1f} %"


def short(value: float | None) -> str:
    """A number of unknown size, such as a score, in three digits."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.3g}".replace("-", "−")


def new_words(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in pieces, each with whether its words are missing from another text at that place."""
    words, others = (re.findall(r"\s*\S+|\s+$", one) for one in (text, other))
    if max(len(words), len(others)) > _MOST_WORDS:
        return [(text, False)]
    bare = ([word.strip() for word in one] for one in (others, words))
    steps = SequenceMatcher(None, *bare, autojunk=False).get_opcodes()
    return [("".join(words[start:end]), kind != "equal") for kind, _, _, start, end in steps if end > start]
