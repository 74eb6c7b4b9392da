"""Moments of both sides of a site against loops over tokens, row by row and without padding, in plain autograd."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorazor.adapter.sites import find_sites
from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import MeasureError
from lorazor.measure.gradients import gram_matrices
from tests.odd_models import odd_inputs, odd_peft_model
from tests.tiny_models import SEQ2SEQ, tiny_inputs, tiny_peft_model

LENGTHS = (7, 4, 6)
"""Tokens of the rows that are no padding."""


def padded_batch(family: str, seed: int = 0) -> Batch:
    """Three rows of 7 tokens, padded on the right; of an encoder-decoder both sides have 7, the encoder's padded."""
    inputs = tiny_inputs(family, seed=seed) if family != "albert" else odd_inputs(family, seed=seed)
    for row, length in enumerate(LENGTHS):
        inputs["input_ids"][row, length:] = 0
        inputs["attention_mask"][row, length:] = 0
    if family == "albert":
        return Batch((0, 1, 2), inputs, torch.tensor([2, 0, 1]))
    targets = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(seed + 1))
    targets[:, :2] = IGNORED
    if family not in SEQ2SEQ:
        targets[inputs["attention_mask"] == 0] = IGNORED
    return Batch((0, 1, 2), inputs, targets)


def rows_alone(batch: Batch) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Inputs and targets of each row, without its padding."""
    found = []
    for row, length in enumerate(LENGTHS):
        inputs = {
            name: one[row : row + 1, : None if name.startswith("decoder") else length]
            for name, one in batch.inputs.items()
        }
        targets = batch.targets[row : row + 1]
        is_causal = targets.ndim == 2 and "decoder_input_ids" not in inputs
        found.append((inputs, targets[:, :length] if is_causal else targets))
    return found


def note(seen: list[tuple[str, Tensor]], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    seen.append((name, output))


def moments_by_hand(model, batches: list[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """(r, r) each, token by token; z is averaged over the tokens that the loss depends on."""
    sites = find_sites(model)
    moments = {site.name: torch.zeros(2, site.rank, site.rank, dtype=torch.double) for site in sites}
    n_answers, n_seen = 0, dict.fromkeys(moments, 0)
    for batch in batches:
        for inputs, targets in rows_alone(batch):
            seen: list[tuple[str, Tensor]] = []
            handles = [
                site.module.lora_A["default"].register_forward_hook(partial(note, seen, site.name)) for site in sites
            ]
            logits = model(**inputs).logits
            loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
            gradients = torch.autograd.grad(loss, [output for _, output in seen])
            for handle in handles:
                handle.remove()
            for (name, output), gradient in zip(seen, gradients, strict=True):
                for z, u in zip(output.flatten(0, -2).double(), gradient.flatten(0, -2).double(), strict=True):
                    n_seen[name] += bool(u.any())
                    moments[name] += torch.stack([torch.outer(z, z) * bool(u.any()), torch.outer(u, u)]).detach()
            n_answers += int((targets != IGNORED).sum())
    return {name: (one[0] / n_seen[name], one[1] / n_answers) for name, one in moments.items()}


MODELS = {
    "llama": lambda: tiny_peft_model("llama", 2),
    "opt": lambda: tiny_peft_model("opt", 1),  # its MLP sees (rows * tokens, d)
    "gpt2": lambda: tiny_peft_model("gpt2", 1, use_rslora=True),
    "bart": lambda: tiny_peft_model("bart", 1),
    "t5": lambda: tiny_peft_model("t5", 1),
    "albert": lambda: odd_peft_model("albert"),  # its layers are one and the same
}


@pytest.mark.parametrize("family", MODELS)
def test_the_moments_are_those_of_every_token_of_every_row_alone(family):
    model = MODELS[family]()
    batches = [padded_batch(family), padded_batch(family, seed=5)]
    found = gram_matrices(model.get_base_model(), find_sites(model), batches)
    expected = moments_by_hand(model, batches)
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        for one, other in zip(pair, expected[name], strict=True):
            assert one.dtype == torch.double and other.abs().max() > 0
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_activations_that_are_computed_again_change_nothing_and_nothing_stays_behind(family):
    model = MODELS[family]()
    sites, batches = find_sites(model), [padded_batch(family)]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    expected = gram_matrices(model.get_base_model(), sites, batches)
    found = gram_matrices(model.get_base_model(), sites, batches, gradient_checkpointing=True)
    for name, pair in found.items():
        torch.testing.assert_close(pair, expected[name])
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(site.module.lora_A["default"]._forward_hooks for site in sites)


def test_twice_the_scale_is_four_times_the_moment_of_the_gradients():
    """As s is in u, and a site at zero has no gradient."""
    model, batch = (
        tiny_peft_model("llama", 1, target_modules=["down_proj", "q_proj", "embed_tokens"]),
        padded_batch("llama"),
    )
    sites = find_sites(model)
    found = gram_matrices(model.get_base_model(), sites, [batch])
    of_embedding = found["model.embed_tokens"]
    assert [one.tolist() for one in of_embedding] == [[[0.0]], [[0.0]]]  # nothing is known of it
    name = "model.layers.0.mlp.down_proj"
    (site,) = (site for site in sites if site.name == name)
    nn.init.zeros_(site.module.lora_B["default"].weight)
    small = gram_matrices(model.get_base_model(), sites, [batch])[name]
    assert not small[0].any() and not small[1].any()
    site.module.lora_B["default"].weight.data.fill_(1e-6)  # too little to move what comes after it
    before = gram_matrices(model.get_base_model(), sites, [batch])[name]
    site.module.set_scale("default", 2.0)
    after = gram_matrices(model.get_base_model(), sites, [batch])[name]
    torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(after[1], 4 * before[1], rtol=1e-3, atol=0)


def test_numbers_that_are_none_are_refused():
    model, batch = tiny_peft_model("llama", 1), padded_batch("llama")
    find_sites(model)[0].module.lora_A["default"].weight.data[0] = float("nan")
    with pytest.raises(MeasureError, match="not a number. Check the adapter for NaN weights"):
        gram_matrices(model.get_base_model(), find_sites(model), [replace(batch)])


def test_what_nothing_reads_does_not_count_as_input():
    """In the last layer only the answers are read, so that more text in front of them changes nothing there."""
    model = tiny_peft_model("llama", 1, rank=1, target_modules=["down_proj"])
    (site,) = find_sites(model)
    inputs, targets = tiny_inputs("llama", rows=1, tokens=9), torch.full((1, 9), IGNORED)
    targets[0, -2:] = 5
    M_A, M_B = gram_matrices(model.get_base_model(), [site], [Batch((0,), inputs, targets)])[site.name]
    outputs: list[tuple[str, Tensor]] = []
    handle = site.module.lora_A["default"].register_forward_hook(partial(note, outputs, site.name))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    squares = outputs[0][1].flatten().square()
    assert float(M_A) == pytest.approx(float(squares[-2:].mean()), rel=1e-4) and float(M_B) > 0
    assert float(M_A) != pytest.approx(float(squares.mean()), rel=0.05)
