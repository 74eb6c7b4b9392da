"""The paired bootstrap against enumeration, a plain loop, formulas and laws."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics as plain
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lorazor.errors import MeasureError
from lorazor.measure.stats import Interval, Scores, paired_differences


def ratio(sums):
    return sums[..., 0] / sums[..., 1]


def scores_of(values, weights=None, higher_is_better=True) -> Scores:
    """Weighted means: values (n_variants, n_examples), weights (n_examples,)."""
    values = np.asarray(values, dtype=float)
    weights = np.ones(values.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    return Scores(
        "score", higher_is_better, np.stack([values * weights, np.tile(weights, (len(values), 1))], -1), ratio
    )


def paired_difference(scores: Scores, variant: int, reference: int, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """One of the differences, with nothing but these two variants there."""
    pair = dataclasses.replace(scores, statistics=scores.statistics[[variant, reference]])
    return paired_differences(pair, 1, n_resamples, seed)[0]


def noisy(n_variants=2, n_examples=40, seed=0) -> Scores:
    rng = np.random.default_rng(seed)
    return scores_of(rng.gamma(2.0, 1.0, (n_variants, n_examples)), rng.integers(1, 30, n_examples))


def test_values_and_per_example_by_hand():
    scores = Scores("loss", False, np.array([[[6.0, 2], [1, 4]], [[0, 2], [12, 4]]]), ratio)
    assert scores.values.tolist() == [7 / 6, 2.0]
    assert scores.per_example.tolist() == [[3.0, 0.25], [0.0, 3.0]]
    assert (scores.n_variants, scores.n_examples) == (2, 2)


def test_per_example_follows_its_own_convention_if_there_is_one():
    scores = Scores("x", True, np.ones((1, 2, 2)), ratio, combine_example=lambda one: one[..., 0] + 41)
    assert scores.per_example.tolist() == [[42, 42]]
    assert scores.values.tolist() == [1]


def test_interval_equals_the_enumeration_of_all_resamples():
    nll, tokens = [[9.0, 2, 30, 4, 11], [7.0, 3, 21, 8, 1]], [4, 1, 10, 2, 5]
    exact = sorted(
        sum(nll[0][i] - nll[1][i] for i in drawn) / sum(tokens[i] for i in drawn)
        for drawn in itertools.product(range(5), repeat=5)
    )
    scores = Scores("loss", False, np.stack([np.array(nll), np.array([tokens, tokens])], -1), ratio)
    interval = paired_difference(scores, 0, 1, n_resamples=40_000)
    assert interval.estimate == pytest.approx((56 - 40) / 22)
    assert interval.standard_error == pytest.approx(plain.pstdev(exact), rel=0.02)
    for end, probability in ((interval.low, 0.025), (interval.high, 0.975)):
        below = sum(value < end - 1e-9 for value in exact) / len(exact)
        up_to = sum(value <= end + 1e-9 for value in exact) / len(exact)
        assert below - 0.004 <= probability <= up_to + 0.004


def test_interval_equals_a_plain_loop():
    scores = noisy()
    generator = random.Random(5)
    rows = scores.statistics.tolist()
    drawn_differences = []
    for _ in range(4000):
        sums = [[0.0, 0.0], [0.0, 0.0]]
        for _ in range(40):
            example = generator.randrange(40)
            for variant in (0, 1):
                sums[variant][0] += rows[variant][example][0]
                sums[variant][1] += rows[variant][example][1]
        drawn_differences.append(sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1])
    drawn_differences.sort()
    interval = paired_difference(scores, 0, 1, n_resamples=4000)
    error = plain.stdev(drawn_differences)
    assert interval.standard_error == pytest.approx(error, rel=0.06)
    assert interval.low == pytest.approx(drawn_differences[100], abs=0.2 * error)
    assert interval.high == pytest.approx(drawn_differences[3900], abs=0.2 * error)


def test_standard_error_of_a_mean_is_the_formula():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 200))
    interval = paired_difference(scores_of([first, second]), 0, 1)
    assert interval.standard_error == pytest.approx(np.std(first - second) / np.sqrt(200), rel=0.06)


def test_pairing_cancels_what_makes_an_example_hard():
    rng = np.random.default_rng(4)
    hardness = rng.normal(scale=10, size=100)
    interval = paired_difference(scores_of([hardness + rng.normal(scale=0.1, size=100) + 0.2, hardness]), 0, 1)
    assert interval.low > 0.1
    assert interval.high < 0.3


def test_all_at_once_equals_one_by_one():
    scores = noisy(n_variants=5)
    for variant, interval in enumerate(paired_differences(scores, 3, seed=7)):
        alone = paired_difference(scores, variant, 3, seed=7)
        assert vars(interval) == pytest.approx(vars(alone), rel=1e-9, abs=1e-12)


def test_seed_decides():
    assert paired_difference(noisy(), 0, 1, seed=1) == paired_difference(noisy(), 0, 1, seed=1)
    assert paired_difference(noisy(), 0, 1, seed=1) != paired_difference(noisy(), 0, 1, seed=2)


FINITE = st.floats(-1e3, 1e3, allow_subnormal=False)


@settings(max_examples=20, deadline=None)
@given(arrays(float, st.integers(2, 12), elements=FINITE), st.integers(0, 3))
def test_identical_variants_differ_by_exactly_nothing(row, seed):
    assert paired_differences(scores_of([row, row]), 1, 100, seed=seed) == [Interval(0.0, 0.0, 0.0, 0.0)] * 2


@settings(max_examples=20, deadline=None)
@given(arrays(float, st.integers(2, 12), elements=FINITE), st.floats(0.01, 100))
def test_a_constant_difference_has_no_width(row, shift):
    interval = paired_difference(scores_of([row + shift, row]), 0, 1, 100)
    assert interval.low == interval.high == interval.estimate == pytest.approx(shift)
    assert interval.standard_error == 0


@settings(max_examples=20, deadline=None)
@given(arrays(float, st.tuples(st.just(2), st.integers(2, 12)), elements=FINITE), st.floats(0.1, 10))
def test_swapping_mirrors_and_scaling_scales(rows, factor):
    forth, back = (paired_difference(scores_of(rows), *pair, 200) for pair in ((0, 1), (1, 0)))
    mirrored = [-back.estimate, -back.high, -back.low, back.standard_error]
    assert [forth.estimate, forth.low, forth.high, forth.standard_error] == pytest.approx(mirrored, abs=1e-7)
    scaled = paired_difference(scores_of(rows * factor), 0, 1, 200)
    assert scaled.low == pytest.approx(factor * forth.low, abs=1e-7)
    assert scaled.standard_error == pytest.approx(factor * forth.standard_error, abs=1e-7)


def test_memory_stays_bounded():
    rng = np.random.default_rng(0)
    scores = Scores("x", True, rng.random((4, 2000, 18)), lambda sums: sums[..., 0] / sums[..., 1])
    paired_differences(scores, 3, n_resamples=100)  # what scipy imports does not count
    tracemalloc.start()
    try:
        paired_differences(scores, 3)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100e6


def test_one_example_is_too_few():
    with pytest.raises(MeasureError, match="at least 2 examples"):
        paired_difference(scores_of([[1.0], [2.0]]), 0, 1)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_statistic_that_is_no_number_names_the_example(broken):
    values = np.ones((2, 4))
    values[1, 2] = broken
    with pytest.raises(MeasureError, match="example 2 of variant 1 is not a finite number"):
        scores_of(values)


@pytest.mark.parametrize("shape", [(2, 3), (2, 0, 1), (0, 2, 1), (2, 2, 0)])
def test_statistics_of_another_shape_are_refused(shape):
    with pytest.raises(MeasureError, match="n_variants, n_examples, n_statistics"):
        Scores("x", True, np.ones(shape), ratio)
