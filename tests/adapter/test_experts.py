"""LoRA on parameters: PEFT's wrappers say what is which, and stock PEFT on the written folder what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from lorazor.adapter.directions import energies, site_norms, to_singular_form_
from lorazor.adapter.experts import names_of_parameters, of_each_expert, stacked
from lorazor.adapter.folder import load_tensors, read_adapter
from lorazor.adapter.gates import silenced
from lorazor.adapter.growth import grow_site_
from lorazor.adapter.live import base_beside, save_live
from lorazor.adapter.load import attach, load, swap
from lorazor.adapter.prune import write_pruned
from lorazor.adapter.sites import find_sites
from lorazor.errors import AdapterError, SettingsError, UnsupportedAdapterError
from lorazor.select.goal import Goal
from lorazor.selection import Selection
from lorazor.settings import ModelSettings, ShrinkSettings
from lorazor.train.disconnect import disconnect_
from tests.data.test_batches import byte_tokenizer
from tests.tiny_mixtures import (
    EXPERTS,
    N_EXPERTS,
    N_LAYERS,
    RANK,
    SIZES,
    logits,
    on_experts,
    tiny_mixture,
    wrappers,
)
from tests.tiny_models import randomise_b_

# PEFT 0.21 looks for patterns among modules alone; the ranks are those of the patterns nonetheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def keeping(folder, kept, **components) -> Selection:
    entries = [
        site.entry(site.name in kept, components=components.get(site.kind.rpartition(".")[2]))
        for site in read_adapter(folder).sites
    ]
    return Selection(tuple(entries), "manual")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_factors_of_an_expert_are_those_that_peft_adds_to_its_weight(family):
    for module in wrappers(on_experts(family)).values():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        pairs = of_each_expert(A, B, N_EXPERTS)
        assert [torch.equal(one, other) for one, other in zip(stacked(pairs), (A, B), strict=True)] == [True, True]
        for (down, up), expected in zip(pairs, module.get_delta_weight("default"), strict=True):
            product = module.scaling["default"] * up @ down
            torch.testing.assert_close(product.T if family == "gpt_oss" else product, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_sites_live_and_on_disk_are_the_parameters_that_peft_wraps(family, tmp_path):
    model = on_experts(family, rank_pattern={"experts.gate_up_proj": 4})
    found = {site.name: site for site in find_sites(model) if site.is_on_parameter}
    assert found.keys() == wrappers(model).keys() and len(found) == 2 * N_LAYERS
    for name, module in wrappers(model).items():
        site = found[name]
        assert (site.rank, site.n_experts, site.scaling) == (module.r["default"], 3, module.scaling["default"])
        assert site.n_parameters == module.lora_A["default"].weight.numel() + module.lora_B["default"].weight.numel()
    on_disk = {site.name: vars(site) for site in read_adapter(saved(model, tmp_path)).sites if site.is_on_parameter}
    assert on_disk.keys() == found.keys()
    assert all(vars(found[name]).items() >= fields.items() for name, fields in on_disk.items())


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_folder_that_keeps_one_of_two_parameters_is_right_in_stock_peft(family, inner, tmp_path):
    model = on_experts(family, rank_pattern={"experts.gate_up_proj": 4})
    folder = saved(model, tmp_path / "full")
    outer = "model.layers.0.mlp.experts.down_proj"
    kept = {outer.replace("down", "gate_up") if inner else outer, "model.layers.1.mlp.experts.down_proj"}
    write_pruned(folder, keeping(folder, kept), tmp_path / "small")
    for name, module in wrappers(model).items():
        if name not in kept:
            module.lora_B["default"].weight.data.zero_()
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            module.lora_B["default"].weight.data.zero_()
    stock = PeftModel.from_pretrained(tiny_mixture(family), tmp_path / "small").eval()
    assert wrappers(stock).keys() == kept
    torch.testing.assert_close(logits(stock), logits(model))


def test_directions_of_experts_are_pruned_as_columns_of_every_expert(tmp_path):
    model = on_experts()
    folder = saved(model, tmp_path / "full")
    kept = {site.name for site in read_adapter(folder).sites}
    write_pruned(folder, keeping(folder, kept, down_proj=(0,), gate_up_proj=(1,)), tmp_path / "small")
    before = logits(model)
    to_singular_form_(find_sites(model))
    torch.testing.assert_close(logits(model), before)
    for name, module in wrappers(model).items():
        B = module.lora_B["default"].weight
        gone = 1 if "down" in name else 0
        B.data.view(len(B), RANK, N_EXPERTS)[:, gone] = 0
    stock = PeftModel.from_pretrained(tiny_mixture(), tmp_path / "small").eval()
    assert {one.r["default"] for one in wrappers(stock).values()} == {1}
    torch.testing.assert_close(logits(stock), logits(model))


def test_norms_and_energies_are_those_of_what_peft_adds(tmp_path):
    model = on_experts()
    folder = read_adapter(saved(model, tmp_path))
    norms, of_directions = {one.site.name: one.norm for one in site_norms(folder)}, energies(folder)
    for name, module in wrappers(model).items():
        deltas = module.get_delta_weight("default").detach().double()
        assert norms[name] == pytest.approx(float(deltas.norm()), rel=1e-5)
        expected = torch.linalg.svdvals(deltas).square().sum(dim=0)[:RANK]  # the j-th of every expert
        torch.testing.assert_close(of_directions[name], expected, rtol=1e-5, atol=1e-9)


def test_what_a_parameter_cannot_do_is_said(tmp_path):
    model = on_experts()
    folder = read_adapter(saved(model, tmp_path))
    with pytest.raises(SettingsError, match=r"balanced.*experts\.down_proj.*fisher or credit"):
        Goal.of(ShrinkSettings(score="balanced"), folder, has_data=True)
    site = next(site for site in find_sites(model) if site.is_on_parameter)
    with pytest.raises(UnsupportedAdapterError, match=r"experts\.down_proj.*cannot grow"):
        grow_site_(site, 4, torch.Generator())


@pytest.mark.parametrize("kept", [("down_proj",), ("gate_up_proj",), ("down_proj", "gate_up_proj"), ()])
def test_a_wrapper_that_goes_leaves_the_other_one_of_its_module(kept, tmp_path):
    model = on_experts()
    for name, module in wrappers(model).items():
        if name.startswith("model.layers.0") and not name.endswith(kept or "none"):
            module.lora_B["default"].weight.data.zero_()
    expected, sites = logits(model), find_sites(model)
    stays = [not site.name.startswith("model.layers.0.mlp") or site.name.endswith(kept or "none") for site in sites]
    left = disconnect_(model, sites, stays)
    assert [site.name for site in find_sites(model)] == [site.name for site in left]
    torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(tiny_mixture(), tmp_path).eval()
    torch.testing.assert_close(logits(stock), expected)
    assert len(wrappers(stock)) == 2 + len(kept)


def test_adapters_on_experts_take_turns_on_a_base(tmp_path):
    base = tmp_path / "base"
    tiny_mixture().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    first, second = on_experts(seed=1), on_experts(seed=2, target_parameters=["experts.down_proj"])
    saved(first, tmp_path / "first"), saved(second, tmp_path / "second")
    loaded = load(tmp_path / "first", ModelSettings(model=str(base)))
    torch.testing.assert_close(logits(loaded.model), logits(first))
    for name, model in (("second", second), ("first", first)):
        loaded = swap(loaded, read_adapter(tmp_path / name))
        torch.testing.assert_close(logits(loaded.model), logits(model))


@pytest.mark.parametrize(
    ("targets", "modules", "expected"),
    [
        (["down_proj", "gate_up_proj"], ["a.experts", "a.experts.base_layer"], ["down_proj", "gate_up_proj"]),
        (["a.experts.up_proj", "experts.down_proj"], ["a.experts", "a.experts.base_layer"], ["down_proj", "up_proj"]),
        (["gate.weight", "down_proj"], ["a.gate"], ["weight"]),
        (["gate.weight", "a.experts.down_proj"], ["a.experts"], ["down_proj"]),
        (["down_proj"], ["a.q_proj"], []),  # a module of target_modules
    ],
)
def test_names_of_parameters_are_told_from_the_config(targets, modules, expected):
    found = names_of_parameters({"target_parameters": targets, "target_modules": ["q_proj"]}, modules)
    assert [name.rpartition(".")[2] for name in found.values()] == expected


@pytest.mark.parametrize(
    ("targets", "modules", "message"),
    [
        (["gate_up_proj", "down_proj"], ["a.experts"], "on 1 parameters of a.experts.*names down_proj, gate_up_proj"),
        (["b.experts.down_proj"], ["a.experts"], "on 1 parameters of a.experts.*names none"),
        (["experts.w1", "experts.w2"], ["a.experts", "a.experts.base_layer"], "which is 'w1'"),
    ],
)
def test_a_config_that_does_not_say_which_parameter_is_refused(targets, modules, message):
    with pytest.raises(AdapterError, match=message):
        names_of_parameters({"target_parameters": targets}, modules)


def test_a_rank_that_experts_do_not_share_is_refused(tmp_path):
    config = json.loads((saved(on_experts(), tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4, "rank_pattern": {"q_proj": 2}}))
    with pytest.raises(AdapterError, match="rank 6, but adapter_config.json says 4"):
        read_adapter(tmp_path)


def test_a_parameter_that_the_base_model_has_not_is_named(tmp_path):
    folder = read_adapter(saved(on_experts(), tmp_path))
    dense = MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_hidden_layers": 1}))
    with pytest.raises(AdapterError, match=r"3 of 6 sites .*layers\.1"):
        attach(dense, folder)


def test_parameters_in_another_order_than_known_are_seen(tmp_path):
    """A model that registers `down_proj` first has it inside, where the file of others has the other one."""

    def reordered():
        model = tiny_mixture()
        for layer in model.model.layers:
            own = layer.mlp.experts._parameters
            own["gate_up_proj"] = own.pop("gate_up_proj")  # last now
        return model

    config = LoraConfig(r=RANK, target_modules=[], target_parameters=EXPERTS)
    model = get_peft_model(reordered(), config)
    randomise_b_(model)
    model.save_pretrained(tmp_path)
    assert any("lora_" in key for key in load_tensors(read_adapter(tmp_path)))
    with pytest.raises(AdapterError, match="another one in the base model than its names say"):
        attach(reordered(), read_adapter(tmp_path))


def test_a_pass_with_one_of_two_parameters_leaves_the_base_as_it_was(tmp_path):
    """PEFT takes a parameter out and back in, as the last, and would nest the next adapter the other way round."""
    base = tmp_path / "base"
    tiny_mixture().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    both, inner = on_experts(seed=1), on_experts(seed=2, target_parameters=["experts.gate_up_proj"])
    saved(both, tmp_path / "both"), saved(inner, tmp_path / "inner")
    loaded = load(tmp_path / "inner", ModelSettings(model=str(base)))
    torch.testing.assert_close(logits(loaded.model), logits(inner))
    loaded = swap(loaded, read_adapter(tmp_path / "both"))
    torch.testing.assert_close(logits(loaded.model), logits(both))
    with silenced(site for site in loaded.sites if site.name.endswith("down_proj")):
        logits(loaded.model)
    loaded = swap(loaded, read_adapter(tmp_path / "both"))
    torch.testing.assert_close(logits(loaded.model), logits(both))


def test_a_model_in_memory_that_ran_with_one_of_two_parameters(tmp_path):
    model = on_experts()
    expected = logits(model)
    with silenced(site for site in find_sites(model) if site.name.endswith("down_proj")):
        logits(model)
    folder = save_live(model, tmp_path, byte_tokenizer())
    twin = swap(base_beside(model, folder, byte_tokenizer(), ModelSettings()), folder)
    torch.testing.assert_close(logits(twin.model), expected)
