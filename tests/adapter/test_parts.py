"""The table of parts: what lines up with what, by hand, and selections that stock PEFT loads again."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import find_sites, site_parameters
from lorazor.errors import SettingsError
from tests.tiny_models import tiny_inputs, tiny_model, tiny_peft_model

TARGETS = ["q_proj", "down_proj", "embed_tokens"]
NAMES = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.embed_tokens"]


def make_model():
    """Three sites: of rank 2, of rank 3, and an embedding, which is one part."""
    model = tiny_peft_model("llama", 1, rank=2, target_modules=TARGETS, rank_pattern={"q_proj": 3})
    torch.nn.init.normal_(find_sites(model)[2].module.lora_embedding_A["default"], std=0.2)
    return model


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_parts_stand_site_by_site_and_know_their_size():
    parts = Parts(tuple(find_sites(make_model())))
    assert [site.name for site in parts.sites] == NAMES
    assert len(parts) == 6 and parts.site_of == [0, 0, 1, 1, 1, 2]
    assert parts.n_parameters == [48 + 32] * 2 + [32 + 32] * 3 + [2 * (64 + 32)]
    gates = torch.tensor([0.0, 0.5, 0, 0, 0, -1])
    assert (parts.n_sites_kept(gates), parts.n_parameters_kept(gates)) == (2, 80 + 192)
    assert len(Parts(())) == 0


def test_a_folder_and_a_live_model_have_the_same_parts(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    live, read = Parts(tuple(find_sites(model))), Parts(read_adapter(tmp_path).sites)
    assert [site.name for site in read.sites] == NAMES
    assert (read.site_of, read.n_parameters) == (live.site_of, live.n_parameters)


def test_numbers_travel_with_the_names_of_their_sites():
    parts = Parts(tuple(find_sites(make_model())))
    by_site = parts.by_site([0.0, 1, 2, 3, 4, 5])
    assert {name: own.tolist() for name, own in by_site.items()} == dict(
        zip(NAMES, [[0, 1], [2, 3, 4], [5]], strict=True)
    )
    shuffled = {name: by_site[name] for name in reversed(NAMES)}
    assert parts.from_sites(shuffled).tolist() == [0, 1, 2, 3, 4, 5]


def test_gates_of_parts_are_columns_of_b():
    model, inputs = make_model(), tiny_inputs("llama")
    parts = Parts(tuple(find_sites(model)))
    gates = torch.tensor([0.0, 0.5, 1, 0, 2, 0.5])
    with parts.gated(gates):
        found = logits(model, inputs)
    by_hand = copy.deepcopy(model)
    for site, own in zip(find_sites(by_hand), gates.split([2, 3, 1]), strict=True):
        site_parameters(site.module, "default")[1].data.mul_(own)
    torch.testing.assert_close(found, logits(by_hand, inputs), atol=1e-5, rtol=1e-5)


GATES = {
    "some directions": [1.0, 0, 0, 1, 1, 1],
    "whole sites": [1.0, 1, 0, 0, 0, 0],
    "weights": [0.5, 0.5, 0, -1, 2, 0.25],
    "everything": [1.0] * 6,
}


@pytest.mark.parametrize("kind", GATES)
def test_a_selection_of_parts_says_what_its_gates_say(kind):
    parts = Parts(tuple(find_sites(make_model())))
    gates = torch.tensor(GATES[kind])
    selection = parts.selection(gates, "by hand", {"n": 1}, [1.0, 2, 3, 4, 5, 6], {"from": "here"})
    entries = {site.name: site for site in selection.sites}
    assert {name: entries[name].score for name in NAMES} == dict(zip(NAMES, [3, 12, 6], strict=True))
    for name, own in zip(NAMES, gates.split([2, 3, 1]), strict=True):
        said = dict.fromkeys(range(len(own)), entries[name].weight)
        if entries[name].components is not None:
            said = dict(
                zip(entries[name].components, entries[name].component_weights or [1.0] * len(own), strict=False)
            )
        assert not own.any() or [said.get(part, 0.0) for part in range(len(own))] == own.tolist()
        assert entries[name].keep == bool(own.any())
        assert entries[name].kept_rank == (int(own.count_nonzero()) if len(own) > 1 else 2) or not own.any()
        assert (entries[name].components is None) == (len(own.unique()) == 1)
    assert (selection.method, selection.settings, selection.provenance) == ("by hand", {"n": 1}, {"from": "here"})


@pytest.mark.parametrize("kind", ["some directions", "weights"])
def test_what_is_written_computes_in_stock_peft_what_the_gates_compute(kind, tmp_path):
    model, inputs = make_model(), tiny_inputs("llama")
    model.save_pretrained(tmp_path / "full", save_embedding_layers=False)
    parts = Parts.singular_(find_sites(model))
    gates = torch.tensor(GATES[kind])
    with parts.gated(gates):
        expected = logits(model, inputs)
    write_pruned(tmp_path / "full", parts.selection(gates, "by hand", {}), tmp_path / "small")
    loaded = PeftModel.from_pretrained(tiny_model("llama", 1), tmp_path / "small").eval()
    torch.testing.assert_close(logits(loaded, inputs), expected, atol=1e-5, rtol=1e-4)


def test_gates_of_another_number_are_refused():
    parts = Parts(tuple(find_sites(make_model())))
    with pytest.raises(SettingsError, match="3 sites with 6 gates"), parts.gated(torch.ones(3)):
        pass
