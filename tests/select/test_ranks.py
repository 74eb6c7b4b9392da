"""Oracles: every subset of components, and every rank with every subset of sites, by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazor.adapter.sites import Site
from lorazor.errors import BudgetError, MeasureError
from lorazor.select.ranks import mixed_ranks, select_components, uniform_rank

# Whole numbers, so that sums are exact and ties are ties.
sites_of_scores = st.lists(st.lists(st.integers(-4, 9), min_size=1, max_size=3), min_size=1, max_size=4)
some_is_positive = sites_of_scores.filter(lambda sites: any(score > 0 for site in sites for score in site))


def named(values):
    """A value for each site, by names whose order is not that of the sites."""
    return {f"site {-index}": value for index, value in enumerate(values)}


def mixed(sites, sizes, budget):
    """`mixed_ranks` of scores by site, with the sizes given in another order."""
    kept = mixed_ranks(tensors(sites), dict(reversed(named(sizes).items())), budget)
    assert list(kept) == list(named(sites))
    return list(kept.values())


def uniform(sites, sizes, budget, ranks=None):
    rank, kept = uniform_rank(tensors(sites), dict(reversed(named(sizes).items())), budget, ranks)
    assert list(kept) == list(named(sites))
    return rank, list(kept.values())


def tensors(sites):
    return named([torch.as_tensor(site, dtype=torch.float32) for site in sites])


def total(sites, kept):
    return sum(site[index] for site, of_site in zip(sites, kept, strict=True) for index in of_site)


@settings(deadline=None, max_examples=150)
@given(some_is_positive, st.integers(1, 12))
def test_of_equal_sizes_the_mixed_choice_is_the_best_of_all_subsets(sites, n_components):
    everything = [score for site in sites for score in site]
    greatest = max(
        sum(subset) for n in range(n_components + 1) for subset in combinations(everything, min(n, len(everything)))
    )
    kept = mixed(sites, [5] * len(sites), 5 * n_components + 4)
    assert total(sites, kept) == greatest
    assert sum(map(len, kept)) <= n_components


@settings(deadline=None, max_examples=150)
@given(some_is_positive, st.integers(1, 12))
def test_of_equal_sizes_the_uniform_choice_is_the_best_of_all_ranks_and_subsets(sites, n_components):
    def worth(site, rank):
        return max(sum(subset) for subset in combinations(site, rank))

    possible = {
        rank: [
            sum(worth(site, rank) for site in subset)
            for n in range(1, n_components // rank + 1)
            for subset in combinations([site for site in sites if len(site) >= rank], n)
        ]
        for rank in range(1, 4)
    }
    greatest = {rank: max(totals, default=0) for rank, totals in possible.items()}
    rank, kept = uniform(sites, [5] * len(sites), 5 * n_components + 4)
    assert total(sites, kept) == max(greatest.values())
    assert rank == min(r for r, value in greatest.items() if value == max(greatest.values()))
    assert {len(of_site) for of_site in kept} <= {0, rank}
    assert sum(map(len, kept)) <= n_components


@settings(deadline=None, max_examples=150)
@given(some_is_positive, st.data())
def test_of_unequal_sizes_the_budget_holds_and_nothing_that_fits_is_left_out(sites, data):
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=len(sites), max_size=len(sites)))
    budget = data.draw(st.integers(max(sizes), 40))
    kept = mixed(sites, sizes, budget)
    n_left = budget - sum(size * len(of_site) for size, of_site in zip(sizes, kept, strict=True))
    assert n_left >= 0
    for site, size, of_site in zip(sites, sizes, kept, strict=True):
        assert of_site == sorted(of_site) and all(site[index] > 0 for index in of_site)
        assert not any(score > 0 and size <= n_left for index, score in enumerate(site) if index not in of_site)
        # within a site, where sizes are equal, no lower score stays before a higher one
        left_out = [score for index, score in enumerate(site) if index not in of_site]
        assert not of_site or max(left_out, default=0) <= min(site[index] for index in of_site)
    rank, kept = uniform(sites, sizes, budget, ranks=[1])
    assert rank == 1 and sum(size * len(of_site) for size, of_site in zip(sizes, kept, strict=True)) <= budget


def test_score_per_parameter_counts_not_score():
    scores = [[6, 5], [4, 3]]
    assert mixed(scores, [10, 2], 10) == [[], [0, 1]]
    assert mixed(scores, [10, 2], 14) == [[0], [0, 1]]
    assert uniform(scores, [10, 2], 14) == (1, [[0], [0]])  # 10 for 12, rank 2 gives 7 for 4
    assert uniform(scores, [10, 2], 14, ranks=[2]) == (2, [[], [0, 1]])


def test_ties_keep_the_earlier_and_the_smaller_rank():
    assert mixed([[2, 2], [2, 2]], [3, 3], 9) == [[0, 1], [0]]
    assert uniform([[1, 1], [1, 1]], [3, 3], 6) == (1, [[0], [0]])
    assert uniform([[1, 2, 3]], [1], 2) == (2, [[1, 2]])  # the best are not always the first


@pytest.mark.parametrize("choose", [mixed, uniform])
def test_what_cannot_be_chosen_is_refused(choose):
    scores = [[2, 1], [3, 1]]
    with pytest.raises(BudgetError, match="A budget of 6 parameters holds no component: the smallest has 7. Pass"):
        choose(scores, [8, 7], 6)
    for value in (float("nan"), float("inf")):
        with pytest.raises(MeasureError, match=f"component 1 of site -1 is {value}, so"):
            choose([scores[0], [1, value]], [8, 7], 100)
    with pytest.raises(MeasureError, match="Scores of 2 sites and sizes of 1. Pass"):
        choose(scores, [8], 100)
    with pytest.raises(MeasureError, match="no better than its base"):
        choose([[0, -1]], [8], 100)


def test_ranks_that_cannot_be_are_refused():
    scores = [[2, 1], [3, 1]]
    with pytest.raises(BudgetError, match="holds no site at a rank of 2, 3"):
        uniform(scores, [8, 7], 13, ranks=[3, 2])
    for ranks in ([], [0, 1]):
        with pytest.raises(BudgetError, match="Pass ranks from 1 to 2"):
            uniform(scores, [8, 7], 13, ranks=ranks)


def test_a_choice_becomes_a_selection_that_names_only_what_changes():
    sites = [
        Site(f"layers.{layer}.q", "layers", layer, "q", rank=2, scaling=1.0, n_parameters=14) for layer in range(3)
    ]
    kept = {"layers.2.q": [], "layers.1.q": [1], "layers.0.q": [0, 1]}
    scores = {"layers.1.q": 2, "layers.0.q": 3, "layers.2.q": 1}
    selection = select_components(sites, kept, "ranks", {"budget": 3}, scores)
    assert [(site.keep, site.components, site.kept_rank, site.score) for site in selection.sites] == [
        (True, None, 2, 3.0),
        (True, (1,), 1, 2.0),
        (False, None, 2, 1.0),
    ]
    assert (selection.method, selection.settings) == ("ranks", {"budget": 3})
