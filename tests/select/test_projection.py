"""Oracles: every subset of sites by brute force, and the schedule in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._published_weightlora import keep_largest_signed
from lorazor.errors import BudgetError
from lorazor.select.projection import (
    budget_for_fraction,
    keep_largest,
    progressive_budget,
    sites_for_count,
    sites_for_parameters,
)

# Eighths: sums of squares are exact in float64, so that ties are ties.
gate_lists = st.lists(st.integers(-24, 24).map(lambda n: n / 8), min_size=1, max_size=7)


@st.composite
def gates_and_budgets(draw):
    gates = draw(gate_lists)
    return gates, draw(st.integers(1, len(gates)))


def restricted(gates, subset):
    return [value if index in subset else 0.0 for index, value in enumerate(gates)]


def squared_distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


@settings(deadline=None, max_examples=150)
@given(gates_and_budgets())
def test_keep_largest_is_the_nearest_of_all_subsets_and_prefers_the_earlier(case):
    gates, budget = case
    candidates = [restricted(gates, subset) for subset in combinations(range(len(gates)), budget)]
    # min() keeps the first of equals, and combinations come in order of site.
    nearest = min(candidates, key=lambda candidate: squared_distance(candidate, gates))
    assert keep_largest(torch.tensor(gates), budget).tolist() == nearest


@settings(deadline=None, max_examples=100)
@given(gates_and_budgets())
def test_the_signed_projection_keeps_the_greatest_sum(case):
    gates, budget = case
    candidates = combinations(range(len(gates)), budget)
    greatest = max(candidates, key=lambda subset: sum(gates[index] for index in subset))
    assert keep_largest_signed(torch.tensor(gates), budget).tolist() == restricted(gates, greatest)


def test_the_published_projection_drops_the_largest_gate_and_ours_does_not():
    gates = torch.tensor([-3, 0.5, 0.2, -0.1, 1])
    assert keep_largest_signed(gates, 2).tolist() == [0, 0.5, 0, 0, 1]
    assert keep_largest(gates, 2).tolist() == [-3, 0, 0, 0, 1]


def test_ties_keep_exactly_the_budget_and_the_earlier_sites():
    assert keep_largest(torch.ones(8), 3).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert keep_largest(torch.tensor([1.0, -2, 2, 1, -2]), 2).tolist() == [0, -2, 2, 0, 0]


@settings(deadline=None, max_examples=50)
@given(gates_and_budgets(), st.randoms(use_true_random=False))
def test_keep_largest_laws(case, random):
    gates, budget = case
    values = torch.tensor(gates)
    kept = keep_largest(values, budget)
    assert torch.equal(keep_largest(kept, budget), kept)
    assert torch.equal(keep_largest(-values, budget), -kept)
    assert torch.equal(keep_largest(4 * values, budget), 4 * kept)
    signs = torch.tensor([random.choice((-1.0, 1.0)) for _ in gates])
    assert torch.equal(keep_largest(signs * values, budget), signs * kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_keep_largest_leaves_its_input_and_dtype_alone(dtype):
    gates = torch.tensor([0.5, -1, 0.25], dtype=dtype)
    kept = keep_largest(gates, 1)
    assert kept.dtype == dtype
    assert kept.tolist() == [0, -1, 0]
    assert gates.tolist() == [0.5, -1, 0.25]


def exact_budget(step, select_steps, n_sites, budget, dense_steps):
    if step <= dense_steps:
        return n_sites
    if step >= select_steps:
        return budget
    left = 1 - Fraction(step - dense_steps, select_steps - dense_steps)
    return budget + math.ceil((n_sites - budget) * left**3)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_the_schedule_is_the_published_cubic(data):
    select_steps = data.draw(st.integers(1, 400), "T")
    dense_steps = data.draw(st.integers(0, select_steps - 1), "t0")
    n_sites = data.draw(st.integers(1, 600), "n")
    budget = data.draw(st.integers(1, n_sites), "K")
    steps = range(select_steps + 3)
    counts = [progressive_budget(step, select_steps, n_sites, budget, dense_steps) for step in steps]
    assert counts == [exact_budget(step, select_steps, n_sites, budget, dense_steps) for step in steps]
    assert counts == sorted(counts, reverse=True)
    assert set(counts[: dense_steps + 1]) == {n_sites}
    assert set(counts[select_steps:]) == {budget}
    # Only the last step reaches K: n - K > 0 sites are still to go before it.
    assert n_sites == budget or min(counts[:select_steps]) > budget


def test_the_schedule_by_hand():
    # n = 10, K = 2, T = 4: 2 + ceil(8 (3/4)^3) = 2 + ceil(3.375), 2 + 8/8, 2 + ceil(8/64), 2
    assert [progressive_budget(step, 4, 10, 2) for step in range(6)] == [10, 6, 3, 3, 2, 2]
    assert [progressive_budget(step, 5, 10, 2, dense_steps=1) for step in range(6)] == [10, 10, 6, 3, 3, 2]


@settings(deadline=None, max_examples=100)
@given(gates_and_budgets())
def test_sites_for_count_is_the_best_of_all_subsets(case):
    scores, budget = case
    best = max(combinations(range(len(scores)), budget), key=lambda subset: sum(scores[index] for index in subset))
    assert sites_for_count(scores, budget).nonzero().flatten().tolist() == list(best)


def test_a_negative_score_is_a_low_score():
    assert sites_for_count(torch.tensor([-5.0, 1.0, 0.5]), 1).tolist() == [False, True, False]


@pytest.mark.parametrize(("fraction", "n_sites", "budget"), [(0.1, 210, 21), (0.29, 100, 29), (1, 7, 7), (0.01, 7, 1)])
def test_fractions_of_the_sites(fraction, n_sites, budget):
    assert budget_for_fraction(fraction, n_sites) == budget


def greedy(scores, sizes, budget):
    """Literally: walk down the scores, and take what still fits."""
    kept: set[int] = set()
    for site in sorted(range(len(scores)), key=lambda index: (-scores[index], index)):
        if sum(sizes[index] for index in kept) + sizes[site] <= budget:
            kept.add(site)
    return [index in kept for index in range(len(scores))]


@settings(deadline=None, max_examples=150)
@given(gate_lists, st.data())
def test_sites_for_parameters_is_greedy_and_never_over_budget(scores, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    budget = data.draw(st.integers(min(sizes), sum(sizes) + 2))
    kept = sites_for_parameters(scores, sizes, budget).tolist()
    assert kept == greedy(scores, sizes, budget)
    n_left = budget - sum(size for size, keep in zip(sizes, kept, strict=True) if keep)
    assert n_left >= 0
    # Maximal: nothing that was dropped would still fit.
    assert all(keep or size > n_left for size, keep in zip(sizes, kept, strict=True))


def test_a_site_that_does_not_fit_is_skipped():
    assert sites_for_parameters([3.0, 2.0, 1.0], [4, 7, 2], 6).tolist() == [True, False, True]


def test_equal_sizes_make_parameters_a_count():
    scores = torch.tensor([0.3, -1.0, 2.0, 0.3, 0.7])
    for budget in range(1, 6):
        assert torch.equal(sites_for_parameters(scores, [12] * 5, 12 * budget + 5), sites_for_count(scores, budget))


def test_a_parameter_budget_that_holds_no_site_is_refused():
    with pytest.raises(BudgetError, match="the smallest has 5"):
        sites_for_parameters([1.0, 2.0], [5, 6], 4)
