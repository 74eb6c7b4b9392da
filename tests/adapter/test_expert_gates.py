"""Gates on LoRA of experts, against columns of B changed by hand."""

from __future__ import annotations

import pytest
import torch

from lorazor.adapter.directions import to_balanced_form_
from lorazor.adapter.gates import fold_, gated, is_gated, put_gate_, silenced, site_gates
from lorazor.adapter.sites import find_sites
from lorazor.errors import RowsUnclearError
from lorazor.measure.gradients import gram_matrices
from tests.tiny_mixtures import (
    INPUTS,
    N_EXPERTS,
    N_LAYERS,
    RANK,
    logits,
    on_experts,
    tiny_mixture,
    wrappers,
)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gates_multiply_and_their_gradients_are_those_of_b(family):
    model = on_experts(family)
    sites = [site for site in find_sites(model) if site.is_on_parameter]
    before = logits(model)
    gates = torch.rand(2 * N_LAYERS * RANK, generator=torch.Generator().manual_seed(2), requires_grad=True)
    halves = torch.full((len(gates),), 0.5)
    with gated(sites, halves), gated(sites, gates):  # the outer ones are on the same rows
        found = model(**INPUTS).logits.square().sum()
    (gradient,) = torch.autograd.grad(found, gates)
    columns, own = {}, dict(zip([site.name for site in sites], gates.detach().split(RANK), strict=True))
    for name, module in wrappers(model).items():
        B = module.lora_B["default"].weight
        B.data.view(len(B), RANK, N_EXPERTS).mul_(0.5 * own[name][:, None])
        columns[name] = B
    expected = model(**INPUTS).logits.square().sum()
    torch.testing.assert_close(found, expected)
    of_b = torch.autograd.grad(expected, [columns[site.name] for site in sites])
    for one, site, found_here in zip(of_b, sites, gradient.split(RANK), strict=True):
        B = columns[site.name]
        by_hand = (one * B).view(len(B), RANK, N_EXPERTS).sum(dim=(0, 2)) / own[site.name]
        torch.testing.assert_close(found_here, by_hand, rtol=1e-3, atol=1e-4)
        B.data.view(len(B), RANK, N_EXPERTS).div_(0.5 * own[site.name][:, None])
    torch.testing.assert_close(logits(model), before)


def test_gate_0_is_the_base_model_and_nothing_stays_behind():
    model = on_experts()
    sites, before, keys = find_sites(model), logits(model), list(model.state_dict())
    with silenced(sites):
        assert torch.equal(logits(model), logits(tiny_mixture()))
    with gated(sites, torch.full((sum(site.n_gates for site in sites),), 0.3)):
        assert list(model.state_dict()) == keys  # what a checkpoint in the middle of a training has
        logits(model)
        assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in wrappers(model).values())


def test_an_error_in_the_middle_of_a_pass_leaves_the_factors_in_place():
    model = on_experts()
    sites, before = find_sites(model), logits(model)
    with pytest.raises(IndexError), gated(sites, torch.full((sum(site.n_gates for site in sites),), 0.3)):
        model(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(RuntimeError, match="stop"), gated(sites, site_gates(sites, torch.full((len(sites),), 0.3))):
        wrappers(model)["model.layers.1.mlp.experts.gate_up_proj"].get_base_layer().register_forward_pre_hook(_stop)
        logits(model)
    for module in wrappers(model).values():
        module.get_base_layer()._forward_pre_hooks.clear()
        assert isinstance(module.lora_A["default"].weight, torch.nn.Parameter)
    assert torch.equal(logits(model), before)


def _stop(*_):
    raise RuntimeError("stop")


def test_rows_share_the_weights_of_experts_so_only_one_row_can_have_gates_of_its_own():
    model = on_experts()
    sites = [site for site in find_sites(model) if site.is_on_parameter]
    gates = torch.rand(2 * N_LAYERS * RANK, 2)
    with pytest.raises(RowsUnclearError, match=r"layers\.0\.mlp\.experts\.\w+ changes a weight"), gated(sites, gates):
        logits(model)
    with gated(sites, gates[:, :1]):
        found = logits(model)
    with gated(sites, gates[:, 0]):
        torch.testing.assert_close(found, logits(model))


def test_folding_is_what_the_gates_were():
    model = on_experts()
    sites = find_sites(model)
    gates = torch.rand(sum(site.n_gates for site in sites), generator=torch.Generator().manual_seed(3))
    with gated(sites, gates):
        expected = logits(model)
    assert not any(map(is_gated, sites))
    fold_(sites, gates)
    torch.testing.assert_close(logits(model), expected)
    site = next(site for site in sites if site.is_on_parameter)
    undo = put_gate_(site, torch.ones(()))
    assert is_gated(site)
    undo()
    assert not is_gated(site)


def test_no_token_is_seen_on_a_parameter_so_it_gets_its_singular_form():
    model = on_experts()
    sites, before = find_sites(model), logits(model)
    matrices = {site.name: (torch.zeros(site.rank, site.rank),) * 2 for site in sites}
    values = to_balanced_form_(sites, matrices)
    torch.testing.assert_close(logits(model), before)
    assert {name: one.tolist() for name, one in values.items() if "experts" in name} == {
        name: [0.0] * RANK for name in wrappers(model)
    }
    assert gram_matrices(model.get_base_model(), sites, [])["model.layers.0.mlp.experts.down_proj"][0].shape == (2, 2)
