"""The verdict on a smaller adapter, measured against the full one on examples that took no part in the choice.

This module never imports torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lorazor.errors import MeasureError
from lorazor.measure.stats import Interval, Scores, paired_differences

_WIDE = 0.02
"""A held-out interval that leaves room for a loss of more than this fraction of the full value is wide."""

_FEW = 10
"""Fewer examples than this that differ between two adapters make the interval too narrow."""


NOTHING_TO_CONFIRM = "Nothing was dropped, so there is nothing to confirm."
"""Said in place of a confirmation where the choice is the full adapter: it would be measured against itself."""


@dataclasses.dataclass(frozen=True)
class Confirmation:
    """A smaller adapter against the full adapter on held-out examples.

    Attributes:
        metric: name of the metric.
        value: the metric of the smaller adapter.
        full_value: the metric of the full adapter.
        difference: `value` minus `full_value`, with a 95 % interval.
        n_examples: held-out examples.
        n_differing: those on which the two do not agree exactly.
        held: False if the whole interval is on the bad side of zero.
        sentence: the outcome in plain words.
    """

    metric: str
    value: float
    full_value: float
    difference: Interval
    n_examples: int
    n_differing: int
    held: bool
    sentence: str

    @property
    def table(self) -> str:
        """The comparison as a Markdown table, for a model card."""
        one = self.difference
        return (
            "| | full adapter | this adapter | difference (95 % interval) |\n|---|---|---|---|\n"
            f"| {self.metric}, {self.n_examples} held-out examples | {self.full_value:.4g} | {self.value:.4g} "
            f"| {one.estimate:+.3g} ({one.low:+.3g} to {one.high:+.3g}) |"
        )

    def to_document(self) -> dict[str, Any]:
        """The confirmation as plain JSON data."""
        return dataclasses.asdict(self)


def confirm(scores: Scores, what: str, seed: int = 0) -> Confirmation:
    """Compare a smaller adapter with the full one.

    Args:
        scores: 2 variants on held-out examples: the smaller adapter, then the full one.
        what: names the smaller adapter in the sentence, "at boundary 26".
        seed: of the bootstrap.
    Raises:
        MeasureError: not two variants, or fewer than 2 examples.
    """
    if scores.n_variants != 2:
        raise MeasureError(f"{scores.n_variants} variants to confirm. Pass 2: the smaller adapter, the full one.")
    value, full_value = (float(number) for number in scores.values)
    difference = paired_differences(scores, 1, seed=seed)[0]
    held = not difference.is_worse(scores.higher_is_better)
    n_differing = int((scores.statistics[0] != scores.statistics[1]).any(axis=-1).sum())
    sentence = (
        f"On {scores.n_examples} held-out examples, {scores.metric} {what} is {value:.4g} "
        f"against {full_value:.4g} for the full adapter (difference {in_words(difference)}): "
        + verdict(difference, held, abs(full_value), scores.higher_is_better, n_differing)
    )
    return Confirmation(scores.metric, value, full_value, difference, scores.n_examples, n_differing, held, sentence)


def verdict(difference: Interval, held: bool, scale: float, higher_is_better: bool, n_differing: int) -> str:
    """What the held-out interval means, and how bad it could still be."""
    if not held:
        return "the choice did not hold, the smaller adapter is worse."
    if n_differing == 0:
        return "the choice held, the two agree on every example."
    verdict = "the choice held"
    room = -difference.low if higher_is_better else difference.high
    if room < 0:
        verdict += ", the smaller adapter is even better"
    elif room > 0:
        share = f", {100 * room / scale:.2g} % of the full value" if scale > 0 else ""
        verdict += f", though it could be worse by as much as {room:.3g}{share}"
    if room > _WIDE * scale:
        verdict += "; the interval is wide, confirm on more examples"
    if n_differing < _FEW:
        verdict += f"; the two differ on only {counted(n_differing, 'example')}, too few to trust the interval"
    return verdict + "."


def in_words(difference: Interval) -> str:
    """A difference and its interval, to three digits."""
    return f"{difference.estimate:+.3g}, 95 % interval {difference.low:+.3g} to {difference.high:+.3g}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: "1 site", "2 sites"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
