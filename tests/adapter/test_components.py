"""Components against NumPy's dense singular value decomposition, and against columns of B struck out by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lorazor.adapter.components import (
    component_gated,
    energy_scores,
    fold_components_,
    singular_form,
    to_singular_form_,
)
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.sites import find_sites
from lorazor.errors import AdapterError, SettingsError, UnsupportedAdapterError
from tests.tiny_models import tiny_inputs, tiny_peft_model, write_adapter_folder

FAMILIES = ("llama", "gpt2", "opt", "t5")  # linear and Conv1D, (rows * tokens, hidden), encoder-decoder


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def n_components(sites) -> int:
    return sum(site.rank for site in sites)


@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"),
    [(7, 5, 3), (5, 7, 5), (3, 9, 4), (9, 3, 4), (4, 6, 1)],
    ids=["usual", "full", "rank above d_out", "rank above d_in", "rank 1"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_singular_form_is_that_of_the_dense_product(d_out, d_in, rank, dtype):
    generator = torch.Generator().manual_seed(rank)
    A = torch.randn(rank, d_in, generator=generator).to(dtype)
    B = torch.randn(d_out, rank, generator=generator).to(dtype)
    new_A, new_B, values = singular_form(A, B)
    assert new_A.shape == A.shape and new_B.shape == B.shape and new_A.dtype == new_B.dtype == dtype

    dense = B.double().numpy() @ A.double().numpy()
    u, expected, v = np.linalg.svd(dense)
    n_directions = min(d_out, d_in, rank)
    np.testing.assert_allclose(values[:n_directions], expected[:n_directions], rtol=1e-10)
    assert values[n_directions:].tolist() == [0.0] * (rank - n_directions)
    spacing = 10 * torch.finfo(dtype).eps
    for index in range(rank):  # term by term: signs fall out of the product
        term = np.outer(new_B[:, index].double(), new_A[index].double())
        wanted = expected[index] * np.outer(u[:, index], v[index]) if index < n_directions else np.zeros_like(dense)
        np.testing.assert_allclose(term, wanted, atol=spacing * expected[0])
        # both factors carry the root of the singular value
        np.testing.assert_allclose(float(new_A[index].double().square().sum()), values[index], atol=spacing * 10)
    largest = new_A.abs().argmax(dim=1, keepdim=True)
    assert (new_A.gather(1, largest) >= 0).all()


def test_the_singular_form_does_not_depend_on_the_basis_of_the_factors():
    generator = torch.Generator().manual_seed(0)
    A, B, basis = (torch.randn(*shape, generator=generator).double() for shape in ((3, 5), (7, 3), (3, 3)))
    expected = singular_form(A, B)
    for found in (singular_form(-A, -B), singular_form(basis @ A, B @ basis.inverse())):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_site_that_changes_nothing_has_zero_components():
    new_A, new_B, values = singular_form(torch.randn(2, 5), torch.zeros(4, 2))
    assert not new_A.any() and not new_B.any() and not values.any()


def test_factors_without_singular_directions_are_refused():
    with pytest.raises(AdapterError, match="NaN or infinite"):
        singular_form(torch.full((2, 5), torch.nan), torch.ones(4, 2))
    with pytest.raises(AdapterError, match=r"A \(2, 5\) and B \(4, 3\)"):
        singular_form(torch.ones(2, 5), torch.ones(4, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_one_is_the_adapter_and_gate_zero_the_base_bit_for_bit(family):
    model, inputs = tiny_peft_model(family, 2), tiny_inputs(family)
    sites, before = find_sites(model), logits(model, inputs)
    parameters = [site.module.lora_B["default"].weight for site in sites]
    values = to_singular_form_(sites)
    assert [site.module.lora_B["default"].weight for site in sites] == parameters  # the same objects
    assert [one.shape for one in values] == [(site.rank,) for site in sites]
    full = logits(model, inputs)
    torch.testing.assert_close(full, before, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        base = logits(model, inputs)
    for shape in ((), (3,)):
        with component_gated(sites, torch.ones(n_components(sites), *shape)):
            assert torch.equal(logits(model, inputs), full)
        with component_gated(sites, torch.zeros(n_components(sites), *shape)):
            assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), full)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_component_of_each_row_gets_its_gate(family):
    """Row by row against a batch of that row alone, with the columns of B multiplied by hand."""
    model, inputs = tiny_peft_model(family, 2), tiny_inputs(family, rows=3)
    sites = find_sites(model)
    gates = torch.rand(n_components(sites), 3, generator=torch.Generator().manual_seed(0))
    with component_gated(sites, gates):
        together = logits(model, inputs)
    for row in range(3):
        alone = copy.deepcopy(model)
        place = 0
        for site in find_sites(alone):
            for column in range(site.rank):
                site.module.lora_B["default"].weight.data[:, column] *= gates[place, row]
                place += 1
        inputs_of_row = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        expected = logits(alone, inputs_of_row)
        torch.testing.assert_close(together[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        with component_gated(sites, gates[:, row]):
            torch.testing.assert_close(logits(model, inputs_of_row), expected, atol=1e-5, rtol=1e-5)
    fold_components_(sites, gates[:, 2])
    torch.testing.assert_close(logits(model, inputs)[2], together[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs)[2], together[2], atol=1e-4, rtol=1e-4)


def test_gates_receive_the_gradient_of_finite_differences():
    model, inputs = tiny_peft_model("gpt2", 2).double(), tiny_inputs("gpt2")  # double throughout
    sites = find_sites(model)

    def totals(gates: torch.Tensor) -> torch.Tensor:
        with component_gated(sites, gates):
            return model(**inputs).logits.square().sum(dim=(1, 2))  # (rows,)

    gates = torch.ones(n_components(sites), dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(totals(gates).sum(), gates)
    of_rows = torch.ones(n_components(sites), 3, dtype=torch.double, requires_grad=True)
    (row_gradient,) = torch.autograd.grad(totals(of_rows).sum(), of_rows)
    torch.testing.assert_close(row_gradient.sum(dim=1), gradient)
    for index in (0, 7, n_components(sites) - 1):
        step = torch.zeros_like(gates)
        step[index] = 1e-4
        slope = (totals(gates.detach() + step) - totals(gates.detach() - step)) / 2e-4
        torch.testing.assert_close(row_gradient[index], slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(), (3,)], ids=["one gate", "a gate per row"])
def test_gradient_checkpointing_changes_no_gradient(rows):
    model, inputs = tiny_peft_model("llama", 2), tiny_inputs("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = find_sites(model)
    gradients = []
    for is_on in (False, True):
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # checkpointing needs it; there is no dropout
        gates = torch.ones(n_components(sites), *rows, requires_grad=True)
        with component_gated(sites, gates):
            model(**inputs).logits.square().sum().backward()
        assert gates.grad is not None
        gradients.append(gates.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().min() > 0


def test_gates_of_a_half_precision_model_keep_their_own_precision():
    model, inputs = tiny_peft_model("llama", 1).to(torch.bfloat16), tiny_inputs("llama")
    sites = find_sites(model)
    gates = torch.ones(n_components(sites), requires_grad=True)
    full = logits(model, inputs)
    with component_gated(sites, gates):
        out = model(**inputs).logits
    assert out.dtype == torch.bfloat16 and torch.equal(out, full)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), gates)
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_nothing_stays_behind_after_an_error():
    model = tiny_peft_model("llama", 1)
    sites = find_sites(model)
    with pytest.raises(RuntimeError, match="on purpose"), component_gated(sites, torch.zeros(n_components(sites))):
        raise RuntimeError("on purpose")
    assert not any(site.module.lora_A["default"]._forward_hooks for site in sites)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3)])


def test_sites_without_components_are_refused_and_left_as_they_are(tmp_path):
    folder = tmp_path / "embedding"
    model = tiny_peft_model("llama", 1, target_modules=["q_proj", "embed_tokens"])
    model.save_pretrained(folder, save_embedding_layers=False)
    cases = {
        "embed_tokens is an embedding": model,
        "layers.0 is a convolution": get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["layers.0"])),
        "q_proj has a bias of B": tiny_peft_model("opt", 1, lora_bias=True, target_modules=["q_proj"]),
    }
    for message, one in cases.items():
        sites = find_sites(one)
        before = copy.deepcopy(one.state_dict())
        gates = torch.ones(n_components(sites))
        with pytest.raises(UnsupportedAdapterError, match=message):
            to_singular_form_(sites)
        with pytest.raises(UnsupportedAdapterError, match=message), component_gated(sites, gates):
            pass
        with pytest.raises(UnsupportedAdapterError, match=message):
            fold_components_(sites, 2 * gates)
        assert all(torch.equal(value, before[key]) for key, value in one.state_dict().items())
    adapter = read_adapter(folder)
    with pytest.raises(UnsupportedAdapterError, match="embed_tokens is an embedding"):
        energy_scores(adapter)
    scores = energy_scores(adapter, [site for site in adapter.sites if site.stack is not None])
    assert {name: len(own) for name, own in scores.items()} == {"model.layers.0.self_attn.q_proj": 4}


def test_wrong_gates_and_broken_or_merged_sites_are_refused():
    model = tiny_peft_model("llama", 1, target_modules=["q_proj", "v_proj"])
    sites = find_sites(model)
    with (
        pytest.raises(SettingsError, match="7 gates for 8 components of 2 sites"),
        component_gated(sites, torch.ones(7)),
    ):
        pass
    with pytest.raises(SettingsError, match=r"\(n_components, rows\)"), component_gated(sites, torch.ones(8, 1, 1)):
        pass
    with pytest.raises(SettingsError, match=r"cannot be folded. Pass \(n_components,\)"):
        fold_components_(sites, torch.ones(8, 2))
    first, last = (site.module.lora_B["default"].weight.data for site in sites)
    before = first.clone()
    last[0] = torch.nan
    with pytest.raises(AdapterError, match=r"self_attn.v_proj: A or B holds NaN"):
        to_singular_form_(sites)
    assert torch.equal(first, before)
    last[0] = 0
    model.merge_adapter()
    with pytest.raises(AdapterError, match="q_proj is merged"), component_gated(sites, torch.ones(8)):
        pass


@pytest.mark.parametrize("use_rslora", [False, True])
def test_energies_are_those_of_the_dense_update(use_rslora, tmp_path):
    shapes = {"model.layers.0.q_proj": (2, 3, 4), "model.layers.1.q_proj": (3, 5, 4), "lm_head": (3, 2, 6)}
    config = {"rank_pattern": {"layers.1.q_proj": 3, "lm_head": 3}, "alpha_pattern": {"lm_head": 5}}
    folder = read_adapter(write_adapter_folder(tmp_path, shapes, use_rslora=use_rslora, **config))
    tensors = load_file(folder.weights)
    alphas = {"lm_head": 5}
    found = energy_scores(folder)
    assert found.keys() == shapes.keys()
    for name, energies in found.items():
        rank = shapes[name][0]
        scaling = alphas.get(name, 2) / (rank**0.5 if use_rslora else rank)
        key = f"base_model.model.{name}.lora_"
        dense = scaling * tensors[f"{key}B.weight"].double().numpy() @ tensors[f"{key}A.weight"].double().numpy()
        expected = np.zeros(rank)  # lm_head has 2 inputs only: its third component is zero
        singular = np.linalg.svd(dense, compute_uv=False)[:rank]
        expected[: len(singular)] = singular**2
        np.testing.assert_allclose(energies, expected, rtol=1e-9, atol=1e-12)
        assert float(energies.sum()) == pytest.approx((dense**2).sum())
