"""Gates against stock PEFT: gate 1 is LoRA, gate 0 the base model, and nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch

from lorazor.adapter.gates import fold_, gated, row_gated, silenced
from lorazor.adapter.sites import find_sites
from lorazor.errors import SettingsError
from tests.tiny_models import FAMILIES, randomise_b_, tiny_inputs, tiny_peft_model


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_one_is_lora_and_gate_zero_is_the_base_bit_for_bit(family):
    model = tiny_peft_model(family).eval()
    sites, inputs = find_sites(model), tiny_inputs(family)
    full = logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    assert not torch.equal(full, base)
    with gated(sites, torch.ones(len(sites))):
        assert torch.equal(logits(model, inputs), full)
    with silenced(sites):
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_gets_the_gates_of_its_own(family):
    """Row by row against a batch of that row alone, with B multiplied by hand."""
    model = tiny_peft_model(family).eval()
    sites, inputs = find_sites(model), tiny_inputs(family, rows=3)
    gates = torch.rand(len(sites), 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    gates[:, 0] = 0.0
    with row_gated(sites, gates):
        together = logits(model, inputs)
    for row in range(3):
        alone = copy.deepcopy(model)
        for site, gate in zip(find_sites(alone), gates[:, row], strict=True):
            site.module.lora_B["default"].weight.data.mul_(gate)
        expected = logits(alone, {name: tensor[row : row + 1] for name, tensor in inputs.items()})[0]
        torch.testing.assert_close(together[row], expected, atol=1e-5, rtol=1e-5)


def test_contexts_nest_and_survive_errors():
    model = tiny_peft_model("llama").eval()
    sites, inputs = find_sites(model), tiny_inputs("llama")
    full = logits(model, inputs)
    with gated(sites, [0.5] * len(sites)):
        half = logits(model, inputs)
        with pytest.raises(RuntimeError, match="on purpose"), silenced(sites[:3]):
            raise RuntimeError("on purpose")
        assert torch.equal(logits(model, inputs), half)
    assert torch.equal(logits(model, inputs), full)


def test_gates_receive_the_gradient_of_finite_differences():
    # GPT-2 computes in double throughout; Llama's norms go through float32
    model = tiny_peft_model("gpt2").eval().double()
    sites, inputs = find_sites(model), tiny_inputs("gpt2")

    def total(gates: torch.Tensor) -> torch.Tensor:
        with gated(sites, gates):
            return model(**inputs).logits.square().sum()

    gates = torch.ones(len(sites), dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(total(gates), gates)
    for index in (0, 7, len(sites) - 1):
        step = torch.zeros_like(gates)
        step[index] = 1e-4
        slope = (total(gates.detach() + step) - total(gates.detach() - step)).item() / 2e-4
        assert gradient[index].item() == pytest.approx(slope, rel=1e-5)


def test_fold_is_the_gate_for_good_and_merges():
    model = tiny_peft_model("llama").eval()
    sites, inputs = find_sites(model), tiny_inputs("llama")
    gates = torch.linspace(-1, 2, len(sites))
    with gated(sites, gates):
        expected = logits(model, inputs)
    fold_(sites, gates)
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), expected, atol=1e-5, rtol=1e-4)


def test_other_adapters_are_left_alone():
    """Two active adapters: silencing one leaves exactly the other."""
    model = tiny_peft_model("llama").eval()
    model.add_adapter("other", model.peft_config["default"])
    randomise_b_(model, "other", seed=5)
    inputs = tiny_inputs("llama")
    model.set_adapter("other")
    only_other = logits(model, inputs)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs)
    with silenced(find_sites(model, "default")):
        assert torch.equal(logits(model, inputs), only_other)
    assert torch.equal(logits(model, inputs), both)


def test_silencing_is_exact_for_broken_weights_and_moves_no_gradient_flags():
    model = tiny_peft_model("llama").eval()
    sites, inputs = find_sites(model), tiny_inputs("llama")
    for parameter in model.parameters():  # as PEFT loads an adapter for inference
        parameter.requires_grad_(False)
    sites[-1].module.lora_B["default"].weight.data.fill_(float("nan"))
    with model.disable_adapter():
        base = logits(model, inputs)
        with silenced(sites[-1:]):  # off already
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), base)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with silenced(sites):
        assert torch.equal(logits(model, inputs), base)
    assert logits(model, inputs).isnan().any()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_embedding_has_a_gate_per_row():
    model = tiny_peft_model("llama", target_modules=["q_proj", "embed_tokens"]).eval()
    sites, inputs = find_sites(model), tiny_inputs("llama", rows=2)
    gates = torch.tensor([[0.5, 0.0]]).repeat(len(sites), 1)
    with torch.no_grad():
        with row_gated(sites, gates):
            together = model(**inputs).logits
        for row, gate in enumerate((0.5, 0.0)):
            with gated(sites, [gate] * len(sites)):
                torch.testing.assert_close(together[row], model(**inputs).logits[row])


@pytest.mark.parametrize("rows", [1, 2])
def test_gates_of_rows_get_gradients(rows):
    """The sum over rows is the gradient of a gate that all rows share."""
    model = tiny_peft_model("llama").eval()
    sites, inputs = find_sites(model), tiny_inputs("llama", rows=rows)
    apart = torch.ones(len(sites), rows, requires_grad=True)
    with row_gated(sites, apart):
        model(**inputs).logits.square().sum().backward()
    shared = torch.ones(len(sites), requires_grad=True)
    with gated(sites, shared):
        model(**inputs).logits.square().sum().backward()
    torch.testing.assert_close(apart.grad.sum(dim=1), shared.grad, rtol=1e-4, atol=1e-4)


def test_wrong_numbers_of_gates_are_refused():
    model = tiny_peft_model("llama", target_modules=["q_proj", "embed_tokens"]).eval()
    sites = find_sites(model)
    with pytest.raises(SettingsError, match="2 gates for 4 sites"), gated(sites, [1.0, 1.0]):
        pass
    with pytest.raises(SettingsError, match=r"\(n_sites, rows\)"), row_gated(sites, torch.ones(4)):
        pass
    with pytest.raises(SettingsError, match="5 gates for 4 sites"):
        fold_(sites, torch.ones(5))
