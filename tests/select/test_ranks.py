"""Ranks of WeightLoRA+: the oracle tries every rank and every further site."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorazor.errors import SettingsError
from lorazor.select.ranks import Shape, paper_ranks, served_ranks
from lorazor.select.weightlora import WeightLoraSettings

VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes in vLLM 0.32


@st.composite
def adapters(draw):
    n_sites = draw(st.integers(1, 12))
    sides = st.tuples(st.integers(1, 600), st.integers(1, 600))
    rank = draw(st.sampled_from([1, 2, 4, 8, 16]))
    shapes = [Shape(rank, sum(pair), min(pair)) for pair in draw(st.lists(sides, min_size=n_sites, max_size=n_sites))]
    scores = draw(st.lists(st.integers(-5, 5), min_size=n_sites, max_size=n_sites))
    order = sorted(range(n_sites), key=lambda index: -scores[index])
    keep = draw(st.integers(1, n_sites))
    is_kept = torch.tensor([index in order[:keep] for index in range(n_sites)])
    is_open = torch.tensor(draw(st.lists(st.booleans(), min_size=n_sites, max_size=n_sites))) | is_kept
    return shapes, [float(score) for score in scores], is_kept, is_open, order


@settings(deadline=None, max_examples=150)
@given(adapters())
def test_one_rank_that_is_served_within_the_budget_as_high_and_wide_as_it_can_be(adapter):
    shapes, scores, is_kept, is_open, order = adapter
    ranks = served_ranks(scores, is_kept, is_open, shapes).tolist()
    before, budget = shapes[0].rank, sum(shape.rank * shape.n_per_rank for shape in shapes)

    def cost(rank, stay):
        return sum(rank * shape.n_per_rank for shape, one in zip(shapes, stay, strict=True) if one)

    chosen = is_kept.tolist()
    possible = [
        rank
        for rank in VLLM
        if rank > before
        and cost(rank, chosen) <= budget
        and all(rank <= shape.limit for shape, one in zip(shapes, chosen, strict=True) if one)
    ]
    if not possible:
        assert ranks == [before if one else 0 for one in chosen]
        return
    stays, rank = [one > 0 for one in ranks], max(ranks)
    assert set(ranks) <= {0, rank} and rank == max(possible)
    assert all(later for later, first in zip(stays, chosen, strict=True) if first)
    assert cost(rank, stays) <= budget
    for place, index in enumerate(order):  # whoever was left out did not fit beside those of higher score
        if not stays[index] and is_open[index] and shapes[index].limit >= rank:
            better = [one or other in order[:place] and stays[other] for other, one in enumerate(chosen)]
            assert cost(rank, better) + rank * shapes[index].n_per_rank > budget
        assert stays[index] <= bool(is_open[index])


def test_a_tenth_of_equal_sites_get_64_instead_of_80_and_five_more_sites():
    shapes = [Shape(8, 1000, 500)] * 210
    is_kept = torch.arange(210) >= 189
    scores = torch.arange(210.0)
    everywhere = torch.ones(210, dtype=torch.bool)
    assert paper_ranks(is_kept, shapes, one_rank=True).tolist() == [0] * 189 + [80] * 21
    served = served_ranks(scores, is_kept, everywhere, shapes)
    assert served.tolist() == [0] * 184 + [64] * 26  # 26 x 64 = 1,664 of 1,680
    assert served_ranks(scores, is_kept, is_kept, shapes).tolist() == [0] * 189 + [64] * 21


def test_the_paper_stops_at_the_size_of_each_map_or_of_the_smallest():
    shapes = [Shape(4, 100, 6), Shape(4, 100, 50), Shape(4, 100, 50), Shape(4, 100, 50)]
    is_kept = torch.tensor([True, True, False, False])
    assert paper_ranks(is_kept, shapes, one_rank=False).tolist() == [6, 8, 0, 0]
    assert paper_ranks(is_kept, shapes, one_rank=True).tolist() == [6, 6, 0, 0]


def test_without_growth_ranks_stay():
    shapes = [Shape(4, 100, 50), Shape(8, 100, 50), Shape(4, 100, 50)]
    is_kept = torch.tensor([False, True, True])
    ranks = WeightLoraSettings(2, 3).ranks(torch.zeros(3), is_kept, is_kept, shapes, one_rank=False)
    assert ranks.tolist() == [0, 8, 4]
    with pytest.raises(SettingsError, match=r"grow='more' is unknown\. Pass None, or one of served, paper"):
        WeightLoraSettings(2, 3, grow="more").check(3, 3)
