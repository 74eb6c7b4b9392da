"""The verdict: is a smaller adapter as good as the full one, up to a margin that the user states?

Non-inferiority, on examples that took no part in the choice, one-sided at 95 %: *shown* where the upper bound of what
is lost lies below the margin, *refuted* where the lower bound lies above it, else *undecided*. This module never
imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.bounds import (
    Bounds,
    check_clusters,
    corpus_bounds,
    paired_bounds,
    ratio_and_spread,
    ratio_bounds,
    share_at_most,
)
from lorazor.measure.metrics import CORRELATIONS, METRICS, metric_named
from lorazor.measure.stats import Scores

Outcome = Literal["shown", "refuted", "undecided"]
T = TypeVar("T")

RIGHT_OR_WRONG = ("accuracy", "gsm8k-match", "numeric-match", "exact-match")
"""Metrics of answers that are right or wrong; where one of several is wanted, the first."""

_ROUNDING = 1e-9
"""A difference below this fraction of the largest value is rounding."""

_Z = 1.881 + 0.842
"""Normal quantiles of the 97 % that is asked of the bootstrap-t, see `ratio_bounds`, and of 80 % power."""


@dataclass(frozen=True)
class Margin:
    """How much worse a smaller adapter may be.

    Attributes:
        metric: name of the metric.
        share: of what the adapter gains over its base in loss, 0..1; None where `amount` says it.
        amount: in units of the metric; None where `share` says it.
    """

    metric: str
    share: float | None = None
    amount: float | None = None

    @classmethod
    def parse(cls, text: str) -> Margin:
        """Read "2%" (of the gain in loss) or "rougeL=0.5" (an amount of a metric).

        Raises:
            SettingsError: neither of them, an unknown metric, or a margin out of range.
        """
        advice = "Pass a share of the gain in loss, such as 2%, or an amount of a metric, such as rougeL=0.5."
        match = re.fullmatch(r"\s*(?:([0-9.]+)\s*%|([\w-]+)\s*=\s*([0-9.eE+-]+))\s*", text)
        if match is None:
            raise SettingsError(f"margin={text!r} is no margin. {advice}")
        percent, metric, digits = match[1], match[2], match[1] or match[3]
        try:
            number = float(digits)
        except ValueError as error:
            raise SettingsError(f"margin={text!r} holds {digits!r}, which is no number. {advice}") from error
        if percent:
            if not 0 < number / 100 < 1:
                raise SettingsError(f"margin={text!r} is not between 0 and 100 % of the gain. {advice}")
            return cls("loss", share=number / 100)
        if not (math.isfinite(number) and number > 0):
            raise SettingsError(f"margin={text!r}: the amount must be above 0. {advice}")
        largest = largest_difference(metric_named(metric).name)
        if number >= largest:
            raise SettingsError(
                f"margin={text!r}: {metric} never differs by more than {largest:g}, so that anything would do. "
                f"Pass less, such as {metric}={largest / 100:g}."
            )
        return cls(metric, amount=number)

    def __str__(self) -> str:
        if self.share is not None:
            return f"{100 * self.share:g} % of the gain in loss"
        return f"{self.amount:g} of {self.metric}"


@dataclass(frozen=True)
class Verdict:
    """A smaller adapter against the full one on examples that took no part in the choice.

    Losses are differences in the direction that is worse: positive is worse, whatever the metric.

    Attributes:
        metric: name of the metric.
        value: the metric of the smaller adapter.
        full_value: of the full one.
        base_value: of the base model; None where it was not needed.
        lost: how much worse the smaller one is.
        lost_at_least: lower bound of it, one-sided 95 %.
        lost_at_most: upper bound of it, one-sided 95 %.
        margin: how much worse it may be, in the metric's unit.
        n_examples: held-out examples.
        n_clusters: different prompts among them.
        n_needed: about how many different prompts would show it at 80 % power; None where it is shown, or where the
            estimate lies above the margin.
        outcome: shown, refuted or undecided.
    """

    metric: str
    value: float
    full_value: float
    base_value: float | None
    lost: float
    lost_at_least: float
    lost_at_most: float
    margin: float
    n_examples: int
    n_clusters: int
    n_needed: int | None
    outcome: Outcome

    @property
    def sentence(self) -> str:
        """The outcome in plain words."""
        lost = f"{self.metric} {self.value:.4g} against {self.full_value:.4g} for the full adapter"
        head = f"On {self.n_examples} held-out examples, {lost}: worse by {self.lost:.3g}"
        if self.outcome == "shown":
            return f"{head}, by at most {self.lost_at_most:.3g} (95 %), below the margin of {self.margin:.3g}: shown."
        if self.outcome == "refuted":
            return (
                f"{head}, by at least {self.lost_at_least:.3g} (95 %), above the margin of {self.margin:.3g}: refuted."
            )
        if math.isinf(self.lost_at_most):
            bound = f"so few differ that there is no upper bound (95 %), and the margin is {self.margin:.3g}: undecided"
        else:
            bound = f"by up to {self.lost_at_most:.3g} (95 %), and the margin is {self.margin:.3g}: undecided"
        if self.n_needed is None and self.lost < self.margin:
            return f"{head}: no two examples differ in it, so nothing is known of those not seen: undecided."
        if self.n_needed is None:
            return f"{head}, {bound}. The estimate itself is not below the margin; keep more of the adapter."
        return f"{head}, {bound}; about {self.n_needed:,} examples with different prompts would decide."

    @property
    def table(self) -> str:
        """The comparison as a Markdown table, for a model card."""
        return (
            "| | full adapter | this adapter | worse by (95 % bounds) | margin | verdict |\n|---|---|---|---|---|---|\n"
            f"| {self.metric}, {self.n_examples} held-out examples | {self.full_value:.4g} | {self.value:.4g} "
            f"| {self.lost:.3g} ({self.lost_at_least:.3g} to {self.lost_at_most:.3g}) | {self.margin:.3g} "
            f"| {self.outcome} |"
        )

    def to_document(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self) | {"sentence": self.sentence}


def judge(scores: Scores, margin: Margin, prompts: Sequence[Hashable], seed: int = 0) -> Verdict:
    """Compare a smaller adapter with the full one.

    Args:
        scores: 2 variants, the smaller adapter and the full one; for a margin that is a share of the gain also the base
            model.
        margin: how much worse it may be.
        prompts: of each example; equal ones are one cluster.
        seed: of the bootstrap.
    Raises:
        MeasureError: another number of variants, fewer than 2 different prompts, or an adapter that gains nothing.
    """
    wanted = 2 if margin.share is None else 3
    if scores.n_variants != wanted:
        raise MeasureError(f"{scores.n_variants} variants to judge, but a margin of {margin} takes {wanted}.")
    places: dict[Hashable, int] = {}
    clusters = np.array([places.setdefault(prompt, len(places)) for prompt in prompts], dtype=np.int64)
    values = [float(value) for value in scores.values]
    check_clusters(len(places))
    amount = margin.amount if margin.share is None else margin.share * _gain(scores, values)
    assert amount is not None
    excess = _excess(scores, margin, amount, clusters, seed)
    outcome: Outcome = "shown" if excess.upper < 0 else "refuted" if excess.lower > 0 else "undecided"
    return Verdict(
        metric=scores.metric,
        value=values[0],
        full_value=values[1],
        base_value=values[2] if margin.share is not None else None,
        lost=amount + excess.estimate,
        lost_at_least=amount + excess.lower,
        lost_at_most=amount + excess.upper,
        margin=amount,
        n_examples=scores.n_examples,
        n_clusters=excess.n_clusters,
        n_needed=_n_needed(scores.metric, excess, amount) if outcome == "undecided" else None,
        outcome=outcome,
    )


def last_shown(sequence: Sequence[T], verdict_on: Callable[[T], Verdict]) -> tuple[T | None, Verdict]:
    """Test several in an order that was fixed before, until one is not shown.

    In at most 5 % of such sequences anything is wrongly shown, however long they are: it takes a wrong verdict on the
    first that is truly worse by the margin.

    Args:
        sequence: at least one, the surest first.
        verdict_on: tests one.
    Returns:
        The last that was shown, and its verdict; or None, and the verdict on the first.
    Source: Maurer, Hothorn & Lehmacher, Multiple comparisons in drug clinical trials (1995), on a priori ordered
        hypotheses.
    """
    found, verdict = None, verdict_on(sequence[0])
    for index, one in enumerate(sequence):
        latest = verdict_on(one) if index else verdict
        if latest.outcome != "shown":
            break
        found, verdict = one, latest
    return found, verdict


def _gain(scores: Scores, values: Sequence[float]) -> float:
    gain = (1.0 if scores.higher_is_better else -1.0) * (values[1] - values[2])
    if gain <= 0:
        raise MeasureError(
            f"The adapter gains nothing over its base model ({scores.metric} {values[1]:.4g} against {values[2]:.4g}), "
            f"so a share of its gain means nothing. Pass a margin as an amount, such as --margin {scores.metric}=0.01; "
            "or a size or a boundary without --confirm, to have no verdict."
        )
    return gain


def _excess(scores: Scores, margin: Margin, amount: float, clusters: NDArray[np.int64], seed: int) -> Bounds:
    """What is lost, less the margin. Of a share of the gain, both vary from sample to sample, and together."""
    sign, statistics = (1.0 if scores.higher_is_better else -1.0), scores.statistics
    if not scores.is_ratio:  # a metric of the whole corpus
        return corpus_bounds(scores, clusters, seed).minus(amount)
    above, below, largest = statistics[:, :, 0], statistics[1, :, 1], largest_difference(scores.metric)
    worse = sign * (above[1] - above[0])
    worse = np.where(np.abs(worse) > _ROUNDING * np.abs(above).max(), worse, 0.0)
    if margin.share is not None:
        return ratio_bounds(worse - margin.share * sign * (above[1] - above[2]), below, clusters, seed=seed)
    if scores.metric in RIGHT_OR_WRONG:
        return _right_or_wrong(worse, below, clusters, largest).minus(amount)
    return ratio_bounds(worse, below, clusters, largest, seed).minus(amount)


def _right_or_wrong(
    worse: NDArray[np.float64], below: NDArray[np.float64], clusters: NDArray[np.int64], largest: float
) -> Bounds:
    """The score interval; where prompts repeat, their answers are the same, and count for as few as carry as much."""
    weight = len(worse) / float((np.bincount(clusters) ** 2).sum())  # of an answer: effective number / number (Kish)
    n_lost, n_won = weight * float((worse > 0).sum()), weight * float((worse < 0).sum())
    paired = paired_bounds(n_lost, n_won, weight * len(worse))
    estimate, spread = ratio_and_spread(worse, below, clusters)
    spread = max(spread, largest * paired.spread)
    return Bounds(estimate, largest * paired.lower, largest * paired.upper, spread, int(clusters.max()) + 1)


def _n_needed(metric: str, excess: Bounds, amount: float) -> int | None:
    """About how many different prompts would show it at 80 % power.

    None where the estimate is not below the margin, or nothing varies and the metric has no largest difference.
    """
    if excess.estimate >= 0:
        return None
    largest = largest_difference(metric)
    least = least_examples(amount, largest) if math.isfinite(largest) else None
    if excess.spread == 0 and least is None:
        return None
    by_spread = math.ceil((_Z * excess.spread / excess.estimate) ** 2)
    return max(excess.n_clusters + 1, by_spread, least or 0)


def largest_difference(metric: str) -> float:
    """The most by which it can differ: 1 for fractions, 2 for correlations, 100 for percent, infinite for losses."""
    if metric == "loss" or metric not in METRICS:
        return math.inf
    return 100.0 if METRICS[metric].needs_text else 2.0 if metric in CORRELATIONS else 1.0


def least_margin(metric: str, n_prompts: int) -> float | None:
    """The smallest margin that so many different prompts can ever show, with no answer changed.

    None where that is not known beforehand: it is for answers that are right or wrong.
    """
    return largest_difference(metric) * share_at_most(0, n_prompts) if metric in RIGHT_OR_WRONG else None


def least_examples(amount: float, largest: float) -> int:
    """The fewest different prompts that can ever show a margin, with no answer changed."""
    return math.floor(math.log(0.05) / math.log1p(-amount / largest)) + 1
