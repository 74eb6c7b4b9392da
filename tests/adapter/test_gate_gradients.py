"""Gradients of gates, their precision and their devices: finite differences, and autograd through PEFT's scale."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lorazor.adapter.gates import gated, is_gated, put_gate_
from lorazor.adapter.sites import find_sites
from tests.tiny_models import tiny_inputs, tiny_peft_model
from tests.whole_sites import WHOLE, convolutions, embeddings, logits, n_gates, random_gates, total, with_scales


@pytest.mark.parametrize("rows", [(), (3,)], ids=["shared", "of rows"])
def test_gates_receive_the_gradient_of_finite_differences(rows):
    model = tiny_peft_model("gpt2", 1, target_modules=["c_attn", "c_fc", "wte"]).double()  # double throughout
    inputs = tiny_inputs("gpt2")
    sites = find_sites(model)

    def totals(gates: torch.Tensor) -> torch.Tensor:
        with gated(sites, gates):
            return model(**inputs).logits.square().sum(dim=(1, 2))  # (rows,)

    gates = torch.ones(n_gates(sites), *rows, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(totals(gates).sum(), gates)
    for index in (0, 5, n_gates(sites) - 1):  # the last is the embedding's
        step = torch.zeros_like(gates)
        step[index] = 1e-4
        slope = (totals(gates.detach() + step) - totals(gates.detach() - step)).detach() / 2e-4
        torch.testing.assert_close(gradient[index], slope if rows else slope.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["embedding", "convolution", "bias of B"])
def test_a_leaf_gathers_the_gradients_of_several_passes_and_may_change_between_them(kind):
    """Against autograd through PEFT's scale, which takes a tensor for one pass."""
    model, inputs = WHOLE[kind]()
    sites = find_sites(model)
    expected = torch.zeros(len(sites))
    for value in (1.0, 0.5):
        scales = [torch.tensor(value, requires_grad=True) for _ in sites]
        for site, scale in zip(sites, scales, strict=True):
            site.module.set_scale("default", scale)  # pyright: ignore[reportArgumentType]
        expected += torch.stack(torch.autograd.grad(total(model, inputs), scales))
    with_scales(model, torch.ones(len(sites)))
    storage = torch.ones(len(sites))
    leaves = [one.detach().requires_grad_() for one in storage]
    undo = [put_gate_(site, leaf) for site, leaf in zip(sites, leaves, strict=True)]
    assert all(map(is_gated, sites))
    for value in (1.0, 0.5):
        storage.fill_(value)
        total(model, inputs).backward()
    found = torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one in undo:
        one()
    assert not any(map(is_gated, sites))


@pytest.mark.parametrize("rows", [(), (3,)], ids=["shared", "of rows"])
def test_activations_that_are_computed_again_change_no_gradient(rows):
    model, inputs = embeddings()
    model.requires_grad_(False)
    sites, gradients = find_sites(model), []
    for is_on in (False, True):
        if is_on:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # checkpointing needs it; there is no dropout
        gates = torch.ones(n_gates(sites), *rows, requires_grad=True)
        with gated(sites, gates):
            total(model, inputs).backward()
        gradients.append(gates.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().min() > 0


@pytest.mark.parametrize("rows", [(), (3,)], ids=["shared", "of rows"])
@pytest.mark.parametrize("make_model", [embeddings, convolutions], ids=["embedding", "convolution"])
def test_gates_of_a_half_precision_model_keep_their_own_precision(make_model, rows):
    model, inputs = make_model()
    model.to(torch.bfloat16)
    inputs = {name: one.bfloat16() if one.is_floating_point() else one for name, one in inputs.items()}
    sites, full = find_sites(model), logits(model, inputs)
    with model.disable_adapter():
        base = logits(model, inputs)
    for value, expected in ((1.0, full), (0.0, base)):
        gates = torch.full((n_gates(sites), *rows), value, requires_grad=True)
        with gated(sites, gates):
            output = model(**inputs)
        output = output if isinstance(output, torch.Tensor) else output.logits
        assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), gates)
    assert gradient.dtype == torch.float32 and gradient.abs().min() > 0
    leaves = [torch.ones((), requires_grad=True) for _ in sites]  # as training has them
    for site, leaf in zip(sites, leaves, strict=True):
        put_gate_(site, leaf)
    total(model, inputs).backward()
    for found in (gradient, torch.stack([leaf.grad for leaf in leaves if leaf.grad is not None])):
        assert len(found) in (len(gates), len(sites)) and not torch.equal(found, found.bfloat16().float())


def test_gates_move_once_to_each_device(monkeypatch):
    """Half of the sites on a device without numbers: what is copied there is counted."""
    model = tiny_peft_model("llama", 2)
    for layer in model.get_submodule("base_model.model.model.layers.1").modules():
        for factors in (getattr(layer, "lora_A", {}), getattr(layer, "lora_B", {})):
            if "default" in factors:
                factors["default"].to("meta")
    sites, moved = find_sites(model), []
    to = torch.Tensor.to

    def counting(tensor, *args, **kwargs):
        moved.extend(one for one in args if isinstance(one, torch.device) and one != tensor.device)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    for gates in (random_gates(n_gates(sites)), random_gates(n_gates(sites), 3).requires_grad_()):
        with gated(sites, gates):
            assert moved == [torch.device("meta")] and all(map(is_gated, sites))
        moved.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_model_on_two_devices_computes_what_it_computes_on_one():
    model, inputs = tiny_peft_model("llama", 2), tiny_inputs("llama")
    sites = find_sites(model)
    gates = random_gates(n_gates(sites), 3).requires_grad_()
    with gated(sites, gates):
        expected = total(model, inputs)
    (gradient,) = torch.autograd.grad(expected, gates)
    layer = model.get_submodule("base_model.model.model.layers.1")
    layer.to("cuda")
    forward = layer.forward

    def there_and_back(hidden, *args, **kwargs):
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: one.cuda(), (args, kwargs))
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda one: one.cpu(), forward(hidden.cuda(), *args, **kwargs)
        )

    layer.forward = there_and_back
    with gated(sites, gates):
        found = total(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found, gates)[0], gradient, rtol=1e-3, atol=1e-3)


def test_gates_keep_as_many_numbers_for_the_backward_pass_as_a_has_outputs():
    """PEFT's scale as a tensor keeps what B puts out, of every site: half as much again as all of stock LoRA."""
    model, inputs = tiny_peft_model("llama", 2, rank=1), tiny_inputs("llama")
    sites, kept = find_sites(model), []

    def n_kept() -> int:
        kept.clear()
        held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
        with saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            model(**inputs)
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
        return sum(size for place, size in storages.items() if place not in held)

    stock, n_tokens = n_kept(), inputs["input_ids"].numel()
    for site in sites:
        put_gate_(site, torch.ones((), requires_grad=True))
    assert n_kept() - stock <= len(sites) * 4 * (n_tokens + 1)
