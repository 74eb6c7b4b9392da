"""Directions against NumPy's dense decompositions: of the product, and of the product weighed by data and loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lorazor.adapter.directions import (
    balanced_form,
    energies,
    singular_form,
    to_balanced_form_,
    to_singular_form_,
    with_equal_norms,
)
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import AdapterError
from tests.tiny_models import tiny_inputs, tiny_peft_model, write_adapter_folder

SHAPES = {
    "usual": (7, 5, 3),
    "full": (5, 7, 5),
    "rank above d_out": (3, 9, 4),
    "rank above d_in": (9, 3, 4),
    "rank 1": (4, 6, 1),
}
"""(d_out, d_in, r)"""


def factors(shape: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    d_out, d_in, rank = SHAPES[shape]
    generator = torch.Generator().manual_seed(rank)
    A, B = (torch.randn(*one, generator=generator).to(dtype) for one in ((rank, d_in), (d_out, rank)))
    return A, B


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_singular_form_is_that_of_the_dense_product(shape, dtype):
    A, B = factors(shape, dtype)
    rank = len(A)
    new_A, new_B, values = singular_form(A, B)
    assert new_A.shape == A.shape and new_B.shape == B.shape and new_A.dtype == new_B.dtype == dtype

    dense = B.double().numpy() @ A.double().numpy()
    u, expected, v = np.linalg.svd(dense)
    n_directions = min(SHAPES[shape])
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
    A, B = factors("usual")
    basis = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = singular_form(A, B)
    for found in (singular_form(-A, -B), singular_form(basis @ A, B @ basis.inverse())):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_a_site_that_changes_nothing_has_zero_directions():
    new_A, new_B, values = singular_form(torch.randn(2, 5), torch.zeros(4, 2))
    assert not new_A.any() and not new_B.any() and not values.any()


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def moment(samples: torch.Tensor) -> torch.Tensor:
    """E[x x^T] of samples (n, d)."""
    return samples.T @ samples / len(samples)


def data(shape: str, scaling: float = 1.0):
    """Factors, inputs x (n, d_in) and gradients g (n, d_out) whose coordinates differ in size, M_A and M_B."""
    d_out, d_in, _ = SHAPES[shape]
    A, B = factors(shape)
    generator = torch.Generator().manual_seed(1)
    x, g = (
        torch.randn(50, d, generator=generator, dtype=torch.float64) * torch.arange(1, d + 1) for d in (d_in, d_out)
    )
    x[:, 0] += x[:, -1]
    return A, B, x, g, moment(x @ A.T), moment(scaling * g @ B)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_directions_are_those_of_the_product_weighed_densely(shape):
    """sigma^2: squared singular values of G^(1/2) s B A C^(1/2); the directions: its singular directions."""
    A, B, x, g, inputs, gradients = data(shape, scaling=0.5)
    new_A, new_B, sigma2 = balanced_form(A, B, inputs, gradients)
    torch.testing.assert_close(new_B @ new_A, B @ A)
    left, right = root(moment(g).numpy()), root(moment(x).numpy())
    u, expected, v = np.linalg.svd(left @ (0.5 * B @ A).numpy() @ right)
    n_directions = min(SHAPES[shape])
    # where a moment is singular, what is lifted to a millionth of its largest number shows
    rtol = 1e-7 if n_directions == len(A) else 1e-3
    np.testing.assert_allclose(sigma2[:n_directions], expected[:n_directions] ** 2, rtol=rtol)
    assert (sigma2[n_directions:] < 1e-5 * sigma2[0]).all() and (sigma2.diff() <= 0).all()
    for index in range(n_directions):
        term = left @ np.outer(0.5 * new_B[:, index], new_A[index]) @ right
        np.testing.assert_allclose(term, expected[index] * np.outer(u[:, index], v[index]), atol=rtol * expected[0])
    both = moment(x @ new_A.T), moment(0.5 * g @ new_B)
    for one in both:
        own = one[:n_directions, :n_directions]
        torch.testing.assert_close(own, own.diag().diag(), atol=rtol * float(own.max()), rtol=0)
    torch.testing.assert_close((both[0] @ both[1]).diag()[:n_directions], sigma2[:n_directions], rtol=rtol, atol=0)
    torch.testing.assert_close(new_A.norm(dim=1), new_B.norm(dim=0))


def test_what_matters_to_the_loss_comes_first_not_what_is_large():
    """Planted: the largest direction of the weights meets no input, the second no gradient."""
    A = torch.diag(torch.tensor([100.0, 10.0, 1.0]))
    B = torch.eye(3)
    inputs, gradients = torch.diag(torch.tensor([1e-9, 100.0, 1.0])), torch.diag(torch.tensor([1.0, 1e-9, 1.0]))
    new_A, new_B, sigma2 = balanced_form(A, B, inputs, gradients)
    assert singular_form(A, B)[0].abs().argmax(dim=1).tolist() == [0, 1, 2]
    assert new_A.abs().argmax(dim=1)[0] == 2 and float(sigma2[0]) == pytest.approx(1)
    torch.testing.assert_close(new_B @ new_A, A, atol=1e-4, rtol=1e-5)
    assert (sigma2[1:] < 2e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unit", [1.0, 1e-7], ids=["nats", "a tiny loss"])
def test_the_balanced_form_fits_into_the_precision_of_the_file(dtype, unit):
    A, B, _, _, inputs, gradients = data("usual")
    A, B = 1e-3 * A, 1e-3 * B  # as short as those of a wide model
    new_A, new_B, _ = balanced_form(A.to(dtype), B.to(dtype), inputs.float(), (unit**2 * gradients).float())
    assert new_A.dtype == new_B.dtype == dtype
    expected = B.to(dtype).double() @ A.to(dtype).double()
    error = (new_B.double() @ new_A.double() - expected).norm() / expected.norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_degenerate_moments():
    A, B, _, _, inputs, gradients = data("usual")
    nothing = torch.zeros(3, 3)
    for pair in ((nothing, gradients), (inputs, nothing)):
        new_A, new_B, sigma2 = balanced_form(A, B, *pair)
        for one, other in zip((new_A, new_B), singular_form(A, B), strict=False):
            assert torch.equal(one, other)
        assert sigma2.tolist() == [0, 0, 0]
    ray = torch.tensor([[1.0, 2.0, 3.0]])
    flat = ray.T @ ray - 1e-5 * torch.eye(3)  # of rank 1, and not quite semidefinite, as sums in float32 are
    for pair in ((flat, gradients), (inputs, flat), (flat, flat)):
        new_A, new_B, sigma2 = balanced_form(A, B, *pair)
        torch.testing.assert_close(new_B @ new_A, B @ A)
        assert torch.isfinite(sigma2).all() and float(sigma2[1] / sigma2[0]) < 1e-4
        assert max(new_A.abs().max(), new_B.abs().max()) < 100
    new_A, new_B, _ = balanced_form(torch.zeros(3, 5), B, nothing, gradients)
    assert not (new_B.double() @ new_A.double()).any()


def test_equal_norms_keep_the_product_and_leave_what_is_zero():
    A, B = factors("usual")
    A[1], B[:, 2] = 0, 0
    new_A, new_B = with_equal_norms(1e6 * A, B)
    torch.testing.assert_close(new_B @ new_A, 1e6 * B @ A)
    assert float(new_A[0].norm()) == pytest.approx(float(new_B[:, 0].norm()))
    assert torch.equal(new_A[1:], 1e6 * A[1:]) and torch.equal(new_B[:, 1:], B[:, 1:])


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3)])


MIXED = {
    "embedding": lambda: tiny_peft_model("llama", 1, target_modules=["q_proj", "embed_tokens"]),
    "bias of B": lambda: tiny_peft_model("opt", 1, lora_bias=True, target_modules=["q_proj"]),
    "convolution": lambda: get_peft_model(Convolution(), LoraConfig(r=2, target_modules=["layers.0"])),
}


def moments_of(sites) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {
        site.name: (moment(one), moment(other))
        for site in sites
        for one, other in [torch.randn(2, 20, site.n_gates, generator=generator)]
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5"])
def test_a_model_in_another_basis_computes_the_same_with_the_same_parameters(family):
    model, inputs = tiny_peft_model(family, 1), tiny_inputs(family)
    sites, expected = find_sites(model), logits(model, inputs)
    parameters = [site_parameters(site.module, site.adapter) for site in sites]
    for rewrite in (to_singular_form_, lambda sites: to_balanced_form_(sites, moments_of(sites))):
        before = copy.deepcopy(parameters)
        rewrite(sites)
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
        for site, own, old in zip(sites, parameters, before, strict=True):
            assert all(one is other for one, other in zip(site_parameters(site.module, "default"), own, strict=True))
            assert not any(torch.equal(one, other) for one, other in zip(own, old, strict=True))


@pytest.mark.parametrize("kind", MIXED)
def test_sites_that_cannot_be_taken_apart_stay_as_they_are(kind):
    model = MIXED[kind]()
    sites = find_sites(model)
    whole = [site for site in sites if not site.has_directions]
    before = [copy.deepcopy(site_parameters(site.module, "default")) for site in whole]
    to_singular_form_(sites)
    sigma2 = to_balanced_form_(sites, moments_of(sites))
    assert {site.name: sigma2[site.name].tolist() for site in whole} == {site.name: [0.0] for site in whole}
    assert all(len(sigma2[site.name]) == site.n_gates for site in sites)
    for site, old in zip(whole, before, strict=True):
        own = site_parameters(site.module, "default")
        assert all(torch.equal(one, other) for one, other in zip(own, old, strict=True))


def test_broken_or_merged_sites_are_named_and_all_stay_as_they_are():
    model = tiny_peft_model("llama", 1, target_modules=["q_proj", "v_proj"])
    sites = find_sites(model)
    moments = moments_of(sites)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    last = sites[1].module.lora_B["default"].weight.data
    last[0] = torch.nan
    for rewrite in (lambda: to_singular_form_(sites), lambda: to_balanced_form_(sites, moments)):
        with pytest.raises(AdapterError, match=r"self_attn.v_proj: A or B.* holds NaN"):
            rewrite()
    last.copy_(before["base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"])
    moments[sites[1].name] = (moments[sites[1].name][0], torch.full((4, 4), torch.nan))
    with pytest.raises(AdapterError, match=r"self_attn.v_proj: A or B, or what they make of the examples"):
        to_balanced_form_(sites, moments)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    model.merge_adapter()
    for rewrite in (lambda: to_singular_form_(sites), lambda: to_balanced_form_(sites, moments_of(sites))):
        with pytest.raises(AdapterError, match="q_proj is merged"):
            rewrite()


def test_factors_without_directions_are_refused():
    with pytest.raises(AdapterError, match="NaN or infinite"):
        singular_form(torch.full((2, 5), torch.nan), torch.ones(4, 2))
    with pytest.raises(AdapterError, match=r"A \(2, 5\) and B \(4, 3\)"):
        singular_form(torch.ones(2, 5), torch.ones(4, 3))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_energies_are_those_of_the_dense_update(use_rslora, tmp_path):
    shapes = {"model.layers.0.q_proj": (2, 3, 4), "model.layers.1.q_proj": (3, 5, 4), "lm_head": (3, 2, 6)}
    config = {"rank_pattern": {"layers.1.q_proj": 3, "lm_head": 3}, "alpha_pattern": {"lm_head": 5}}
    folder = read_adapter(write_adapter_folder(tmp_path, shapes, use_rslora=use_rslora, **config))
    tensors = load_file(folder.weights)
    alphas = {"lm_head": 5}
    found = energies(folder)
    assert found.keys() == shapes.keys()
    for name, own in found.items():
        rank = shapes[name][0]
        scaling = alphas.get(name, 2) / (rank**0.5 if use_rslora else rank)
        key = f"base_model.model.{name}.lora_"
        dense = scaling * tensors[f"{key}B.weight"].double().numpy() @ tensors[f"{key}A.weight"].double().numpy()
        expected = np.zeros(rank)  # lm_head has 2 inputs only: its third direction is zero
        singular = np.linalg.svd(dense, compute_uv=False)[:rank]
        expected[: len(singular)] = singular**2
        np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-12)
        assert float(own.sum()) == pytest.approx((dense**2).sum())


def test_the_energy_of_a_site_that_cannot_be_taken_apart_is_that_of_what_it_adds(tmp_path):
    """An embedding's whole table, merged by stock PEFT."""
    model = tiny_peft_model("llama", 1, target_modules=["q_proj", "embed_tokens"])
    (embedding,) = (site for site in find_sites(model) if not site.has_directions)
    nn.init.normal_(embedding.module.lora_embedding_A["default"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    before = embedding.module.get_base_layer().weight.detach().clone()
    found = energies(read_adapter(tmp_path))
    model.merge_adapter()
    update = embedding.module.get_base_layer().weight.detach() - before
    assert {name: len(own) for name, own in found.items()} == {"model.layers.0.self_attn.q_proj": 4, embedding.name: 1}
    assert float(found[embedding.name]) == pytest.approx(float(update.double().square().sum()), rel=1e-4)
