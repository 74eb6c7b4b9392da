"""Credits against losses of models whose B was scaled by hand, and numerical integration by scipy."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.integrate import fixed_quad
from torch.nn.functional import cross_entropy
from transformers import GPT2ForSequenceClassification, LlamaForSequenceClassification

from lorazor.adapter.gates import site_gates
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.gradients import checkpointed, frozen
from lorazor.measure.losses import differentiable_row_losses
from lorazor.select.credit import Credits, path_credit, ratio_errors
from lorazor.select.scoring import Scoring, score_named
from tests.measure.test_engines import losses_by_hand, tiny_batch
from tests.tiny_models import FAMILIES, lora_config, randomise_b_, tiny_model, tiny_peft_model


def scaled(model, factors: list[float]):
    """A copy of the model, with B of every site multiplied by its factor."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for site, factor in zip(find_sites(changed), factors, strict=True):
            site_parameters(site.module, site.adapter)[1].mul_(factor)
    return changed


def slope_by_hand(model, batch: Batch, factors: list[float], index: int) -> np.ndarray:
    """D nll / d gate of each direction of one site, (rows, r): the gradient by its scaled B, times the columns of B."""
    changed = scaled(model, factors)
    B = [site_parameters(site.module, site.adapter)[1] for site in find_sites(changed)][index]
    direction = site_parameters(find_sites(model)[index].module, "default")[1]
    gradients = row_gradients(changed, batch, B)
    return np.array([(gradient * direction.detach()).sum(dim=0).tolist() for gradient in gradients])


def row_gradients(model, batch: Batch, parameter) -> list[torch.Tensor]:
    """Gradient of each row's negative log-likelihood with respect to a parameter."""
    logits = model(**batch.inputs).logits
    gradients = []
    for row, targets in zip(logits, batch.targets, strict=True):
        loss = cross_entropy(row.reshape(-1, row.shape[-1]), targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
        gradients += torch.autograd.grad(loss, parameter, retain_graph=True)
    return gradients


def double_batch(family: str) -> Batch:
    """A batch for a model in float64; Whisper's features are floats too."""
    batch = tiny_batch(family)
    inputs = {name: one.double() if one.is_floating_point() else one for name, one in batch.inputs.items()}
    return replace(batch, inputs=inputs)


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=[] if one in ("llama", "bart") else pytest.mark.slow) for one in FAMILIES],
)
def test_a_credit_is_the_integral_of_the_slope(family):
    model = tiny_peft_model(family, n_layers=2).double().eval()
    sites, batch = find_sites(model), double_batch(family)
    end = [1.0] * len(sites)
    end[1] = 0.5  # a path that ends elsewhere, and one site that is dropped already
    end[2] = 0.0
    parts = Parts(tuple(sites))
    credits = path_credit(model.get_base_model(), [batch], parts.gated, site_gates(sites, end), 3)
    for index in (0, 1, 2, len(sites) - 1):

        def slopes(positions: np.ndarray, index: int = index) -> np.ndarray:
            return np.stack(
                [slope_by_hand(model, batch, [float(a) * one for one in end], index) for a in positions], axis=-1
            )

        expected = -end[index] * fixed_quad(slopes, 0, 1, n=3)[0]
        own = credits.credits[:, np.array(parts.site_of) == index]
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-6)
    assert credits.examples == batch.indices
    np.testing.assert_allclose(credits.full_nats, losses_by_hand(scaled(model, end), batch)[0])
    np.testing.assert_allclose(credits.base_nats, losses_by_hand(scaled(model, [0.0] * len(end)), batch)[0])


def test_the_fisher_information_of_a_gate_is_the_mean_square_of_its_slopes():
    model, batch = tiny_peft_model("llama").double().eval(), double_batch("llama")
    randomise_b_(model)
    sites = tuple(find_sites(model))
    parts = Parts(sites)
    scoring = Scoring(parts, SimpleNamespace(), model.get_base_model(), [batch])  # type: ignore[arg-type]
    found = score_named("fisher")(scoring)
    slopes = np.concatenate([slope_by_hand(model, batch, [1.0] * len(sites), i) for i in range(len(sites))], axis=1)
    n_tokens = int((batch.targets != IGNORED).sum())
    np.testing.assert_allclose(found.values, (slopes**2).sum(axis=0) / n_tokens, rtol=1e-4)
    np.testing.assert_allclose(found.per_example, slopes**2, rtol=1e-4)  # gates are float32


def test_credits_add_up_to_the_gain():
    model = tiny_peft_model("llama", n_layers=3).eval()
    parts = Parts(tuple(find_sites(model)))
    batches = [tiny_batch("llama", rows=3)]
    one = torch.ones(len(parts))
    errors = []
    for n_points in (1, 4, 32):
        found = path_credit(model.get_base_model(), batches, parts.gated, one, n_points).completeness
        assert found.gain == pytest.approx(found.loss_base - found.loss_full)
        errors.append(abs(found.credit_sum - found.gain))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 1e-3 * abs(found.gain)


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "bart", "opt", "whisper"])
def test_checkpointing_changes_no_credit(family):
    model = tiny_peft_model(family, n_layers=2).eval()
    base, parts, batch = model.get_base_model(), Parts(tuple(find_sites(model))), tiny_batch(family)
    gating, one = parts.gated, torch.ones(len(parts))
    in_training, before = [], {name: one.__dict__.get("forward") for name, one in base.named_modules()}
    for module in base.modules():
        module.register_forward_hook(lambda module, *_: in_training.append(module.training))
    plain = path_credit(base, [batch], gating, one, 2)
    recomputed = path_credit(base, [batch], gating, one, 2, gradient_checkpointing=True)
    np.testing.assert_allclose(recomputed.credits, plain.credits, atol=1e-5)
    np.testing.assert_array_equal(recomputed.full_nats, plain.full_nats)
    assert not any(in_training)
    assert {name: one.__dict__.get("forward") for name, one in base.named_modules()} == before


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_checkpointing_keeps_what_layers_are_given_and_no_more(family):
    """Numbers that autograd keeps for the backward pass; those inside the layers come back when they are needed."""
    model = tiny_peft_model(family, n_layers=3).eval()
    base, sites, batch = model.get_base_model(), find_sites(model), tiny_batch(family)
    parts, first = Parts(tuple(sites)), next(site for site in sites if site.name.endswith("q_proj"))
    runs, kept = [], {}
    first.module.register_forward_hook(lambda *_: runs.append(1))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[is_on] += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel()
        return tensor

    for is_on in (False, True):
        kept[is_on] = 0
        runs.clear()
        gates = torch.ones(len(parts), 3, requires_grad=True)
        with frozen(base), checkpointed(base, is_on), parts.gated(gates):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = differentiable_row_losses(base, batch).nll_nats.sum()
            loss.backward()
        assert len(runs) == 1 + is_on
    assert kept[True] < kept[False] / 4


@pytest.mark.parametrize(
    ("family", "model_class"), [("llama", LlamaForSequenceClassification), ("gpt2", GPT2ForSequenceClassification)]
)
def test_checkpointing_a_classifier_that_has_a_cache(family, model_class):
    """A decoder that labels texts fills a cache, which the second run of a layer would find full."""
    config = tiny_model(family, 2).config
    config.num_labels = 3
    base = model_class(config).eval()
    model = get_peft_model(base, lora_config(family, task_type="SEQ_CLS"))
    randomise_b_(model)
    batch = replace(tiny_batch(family), targets=torch.tensor([0, 2, 1]))
    batch.inputs["attention_mask"][0, 5:] = 0
    parts = Parts(tuple(find_sites(model)))
    gating, one = parts.gated, torch.ones(len(parts))
    plain, recomputed = (
        path_credit(base, [batch], gating, one, 2, gradient_checkpointing=is_on) for is_on in (False, True)
    )
    np.testing.assert_allclose(recomputed.credits, plain.credits, atol=1e-5)


def test_a_model_that_cannot_checkpoint_is_told_so():
    model = tiny_peft_model("llama").get_base_model()
    model.__class__ = type("Plain", (type(model),), {"supports_gradient_checkpointing": False})
    with pytest.raises(SettingsError, match="cannot recompute"), checkpointed(model):
        pass


def test_only_gates_get_gradients():
    model = tiny_peft_model("llama", n_layers=2).eval()
    parts = Parts(tuple(find_sites(model)))
    path_credit(model.get_base_model(), [tiny_batch("llama")], parts.gated, torch.ones(len(parts)), 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name.split(".")[-3] for name, one in model.named_parameters() if one.requires_grad} == {"lora_A", "lora_B"}


def test_standard_errors_are_those_of_the_jackknife():
    generator = np.random.default_rng(0)
    sums, tokens = generator.normal(size=(50, 2)), generator.integers(5, 9, size=50).astype(float)
    left_out = [np.delete(sums, i, 0).sum(0) / np.delete(tokens, i).sum() for i in range(50)]
    expected = np.sqrt(49 / 50 * ((left_out - np.mean(left_out, axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(ratio_errors(sums, tokens), expected, rtol=0.02)
    assert np.isnan(ratio_errors(sums[:1], tokens[:1])).all()


def test_values_weigh_examples_by_their_tokens():
    credits = Credits((0, 1), np.array([1.0, 3.0]), np.array([[1.0], [1.0]]), np.array([4.0, 4]), np.array([2.0, 2]))
    assert credits.values == pytest.approx([0.5])
    assert credits.completeness.gain == pytest.approx(1)
    assert credits.completeness.error == pytest.approx(0.5)


def test_layers_without_gradients_are_refused():
    model = tiny_peft_model("llama", n_layers=1).eval()
    sites, base = find_sites(model), model.get_base_model()
    parts = Parts(tuple(sites))
    base.model.forward = torch.no_grad()(base.model.forward)  # as far as autograd sees, Reformer's layers are so
    with pytest.raises(MeasureError, match="LlamaForCausalLM hides its layers from autograd"):
        path_credit(base, [tiny_batch("llama")], parts.gated, torch.ones(len(parts)), 1)


def test_bad_settings_and_weights():
    model = tiny_peft_model("llama", n_layers=1).eval()
    sites, base = find_sites(model), model.get_base_model()
    parts = Parts(tuple(sites))
    with pytest.raises(SettingsError, match="n_points=0"):
        path_credit(base, [tiny_batch("llama")], parts.gated, torch.ones(len(parts)), 0)
    with torch.no_grad():
        site_parameters(sites[0].module, sites[0].adapter)[1].fill_(float("nan"))
    with pytest.raises(MeasureError, match="example 10"):
        path_credit(base, [tiny_batch("llama")], parts.gated, torch.ones(len(parts)), 1)
