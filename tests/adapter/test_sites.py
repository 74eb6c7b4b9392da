"""Sites against an independent walk over the model, and against the order in which layers really run."""

import dataclasses
import json
import re

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from lorazor.adapter.sites import (
    _VARIANT_FIELDS,
    check_is_plain_lora,
    choose_stack,
    find_sites,
    locate,
    site_parameters,
    stack_sizes,
)
from lorazor.errors import AdapterError, UnsupportedAdapterError
from tests.tiny_models import (
    FAMILIES,
    SEQ2SEQ,
    STACKS,
    lora_config,
    randomise_b_,
    tiny_inputs,
    tiny_model,
    tiny_peft_model,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_what_a_walk_over_the_model_finds_in_the_order_it_runs(family):
    model = tiny_peft_model(family)
    prefix = "base_model.model."
    modules = {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    calls = []
    hooks = [m.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, m in modules.items()]
    with torch.no_grad():
        model(**tiny_inputs(family))
    for hook in hooks:
        hook.remove()

    sites = find_sites(model)

    assert {site.name: site.module for site in sites} == modules
    assert sorted(calls) == sorted(modules)  # every site runs, once
    ran = dict.fromkeys(_layer_by_hand(name) for name in calls)
    assert list(dict.fromkeys((site.stack, site.layer) for site in sites)) == list(ran)
    assert list(stack_sizes(sites).items()) == [(stack, 3) for stack in STACKS[family]]
    for site in sites:
        a, b = site.module.lora_A["default"].weight, site.module.lora_B["default"].weight
        assert (site.rank, site.scaling, site.n_parameters) == (a.shape[0], 2.0, a.numel() + b.numel())
        assert site.scaling == site.module.scaling["default"]


def _layer_by_hand(name):
    """The layer of a module, by cutting its name at the stacks this family is known to have."""
    stack = next(stack for stacks in STACKS.values() for stack in stacks if name.startswith(stack + "."))
    return stack, int(name[len(stack) + 1 :].split(".")[0])


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_a_boundary_runs_through_the_decoder_unless_told_otherwise(family):
    sites = find_sites(tiny_peft_model(family))
    encoder, decoder = STACKS[family]
    assert choose_stack(sites) == decoder
    assert choose_stack(sites, encoder) == encoder
    assert choose_stack(sites, "encoder") == encoder
    with pytest.raises(AdapterError, match=f"stack='layers.9' names 0 stacks.*{re.escape(encoder)} .3 layers."):
        choose_stack(sites, "layers.9")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", ("model.layers", 0, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11, "attn.c_attn")),
        ("decoder.block.3.layer.1.EncDecAttention.q", ("decoder.block", 3, "layer.EncDecAttention.q")),
        ("model.layers.2.mlp.experts.7.w1", ("model.layers", 2, "mlp.experts.w1")),
        ("h.4.mlp.c_fc", ("h", 4, "mlp.c_fc")),
        ("model.embed_tokens", (None, None, "model.embed_tokens")),
        ("lm_head", (None, None, "lm_head")),
    ],
)
def test_locate(name, expected):
    assert locate(name) == expected


def test_layers_are_ordered_as_numbers_not_as_text():
    sites = find_sites(tiny_peft_model("llama", n_layers=11, target_modules=["q_proj"]))
    assert [site.layer for site in sites] == list(range(11))


def test_several_adapters_on_one_model_are_told_apart():
    model = tiny_peft_model("llama", target_modules=["q_proj"])
    model.add_adapter("wide", lora_config("llama", rank=6, lora_alpha=3, target_modules=["up_proj"]))
    assert {(site.kind, site.rank, site.adapter) for site in find_sites(model)} == {("self_attn.q_proj", 4, "default")}
    wide = find_sites(model, "wide")
    assert {(site.kind, site.rank, site.scaling) for site in wide} == {("mlp.up_proj", 6, 0.5)}
    model.set_adapter("wide")
    assert find_sites(model) == wide
    with pytest.raises(AdapterError, match="adapter='narrow' is not on this model. It has: default, wide."):
        find_sites(model, "narrow")


def test_two_active_adapters_must_be_named():
    model = tiny_peft_model("llama")
    model.add_adapter("second", lora_config("llama"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="2 active adapters: default, second. Name one"):
        find_sites(model)
    assert len(find_sites(model, "second")) == 21


def test_modules_to_save_are_no_sites():
    model = tiny_peft_model("bert")
    assert model.peft_config["default"].modules_to_save  # the classifier, by its task type
    assert len(find_sites(model)) == 18
    assert not [site for site in find_sites(model) if "classifier" in site.name]


def test_output_layer_and_embedding_are_outside_every_stack_and_last():
    model = tiny_peft_model("llama", target_modules=["embed_tokens", "q_proj", "lm_head"])
    sites = find_sites(model)
    assert [(site.name, site.stack, site.layer) for site in sites[3:]] == [
        ("lm_head", None, None),
        ("model.embed_tokens", None, None),
    ]
    assert [site.layer for site in sites[:3]] == [0, 1, 2]
    assert sites[4].n_parameters == 4 * (64 + 32)
    assert [tuple(parameter.shape) for parameter in site_parameters(sites[4].module, "default")] == [(4, 64), (32, 4)]


def test_only_sites_outside_stacks_leave_no_boundary_to_move():
    sites = find_sites(tiny_peft_model("llama", target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match="no LoRA site in a stack"):
        choose_stack(sites)


def test_two_stacks_without_a_decoder_must_be_chosen_between():
    class TwoTowers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for tower in ("text", "image"):
                layers = torch.nn.ModuleList([torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)}) for _ in range(2)])
                setattr(self, tower, torch.nn.ModuleDict({"layers": layers}))

    sites = find_sites(get_peft_model(TwoTowers(), LoraConfig(target_modules=["fc"])))
    with pytest.raises(AdapterError, match=r"several stacks: image.layers \(2 layers\), text.layers \(2 layers\)"):
        choose_stack(sites)
    assert choose_stack(sites, "text") == "text.layers"


def test_ranks_and_scalings_follow_patterns():
    model = tiny_peft_model(
        "llama", lora_alpha=4, rank_pattern={"q_proj": 2, r".*layers\.1\.mlp\.up_proj": 8}, alpha_pattern={"q_proj": 5}
    )
    found = {site.name: (site.rank, site.scaling) for site in find_sites(model)}
    assert found["model.layers.0.self_attn.q_proj"] == (2, 2.5)
    assert found["model.layers.1.mlp.up_proj"] == (8, 0.5)
    assert found["model.layers.2.mlp.up_proj"] == (4, 1.0)


def test_rslora_divides_by_the_root_of_the_rank():
    sites = find_sites(tiny_peft_model("llama", lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 9}))
    assert {(site.rank, site.scaling) for site in sites} == {(4, 3.0), (9, 2.0)}
    assert all(site.scaling == site.module.scaling["default"] for site in sites)


def test_the_bias_of_b_counts_as_a_parameter():
    plain = find_sites(tiny_peft_model("opt", target_modules=["q_proj"]))
    biased = find_sites(tiny_peft_model("opt", target_modules=["q_proj"], lora_bias=True))
    assert [b.n_parameters - p.n_parameters for p, b in zip(plain, biased, strict=True)] == [32] * 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_an_adapter_added_by_transformers_has_the_same_sites(family):
    model = tiny_model(family)
    model.add_adapter(lora_config(family), "ours")
    randomise_b_(model, "ours")
    native, wrapped = find_sites(model), find_sites(tiny_peft_model(family))
    assert [(s.name, s.rank, s.scaling, s.n_parameters) for s in native] == [
        (s.name, s.rank, s.scaling, s.n_parameters) for s in wrapped
    ]
    assert {site.adapter for site in native} == {"ours"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base weights"),
    ],
)
def test_adapters_whose_gate_0_is_not_the_base_model_are_refused(settings, message):
    model = get_peft_model(tiny_model("llama", n_layers=1), LoraConfig(**{"target_modules": ["q_proj"], **settings}))
    with pytest.raises(UnsupportedAdapterError, match=message):
        find_sites(model)


def test_other_methods_are_refused():
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    with pytest.raises(UnsupportedAdapterError, match="is a IA3 adapter"):
        find_sites(get_peft_model(tiny_model("llama", n_layers=1), config))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_leave_the_base_alone_are_accepted(init):
    config = json.loads(json.dumps({"peft_type": "LORA", "init_lora_weights": init}))
    check_is_plain_lora(config, "adapter")


def test_merged_adapters_are_refused_until_unmerged():
    model = tiny_peft_model("llama")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        find_sites(model)
    model.unmerge_adapter()
    assert len(find_sites(model)) == 21


def test_a_model_without_adapter_is_refused():
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no PEFT adapter"):
        find_sites(tiny_model("llama", n_layers=1))
    unloaded = tiny_peft_model("llama", n_layers=1).unload()
    with pytest.raises(AdapterError, match="LlamaForCausalLM"):
        find_sites(unloaded)


def test_every_lora_variant_that_peft_knows_is_refused():
    """A new PEFT with a new variant must fail here, not silently pass."""
    variants = {f.name for f in dataclasses.fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants and variants - {"use_dora"} <= set(_VARIANT_FIELDS)  # DoRA: whole sites, test_dora.py
