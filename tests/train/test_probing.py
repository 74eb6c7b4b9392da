"""What a step costs with LoRA on some sites: what is saved, what lives, and that probing leaves no trace."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import find_sites
from lorazor.data.batches import IGNORED
from lorazor.measure.peak import counting_peak
from lorazor.settings import FitSettings
from lorazor.train.anatomy import Anatomy
from lorazor.train.answers import TARGETS
from lorazor.train.disconnect import disconnect_
from lorazor.train.fit import fit
from lorazor.train.probing import Probing
from tests.tiny_models import tiny_inputs
from tests.train.tiny_training import tiny_llama


def saved_bytes(model: PeftModel, batch: dict) -> int:
    """What autograd keeps of a forward pass, each storage once, weights left out."""
    held = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(one.nbytes() for one in saved.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "is_kept",
    [
        lambda site: True,
        lambda site: site.layer == 1,  # the frozen layer below saves nothing
        lambda site: site.name.endswith("layers.0.mlp.down_proj"),
        lambda site: site.kind.endswith(("q_proj", "k_proj", "v_proj")),  # one input for three
        lambda site: site.kind.endswith("q_proj") or site.name.endswith("1.mlp.gate_proj"),
    ],
)
def test_saved_bytes_of_a_choice_are_told_from_one_pass_with_all_sites(is_kept, dropout):
    model, batch = tiny_llama(lora_dropout=dropout), dict(tiny_inputs("llama"))
    sites = find_sites(model)
    choice = [is_kept(site) for site in sites]
    anatomy = Anatomy.of(model, lambda: model(**batch))
    _, frozen, of_sites, _ = anatomy.features("bytes")
    cut = copy.deepcopy(model)
    disconnect_(cut, find_sites(cut), choice)
    start = min(time for time, stays in zip(anatomy.times, choice, strict=True) if stays)
    lowest = [site for site, time, stays in zip(sites, anatomy.times, choice, strict=True) if stays and time == start]
    # told too high by the masks of the lowest sites' dropout: their input needs no gradient, so that none is kept
    masks = 0
    if dropout and start > min(anatomy.times):
        masks = 4 * batch["input_ids"].numel() * sum(cast(int, site.module.in_features) for site in lowest)
    assert frozen.of(choice) + of_sites.of(choice) - masks == saved_bytes(cut, batch)
    if not all(choice):
        assert saved_bytes(cut, batch) < 0.95 * saved_bytes(model, batch)


def test_the_peak_on_the_cpu_is_of_the_tensors_that_live():
    linear = nn.Linear(100, 100, bias=False).requires_grad_(False)  # 40,000 bytes
    with counting_peak(linear) as peak:
        x = torch.zeros(25, 100)  # 10,000
        y = linear(x)
        view = y.view(-1)
        del y
        assert peak() == 60_000
        del view, x
        z = torch.zeros(15, 100) * 2
    assert peak() == 60_000
    del z


def probing_of(model: PeftModel, folder: Path, precision: str = "float32", **settings) -> Probing:
    class Padding:
        pad_token_id, pad_token_type_id, bos_token_id, eos_token_id = 0, 0, 1, 2

        def save_pretrained(self, folder: str) -> None:
            """Nothing: the Trainer asks for it."""

    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(8, 24, (12,), generator=generator).tolist():
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, TARGETS: [*ids[1:], IGNORED]})
    loaded = Loaded(model.get_base_model(), Padding(), lambda: None, "causal", [])  # pyright: ignore
    fit = FitSettings(steps=6, precision=precision, **settings)
    return Probing(model, loaded, rows, folder, fit, 4)  # pyright: ignore


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_predicted_peak_is_that_of_a_choice_that_was_not_probed(tmp_path, checkpointing):
    model = tiny_llama()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    probing = probing_of(model, tmp_path, gradient_checkpointing=checkpointing)
    costs, probes, measured = probing.costs("bytes")
    assert len(probes) == 6 and all(probes[0])
    choices = [[True] * 14, [site.kind.endswith(("q_proj", "up_proj")) for site in find_sites(model)]]
    choices.append([site.layer == 1 and not site.kind.endswith("down_proj") for site in find_sites(model)])
    for choice, value in zip(choices, probing.measure("bytes", choices), strict=True):
        assert costs.of(choice) == pytest.approx(value, rel=0.05)
    recomputed = probing.recomputed(14)
    if checkpointing:
        assert recomputed is None
    else:
        again = probing_of(model, tmp_path, gradient_checkpointing=True)
        assert recomputed == again.costs("bytes")[2][0] < measured[0]
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert trained == {name for name, one in model.named_parameters() if one.requires_grad}
    assert all(one.grad is None for one in model.parameters()) and model.training
    assert not any(site.module.disable_adapters for site in find_sites(model))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_costs_after_a_training_what_it_cost_before(tmp_path, precision):
    """A Trainer leaves its precision around the model, and marks it as done for the next one."""
    model = tiny_llama()
    probing = probing_of(model, tmp_path, precision=precision)
    choices = [[True] * 14, [site.layer == 1 for site in find_sites(model)]]
    before = probing.measure("bytes", choices)
    fit(model, probing.loaded, probing.rows, tmp_path, probing.training, 4)
    assert probing.measure("bytes", choices) == before


def test_the_step_with_the_largest_batch_is_probed(tmp_path):
    probing = probing_of(tiny_llama(), tmp_path)
    lengths = [len(row["input_ids"]) for row in probing.rows]  # pyright: ignore
    largest = probing._batch(4, is_largest=True)
    assert max(len(row["input_ids"]) for row in largest) == max(lengths)  # pyright: ignore
    typical = probing._batch(4, is_largest=False)
    assert max(len(row["input_ids"]) for row in typical) <= max(lengths)  # pyright: ignore


def test_seconds_are_ratios_within_a_round(tmp_path, monkeypatch):
    """A clock that is twice as slow in every other round gives the same ratios."""
    model = tiny_llama()
    sites = find_sites(model)
    now = [0.0]
    probing = probing_of(model, tmp_path)
    choices = [[True] * 14, [site.layer == 1 for site in sites]]
    calls = [0]

    def clock() -> float:
        step, is_end = divmod(calls[0], 2)
        calls[0] += 1
        if is_end:
            now[0] += (1 + step // 2 % 2) * (2.0 if step % 2 == 0 else 0.5)
        return now[0]

    everything, chosen = dataclasses.replace(probing, clock=clock).measure("seconds", choices)
    assert chosen / everything == pytest.approx(0.25)
