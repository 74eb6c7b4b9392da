"""Oracles: numpy transcriptions, autograd, and the loss that really was lost on the way down."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from lorazor.adapter.sites import Site
from lorazor.errors import MeasureError
from lorazor.select.projection import sites_for_count
from lorazor.select.warmup_scores import credit_of_step, warmup_scores

SHAPES = [(6, 5, 2), (4, 9, 2), (3, 3, 4)]  # (d_in, d_out, r) of three sites; the last has r > d_out


def random_sites(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(r, d_in, generator=generator).to(dtype), torch.randn(d_out, r, generator=generator).to(dtype)]
        for d_in, d_out, r in SHAPES
    ]


def made_sites(layers, stack="model.layers", kinds=("q_proj", "v_proj")):
    return [Site(f"{stack}.{layer}.{kind}", stack, layer, kind, 2, 1.0, 10) for layer, kind in product(layers, kinds)]


def scores_of(sites, gates=None, credit=None, seed=0):
    ones = torch.ones(len(sites))
    return warmup_scores(ones if gates is None else gates, ones if credit is None else credit, sites, seed)


def test_gate_is_the_magnitude():
    gates = torch.tensor([-3.0, 0.5], requires_grad=True)
    assert scores_of(made_sites([0]), gates)["gate"].tolist() == [3, 0.5]


def test_credit_is_its_equation():
    before, after, gradients = random_sites(3), random_sites(4), random_sites(5)
    as_numpy = [
        [tuple(t.numpy().astype(np.float64) for t in three) for three in zip(*site, strict=True)]
        for site in zip(before, after, gradients, strict=True)
    ]
    credit = [-sum((gradient * (new - old)).sum() for old, new, gradient in site) for site in as_numpy]
    np.testing.assert_allclose(credit_of_step(before, after, gradients).numpy(), credit, rtol=1e-4)


def gated_loss(sites, x, target):
    return ((sum(B @ (A @ x) for A, B in sites) - target) ** 2).mean()


def test_credit_adds_up_to_the_loss_decrease_and_finds_who_earned_it():
    generator = torch.Generator().manual_seed(6)
    x, target = torch.randn(5, 30, generator=generator), torch.randn(4, 30, generator=generator)
    sites = [[0.5 * torch.randn(2, 5, generator=generator), torch.zeros(4, 2)] for _ in range(3)]
    credit = torch.zeros(3)
    learning_rates = [1e-3, 4e-3, 0.0]  # the third never moves
    first_loss = float(gated_loss(sites, x, target))
    for _ in range(150):
        leaves = [[tensor.clone().requires_grad_() for tensor in site] for site in sites]
        gated_loss(leaves, x, target).backward()
        gradients = [[tensor.grad for tensor in site] for site in leaves]
        before, sites = (
            sites,
            [
                [tensor - rate * gradient for tensor, gradient in zip(site, site_gradients, strict=True)]
                for site, site_gradients, rate in zip(sites, gradients, learning_rates, strict=True)
            ],
        )
        credit += credit_of_step(before, sites, gradients)
    decrease = first_loss - float(gated_loss(sites, x, target))
    assert decrease > 0.02
    assert float(credit.sum()) == pytest.approx(decrease, rel=0.02)
    assert credit[1] > credit[0] > 0 and credit[2] == 0


def test_credit_does_not_depend_on_how_size_is_shared_between_A_and_B():
    def scaled(sites, factor):
        return [[factor * A, B / factor] for A, B in sites]

    before, after, gradients = random_sites(7), random_sites(8), random_sites(9)
    there = credit_of_step(scaled(before, 8.0), scaled(after, 8.0), scaled(gradients, 1 / 8.0))
    np.testing.assert_allclose(there.numpy(), credit_of_step(before, after, gradients).numpy(), rtol=1e-5)


def test_a_missing_gradient_counts_as_zero():
    before, after, gradients = random_sites(3), random_sites(4), random_sites(5)
    zeros = [[torch.zeros_like(A), torch.zeros_like(B)] for A, B in gradients[:1]] + gradients[1:]
    missing = [[None, None], *gradients[1:]]
    assert torch.equal(credit_of_step(before, after, missing), credit_of_step(before, after, zeros))
    assert credit_of_step(before, after, missing)[0] == 0


def test_bfloat16_parameters_are_summed_in_float32():
    sites, ones = [[torch.full((2, 600), 0.01, dtype=torch.bfloat16)]], [[torch.ones(2, 600, dtype=torch.bfloat16)]]
    expected = 1200 * float(torch.tensor(0.01, dtype=torch.bfloat16))
    nothing = [[torch.zeros_like(one) for one in site] for site in sites]
    assert credit_of_step(sites, nothing, ones).dtype == torch.float32
    assert float(credit_of_step(sites, nothing, ones)) == pytest.approx(expected, rel=1e-5)


def test_a_site_with_a_missing_tensor_is_refused():
    with pytest.raises(ValueError, match="zip"):
        credit_of_step(random_sites(0), random_sites(1), random_sites(2)[:2])


def test_a_credit_that_is_no_number_names_its_site():
    with pytest.raises(MeasureError, match=r"credit of model\.layers\.0\.v_proj is nan"):
        scores_of(made_sites([0]), credit=torch.tensor([1.0, math.nan]))


def kept_layers(sites, scores, budget):
    kept = sites_for_count(scores, budget).tolist()
    return sorted({site.layer for site, keep in zip(sites, kept, strict=True) if keep})


def test_random_sets_are_seeded_and_uniform():
    def drawn(seed, n_layers=3):
        return scores_of(made_sites(range(n_layers)), seed=seed)["random"]

    assert torch.equal(drawn(4, 15), drawn(4, 15))
    assert not torch.equal(drawn(4, 15), drawn(5, 15))
    counts = sum(sites_for_count(drawn(seed), 2).int() for seed in range(1200))
    # Each site is in 1/3 of the sets: 400 of 1200, standard deviation 16.
    assert all(abs(int(count) - 400) < 80 for count in counts)


def test_first_and_last_layers_keep_whole_layers_at_the_ends():
    sites = made_sites(range(6))
    assert kept_layers(sites, scores_of(sites)["first-layers"], 4) == [0, 1]
    assert kept_layers(sites, scores_of(sites)["last-layers"], 4) == [4, 5]
    # Ties within a layer keep the earlier site, at either end.
    for score in ("first-layers", "last-layers"):
        kept = sites_for_count(scores_of(sites)[score], 5).tolist()
        names = [site.kind for site, keep in zip(sites, kept, strict=True) if keep]
        assert sorted(names) == ["q_proj"] * 3 + ["v_proj"] * 2


def test_stacks_follow_each_other_and_sites_outside_come_last():
    sites = made_sites(range(2), "encoder.layers") + made_sites(range(2), "decoder.layers")
    sites.append(Site("lm_head", None, None, "lm_head", 2, 1.0, 10))
    assert scores_of(sites)["last-layers"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert scores_of(sites)["first-layers"].tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1]


def test_no_site_is_worth_nothing_by_a_control():
    scores = scores_of(made_sites(range(6)), seed=1)
    assert all(scores[name].min() > 0 for name in ("random", "first-layers", "last-layers"))
