"""Metrics of labels: what a head predicts against what is true. This module never imports torch.

They are of the whole corpus: made of sums over examples, or, of correlations, of how often each example counts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.stats import Array, Scores

_ROUNDING = 1e-12
"""A spread below this fraction of the largest number is rounding."""


def label_scores(metric: str, predicted: ArrayLike, labels: ArrayLike) -> Scores:
    """A metric of predicted classes or numbers.

        F1 = 2 TP / (2 TP + FP + FN), of class 1
        Matthews = (s c - sum_k p_k t_k) / sqrt((s^2 - sum_k p_k^2) (s^2 - sum_k t_k^2))
        Pearson = cov(x, y) / (sd(x) sd(y));  Spearman: of the ranks, ties sharing their mean

    with s examples, c of them right, p_k predicted as and t_k truly of class k. Each is 0 where it would be 0 / 0: one
    class alone is predicted, or one number.

    Args:
        metric: `f1`, `matthews`, `pearson` or `spearman`.
        predicted: (n_variants, n_examples), classes from 0, or numbers.
        labels: (n_examples,), likewise.
    Raises:
        SettingsError: the metric is unknown.
        MeasureError: shapes that do not fit, a class that is none, or a number that is not finite.
    Source: Gorodkin, Comparing two K-category assignments by a K-category correlation coefficient (2004); F1, Matthews
        as in scikit-learn, Pearson and Spearman as in scipy, but for 0 in the place of NaN.
    """
    if metric not in LABEL_METRICS:
        raise SettingsError(f"metric={metric!r} is none of labels. Pass one of {', '.join(LABEL_METRICS)}.")
    own, true = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if own.ndim != 2 or true.shape != own.shape[1:]:
        raise MeasureError(
            f"{metric}: predicted {own.shape} and labels {true.shape} do not fit. Pass (n_variants, n_examples) and "
            "(n_examples,)."
        )
    return LABEL_METRICS[metric](metric, own, np.broadcast_to(true, own.shape))


def _f1(metric: str, own: Array, true: Array) -> Scores:
    columns = ((own == 1) & (true == 1), own == 1, true == 1)  # found, predicted, there
    return Scores(
        metric, True, np.stack(columns, axis=-1), lambda sums: _share(2 * sums[..., 0], sums[..., 1:].sum(-1))
    )


def _matthews(metric: str, own: Array, true: Array) -> Scores:
    if (own < 0).any() or (true < 0).any() or (own % 1).any() or (true % 1).any():
        raise MeasureError(f"{metric}: classes are whole numbers from 0. Pass these, or another metric.")
    n_classes = int(max(own.max(), true.max())) + 1
    chosen, right = (numbers[..., None] == np.arange(n_classes) for numbers in (own, true))
    statistics = np.concatenate([(own == true)[..., None], chosen, right], axis=-1)

    def combine(sums: Array) -> Array:
        n_right, p, t = sums[..., 0], sums[..., 1 : 1 + n_classes], sums[..., 1 + n_classes :]
        n = t.sum(axis=-1)
        spreads = (n**2 - (p**2).sum(axis=-1)) * (n**2 - (t**2).sum(axis=-1))
        return _share(n * n_right - (p * t).sum(axis=-1), np.sqrt(np.maximum(spreads, 0.0)))

    return Scores(metric, True, statistics, combine)


def _pearson(metric: str, own: Array, true: Array) -> Scores:
    return _correlated(metric, own, true, lambda numbers, times_drawn: numbers)


def _spearman(metric: str, own: Array, true: Array) -> Scores:
    return _correlated(metric, own, true, _ranks)


def _correlated(metric: str, own: Array, true: Array, compared: Callable[[Array, Array], Array]) -> Scores:
    """Scores of what is recounted for each resample: ranks, and means to take differences from, which keeps digits."""

    def recount(statistics: Array, times_drawn: Array) -> Array:
        found = []
        for columns in np.moveaxis(statistics, -1, 1):  # (2, n_examples), once per variant
            x, y = (compared(numbers, times_drawn) for numbers in columns)
            found.append(_correlations(x, y, times_drawn))
        return np.stack(found)

    # of one example there is no correlation
    return Scores(metric, True, np.stack([own, true], -1), lambda sums: np.zeros(sums.shape[:-1]), recount=recount)


LABEL_METRICS: dict[str, Callable[[str, Array, Array], Scores]] = {
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
"""By name: makes the scores of predicted and true labels, both (n_variants, n_examples)."""


def _ranks(numbers: Array, times_drawn: Array) -> Array:
    """(n_resamples, n_examples), ranks from 1 in each resample; equal numbers share their mean."""
    _, group = np.unique(numbers, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.add.reduceat(times_drawn[:, order], starts, axis=1)  # (n_resamples, n_groups)
    return (np.cumsum(sizes, axis=1) - sizes / 2 + 0.5)[:, group]


def _correlations(x: Array, y: Array, times_drawn: Array) -> Array:
    """(n_resamples,), Pearson's of numbers (n_examples,) or (n_resamples, n_examples), each counted so many times."""
    n, centred, spreads = times_drawn.sum(axis=1), [], []
    for numbers in (x, y):
        distances = numbers - ((times_drawn * numbers).sum(axis=1) / n)[:, None]
        squares = (times_drawn * distances**2).sum(axis=1)
        is_rounding = squares <= n * (_ROUNDING * np.abs(numbers).max()) ** 2
        centred.append(distances)
        spreads.append(np.sqrt(np.where(is_rounding, 0.0, squares)))
    return np.clip(_share((times_drawn * centred[0] * centred[1]).sum(axis=1), spreads[0] * spreads[1]), -1.0, 1.0)


def _share(above: Array, below: Array) -> Array:
    """A quotient, 0 where it is 0 / 0."""
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below > 0)
