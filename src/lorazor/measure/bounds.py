"""One-sided bounds on how much worse one of two variants is, measured on the same examples.

Examples with the same prompt are not independent: they count as one cluster. This module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import MeasureError
from lorazor.measure.stats import Array, Scores, ratio_and_error

LEVEL = 0.95
"""Confidence of each bound by itself."""

_SCORE_LEVEL = 0.96
"""Confidence asked of the score interval: at 95 % it is wrong in up to 6.3 % of samples of 20 to 300 answers, at 96 %
in up to 4.9 %, both exactly."""

_FEWEST_WRONG, _ENOUGH_CLUSTERS = 0.03, 200
"""The bootstrap-t is asked for 97 % from so many clusters on, and for more of fewer: at 95 % it is wrong in up to 9 %
of samples of 50 real and skewed differences, in 8 % of 100 and in 6 % of 300: it learns too little of a long tail."""

_N_RESAMPLES = 2000

_MAX_DRAWS = 500_000
"""Clusters drawn at a time, over all resamples of a batch; bounds the memory to some 50 MB."""

_ROUNDING = 1e-9
"""A spread below this fraction of what it is the spread of is rounding, not evidence."""


@dataclass(frozen=True)
class Bounds:
    """A number with its one-sided 95 % bounds.

    Attributes:
        estimate: the number.
        lower: it is above this in 95 % of samples; -inf where nothing can be said.
        upper: it is below this in 95 % of samples; inf where nothing can be said.
        spread: standard deviation of one cluster's part in it: the standard error is `spread / sqrt(n_clusters)`.
        n_clusters: examples that are independent of each other.
    """

    estimate: float
    lower: float
    upper: float
    spread: float
    n_clusters: int

    def minus(self, amount: float) -> Bounds:
        """The same on the number less a constant."""
        return replace(self, estimate=self.estimate - amount, lower=self.lower - amount, upper=self.upper - amount)


def ratio_bounds(
    above: Array, below: Array, clusters: NDArray[np.int64], largest: float = np.inf, seed: int = 0
) -> Bounds:
    """Bounds on a ratio of sums, `sum_i above_i / sum_i below_i`, such as a mean loss per token.

        se^2 = C / (C - 1) sum_c (above_c - m below_c)^2 / (sum_i below_i)^2          m the ratio, c clusters

    The wider of two on each side: Student's t with C - 1 degrees of freedom, and the bootstrap-t over clusters, which
    sees a skewed distribution, at 97 % or more (`_ENOUGH_CLUSTERS`). Where so few clusters vary that its quantile falls
    among the resamples which hold none of them, neither means anything: the bound is then the most that as many
    clusters as may vary, at 95 % confidence, could add.

    Args:
        above: (n_examples,).
        below: (n_examples,), each above 0.
        clusters: (n_examples,), number of the cluster of each, 0..C-1.
        largest: the most that the ratio of one example can be, either way, such as 100 for a metric in percent.
        seed: of the bootstrap.
    Raises:
        MeasureError: fewer than 2 clusters.
    Source: Cochran, Sampling Techniques (1977), on ratios; Efron & Tibshirani, An Introduction to the Bootstrap (1993),
        chapter 12.5; Clopper & Pearson, Biometrika 26 (1934), for the few that vary.
    """
    from scipy.stats import t as student

    sums, estimate, error = _summed(above, below, clusters)
    n_clusters = sums.shape[1]
    level = 1 - _FEWEST_WRONG * min(1.0, (n_clusters / _ENOUGH_CLUSTERS) ** 0.5)
    spread, pivots = error * n_clusters**0.5, _pivots(sums, estimate, error, seed)
    if np.isinf(pivots).mean() >= 1 - level:
        n_varying = int((sums[0] != 0).sum())
        furthest = largest * share_at_most(n_varying, n_clusters) * float(sums[1].max() / sums[1].mean())
        return Bounds(estimate, -furthest, furthest, spread, n_clusters)
    quantile = float(student.ppf(LEVEL, n_clusters - 1))
    low = float(np.quantile(pivots, 1 - level, method="lower"))
    high = float(np.quantile(pivots, level, method="higher"))
    upper, lower = estimate + error * max(quantile, -low), estimate - error * max(quantile, high)
    return Bounds(estimate, lower, upper, spread, n_clusters)


def ratio_and_spread(above: Array, below: Array, clusters: NDArray[np.int64]) -> tuple[float, float]:
    """The estimate and the spread of `ratio_bounds`, without the bounds."""
    sums, estimate, error = _summed(above, below, clusters)
    return estimate, error * sums.shape[1] ** 0.5


def check_clusters(n_clusters: int) -> None:
    """Raise MeasureError where nothing is known of how examples vary."""
    if n_clusters < 2:
        raise MeasureError(f"{n_clusters} independent example: no bound can be had. Pass examples with other prompts.")


def share_at_most(n_seen: float, n: float) -> float:
    """Upper bound on a share of which `n_seen` of `n` were seen, one-sided 95 %: of none, `1 - 0.05^(1/n)`, about 3/n.

    Source: Clopper & Pearson, Biometrika 26 (1934) 404-413.
    """
    from scipy.stats import beta

    return 1.0 if n_seen >= n else float(beta.ppf(LEVEL, n_seen + 1, n - n_seen))


def paired_bounds(n_lost: float, n_won: float, n: float) -> Bounds:
    """Bounds on a difference of two shares of right answers to the same questions: a score interval of paired 0/1 data.

        z(d) = (b - c - n d) / sqrt(n (2 q(d) + d (1 - d)))

    with b answers that only the full adapter gets right, c that only the other does, and q(d) the likeliest share of
    the latter if the difference were d. The bounds are where |z| reaches the normal quantile of 96 %: at that of 95 %
    they are wrong in more than 5 % of samples. Where all differences go one way, z says too much (7 % error at 50
    answers), and the exact bound on their share counts where it is wider.

    Args:
        n_lost: b.
        n_won: c.
        n: of all answers. Not whole numbers, all three, where answers depend on each other and count for fewer.
    Source: Tango, Statistics in Medicine 17 (1998) 891-908.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    b, c = float(n_lost), float(n_won)
    quantile = float(norm.ppf(_SCORE_LEVEL))

    def z(d: float) -> float:
        linear, constant = -b - c + (2 * n - b + c) * d, -c * d * (1 - d)
        q = (np.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance, distance = n * (2 * q + d * (1 - d)), b - c - n * d
        return 0.0 if distance == 0 else distance / np.sqrt(variance) if variance > 0 else np.copysign(np.inf, distance)

    estimate, edge = (b - c) / n, 1 - 1e-9
    lower = -1.0 if z(-edge) < quantile else float(brentq(lambda d: z(d) - quantile, -edge, estimate))  # pyright: ignore[reportArgumentType]
    upper = 1.0 if z(edge) > -quantile else float(brentq(lambda d: z(d) + quantile, estimate, edge))  # pyright: ignore[reportArgumentType]
    lower = lower if b else min(lower, -share_at_most(c, n))
    upper = upper if c else max(upper, share_at_most(b, n))
    return Bounds(estimate, lower, upper, float(np.sqrt(max((b + c) / n - estimate**2, 0.0))), int(n))


def corpus_bounds(scores: Scores, clusters: NDArray[np.int64], seed: int = 0) -> Bounds:
    """Bounds on how much worse the first of two variants is by a metric of the whole corpus, such as BLEU.

    By the percentile bootstrap over clusters.

    Args:
        scores: 2 variants: the smaller adapter, the full one.
        clusters: (n_examples,), number of the cluster of each, 0..C-1.
        seed: of the bootstrap.
    Raises:
        MeasureError: fewer than 2 clusters.
    Source: Koehn, Statistical Significance Tests for Machine Translation Evaluation (2004).
    """
    sign = 1.0 if scores.higher_is_better else -1.0
    n_clusters = int(clusters.max()) + 1
    check_clusters(n_clusters)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), _N_RESAMPLES).astype(float)
    if scores.recount is None:
        sums = np.zeros((2, n_clusters, scores.statistics.shape[2]))
        for variant in range(2):
            np.add.at(sums[variant], clusters, scores.statistics[variant])
        values = scores.combine(drawn @ sums)  # (2, n_resamples)
    else:
        n_together = max(1, _MAX_DRAWS // len(clusters))
        parts = [drawn[first : first + n_together] for first in range(0, _N_RESAMPLES, n_together)]
        values = np.concatenate([scores.resampled(part[:, clusters]) for part in parts], axis=1)
    worse = sign * (values[1] - values[0])
    is_constant = np.ptp(worse) <= _ROUNDING * np.abs(values).max()
    low, high = (-np.inf, np.inf) if is_constant else np.quantile(worse, (1 - LEVEL, LEVEL))
    estimate = float(sign * (scores.values[1] - scores.values[0]))
    spread = 0.0 if is_constant else float(np.std(worse)) * n_clusters**0.5
    return Bounds(estimate, float(low), float(high), spread, n_clusters)


def _summed(above: Array, below: Array, clusters: NDArray[np.int64]) -> tuple[Array, float, float]:
    """Sums of clusters, (2, n_clusters), their ratio and its standard error, 0 where that is rounding."""
    sums: Array = np.stack([np.bincount(clusters, weights) for weights in (above, below)]).astype(float)
    check_clusters(sums.shape[1])
    estimate, error = map(float, ratio_and_error(*sums))
    is_rounding = error * sums.shape[1] ** 0.5 <= _ROUNDING * float(np.abs(sums[0]).max() / sums[1].mean())
    return sums, estimate, 0.0 if is_rounding else error


def _pivots(sums: Array, estimate: float, error: float, seed: int) -> Array:
    """(n_resamples,), how many of its own errors each resample is above the estimate; infinite where it has none."""
    n_clusters, generator = sums.shape[1], np.random.default_rng(seed)
    per_batch, found = max(1, _MAX_DRAWS // n_clusters), []
    for start in range(0, _N_RESAMPLES, per_batch):
        n_resamples = min(per_batch, _N_RESAMPLES - start)
        values, errors = ratio_and_error(*sums[:, generator.integers(0, n_clusters, (n_resamples, n_clusters))])
        distances = values - estimate
        is_without = errors <= _ROUNDING * error if error else np.ones_like(errors, dtype=bool)
        infinite = np.copysign(np.inf, distances)
        found.append(np.where(is_without, infinite, distances / np.where(is_without, 1.0, errors)))
    return np.concatenate(found)
