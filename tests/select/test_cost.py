"""The cost of a choice of sites, and the choice that spends a budget best."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazor.select.cost import Costs, Part, fit_costs

# Two layers: q and v read one input, o follows. Time 3 and 7: attention, between the sites.
TIMES = (2, 2, 4, 6, 6, 8)
LAYERS = Costs(
    10.0,
    TIMES,
    (
        *(Part(amount, (site,)) for site, amount in enumerate((1, 2, 3, 1, 2, 3))),
        Part(5, (0, 1)),
        Part(7, (3, 4), 7),
        *(Part(20, (), time) for time in (3, 4, 6, 7, 8)),
    ),
)


def kept(*sites: int, n_sites: int = 6) -> list[bool]:
    return [site in sites for site in range(n_sites)]


@pytest.mark.parametrize(
    ("sites", "cost"),
    [
        ((), 10),
        ((5,), 10 + 3),  # the last site: nothing is passed back
        ((4,), 10 + 2 + 7 + 2 * 20),  # times 7 and 8, and its input
        ((3, 4), 10 + 3 + 7 + 2 * 20),  # q and v share the input
        ((2,), 10 + 3 + 7 + 3 * 20),  # behind it, something frozen saves what 3 and 4 would
        ((0, 1), 10 + 3 + 5 + 7 + 5 * 20),
        ((0, 1, 2, 3, 4, 5), 10 + 12 + 5 + 7 + 5 * 20),
    ],
)
def test_parts_happen_with_their_sites_or_behind_the_lowest(sites, cost):
    assert LAYERS.of(kept(*sites)) == cost
    assert LAYERS.least == 13


def best_by_force(costs: Costs, scores: list[float], limit: float) -> float:
    n_sites = len(scores)
    sums = [
        math.fsum(scores[site] for site in sites)
        for n in range(1, n_sites + 1)
        for sites in itertools.combinations(range(n_sites), n)
        if costs.of(kept(*sites, n_sites=n_sites)) <= limit
    ]
    return max(sums)


amounts = st.floats(0.1, 5)
scores_of_six = st.lists(st.floats(0.01, 1), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(amounts, min_size=6, max_size=6), st.lists(amounts, min_size=5, max_size=5), scores_of_six, st.floats(0, 1)
)
def test_the_choice_misses_the_best_by_less_than_one_site(own, depths, scores, share):
    parts = [Part(amount, (site,)) for site, amount in enumerate(own)]
    parts += [Part(amount, (), time) for amount, time in zip(depths, (3, 4, 6, 7, 8), strict=True)]
    costs = Costs(1.0, TIMES, tuple(parts))
    limit = costs.least + share * (costs.of([True] * 6) - costs.least)
    choice = costs.choose(scores, limit).tolist()
    assert any(choice) and costs.of(choice) <= limit + 1e-9
    found = sum(score for score, stays in zip(scores, choice, strict=True) if stays)
    assert found > best_by_force(costs, scores, limit) - max(scores) - 1e-9


@settings(max_examples=60, deadline=None)
@given(scores_of_six, st.floats(0, 1))
def test_among_sites_of_one_price_the_choice_is_the_best(scores, share):
    parts = [Part(2.0, (site,)) for site in range(6)] + [Part(3.0, (), time) for time in (3, 4, 6, 7, 8)]
    costs = Costs(1.0, TIMES, tuple(parts))
    limit = costs.least + share * (costs.of([True] * 6) - costs.least)
    choice = costs.choose(scores, limit).tolist()
    found = math.fsum(score for score, stays in zip(scores, choice, strict=True) if stays)
    assert found == pytest.approx(best_by_force(costs, scores, limit))


def test_a_shared_input_is_worth_it_for_all_of_its_sites_together():
    parts = (*(Part(1.0, (site,)) for site in range(4)), Part(3.0, (0, 1, 2)))
    costs = Costs(0.0, (2, 2, 2, 2), parts)
    assert costs.choose([1.0, 1.0, 1.0, 0.45], 6.0).tolist() == [True, True, True, False]  # 3 for 6, 0.45 for 1
    assert costs.choose([1.0, 1.0, 1.0, 0.6], 5.9).tolist() == [True, False, False, True]  # 3 and the 3 do not fit
    assert costs.choose([-1.0, 0.0, -2.0, -0.5], 9.0).tolist() == [False, True, False, False]


def test_scores_that_are_an_order_are_taken_in_their_order():
    costs = Costs(0.0, (2, 4, 6), (Part(5.0, (0,)), Part(1.0, (1,)), Part(1.0, (2,))))
    assert costs.in_order(torch.tensor([3.0, 2.0, 1.0]), 6.5).tolist() == [True, True, False]
    assert costs.in_order([3.0, 2.0, 1.0], 4.0).tolist() == [False, True, True]


def test_planted_costs_are_found_again():
    features = [
        Costs(1.0, TIMES, ()),
        Costs(0.0, TIMES, tuple(Part(1.0 + time, (), time) for time in (3, 4, 6, 7, 8))),
        Costs(0.0, TIMES, tuple(Part(amount, (site,)) for site, amount in enumerate((1, 2, 3, 1, 2, 3)))),
        Costs(0.0, TIMES, tuple(Part(1.0, (site,)) for site in range(6))),
    ]
    planted = (0.7, 0.02, 0.003, 0.05)
    probes = [kept(*range(6)), kept(5), kept(0), kept(3, 4, 5), kept(0, 3, 1), kept(2, 4, 5)]
    measured = [sum(number * one.of(probe) for number, one in zip(planted, features, strict=True)) for probe in probes]
    costs = fit_costs(features, probes, measured)
    for sites in itertools.combinations(range(6), 2):
        wanted = sum(number * one.of(kept(*sites)) for number, one in zip(planted, features, strict=True))
        assert costs.of(kept(*sites)) == pytest.approx(wanted, rel=1e-6)
