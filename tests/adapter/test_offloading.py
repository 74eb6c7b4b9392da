"""A model whose base weights accelerate keeps on disk between forward passes, against the same model in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model

from lorazor.adapter.directions import to_balanced_form_
from lorazor.adapter.gates import device_of, fold_, gated
from lorazor.adapter.offloading import device_of_inputs, fetch_
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import find_sites
from lorazor.measure.engines import on_model
from lorazor.measure.gradients import gram_matrices
from lorazor.measure.losses import row_losses
from lorazor.select.credit import path_credit
from tests.measure.test_engines import tiny_batch
from tests.tiny_models import tiny_peft_model

PREFIX = "base_model.model."
WHOLE = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.fixture(params=["the last layer", "all but the last layer"])
def pair(request, tmp_path):
    """The model in memory, and with some of it on disk; in evaluation mode."""
    model = tiny_peft_model("llama", 2).eval()
    elsewhere = copy.deepcopy(model)
    is_last = request.param == "the last layer"
    places = {PREFIX + name: "disk" if ("1" in name) == is_last else "cpu" for name in WHOLE}
    dispatch_model(elsewhere, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    return model, elsewhere


def random_gates(n: int, *rows: int) -> torch.Tensor:
    return torch.rand(n, *rows, generator=torch.Generator().manual_seed(0))


def test_of_an_offloaded_model_only_the_adapter_stays(pair):
    model, elsewhere = pair
    sites = find_sites(elsewhere)
    assert {"cpu", "meta"} == {device_of(site).type for site in sites}
    assert device_of_inputs(elsewhere) == torch.device("cpu")
    fetch_(sites)
    own = {name for name, one in elsewhere.named_parameters() if one.is_meta}
    assert own and not any("lora_" in name for name in own)
    for (name, one), (_, other) in zip(model.named_parameters(), elsewhere.named_parameters(), strict=True):
        assert name in own or torch.equal(one, other)
    assert all(isinstance(one, torch.nn.Parameter) for _, one in elsewhere.named_parameters())


@pytest.mark.parametrize("rows", [(), (3,)])
def test_gates_are_on_offloaded_sites_what_they_are_in_memory(pair, rows):
    found = []
    for model in pair:
        sites = find_sites(model)
        fetch_(sites)
        gates = random_gates(sum(site.n_gates for site in sites), *rows).requires_grad_()
        batch = on_model(model, tiny_batch("llama"))
        with gated(sites, gates):
            logits = model(**batch.inputs).logits
        found.append((logits.detach(), *torch.autograd.grad(logits.square().sum(), gates)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_shrink_does_to_an_offloaded_model_is_what_it_does_in_memory(pair):
    """Moments, balanced form, credit, losses of a smaller adapter, folding."""
    found = []
    for model in pair:
        sites, batch = find_sites(model), tiny_batch("llama")
        fetch_(sites)
        parts, base = Parts(tuple(sites)), model.get_base_model()
        sigma2 = to_balanced_form_(sites, gram_matrices(base, sites, [batch]))
        credits = path_credit(base, [batch], parts.gated, torch.ones(len(parts)), 2).credits
        gates = (random_gates(len(parts)) < 0.5).float()
        fold_(sites, gates)
        folded = row_losses(base, on_model(base, batch)).nll_nats
        found.append((parts.from_sites(sigma2), torch.from_numpy(credits), folded))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
