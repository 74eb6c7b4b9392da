"""Gates against stock PEFT: columns of B multiplied by hand, `set_scale`, and the base model."""

from __future__ import annotations

import copy

import pytest
import torch

from lorazor.adapter.gates import fold_, gated, is_gated, put_gate_, silenced, site_gates
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import AdapterError, RowsUnclearError, SettingsError
from tests.odd_models import odd_inputs, odd_peft_model
from tests.tiers import fast_first
from tests.tiny_models import FAMILIES, randomise_b_, tiny_inputs, tiny_peft_model
from tests.whole_sites import WHOLE, embeddings, logits, n_gates, random_gates, with_scales

MIXING = ("switch", "nllb-moe", "fsmt", "xlnet", "longformer")
"""Odd models in which some module does not see one row after the other."""
ODD = (*MIXING, "qwen2-moe", "albert", "gemma3n", "gemma4", "mllama", "funnel")


def row_of(inputs, row: int):
    return {name: tensor[row : row + 1] for name, tensor in inputs.items()}


def by_hand(model, gates):
    """A copy whose columns of B, or all of B with its bias, are multiplied: (n_gates,)."""
    model, place = copy.deepcopy(model), 0
    for site in find_sites(model):
        if site.has_directions:
            for column in range(site.rank):
                site.module.lora_B["default"].weight.data[:, column] *= gates[place + column]
        else:
            for parameter in site_parameters(site.module, "default")[1:]:
                parameter.data *= gates[place]
        place += site.rank if site.has_directions else 1
    assert place == len(gates)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_one_is_lora_and_gate_zero_is_the_base_bit_for_bit(family):
    """Off, by numbers that need gradients, and by rows."""
    model, inputs = tiny_peft_model(family, 2), tiny_inputs(family)
    sites = find_sites(model)
    full = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    assert not torch.equal(full, base)
    for gates in (torch.ones(n_gates(sites)), torch.ones(n_gates(sites), 3)):
        for needs_gradients in (False, True):
            with gated(sites, gates.clone().requires_grad_(needs_gradients)):
                assert torch.equal(logits(model, inputs), full)
            with gated(sites, torch.zeros_like(gates).requires_grad_(needs_gradients)):
                assert torch.equal(logits(model, inputs), base)
    with silenced(sites):
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), full)


@pytest.mark.parametrize("family", fast_first(FAMILIES, "llama", "opt", "t5"))
def test_each_direction_of_each_row_gets_its_gate(family):
    """Row by row against a batch of that row alone, with the columns of B multiplied by hand."""
    model, inputs = tiny_peft_model(family, 2), tiny_inputs(family)
    sites = find_sites(model)
    gates = random_gates(n_gates(sites), 3)
    gates[:, 0] = 0
    with gated(sites, gates):
        together = logits(model, inputs)
    for row in range(3):
        expected = logits(by_hand(model, gates[:, row]), row_of(inputs, row))
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        with gated(sites, gates[:, row]):
            torch.testing.assert_close(logits(model, row_of(inputs, row)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_site_that_cannot_be_taken_apart_has_one_gate(kind):
    model, inputs = WHOLE[kind]()
    sites = find_sites(model)
    assert not all(site.has_directions for site in sites)
    gates = random_gates(n_gates(sites), 3)
    with gated(sites, gates):
        together = logits(model, inputs)
    for row in range(3):
        expected = logits(by_hand(model, gates[:, row]), row_of(inputs, row))
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)
    with gated(sites, gates[:, 1]):
        torch.testing.assert_close(logits(model, inputs)[1], together[1], atol=1e-5, rtol=1e-5)
    full = logits(model, inputs)
    with gated(sites, torch.ones_like(gates)):
        assert torch.equal(logits(model, inputs), full)
    fold_(sites, gates[:, 2])
    torch.testing.assert_close(logits(model, inputs)[2], together[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs)[2], together[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "rsLoRA", "convolution", "bias of B"])
def test_the_gate_of_a_site_is_pefts_scale(kind):
    model, inputs = WHOLE[kind]()
    sites = find_sites(model)
    values = random_gates(len(sites))
    with gated(sites, site_gates(sites, values)):
        found = logits(model, inputs)
    with_scales(model, values)
    torch.testing.assert_close(found, logits(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", [one if one == "xlnet" else pytest.param(one, marks=pytest.mark.slow) for one in ODD]
)
def test_odd_models_give_each_row_its_gates_or_refuse(family):
    """Against `set_scale` on that row alone."""
    model, inputs = odd_peft_model(family), odd_inputs(family)
    sites = find_sites(model)
    values = random_gates(len(sites), 3)
    settings = {} if family in ("albert", "longformer", "funnel", "xlnet") else {"use_cache": False}
    alone = []
    for row in range(3):
        with_scales(model, values[:, row])
        expected = logits(model, row_of(inputs, row) | settings)
        with_scales(model, torch.ones(len(sites)))
        with gated(sites, site_gates(sites, values[:, row : row + 1])):
            torch.testing.assert_close(logits(model, row_of(inputs, row) | settings), expected, atol=1e-5, rtol=1e-5)
        alone.append(expected)
    with gated(sites, site_gates(sites, values), {7}):
        if family in MIXING:
            with pytest.raises(RowsUnclearError, match="3 rows"):
                logits(model, inputs | settings)
        else:
            together = logits(model, inputs | settings)
            torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_blocks_nest_and_survive_errors():
    model, inputs = embeddings()
    sites = find_sites(model)
    full = logits(model, inputs)
    quarter = logits(by_hand(model, torch.full((n_gates(sites),), 0.25)), inputs)
    half = torch.full((n_gates(sites),), 0.5)
    with gated(sites, half):
        outer = logits(model, inputs)
        with pytest.raises(RuntimeError, match="on purpose"), gated(sites, half), silenced(sites[:1]):
            raise RuntimeError("on purpose")
        with gated(sites, half):
            torch.testing.assert_close(logits(model, inputs), quarter)
        assert torch.equal(logits(model, inputs), outer) and all(map(is_gated, sites))
    with silenced([]):
        assert torch.equal(logits(model, inputs), full) and not any(map(is_gated, sites))


def test_other_adapters_are_left_alone():
    """Two active adapters: silencing one leaves exactly the other."""
    model, inputs = tiny_peft_model("llama"), tiny_inputs("llama")
    model.add_adapter("other", model.peft_config["default"])
    randomise_b_(model, "other", seed=5)
    model.set_adapter("other")
    only_other = logits(model, inputs)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs)
    with silenced(find_sites(model, "default")):
        assert torch.equal(logits(model, inputs), only_other)
    assert torch.equal(logits(model, inputs), both)


def test_silencing_is_exact_for_broken_weights_and_moves_no_gradient_flags():
    model, inputs = tiny_peft_model("llama"), tiny_inputs("llama")
    sites = find_sites(model)
    model.requires_grad_(False)  # as PEFT loads an adapter for inference
    sites[-1].module.lora_B["default"].weight.data.fill_(float("nan"))
    with model.disable_adapter():
        base = logits(model, inputs)
        with silenced(sites[-1:]):  # off already
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), base)
    model.requires_grad_(False)
    with silenced(sites):
        assert torch.equal(logits(model, inputs), base)
    assert logits(model, inputs).isnan().any()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_of_a_gated_model_computes_the_same():
    model, inputs = embeddings()
    sites = find_sites(model)
    for site in sites:
        put_gate_(site, torch.full((), 0.5, requires_grad=True))
    assert torch.equal(logits(copy.deepcopy(model), inputs), logits(model, inputs))


def test_fold_is_the_gate_for_good_and_merges():
    model, inputs = tiny_peft_model("llama", 2), tiny_inputs("llama")
    sites = find_sites(model)
    gates = torch.linspace(-1, 2, n_gates(sites))
    with gated(sites, gates):
        expected = logits(model, inputs)
    fold_(sites, gates)
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), expected, atol=1e-5, rtol=1e-4)


def test_wrong_gates_and_merged_sites_are_refused_and_change_nothing():
    model, _ = embeddings()
    sites = find_sites(model)  # of rank 4: q_proj and lm_head; an embedding
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingsError, match="2 gates for 3 sites. Pass one gate per site"):
        site_gates(sites, [1.0, 1.0])
    for gates in (torch.ones(3), torch.ones(8), torch.ones(9, 3, 1), torch.tensor(1.0)):
        with pytest.raises(SettingsError, match=r"3 sites with 9 gates. Pass \(n_gates,\)"), gated(sites, gates):
            pass
        with pytest.raises(SettingsError, match="3 sites with 9 gates"):
            fold_(sites, gates)
    with pytest.raises(SettingsError, match=r"\(9, 2\) cannot be folded. Pass \(n_gates,\)"):
        fold_(sites, torch.ones(9, 2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.merge_adapter()
    for attempt in (lambda: fold_(sites, torch.ones(9)), lambda: gated(sites, torch.ones(9)).__enter__()):
        with pytest.raises(AdapterError, match=r"is merged into its base weight. Call unmerge_adapter"):
            attempt()
