"""Metrics of labels against scipy, and against their definitions told otherwise, on any sample and any resample."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from lorazor.errors import MeasureError, SettingsError
from lorazor.measure import bounds
from lorazor.measure.labels import label_scores
from lorazor.select.verdict import Margin, judge

DRAW = np.random.default_rng(0)


def by_definition(metric, predicted, labels):
    """F1 of precision and recall; Matthews' as the correlation of the classes' indicator vectors; scipy's own."""
    if metric == "f1":
        found = np.sum((predicted == 1) & (labels == 1))
        if not found:
            return 0.0
        precision, recall = found / np.sum(predicted == 1), found / np.sum(labels == 1)
        return 2 * precision * recall / (precision + recall)
    if metric == "matthews":
        x, y = (np.equal.outer(numbers, np.arange(9)).astype(float) for numbers in (predicted, labels))

        def covariance(one, other):
            return sum(np.cov(one[:, k], other[:, k], bias=True)[0, 1] for k in range(9))

        spread = covariance(x, x) * covariance(y, y)
        return covariance(x, y) / np.sqrt(spread) if spread > 1e-15 else 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constants, for which scipy has NaN
        value = (stats.pearsonr if metric == "pearson" else stats.spearmanr)(predicted, labels).statistic
    return 0.0 if np.isnan(value) else value


def sample(metric, n, n_classes):
    if metric in ("f1", "matthews"):
        return DRAW.integers(0, n_classes, n).astype(float)
    numbers = DRAW.choice([-3e5, 0.1, 1.0, 1.00001, 7.5], n) if n_classes == 3 else 1e4 + DRAW.normal(size=n)
    return numbers.astype(float)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_metrics_of_labels_are_those_of_their_definitions_on_samples_and_resamples(metric, n_classes):
    for n in (2, 3, 5, 12, 60):
        first, second, labels = (sample(metric, n, n_classes) for _ in range(3))
        scores = label_scores(metric, [first, second, labels, np.zeros(n)], labels)
        expected = [by_definition(metric, own, labels) for own in (first, second, labels, np.zeros(n))]
        assert scores.values == pytest.approx(expected, abs=1e-9), (metric, n)
        counts = DRAW.multinomial(n, np.full(n, 1 / n), 4)
        resampled = scores.resampled(counts.astype(float))
        for count, values in zip(counts, resampled.T, strict=True):
            drawn = np.repeat(np.arange(n), count)
            expected = [by_definition(metric, own[drawn], labels[drawn]) for own in (first, second)]
            assert values[:2] == pytest.approx(expected, abs=1e-7), (metric, n, count)


def test_edges():
    right, wrong = np.array([0.0, 1, 1, 0]), np.array([1.0, 0, 0, 1])
    assert label_scores("matthews", [right, wrong], right).values == pytest.approx([1, -1])
    assert label_scores("f1", [right, wrong], right).values == pytest.approx([1, 0])
    numbers = np.array([0.1, 0.1, 0.1])  # its mean is not 0.1
    for metric in ("pearson", "spearman"):
        assert label_scores(metric, [numbers, [1, 2, 4]], [3, 2, 1]).values[0] == 0
        assert label_scores(metric, [[1e-9, 2e-9, 3e-9]], [1, 2, 3]).values == pytest.approx([1])
    with pytest.raises(SettingsError, match="metric='bleu' is none of labels. Pass one of f1, matthews"):
        label_scores("bleu", [right], right)
    with pytest.raises(MeasureError, match="do not fit"):
        label_scores("f1", [right], right[:2])
    with pytest.raises(MeasureError, match="whole numbers"):
        label_scores("matthews", [[0.5]], [1])
    with pytest.raises(MeasureError, match="not a finite number"):
        label_scores("spearman", [[np.nan, 1]], [1, 2])


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_a_verdict_is_a_bootstrap_over_different_prompts(metric, monkeypatch):
    monkeypatch.setattr(bounds, "_N_RESAMPLES", 60)
    monkeypatch.setattr(bounds, "_MAX_DRAWS", 500)  # several batches
    labels, small, full = (sample(metric, 40, 2) for _ in range(3))
    full = np.where(np.arange(40) % 10 == 0, full, labels)  # the better one
    prompts = [f"prompt {n // 2}" for n in range(40)]
    scores = label_scores(metric, [small, full], labels)
    verdict = judge(scores, Margin(metric, amount=0.01), prompts, seed=3)
    drawn = np.random.default_rng(3).multinomial(20, np.full(20, 1 / 20), 60)
    lost = []
    for counts in drawn:
        rows = [row for cluster, n in enumerate(counts) for row in n * [2 * cluster, 2 * cluster + 1]]
        lost.append(by_definition(metric, full[rows], labels[rows]) - by_definition(metric, small[rows], labels[rows]))
    low, high = np.quantile(lost, (0.05, 0.95))
    assert (verdict.lost_at_least, verdict.lost_at_most) == pytest.approx((low, high), abs=1e-7)
    assert verdict.outcome == "refuted" and verdict.n_clusters == 20
    turned = judge(label_scores(metric, [full, small], labels), Margin(metric, amount=0.01), prompts, seed=3)
    assert turned.outcome == "shown"
    same = judge(label_scores(metric, [full, full], labels), Margin(metric, amount=0.01), prompts)
    assert same.outcome == "undecided"  # what was never seen to differ may differ
