"""Subsets against exhaustive search on small cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorazor.adapter.sites import Site, locate
from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.measure.stats import Interval
from lorazor.select.ranks import mixed_ranks
from lorazor.select.subsets import (
    best_window,
    eliminate,
    is_tolerable,
    make_units,
    nested,
    smallest_passing,
    unit_scores,
    units_within,
    within_budget,
)

NAMES = [
    f"model.layers.{layer}.{kind}"
    for layer in range(2)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
] + ["lm_head"]
SITES = [Site(name, *locate(name), rank=4, scaling=2.0, n_parameters=10) for name in NAMES]

scores_and_costs = st.lists(
    st.tuples(st.integers(-20, 20).map(float), st.integers(1, 5)), min_size=1, max_size=7
).map(lambda pairs: tuple(zip(*pairs, strict=True)))  # fmt: skip


def labels(by: str) -> dict[str, int]:
    return {unit.label: len(unit.parts) for unit in make_units(SITES, range(11), [10] * 11, by)}


def test_units():
    assert labels("site") == dict.fromkeys(NAMES, 1)
    assert labels("kind")["mlp.up_proj"] == 2 and len(labels("kind")) == 6
    assert labels("layer") == {"model.layers.0": 5, "model.layers.1": 5, "lm_head": 1} == labels("window")
    assert labels("group") == {
        "model.layers.0.self_attn.q/k/v": 2,
        "model.layers.0.self_attn.o_proj": 1,
        "model.layers.0.mlp.gate/up": 2,
        "model.layers.1.self_attn.q/k/v": 2,
        "model.layers.1.self_attn.o_proj": 1,
        "model.layers.1.mlp.gate/up": 2,
        "lm_head": 1,
    }
    with pytest.raises(SettingsError, match="by='head'"):
        labels("head")


@pytest.mark.parametrize(
    "names", [["query", "key", "value"], ["q_lin", "k_lin", "v_lin"], ["q", "k", "v"], ["query_proj", "key_proj"]]
)
def test_groups_of_other_families(names):
    sites = [Site(f"h.0.attn.{name}", "h", 0, f"attn.{name}", 1, 1.0, 1) for name in [*names, "dense"]]
    assert len(make_units(sites, range(len(sites)), [1] * len(sites), "group")) == 2


def test_components_of_a_site_are_units_of_their_own():
    units = make_units(SITES[:2], [0, 0, 1, 1], [5, 5, 5, 5], "site")
    assert [unit.parts for unit in units] == [(0,), (1,), (2,), (3,)]
    assert units[1].label == NAMES[0]


def test_scores_of_units():
    units = make_units(SITES, range(11), [10] * 10 + [30], "layer")
    np.testing.assert_allclose(unit_scores(range(11), units, "nothing"), [10, 35, 10])
    np.testing.assert_allclose(unit_scores(range(11), units, "parameters"), [10 / 50, 35 / 50, 10 / 30])
    np.testing.assert_allclose(unit_scores(range(11), units, "parts"), [10 / 5, 35 / 5, 10])
    with pytest.raises(MeasureError, match="part 1 is nan"):
        unit_scores([0.0, float("nan"), *range(9)], units, "parameters")


@given(scores_and_costs, st.integers(1, 20))
def test_greedy_takes_the_most_necessary_units(columns, budget):
    """No unit that was left out scores more than one that stayed, if it had fitted when its turn came."""
    scores, costs = columns
    if budget < min(costs):
        with pytest.raises(BudgetError, match="keeps nothing"):
            within_budget(scores, costs, budget)
        return
    kept = within_budget(scores, costs, budget)
    assert sum(costs[unit] for unit in kept) <= budget
    for left_out in set(range(len(costs))) - set(kept):
        before = [unit for unit in kept if (-scores[unit], unit) < (-scores[left_out], left_out)]
        assert sum(costs[unit] for unit in before) + costs[left_out] > budget


@given(scores_and_costs.filter(lambda columns: len(columns[0]) > 1), st.integers(1, 6))
def test_greedy_is_best_where_all_cost_the_same(columns, n_kept):
    scores = columns[0]
    n_kept = min(n_kept, len(scores))
    found = sum(scores[unit] for unit in within_budget(scores, [3] * len(scores), 3 * n_kept))
    assert found == max(sum(chosen) for chosen in combinations(scores, n_kept))


@given(scores_and_costs, st.integers(1, 20))
def test_the_best_window(columns, budget):
    scores, costs = columns
    windows = {
        (a, b): sum(scores[a:b])
        for a in range(len(scores))
        for b in range(a + 1, len(scores) + 1)
        if sum(costs[a:b]) <= budget
    }
    if not windows:
        with pytest.raises(BudgetError):
            best_window(scores, costs, budget)
        return
    assert windows[best_window(scores, costs, budget)] == max(windows.values())


def test_a_window_of_given_length_that_does_not_fit():
    with pytest.raises(BudgetError, match="No 2 neighbouring"):
        best_window([1, 2], [3, 3], 4, 2)


def test_nested_subsets():
    keep = nested([1.0, 5.0, 3.0, 5.0])
    assert [keep(n) for n in (1, 2, 3)] == [[1], [1, 3], [1, 2, 3]]
    assert nested([1.0, 5.0, 3.0, 0.0], is_window=True)(2) == [1, 2]


@given(st.integers(1, 60), st.integers(1, 60))
def test_bisection_finds_the_smallest(n_units, threshold):
    threshold, asked = min(threshold, n_units), []

    def passes(size: int) -> bool:
        asked.append(size)
        return size >= threshold

    assert smallest_passing(n_units, passes) == threshold
    assert n_units not in asked and len(asked) <= np.ceil(np.log2(n_units)) + 1


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 50))
def test_bisection_stops_at_its_resolution(n_units, threshold, resolution):
    threshold = min(threshold, n_units)
    found = smallest_passing(n_units, lambda size: size >= threshold, resolution)
    assert threshold <= found <= min(n_units, threshold + resolution - 1)


def test_a_tolerance_that_nothing_meets_keeps_everything():
    assert smallest_passing(7, lambda size: False) == 7


def test_backward_elimination_is_greedy_and_verified():
    """With every unit tried, each step is the best single removal."""
    values = {frozenset(chosen): hash(chosen) % 97 for n in range(1, 5) for chosen in combinations(range(4), n)}
    kept = frozenset(range(4))
    for found in eliminate(range(4), [0.0] * 4, 4, lambda units: values[frozenset(units)]):
        kept = min((kept - {gone} for gone in sorted(kept)), key=values.__getitem__)
        assert frozenset(found) == kept
    assert len(kept) == 1


def test_backward_elimination_tries_the_lowest_scores_only():
    asked = []

    def cost(units: tuple[int, ...]) -> float:
        asked.append(units)
        return 0.0

    steps = eliminate(range(4), [4.0, 1.0, 3.0, 2.0], 2, cost)
    assert next(steps) == (0, 2, 3)
    assert asked == [(0, 2, 3), (0, 1, 2)]
    with pytest.raises(SettingsError, match="0 candidates"):
        next(eliminate(range(4), [0.0] * 4, 0, cost))


def test_units_within():
    units = make_units(SITES[:10], range(10), [10] * 10, "window")
    assert units_within([1.0] * 5 + [2.0] * 5, units, [50, 50], 50, "window", "parameters") == [1]
    units = make_units(SITES[:10], range(10), [10] * 10, "kind")
    assert units_within([1, 1, 9.0, 1, 1] * 2, units, [20] * 5, 40, "kind", "parameters") == [0, 2]


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=6), st.integers(1, 6))
def test_what_is_worth_nothing_never_stays_as_with_mixed_ranks(scores, budget):
    """Of sites of rank 1, a subset of sites and mixed ranks are the same choice: the best sum of all subsets."""
    sites = [Site(f"site {index}", None, None, "q", 1, 1.0, 1) for index in range(len(scores))]
    units = make_units(sites, range(len(scores)), [1] * len(scores), "site")

    def choose() -> set[int]:
        return set(units_within(scores, units, [1] * len(scores), budget, "site", "parameters"))

    if max(scores) <= 0:
        with pytest.raises(MeasureError, match="no better than its base"):
            choose()
        return
    kept = choose()
    greatest = max(sum(some) for n in range(1, budget + 1) for some in combinations(scores, min(n, len(scores))))
    assert sum(scores[unit] for unit in kept) == greatest and all(scores[unit] > 0 for unit in kept)
    of_sites = {site.name: torch.tensor([float(score)]) for site, score in zip(sites, scores, strict=True)}
    mixed = mixed_ranks(of_sites, dict.fromkeys(of_sites, 1), budget)
    assert kept == {index for index, components in enumerate(mixed.values()) if components}


@pytest.mark.parametrize(
    ("estimate", "higher_is_better", "one_se", "no_worse"),
    [
        (-0.9, True, True, True),
        (-1.5, True, False, True),
        (-2.5, True, False, False),
        (+5.0, True, True, True),
        (+0.9, False, True, True),
        (+1.5, False, False, True),
        (-5.0, False, True, True),
    ],
)
def test_what_is_tolerable(estimate, higher_is_better, one_se, no_worse):
    difference = Interval(estimate, estimate - 2, estimate + 2, 1.0)
    assert is_tolerable(difference, higher_is_better, "one-se") is one_se
    assert is_tolerable(difference, higher_is_better, "no-worse") is no_worse
