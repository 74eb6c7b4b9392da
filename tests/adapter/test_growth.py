"""Oracles: the dense equations in numpy, autograd, stock PEFT, and the paper's arithmetic."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model
from transformers.pytorch_utils import Conv1D

from lorazor.adapter.growth import grow, grow_site_, grown_rank
from lorazor.adapter.sites import find_sites
from lorazor.errors import AdapterError, BudgetError, UnsupportedAdapterError

pytestmark = [
    # Linear and Conv1D under one LoraConfig: PEFT corrects the flag for each and says so.
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # PEFT 0.21 asks transformers 5.23 by the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_factors(rank, d_in, d_out, seed=0, dtype=torch.float32):
    generator = seeded(seed)
    A = torch.randn(rank, d_in, generator=generator).to(dtype)
    return A, torch.randn(d_out, rank, generator=generator).to(dtype)


def as_numpy(tensor):
    return tensor.detach().double().numpy()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_growth_keeps_the_product_and_adds_orthogonal_rows_of_the_same_length(data):
    d_in, d_out = data.draw(st.integers(1, 12), "d_in"), data.draw(st.integers(1, 12), "d_out")
    rank = data.draw(st.integers(1, d_in), "r")
    new_rank = data.draw(st.integers(rank, d_in), "r'")
    n_true = data.draw(st.integers(0, rank), "rank of A")
    seed = data.draw(st.integers(0, 99), "seed")
    generator = seeded(seed)
    A = torch.randn(rank, n_true, generator=generator) @ torch.randn(n_true, d_in, generator=generator)
    B = torch.randn(d_out, rank, generator=generator)
    grown_A, grown_B = grow(A, B, new_rank, generator)
    assert grown_A.shape == (new_rank, d_in) and grown_B.shape == (d_out, new_rank)
    assert torch.equal(grown_A[:rank], A) and torch.equal(grown_B[:, :rank], B)
    np.testing.assert_allclose(as_numpy(grown_B) @ as_numpy(grown_A), as_numpy(B) @ as_numpy(A), atol=1e-6)
    length = np.sqrt(np.mean(np.sum(as_numpy(A) ** 2, axis=1))) or 1 / np.sqrt(3)
    new = as_numpy(grown_A[rank:])
    np.testing.assert_allclose(new @ new.T, length**2 * np.eye(len(new)), atol=1e-5 * length**2)
    np.testing.assert_allclose(new @ as_numpy(A).T, 0, atol=1e-5 * length**2)


@pytest.mark.parametrize(
    ("n_true", "rank", "new_rank", "d_in"), [(2, 2, 5, 9), (4, 4, 9, 9), (1, 1, 40, 60), (1, 3, 5, 6), (0, 2, 4, 4)]
)
def test_the_new_rows_are_the_published_directions(n_true, rank, new_rank, d_in):
    """Paper: (I - Q Q^T) N; formed densely here, orthonormalised row by row. `n_true` is the rank of A as a matrix."""
    A, B = random_factors(rank, d_in, 5)
    A[n_true:] = 0
    noise = torch.randn(d_in, new_rank - rank, generator=seeded(3), dtype=torch.float64).numpy()
    projected = (np.eye(d_in) - np.linalg.pinv(as_numpy(A)) @ as_numpy(A)) @ noise
    expected = []
    for column in projected.T:
        for earlier in expected:
            column = column - earlier * (earlier @ column)
        expected.append(column / np.linalg.norm(column))
    new = as_numpy(grow(A, B, new_rank, seeded(3))[0][rank:])
    np.testing.assert_allclose(new / np.linalg.norm(new, axis=1, keepdims=True), np.array(expected), atol=1e-5)


def test_growth_equals_the_published_factors_in_function_and_span():
    A, B = random_factors(3, 8, 6)
    grown_A, grown_B = grow(A, B, 6, seeded(1))
    q, r = np.linalg.qr(as_numpy(A).T)  # A^T = Q R
    new = as_numpy(grown_A[3:])
    unit = new / np.linalg.norm(new, axis=1, keepdims=True)
    published_A, published_B = np.vstack([q.T, unit]), np.hstack([as_numpy(B) @ r.T, np.zeros((6, 3))])
    np.testing.assert_allclose(published_B @ published_A, as_numpy(grown_B) @ as_numpy(grown_A), atol=1e-5)
    projector = np.linalg.pinv(as_numpy(grown_A)) @ as_numpy(grown_A)
    np.testing.assert_allclose(published_A.T @ published_A, projector, atol=1e-6)


def test_the_new_columns_of_B_learn_from_the_first_step():
    A, B = (tensor.requires_grad_() for tensor in random_factors(2, 7, 5))
    grown = [tensor.requires_grad_() for tensor in grow(A, B, 5, seeded(2))]
    x, target = torch.randn(7, 11, generator=seeded(4)), torch.randn(5, 11, generator=seeded(5))
    for factors in ((A, B), grown):
        ((factors[1] @ (factors[0] @ x) - target) ** 2).mean().backward()
    A_gradient, B_gradient = (tensor.grad for tensor in grown)
    assert A.grad is not None and B.grad is not None and A_gradient is not None and B_gradient is not None
    # What was there learns as before; of what is new, B moves first and A once B has left zero.
    torch.testing.assert_close(A_gradient[:2], A.grad)
    torch.testing.assert_close(B_gradient[:, :2], B.grad)
    assert A_gradient[2:].count_nonzero() == 0
    assert bool((B_gradient[:, 2:].norm(dim=0) > 1e-2).all())


def test_growth_is_seeded_and_works_from_other_dtypes():
    A, B = random_factors(2, 6, 4, dtype=torch.bfloat16)
    first, second, third = (grow(A, B, 4, seeded(seed))[0] for seed in (7, 7, 8))
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert float((first[2:].float() @ A.float().T).abs().max()) < 0.1
    assert grow(A, B.float(), 4, seeded())[1].dtype == torch.float32


def test_the_same_rank_gives_copies():
    A, B = random_factors(3, 2, 4)  # r > d_in: allowed as long as nothing grows
    grown_A, grown_B = grow(A, B, 3, seeded())
    assert torch.equal(grown_A, A) and torch.equal(grown_B, B)
    grown_A.zero_()
    assert A.count_nonzero() > 0


@pytest.mark.parametrize(
    ("new_rank", "message"), [(7, r"only 6 directions .* Pass 2\.\.6"), (1, r"new_rank=1, but the site has rank 2")]
)
def test_ranks_out_of_range(new_rank, message):
    with pytest.raises(BudgetError, match=message):
        grow(*random_factors(2, 6, 4), new_rank, seeded())


def test_factors_that_cannot_grow():
    A, B = random_factors(2, 6, 4)
    with pytest.raises(AdapterError, match=r"A \(2, 6\) and B \(4, 1\)"):
        grow(A, B[:, :1], 4, seeded())
    A[0, 0] = math.nan
    with pytest.raises(AdapterError, match="NaN"):
        grow(A, B, 4, seeded())


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(("rank", "new_rank"), [(2, 6), (3, 5), (1, 6), (5, 5)])
def test_alpha_keeps_the_scale(use_rslora, rank, new_rank):
    (site,) = find_sites(trained_model(target_modules=["q_proj"], r=rank, lora_alpha=32, use_rslora=use_rslora))
    grow_site_(site, new_rank, seeded())
    exponent = 0.5 if use_rslora else 1
    scale = site.module.lora_alpha["default"] / new_rank**exponent
    assert scale == pytest.approx(32 / rank**exponent, rel=1e-15)


@pytest.mark.parametrize(
    ("rank", "n_sites", "n_kept", "max_rank", "new_rank"),
    [(8, 36, 5, None, 57), (8, 36, 10, None, 28), (1, 72, 20, None, 3), (8, 36, 36, None, 8), (8, 36, 5, 32, 32)],
)
def test_the_published_rank(rank, n_sites, n_kept, max_rank, new_rank):
    assert grown_rank(rank, n_sites, n_kept, max_rank) == new_rank
    # floor: one more would cost more than the sites that were freed
    assert rank * n_sites >= n_kept * new_rank
    assert max_rank is not None or rank * n_sites < n_kept * (new_rank + 1)


def test_a_limit_below_the_rank_never_shrinks_a_site():
    assert grown_rank(8, 36, 5, max_rank=4) == 8


@pytest.mark.parametrize(("rank", "n_kept"), [(0, 5), (8, 0), (8, 37)])
def test_ranks_of_no_sites(rank, n_kept):
    with pytest.raises(BudgetError, match=r"1\.\.36"):
        grown_rank(rank, 36, n_kept)


class TinyModel(nn.Module):
    """An embedding, a Linear, a Conv1D (weights transposed) and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q_proj = nn.Linear(6, 5)
        self.c_proj = Conv1D(7, 5)
        self.conv = nn.Conv1d(7, 4, 3)

    def forward(self, tokens):
        hidden = self.c_proj(torch.tanh(self.q_proj(self.embed(tokens))))
        return self.conv(hidden.transpose(1, 2))


def trained_model(**config):
    torch.manual_seed(0)
    names = ["embed", "q_proj", "c_proj"]
    settings = {"r": 2, "lora_alpha": 6, "target_modules": names, **config}
    model = peft.get_peft_model(TinyModel(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


TOKENS = torch.tensor([[0, 3, 7, 10, 2]])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_growing_a_live_site_changes_no_output_and_no_scale(use_rslora):
    model = trained_model(use_rslora=use_rslora)
    before = model(TOKENS)
    scalings = {site.name: site.module.scaling["default"] for site in find_sites(model)}
    for site in find_sites(model):
        old_parameters = [parameter.dtype for parameter in model.parameters()]
        grown = grow_site_(site, 5, seeded())
        assert old_parameters == [parameter.dtype for parameter in model.parameters()]
        assert grown == find_sites_named(model, site.name)  # what a fresh look at the model says
        assert grown.n_parameters == site.n_parameters * 5 // 2
        assert grown.scaling == pytest.approx(site.scaling, rel=1e-15)
        assert site.module.scaling["default"] == scalings[site.name]
    torch.testing.assert_close(model(TOKENS), before, atol=1e-6, rtol=1e-5)
    for site in find_sites(model):
        site.module.set_scale("default", 1.0)
    torch.testing.assert_close(model(TOKENS), before, atol=1e-6, rtol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS), before, atol=1e-5, rtol=1e-5)


def find_sites_named(model, name):
    (site,) = [site for site in find_sites(model) if site.name == name]
    return dataclasses.replace(site, scaling=pytest.approx(site.scaling, rel=1e-15))


def test_every_new_direction_of_a_live_site_gets_a_gradient():
    model = trained_model()
    for site in find_sites(model):
        grow_site_(site, 4, seeded())
    model(TOKENS).square().mean().backward()
    for site in find_sites(model):
        module = site.module
        is_embedding = "default" in module.lora_embedding_A
        # The factor that is zero in the new directions: A of an embedding (rows), B of a linear map (columns).
        gradient = module.lora_embedding_A["default"].grad if is_embedding else module.lora_B["default"].weight.grad.T
        assert bool((gradient[2:].norm(dim=1) > 0).all()), site.name


def test_a_grown_adapter_loads_in_stock_peft(tmp_path):
    model = trained_model()
    for site in find_sites(model):
        grow_site_(site, 4, seeded())
    config = model.peft_config["default"]
    config.r, config.lora_alpha = 4, find_sites(model)[0].module.lora_alpha["default"]
    before = model(TOKENS)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = TinyModel()
    base.load_state_dict(model.unload().state_dict())
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(TOKENS), before, atol=1e-6, rtol=1e-5)


def test_frozen_gated_and_biased_sites_stay_so():
    model = trained_model(target_modules=["q_proj"], lora_bias=True)
    (site,) = find_sites(model)
    module = site.module
    module.to(torch.bfloat16)
    module.lora_A["default"].weight.requires_grad_(False)
    gated = torch.tensor(0.25, requires_grad=True)
    module.set_scale("default", gated)
    scaling, bias = module.scaling["default"], module.lora_B["default"].bias
    grown = grow_site_(site, 6, seeded())
    down, up = module.lora_A["default"], module.lora_B["default"]
    assert module.scaling["default"] is scaling
    assert up.bias is bias and grown.n_parameters == 6 * 6 + 5 * 6 + 5
    assert not down.weight.requires_grad and up.weight.requires_grad
    assert down.weight.dtype == up.weight.dtype == torch.bfloat16
    assert (down.in_features, down.out_features, up.in_features, up.out_features) == (6, 6, 6, 5)


def test_the_same_rank_leaves_the_very_same_parameters():
    model = trained_model()
    before = list(model.parameters())
    for site in find_sites(model):
        assert grow_site_(site, 2, seeded()) is site
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


def test_sites_that_cannot_grow_are_left_as_they_were():
    model = trained_model(target_modules=["q_proj", "conv"])
    convolution, linear = find_sites(model)
    with pytest.raises(UnsupportedAdapterError, match="conv: the rank of LoRA on Conv1d cannot grow"):
        grow_site_(convolution, 4, seeded())
    with pytest.raises(BudgetError, match=r"Pass 2\.\.6"):
        grow_site_(linear, 7, seeded())
    linear.module.merge()
    with pytest.raises(AdapterError, match="q_proj is merged"):
        grow_site_(linear, 4, seeded())
    assert [site.module.r["default"] for site in (linear, convolution)] == [2, 2]
    assert linear.module.lora_A["default"].weight.shape == (2, 6)


def test_the_parameters_of_debertav3_base():
    """METHODS of the paper: 36 query, key and value sites at r = 8, all of them and the K kept."""
    config = DebertaV2Config(vocab_size=100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    lora = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["query_proj", "key_proj", "value_proj"])
    with torch.device("meta"):
        model = peft.get_peft_model(DebertaV2Model(config), lora)
    sites = find_sites(model)
    assert len(sites) == 36
    sizes = [site.n_parameters for site in sites]
    assert sum(sizes) == 442_368 == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (sum(sizes[:10]), sum(sizes[:5])) == (122_880, 61_440)
    # Rank growth spends what was freed, and no more.
    per_rank = [site.n_parameters // site.rank for site in sites[:5]]
    assert grown_rank(8, 36, 5) == 57
    assert sum(per_rank) * 57 <= 442_368 < sum(per_rank) * 58
