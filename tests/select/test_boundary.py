"""The choice of a boundary against hand-made tables and a plain-loop bootstrap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazor.errors import BoundaryError, MeasureError, SettingsError
from lorazor.measure.stats import Interval, Scores
from lorazor.select.boundary import (
    choose_boundary,
    parse_boundaries,
    shortlist,
)


def scores_of(values, higher_is_better=True) -> Scores:
    """Means: values (n_variants, n_examples)."""
    values = np.asarray(values, dtype=float)
    statistics = np.stack([values, np.ones_like(values)], -1)
    return Scores("score", higher_is_better, statistics, lambda sums: sums[..., 0] / sums[..., 1])


def around_full(offsets, n_examples=100, seed=0):
    """Values whose paired differences to the last have mean offset and standard error 1, both exactly."""
    rng = np.random.default_rng(seed)
    full = rng.normal(50, 30, n_examples)
    rows = []
    for offset in offsets:
        noise = rng.normal(size=n_examples)
        rows.append(full + offset + np.sqrt(n_examples) * (noise - noise.mean()) / noise.std())
    return np.array([*rows, full])


def loop_intervals(values, seed):
    """The percentile intervals of the differences of means to the last row, by a plain loop: (n_variants, 2)."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(1500):
        drawn = rng.integers(0, values.shape[1], values.shape[1])
        means.append(values[:, drawn].mean(axis=1) - values[-1, drawn].mean())
    return np.percentile(means, [2.5, 97.5], axis=0).T


TABLE = [[1, 1, 2, 2], [5, 3, 4, 4], [4, 4, 4, 4], [2, 3, 4, 3]]  # means 1.5, 4, 4, 3


def test_best_is_the_best_mean_and_ties_go_to_the_smaller():
    assert choose_boundary(scores_of(TABLE), [0, 10, 20, 30], "best").boundary == 10
    assert choose_boundary(scores_of(TABLE, higher_is_better=False), [0, 10, 20, 30], "best").boundary == 0
    assert choose_boundary(scores_of(TABLE[2:]), [0, 30], "best").boundary == 0


@pytest.mark.parametrize("boundary", [0, 10, 20, 30])
def test_manual_is_what_was_given(boundary):
    choice = choose_boundary(scores_of(TABLE), [0, 10, 20, 30], "manual", boundary=boundary)
    assert (choice.boundary, choice.chosen.boundary) == (boundary, boundary)


@pytest.mark.parametrize(("offset", "boundary"), [(-0.5, 0), (-1.7, 1)])
def test_one_se_takes_the_smallest_within_one_paired_standard_error(offset, boundary):
    values = around_full([offset, -0.6])  # the unpaired standard error would be about 3
    assert choose_boundary(scores_of(values), [0, 1, 2], "one-se").boundary == boundary
    assert choose_boundary(scores_of(-values, False), [0, 1, 2], "one-se").boundary == boundary


def test_one_se_measures_from_the_best_and_not_from_the_full_adapter():
    values = around_full([-0.5, 4.0])
    assert choose_boundary(scores_of(values), [0, 1, 2], "one-se").boundary == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_the_differences_equal_a_plain_loop(seed, higher_is_better):
    rng = np.random.default_rng(seed)
    values = around_full(rng.choice([-6.0, -4.0, 0.0, 4.0], 5), n_examples=50, seed=seed)
    intervals = loop_intervals(values, seed)
    choice = choose_boundary(scores_of(values, higher_is_better), range(6), "best")
    for candidate, (low, high) in zip(choice.candidates, intervals, strict=True):
        assert (candidate.difference.low, candidate.difference.high) == pytest.approx((low, high), abs=0.25)


tables = st.integers(2, 8).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=1, max_size=5)
)


@settings(max_examples=25, deadline=None)
@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(table, generator):
    values = np.array(table)
    shuffled = values[:, generator.sample(range(values.shape[1]), values.shape[1])]
    first, second = (choose_boundary(scores_of(v), range(len(table)), "best") for v in (values, shuffled))
    assert first.boundary == second.boundary
    assert [c.value for c in first.candidates] == [c.value for c in second.candidates]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=10), st.sampled_from(["best", "one-se"]))
def test_of_identical_boundaries_every_rule_takes_the_smallest(row, rule):
    choice = choose_boundary(scores_of([row] * 3), [2, 4, 8], rule)
    assert choice.boundary == 2
    assert {candidate.difference for candidate in choice.candidates} == {Interval(0.0, 0.0, 0.0, 0.0)}


def test_differences_are_to_the_full_adapter_under_every_rule():
    for rule, more in (("best", {}), ("one-se", {}), ("manual", {"boundary": 0})):
        choice = choose_boundary(scores_of(TABLE), [0, 10, 20, 30], rule, **more)
        assert [candidate.difference.estimate for candidate in choice.candidates] == [-1.5, 1.0, 1.0, 0.0]
        assert [candidate.value for candidate in choice.candidates] == [1.5, 4.0, 4.0, 3.0]


def test_the_reason_is_one_sentence_with_the_figures():
    choice = choose_boundary(scores_of(TABLE), [0, 10, 20, 30], "best")
    assert choice.reason.startswith("Boundary 10 has the best score: 4 on 4 examples, against 3 for the full adapter")
    assert "difference +1, 95 % interval " in choice.reason
    assert "within one paired standard error" in choose_boundary(scores_of(TABLE), [0, 10, 20, 30]).reason


def test_one_se_says_whether_it_chose_the_best_itself():
    """A boundary is not within an error of 0 of itself."""
    draw = np.random.default_rng(0).normal(size=(2, 50))
    best, near = (choose_boundary(scores_of([far, draw[0]]), [0, 1], "one-se") for far in (draw[0] - 9, draw[1]))
    assert "has the best score, and no smaller one is within one paired standard error of it" in best.reason
    assert (best.boundary, near.boundary) == (1, 0) and "(0) of the best" not in near.reason


def test_the_document_is_plain_json():
    choice = choose_boundary(scores_of(TABLE), np.array([0, 10, 20, 30]), "best")
    document = choice.to_document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["candidates"][1]["difference"]["estimate"] == 1.0
    assert {"rule", "metric", "higher_is_better", "boundary", "full", "n_examples", "reason"} < set(document)


@pytest.mark.parametrize(
    ("settings_", "error", "message"),
    [
        ({"rule": "beste"}, SettingsError, "rule='beste' is unknown. Pass one of best, one-se, manual"),
        ({"rule": "manual"}, SettingsError, "needs boundary"),
        ({"rule": "one-se", "boundary": 0}, SettingsError, "boundary=0 contradicts"),
        ({"rule": "no-worse"}, SettingsError, "rule='no-worse' is unknown"),
        ({"rule": "manual", "boundary": 11}, BoundaryError, "boundary=11 was not measured. Pass one of 0, 10, 20, 30"),
    ],
)
def test_contradictory_settings_are_refused(settings_, error, message):
    with pytest.raises(error, match=message):
        choose_boundary(scores_of(TABLE), [0, 10, 20, 30], **settings_)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(MeasureError, match="3 boundaries for 4 scored variants"):
        choose_boundary(scores_of(TABLE), [0, 10, 20])
    for boundaries in ([0, 20, 10, 30], [0, 10, 10, 30], []):
        with pytest.raises(BoundaryError, match="do not ascend"):
            choose_boundary(scores_of(TABLE), boundaries)
    with pytest.raises(MeasureError, match="at least 2 examples"):
        choose_boundary(scores_of([[1], [2]]), [0, 1])


@pytest.mark.parametrize(
    ("text", "boundaries"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6]),
        ("6", [6]),
        ("0", [0, 6]),
        ("4, 0,2", [0, 2, 4, 6]),
        ("0,3:5", [0, 3, 4, 5, 6]),
        ("2 : 3,3,2:2", [2, 3, 6]),
    ],
)
def test_parse_boundaries(text, boundaries):
    assert parse_boundaries(text, 6) == boundaries


@pytest.mark.parametrize("text", ["", "1,,2", "a", "1.5", "1:2:3", "1:", "7", "-1", "3:7", "4:2", "1 2"])
def test_parse_boundaries_refuses(text):
    with pytest.raises(BoundaryError, match="boundaries="):
        parse_boundaries(text, 6)


LOSSES = {0: 4.0, 16: 2.0, 20: 1.8, 24: 2.6, 28: 1.2, 30: 1.0}  # half of the gain is kept below 2.5


@pytest.mark.parametrize(
    ("n_boundaries", "allowed", "listed"),
    [
        (9, None, [16, 20, 28, 30]),
        (9, [16, 20, 24, 28, 30], [16, 20, 28, 30]),  # 0 is what the gain is over, although it may not be chosen
        (2, None, [16, 30]),
        (9, [0, 16, 20], [16, 20, 30]),  # something to choose, and the full adapter to compare with
        (9, [0, 24], [24, 30]),  # nothing keeps half of the gain: the best there is
        (2, [0], [0, 30]),
    ],
)
def test_the_shortlist_keeps_half_of_the_gain_over_the_base_model(n_boundaries, allowed, listed):
    losses = scores_of([[loss, loss] for loss in LOSSES.values()], higher_is_better=False)
    assert shortlist(losses, list(LOSSES), n_boundaries, allowed) == listed


def test_a_shortlist_without_the_base_model_is_refused():
    losses = scores_of([[2.0, 2.0], [1.0, 1.0]], higher_is_better=False)
    with pytest.raises(MeasureError, match="Measure boundary 0"):
        shortlist(losses, [16, 30], 3)
    with pytest.raises(MeasureError, match="one or more that may be chosen"):
        shortlist(losses, [0, 30], 3, [])
