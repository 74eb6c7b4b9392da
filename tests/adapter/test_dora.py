"""DoRA, of which whole sites stay or go, against stock PEFT and its equation by hand."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.gates import fold_, gated, is_gated, silenced, site_gates
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import find_sites
from lorazor.errors import SettingsError, UnsupportedAdapterError
from lorazor.selection import Selection
from tests.adapter.test_folder import described
from tests.adapter.test_prune import PREFIX, logits, selection_of
from tests.tiny_folders import make_folders, write_rows
from tests.tiny_models import tiny_inputs, tiny_model, tiny_peft_model

FAMILIES = ("llama", "gpt2")  # nn.Linear, and Conv1D, whose weight lies the other way


def dora_model(family="llama", n_layers=2, **settings):
    """With magnitudes that are not those of the base weights."""
    model = tiny_peft_model(family, n_layers, use_dora=True, **settings)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def switched_off_by_hand(model, names):
    for name in names:
        model.get_submodule(PREFIX + name).enable_adapters(False)
    found = logits_of(model)
    for name in names:
        model.get_submodule(PREFIX + name).enable_adapters(True)
    return found


def logits_of(model):
    return logits(model, model.get_base_model().config.model_type)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_sites_are_switched_off_in_stock_peft(family, tmp_path):
    model = dora_model(family)
    model.save_pretrained(tmp_path / "full")
    folder = read_adapter(tmp_path / "full")
    assert described(folder.sites) == described(find_sites(model))
    assert all(site.is_dora and site.n_gates == 1 for site in (*folder.sites, *find_sites(model)))
    dropped = [site.name for site in folder.sites][1::2]
    result = write_pruned(tmp_path / "full", selection_of(tmp_path / "full", lambda name: name not in dropped),
                          tmp_path / "pruned")  # fmt: skip
    expected = switched_off_by_hand(model, dropped)
    assert (expected - logits_of(model)).abs().max() > 1e-2
    with silenced(site for site in find_sites(model) if site.name in dropped):
        torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(tiny_model(family, 2), tmp_path / "pruned")
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("full", "pruned"))
    assert after.keys() == {key for key in before if not any(f".{name}." in f".{key}" for name in dropped)}
    assert result.n_parameters_kept == sum(tensor.numel() for tensor in after.values())


def test_scalings_are_folded_into_b(tmp_path):
    """S B A is the same, and so is its norm with W."""
    model = dora_model(use_rslora=True, alpha_pattern={"q_proj": 3}, rank_pattern={"v_proj": 2})
    model.save_pretrained(tmp_path / "full")
    write_pruned(tmp_path / "full", selection_of(tmp_path / "full", lambda name: True), tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["use_dora"] is True and config["use_rslora"] is False and config["alpha_pattern"] == {}
    loaded = PeftModel.from_pretrained(tiny_model("llama", 2), tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gate_is_on_what_the_site_adds(family):
    """By the equation: (1 - g) W x + g m (W + s B A) x / ||W + s B A||, of one site, whose output is looked at."""
    model, gate = dora_model(family, 1), 0.3
    site = find_sites(model)[0]
    module = site.module
    x = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(1))
    weight = module.base_layer.weight.T if family == "gpt2" else module.base_layer.weight
    bias = module.base_layer.bias if module.base_layer.bias is not None else 0
    updated = weight + site.scaling * module.lora_B["default"].weight @ module.lora_A["default"].weight
    magnitudes = module.lora_magnitude_vector["default"].weight / updated.norm(dim=1)
    full = x @ (magnitudes[:, None] * updated).T
    expected = (1 - gate) * (x @ weight.T) + gate * full + bias
    with torch.no_grad(), gated([site], torch.tensor([gate])):
        assert is_gated(site)
        torch.testing.assert_close(module(x), expected)
    assert not is_gated(site)
    of_rows = torch.tensor([[1.0, 0.0]])
    with torch.no_grad(), gated([site], of_rows):
        by_rows = module(x)
    with torch.no_grad():
        assert torch.equal(by_rows[:1], module(x[:1])) and torch.equal(by_rows[1:], module.base_layer(x[1:]))


def test_gates_get_the_gradients_of_differences():
    model = dora_model("gpt2", 1)  # its norms compute in float64, those of Llama do not
    sites, inputs = find_sites(model), tiny_inputs("gpt2")
    gates = torch.full((len(sites),), 0.5, dtype=torch.float64, requires_grad=True)
    model.double()

    def total(values):
        with gated(sites, values):
            return model(**inputs).logits.square().sum()

    (found,) = torch.autograd.grad(total(gates), gates)
    for index in range(len(sites)):
        step = torch.zeros(len(sites), dtype=torch.float64)
        step[index] = 1e-5
        with torch.no_grad():
            slope = (total(gates.detach() + step) - total(gates.detach() - step)) / 2e-5
        torch.testing.assert_close(found[index], slope, rtol=1e-4, atol=1e-6)


def test_what_no_file_can_hold_is_refused(tmp_path):
    model = dora_model()
    model.save_pretrained(tmp_path / "full")
    sites, before = find_sites(model), logits(model)
    for gate in (0.5, 0.0):
        gates = site_gates(sites, [1.0] * (len(sites) - 1) + [gate])
        with pytest.raises(UnsupportedAdapterError, match=r"is DoRA.*peft\.save_as_lora"):
            fold_(sites, gates)
    fold_(sites, torch.ones(len(sites)))
    assert torch.equal(logits(model), before)
    entries = [site.entry(True, weight=0.5) for site in sites]
    with pytest.raises(UnsupportedAdapterError, match=r"is DoRA.*weight 0\.5 cannot be multiplied"):
        write_pruned(tmp_path / "full", Selection(tuple(entries), "weights", {}), tmp_path / "out")
    entries = [site.entry(True, components=(0,)) for site in sites]
    with pytest.raises(UnsupportedAdapterError, match="it has no directions to choose from"):
        write_pruned(tmp_path / "full", Selection(tuple(entries), "components", {}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_an_embedding_with_dora_is_refused(tmp_path):
    tiny_peft_model("llama", 1, use_dora=True, target_modules=["embed_tokens", "q_proj"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=r"embed_tokens is an embedding with DoRA.*save_as_lora"):
        read_adapter(tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("dora"), use_dora=True, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params_fraction": 0.5}, "it has no directions, and sites stay or go whole. Pass --by site"),
        ({"max_rank": 2}, "it has no directions"),
        ({"params_fraction": 0.5, "by": "site", "score": "energy"}, "does not say what DoRA does"),
    ],
)
def test_shrinks_that_dora_has_not_are_refused(folders, tmp_path, settings, message):
    with pytest.raises(SettingsError, match=message):
        lorazor.shrink(folders.adapter, folders.validation, out=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_without_data_nothing_is_known_of_dora(folders, tmp_path):
    with pytest.raises(SettingsError, match="Pass --data, which scores by credit"):
        lorazor.shrink(folders.adapter, out=tmp_path / "run", params_fraction=0.5, by="site")
    result = lorazor.shrink(folders.adapter, out=tmp_path / "other", params_fraction=0.5, by="layer",
                            score="first-layers")  # fmt: skip
    assert {site.layer for site in read_adapter(result.pruned.path).sites} == {0, 1}
    assert not any(one.is_dead for one in lorazor.inspect(folders.adapter).sites)


@pytest.mark.slow
def test_a_boundary_and_a_healed_shrink(folders, tmp_path):
    """Losses of both are those of the folder in stock PEFT, which `shrink` compares itself; the healed one learns m."""
    reading = lorazor.DataSettings(batch_size=2)
    found = lorazor.find_boundary(folders.adapter, folders.validation, out=tmp_path / "cut", rule="manual", boundary=2,
                                  reading=reading)  # fmt: skip
    assert {site.layer for site in read_adapter(found.pruned.path).sites} == {0, 1}
    heal = write_rows(tmp_path / "heal.jsonl", range(30, 36))
    result = lorazor.shrink(
        folders.adapter, folders.validation, out=tmp_path / "run", by="site", params_fraction=0.5, heal=str(heal),
        heal_steps=20, heal_lr=3e-3, heal_from="labels", reading=reading,
    )  # fmt: skip
    assert result.loaded_differs_by < 1e-4
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folders.adapter, result.pruned.path))
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    assert {key.rpartition(".lora_")[2] for key in moved} == {"A.weight", "B.weight", "magnitude_vector"}
    base = AutoModelForCausalLM.from_pretrained(folders.base)
    assert len(find_sites(PeftModel.from_pretrained(base, result.pruned.path))) == result.pruned.n_sites_kept
