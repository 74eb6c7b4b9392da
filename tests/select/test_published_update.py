"""schedule="every-step" against the published update, transcribed with its dense products: the same gates."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks._published_weightlora import (
    GATE_LEARNING_RATE,
    PublishedLinear,
    PublishedUpdate,
    install_published_,
    keep_largest_signed,
)
from lorazor.adapter.sites import find_sites
from lorazor.select.projection import keep_largest
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.train.gating import GatedSites
from tests.tiny_models import tiny_inputs, tiny_model, tiny_peft_model

N_LAYERS, RANK, SCALING = 2, 2, 4.0
N_STEPS, BUDGET, LEARNING_RATE = 50, 6, 5e-3


def batches_of(family):
    generator = torch.Generator().manual_seed(0)
    batches = [tiny_inputs(family, seed=step) for step in range(N_STEPS)]
    for batch in batches:
        labels = torch.randint(3, (len(batch["input_ids"]),), generator=generator)
        batch["labels"] = labels if family == "deberta-v2" else batch["input_ids"]
    return batches


def start_of(family, is_fresh):
    """Stock PEFT in float64: in float32, two ways to compute a product choose other sites after some steps."""
    model = tiny_peft_model(family, N_LAYERS, RANK, lora_alpha=SCALING * RANK).double().train()
    if is_fresh:
        for site in find_sites(model):
            nn.init.zeros_(site.module.lora_B["default"].weight)
    return model


def published_path(family, start):
    weights = start.state_dict()
    names = [site.name for site in find_sites(start)]
    factors = {
        name: tuple(weights[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB") for name in names
    }
    model = tiny_model(family, N_LAYERS).double().train().requires_grad_(False)
    layers = install_published_(model, factors, SCALING)
    head = list(model.classifier.requires_grad_().parameters()) if family == "deberta-v2" else []
    update = PublishedUpdate(layers, BUDGET, LEARNING_RATE, head)
    for batch in batches_of(family):
        model(**batch).loss.backward()
        yield torch.tensor(update.step())


def lorazor_path(family, start, projection=keep_largest_signed):
    model = copy.deepcopy(start)
    sites = find_sites(model)
    settings = WeightLoraSettings(
        keep=BUDGET, select_steps=N_STEPS, schedule="every-step", gate_lr=GATE_LEARNING_RATE, dense_steps=0
    )
    gated = GatedSites(sites, Gates(len(sites), settings, projection=projection))
    gated.attach_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    for batch in batches_of(family):
        model(**batch).loss.backward()
        gated.gates.step(gated.take_gradient())
        gated.update_()
        optimizer.step()
        optimizer.zero_grad()
        yield gated.gates.values.detach().clone()


def path(steps):
    return torch.stack(list(steps))  # (n_steps, n_sites)


@pytest.mark.parametrize("family", ["llama", "deberta-v2"])
def test_every_step_is_the_published_update(family):
    start = start_of(family, is_fresh=True)
    gates, published = path(lorazor_path(family, start)), path(published_path(family, start))
    torch.testing.assert_close(gates, published, atol=1e-5, rtol=0)
    assert ((gates != 0).sum(1) == BUDGET).all()
    assert (published[published != 0] - 1).abs().max() > 0.01  # they have learned


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deberta-v2"])
def test_it_is_where_the_choice_changes_too(family):
    """A random B, unlike a fresh one, gives gates of either sign: here their order is compared as well."""
    start = start_of(family, is_fresh=False)
    gates, published = path(lorazor_path(family, start)), path(published_path(family, start))
    torch.testing.assert_close(gates, published, atol=1e-5, rtol=0)
    assert (published != 0).any(0).sum() > BUDGET
    by_magnitude = path(lorazor_path(family, start, keep_largest))
    assert ((by_magnitude != 0) != (published != 0)).any() and (by_magnitude < 0).any()


def test_the_published_projection_drops_the_gate_that_matters_most():
    layers = [PublishedLinear(nn.Linear(2, 3), torch.ones(1, 2), torch.ones(3, 1), 1.0) for _ in range(5)]
    values = torch.tensor([-3.0, 0.5, 0.2, -0.1, 1.0])
    for layer, value in zip(layers, values, strict=True):
        layer.omega.data, layer.omega.grad = value.clone(), torch.zeros(())
    published = PublishedUpdate(layers, 2, LEARNING_RATE).step()
    assert published == keep_largest_signed(values, 2).tolist() == [0, 0.5, 0, 0, 1]
    assert keep_largest(values, 2).tolist() == [-3, 0, 0, 0, 1]
