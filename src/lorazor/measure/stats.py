"""Metrics as functions of summed per-example statistics, and one paired bootstrap for all of them.

A loss per token, a mean ROUGE-L and corpus BLEU have one form in common:

    value = combine(sum over examples of the example's statistics)

so that resampling examples means adding up other rows, whatever the metric is.
This module never imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import MeasureError

Array: TypeAlias = NDArray[np.float64]

_MAX_DRAWS = 500_000
"""Examples drawn at a time, over all resamples of a batch; bounds the memory to about 40 MB."""

_ROUNDING = 1e-12
"""A spread below this fraction of the metric's largest value is rounding, not evidence."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """One metric of several variants (boundaries, adapters) on the same examples.

    Attributes:
        metric: name of the metric.
        higher_is_better: the direction of the metric.
        statistics: (n_variants, n_examples, n_statistics), what adds up over examples.
        combine: sums over examples (..., n_statistics) -> values (...), in the metric's unit.
        combine_example: the same for the statistics of one example, where convention differs
            (sentence BLEU is not corpus BLEU of one sentence); None uses `combine`.
        recount: for a metric that is no function of sums, such as a correlation of ranks, in the place of `combine`:
            statistics and how often each example counts, (n_resamples, n_examples) -> (n_variants, n_resamples).

    Raises:
        MeasureError: not three dimensions, no examples, or a statistic that is not finite.
    """

    metric: str
    higher_is_better: bool
    statistics: Array
    combine: Callable[[Array], Array]
    combine_example: Callable[[Array], Array] | None = None
    recount: Callable[[Array, Array], Array] | None = None

    def __post_init__(self) -> None:
        statistics = np.asarray(self.statistics, dtype=np.float64)
        object.__setattr__(self, "statistics", statistics)
        if statistics.ndim != 3 or 0 in statistics.shape:
            raise MeasureError(
                f"{self.metric}: statistics of shape {statistics.shape}. "
                "Pass (n_variants, n_examples, n_statistics), none of them zero."
            )
        is_broken = ~np.isfinite(statistics).all(axis=-1)
        if is_broken.any():
            variant, example = (int(index) for index in np.argwhere(is_broken)[0])
            raise MeasureError(
                f"{self.metric}: example {example} of variant {variant} is not a finite number "
                f"({statistics[variant, example].tolist()}). Look at that example, or leave it out."
            )

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return self.statistics.shape[1]

    @property
    def n_variants(self) -> int:
        """Number of variants."""
        return self.statistics.shape[0]

    @property
    def values(self) -> Array:
        """(n_variants,), the metric of every variant on all examples."""
        if self.recount is not None:
            return self.recount(self.statistics, np.ones((1, self.n_examples)))[:, 0]
        return self.combine(self.statistics.sum(axis=1))

    @property
    def is_ratio(self) -> bool:
        """Whether the metric is one sum over examples by another, such as a mean: all that have two sums are."""
        return self.statistics.shape[2] == 2 and self.recount is None

    def resampled(self, times_drawn: Array) -> Array:
        """The metric of every variant, (n_variants, n_resamples), on examples drawn (n_resamples, n_examples) times."""
        if self.recount is not None:
            return self.recount(self.statistics, times_drawn)
        return self.combine(times_drawn @ self.statistics)

    @property
    def per_example(self) -> Array:
        """(n_variants, n_examples), the metric of every example by itself."""
        return (self.combine_example or self.combine)(self.statistics)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A difference between two variants, with its uncertainty, in the metric's own unit.

    Attributes:
        estimate: the difference on all examples.
        low: lower end of the confidence interval.
        high: upper end of the confidence interval.
        standard_error: standard deviation of the bootstrap distribution.
    """

    estimate: float
    low: float
    high: float
    standard_error: float


def paired_differences(scores: Scores, reference: int, n_resamples: int = 2000, seed: int = 0) -> list[Interval]:
    """The metric of every variant minus that of a reference, by a paired bootstrap over examples.

    Every resample draws the same examples for all variants, so that what makes an example
    easy or hard cancels. Percentile intervals: BCa costs `n_examples` evaluations more and is
    undefined where few examples vary. Neither is to be trusted where only a handful of examples
    differ between two variants: what was not seen cannot be resampled, so the interval is too narrow.

    Args:
        scores: at least 2 examples.
        reference: index of the variant to subtract.
        n_resamples: bootstrap resamples.
        seed: of the resampling; equal seeds draw equal examples.
    Returns:
        One 95 % interval per variant; width 0 where all examples agree on the difference.
    Raises:
        MeasureError: fewer than 2 examples.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13;
        for corpus metrics Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
    """
    if scores.n_examples < 2:
        raise MeasureError(
            f"{scores.metric}: an interval from {scores.n_examples} example is impossible. Pass at least 2 examples."
        )
    # scipy.stats takes longer to import than a command's --help may take to answer
    from scipy.stats import bootstrap

    n_examples = scores.n_examples

    def resampled_values(drawn: NDArray[np.int64], axis: int) -> Array:
        row_starts = n_examples * np.arange(len(drawn))[:, None]
        counts = np.bincount((drawn + row_starts).ravel(), minlength=len(drawn) * n_examples)
        times_drawn = counts.reshape(len(drawn), n_examples).astype(np.float64)  # of each example in each resample
        values = scores.resampled(times_drawn)
        return np.stack([values - values[reference], values])  # (2, n_variants, n_resamples)

    result = bootstrap(
        (np.arange(n_examples),),
        resampled_values,
        vectorized=True,
        n_resamples=n_resamples,
        batch=max(1, _MAX_DRAWS // n_examples),
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    differences, values = result.bootstrap_distribution
    is_constant = np.ptp(differences, axis=-1) <= _ROUNDING * np.abs(values).max()
    estimates = scores.values - scores.values[reference]
    interval = result.confidence_interval
    columns = (
        estimates,
        np.where(is_constant, estimates, interval.low[0]),
        np.where(is_constant, estimates, interval.high[0]),
        np.where(is_constant, 0.0, np.std(differences, axis=-1, ddof=1)),
    )
    return [Interval(*map(float, row)) for row in zip(*columns, strict=True)]


def ratio(sums: Array) -> Array:
    """The first of two sums by the second, (..., 2) -> (...)."""
    return sums[..., 0] / sums[..., 1]


def token_mean(values: Array, n_tokens: Array) -> tuple[Array, Array]:
    """Mean over all tokens of all examples, and its standard error over examples, see `ratio_and_error`.

    The tokens of one example are not independent of each other, and long examples count for more.

    Args:
        values: the mean over the tokens of each example, (..., N).
        n_tokens: tokens of each example, (N,), N at least 2.
    Returns:
        (...,) each.
    Raises:
        MeasureError: fewer than 2 examples.
    """
    if len(n_tokens) < 2:
        raise MeasureError(f"A standard error from {len(n_tokens)} example is impossible. Pass at least 2 examples.")
    return ratio_and_error(values * n_tokens, n_tokens)


def ratio_and_error(above: Array, below: Array) -> tuple[Array, Array]:
    """A ratio of sums and its standard error: the ratio estimator with examples as clusters.

        m = sum_i a_i / sum_i b_i          se^2 = N / (N - 1) sum_i (a_i - m b_i)^2 / (sum_i b_i)^2

    Args:
        above: a_i, (..., N), N at least 2.
        below: b_i, (N,) or (..., N).
    Returns:
        m and se, (...,) each.
    Source: Cochran, Sampling Techniques (1977), on the estimation of a ratio.
    """
    n_examples, total = below.shape[-1], below.sum(axis=-1)
    quotient = above.sum(axis=-1) / total
    residuals = above - quotient[..., None] * below
    return quotient, np.sqrt(n_examples / (n_examples - 1) * (residuals**2).sum(axis=-1)) / total
