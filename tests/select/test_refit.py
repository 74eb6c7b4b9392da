"""Gates learned on a trained adapter, against torch's own Adam and a transcription of WeightLoRA's update."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lorazor.adapter.gates import gated
from lorazor.adapter.sites import find_sites
from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.select.refit import GateFit, refit_gates, sparse_gates
from lorazor.select.weightlora import WeightLoraSettings
from tests.measure.test_sweep import tiny_batch
from tests.tiny_models import tiny_peft_model


@pytest.fixture
def model():
    return tiny_peft_model("llama", n_layers=1).eval()


def loss(model, batch, gates) -> torch.Tensor:
    """Mean over the answer tokens, with the gates put on B's output by a hook of our own."""
    sites, handles = find_sites(model), []
    for site, gate in zip(sites, gates, strict=True):
        hook = partial(lambda gate, module, inputs, output: gate * output, gate)
        handles.append(site.module.lora_B["default"].register_forward_hook(hook))
    logits = model(**batch.inputs).logits
    for handle in handles:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def test_refit_is_adam_on_the_kept_gates(model):
    sites, batches = find_sites(model), [tiny_batch("llama"), tiny_batch("llama", rows=2)]
    start = torch.ones(len(sites))
    start[[1, 4]] = 0
    steps = []
    found = refit_gates(model.get_base_model(), batches, partial(gated, sites), start, GateFit(3, 0.1), steps.append)

    kept = [index for index in range(len(sites)) if start[index]]
    gates = [torch.tensor(float(one), requires_grad=index in kept) for index, one in enumerate(start)]
    adam = torch.optim.Adam([gates[index] for index in kept])
    for step, batch in enumerate([batches[0], batches[1], batches[0]]):
        adam.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        adam.zero_grad()
        before = loss(model, batch, gates)
        before.backward()
        adam.step()
        assert steps[step].loss == pytest.approx(before.item(), rel=1e-5)
        assert steps[step].learning_rate == pytest.approx(0.1 * (1 - step / 3))
    torch.testing.assert_close(found, torch.stack(gates).detach(), rtol=1e-3, atol=1e-4)
    assert found[1] == found[4] == 0


def test_refit_leaves_the_weights_alone(model):
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    sites = find_sites(model)
    refit_gates(model.get_base_model(), [tiny_batch("llama")], partial(gated, sites), torch.ones(len(sites)))
    for name, one in model.named_parameters():
        assert torch.equal(one, before[name]) and one.grad is None
    assert all(isinstance(site.module.scaling["default"], float) for site in sites)


def test_sparse_gates_are_the_published_update(model):
    """Veprikov et al.: w <- H_K(w - eta grad), from w = 1."""
    sites, batch = find_sites(model), tiny_batch("llama")
    settings = WeightLoraSettings(keep=3, warmup_steps=3, schedule="every-step", gate_lr=0.5, dense_steps=1)
    found = sparse_gates(model.get_base_model(), [batch], partial(gated, sites), [9] * len(sites), settings)

    gates = torch.ones(len(sites))
    for step in range(3):
        leaf = gates.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model, batch, leaf), leaf)
        gates = gates - 0.5 * gradient
        if step >= 1:
            gates[gates.abs().argsort(descending=True)[3:]] = 0
    torch.testing.assert_close(found, gates, rtol=1e-4, atol=1e-5)
    assert int((found != 0).sum()) == 3


def test_one_cut_keeps_the_largest_at_the_end(model):
    sites = find_sites(model)
    settings = WeightLoraSettings(keep=2, warmup_steps=2, gate_lr=0.5)
    sparse, dense = (
        sparse_gates(model.get_base_model(), [tiny_batch("llama")], partial(gated, sites), [9] * len(sites), one)
        for one in (settings, WeightLoraSettings(keep=len(sites), warmup_steps=2, gate_lr=0.5))
    )
    largest = dense.abs().argsort(descending=True)[:2]
    torch.testing.assert_close(sparse[largest], dense[largest])
    assert int((sparse != 0).sum()) == 2


def test_bad_settings_and_numbers(model):
    sites, base = find_sites(model), model.get_base_model()
    gating, one = partial(gated, sites), torch.ones(len(sites))
    with pytest.raises(SettingsError, match="0 steps"):
        refit_gates(base, [tiny_batch("llama")], gating, one, GateFit(steps=0))
    with pytest.raises(SettingsError, match="step size -1"):
        refit_gates(base, [tiny_batch("llama")], gating, one, GateFit(learning_rate=-1))
    with pytest.raises(SettingsError, match="No examples"):
        refit_gates(base, [], gating, one)
    with pytest.raises(BudgetError, match="keep=9"):
        sparse_gates(base, [tiny_batch("llama")], gating, [9] * 7, WeightLoraSettings(keep=9, warmup_steps=1))
    with pytest.raises(MeasureError, match="step 1"):
        refit_gates(base, [tiny_batch("llama")], gating, one * float("nan"))
