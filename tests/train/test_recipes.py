"""Recipes, read as each trainer reads them and judged by stock PEFT: which modules got LoRA, and how."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorazor.adapter.sites import locate
from lorazor.errors import SelectionError, SettingsError
from lorazor.selection import SelectedSite, Selection
from lorazor.train.recipes import Style, recipe
from tests.tiny_models import FAMILIES, lora_targets, tiny_model

STYLES = get_args(Style)
N_LAYERS = 12  # layers 1, 10 and 11 begin alike

# PEFT sets fan_in_fan_out for GPT-2's Conv1D by itself, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is:UserWarning")


def selection_of(ranks: dict[str, int], kept: set[str]) -> Selection:
    """A selection over the sites in `ranks`."""
    sites = []
    for name, rank in ranks.items():
        stack, layer, kind = locate(name)
        keep = name in kept
        sites.append(SelectedSite(name=name, layer=layer, stack=stack, kind=kind, rank=rank, keep=keep, weight=0.5))
    return Selection(sites=tuple(sites), method="manual")


@functools.cache
def site_names(family: str, n_layers: int = N_LAYERS, *others: str) -> tuple[str, ...]:
    """The projections of a family, which are all sites there may be; `others` are names outside the layers."""
    targets = (*lora_targets(family), *others)
    names = (name for name, _ in tiny_model(family, n_layers).named_modules())
    return tuple(name for name in names if any(f".{name}".endswith(f".{target}") for target in targets))


def read(style: Style, text: str) -> LoraConfig:
    """The LoraConfig that the trainer builds from the recipe; task types play no part in which modules match."""
    return {"peft": _peft, "axolotl": _axolotl, "llama-factory": _llama_factory, "unsloth": _unsloth}[style](text)


def _peft(text: str) -> LoraConfig:
    names: dict[str, Any] = {}
    exec(text, names)
    return names["peft_config"]


def _axolotl(text: str) -> LoraConfig:
    read = yaml.safe_load(text)
    assert read.pop("adapter") == "lora"
    assert read.pop("lora_target_linear") is False
    assert isinstance(read["lora_alpha"], int)
    config = LoraConfig(
        r=read.pop("lora_r"),
        lora_alpha=read.pop("lora_alpha"),
        lora_dropout=read.pop("lora_dropout"),
        target_modules=read.pop("lora_target_modules", []),
        target_parameters=read.pop("lora_target_parameters", []),
        use_rslora=read.pop("peft_use_rslora", False),
        rank_pattern=read.pop("lora_rank_pattern", {}),
        alpha_pattern=read.pop("lora_alpha_pattern", {}),
    )
    assert not read
    return config


def _llama_factory(text: str) -> LoraConfig:
    read = yaml.safe_load(text)
    assert read.pop("finetuning_type") == "lora"
    config = LoraConfig(
        inference_mode=False,
        r=read.pop("lora_rank"),
        lora_alpha=read.pop("lora_alpha"),
        lora_dropout=read.pop("lora_dropout"),
        target_modules=[part.strip() for part in read.pop("lora_target").split(",")],
        use_rslora=read.pop("use_rslora", False),
    )
    assert read in ({}, {"freeze_vision_tower": False, "freeze_multi_modal_projector": False})
    return config


def _unsloth(text: str) -> LoraConfig:
    base, calls = object(), []

    class FastLanguageModel:
        @staticmethod
        def get_peft_model(model: object, **arguments: Any) -> str:
            assert model is base
            calls.append(arguments)
            return "wrapped"

    names: dict[str, Any] = {"model": base, "FastLanguageModel": FastLanguageModel}
    exec(text, names)
    assert names["model"] == "wrapped"
    (arguments,) = calls
    assert isinstance(arguments["target_modules"], list)
    leaves = {name.split(".")[-1] for name in arguments["target_modules"]}
    assert not leaves & {"lm_head", "embed_tokens"}  # it would train them whole
    return LoraConfig(**arguments)


def check_wrapped(
    model: nn.Module, config: LoraConfig, ranks: dict[str, int], alpha: float, dropout: float, use_rslora: bool = False
) -> None:
    """Exactly the sites in `ranks` carry LoRA, at their rank, scaling and dropout, and nothing else is trained."""
    wrapped = get_peft_model(model, config).get_base_model()
    layers: dict[str, Any] = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    assert set(layers) == set(ranks)
    for name, layer in layers.items():
        rank = ranks[name]
        assert layer.r == {"default": rank}
        assert layer.lora_A["default"].weight.shape[0] == rank
        expected = alpha / math.sqrt(rank) if use_rslora else alpha / max(ranks.values())
        assert layer.scaling["default"] == pytest.approx(expected, rel=1e-12)
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == dropout
    trained = {name.split(".lora_")[0] for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert trained == set(ranks)


def few(names: Sequence[str]) -> set[str]:
    """One site of layer 1 and one of layer 11 of every stack."""
    return set({locate(name)[:2]: name for name in names if locate(name)[1] in (1, 11)}.values())


def many(names: Sequence[str]) -> set[str]:
    """Two thirds of the sites, so that PEFT shortens the list, and all of layer 1 but none of layers 10 and 11."""
    layers = {name: int(str(locate(name)[1])) for name in names}
    return {name for i, name in enumerate(names) if layers[name] == 1 or (i % 3 and layers[name] < 10)}


def case(family: str, choose: Callable[[Sequence[str]], set[str]]) -> Any:
    is_fast = (family, choose) in [("llama", few), ("llama", many), ("gpt2", few), ("t5", few)]
    return pytest.param(family, choose, marks=() if is_fast else pytest.mark.slow)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("family", "choose"), [case(family, choose) for family in FAMILIES for choose in (few, many)])
def test_exactly_the_kept_sites_get_lora(family, choose, style):
    names = site_names(family)
    kept = choose(names)
    assert len(kept) in (2, 4) if choose is few else len(kept) >= 20
    text = recipe(selection_of(dict.fromkeys(names, 3), kept), style, alpha=12, dropout=0.25)
    check_wrapped(tiny_model(family, N_LAYERS), read(style, text), dict.fromkeys(kept, 3), 12, 0.25)
    if style == "llama-factory":  # where a model is multimodal, it takes every module whose name contains a target
        targets = read(style, text).target_modules or ()
        assert {name for name in names if any(target in name for target in targets)} == kept


@pytest.mark.parametrize("style", ["peft", "axolotl", "unsloth"])
@pytest.mark.parametrize(("choose", "use_rslora"), [(few, True), (many, False)])
def test_ranks_of_their_own(choose, use_rslora, style):
    names = site_names("bart")
    ranks = {name: 1 + len(name) % 4 for name in names}
    kept = choose(names)
    expected = {name: ranks[name] for name in kept}
    assert len(set(expected.values())) > 1
    text = recipe(selection_of(ranks, kept), style, alpha=12, use_rslora=use_rslora)
    check_wrapped(tiny_model("bart", N_LAYERS), read(style, text), expected, 12, 0.0, use_rslora)


@pytest.mark.parametrize("style", STYLES)
def test_one_rank_for_all_replaces_the_ranks_of_the_selection(style):
    names = site_names("llama", 3)
    selection = selection_of({name: 1 + index % 4 for index, name in enumerate(names)}, set(names[:5]))
    text = recipe(selection, style, alpha=8, use_rslora=True, rank=5)
    check_wrapped(tiny_model("llama"), read(style, text), dict.fromkeys(names[:5], 5), 8, 0.0, True)


@pytest.mark.parametrize("style", ["peft", "axolotl", "llama-factory"])
@pytest.mark.parametrize("keep_head", [False, True])
def test_sites_outside_the_layers(style, keep_head):
    names = site_names("llama", N_LAYERS, "lm_head")
    assert "lm_head" in names
    kept = few(names) | ({"lm_head"} if keep_head else set())
    text = recipe(selection_of(dict.fromkeys(names, 2), kept), style, alpha=4)
    check_wrapped(tiny_model("llama", N_LAYERS), read(style, text), dict.fromkeys(kept, 2), 4, 0.0)


# Names of which some end in others, contain others, or stand for others as a regular expression.
TRAPS = (
    *(f"{stack}.{layer}.{kind}" for stack in ("encoder.layers", "text.encoder.layers") for layer in (1, 11)
      for kind in ("fc", "fc_up", "f-c", "fc1")),
    *(f"{stack}.layers.{layer}.fc" for stack in ("a", "b") for layer in range(12)),
    "head", "text.head", "text.header", "layers.1.fc", "encoderXlayersX1Xfc",
)  # fmt: skip


class Tree(nn.Module):
    """A module with a linear map at each of the traps."""

    def __init__(self) -> None:
        super().__init__()
        for name in TRAPS:
            *parents, leaf = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place.get_submodule(parent)
            place.add_module(leaf, nn.Linear(4, 4))


def matches(targets: Sequence[str]) -> set[str]:
    """The traps that stock PEFT matches with a list."""
    config = LoraConfig(target_modules=list(targets))
    return {name for name in TRAPS if check_target_module_exists(config, name)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_recipe_is_exact_or_an_error_whatever_is_kept(data):
    kept = data.draw(st.sets(st.sampled_from(TRAPS), min_size=1))
    mixed = st.lists(st.integers(1, 4), min_size=len(TRAPS), max_size=len(TRAPS))
    ranks = dict(zip(TRAPS, data.draw(mixed | st.just([2] * len(TRAPS))), strict=True))
    expected = {name: ranks[name] for name in kept}
    style = data.draw(st.sampled_from(STYLES))
    ends = matches(sorted(kept)) == kept
    parts = {name for name in TRAPS if any(target in name for target in kept)} == kept
    is_one_rank = len(set(expected.values())) == 1
    possible = {"peft": True, "axolotl": True, "llama-factory": ends and parts and is_one_rank, "unsloth": ends}
    if possible[style]:
        text = recipe(selection_of(ranks, kept), style, alpha=12)  # of which each rank has a whole share
        check_wrapped(Tree(), read(style, text), expected, 12, 0.0)
    else:
        with pytest.raises(SelectionError):
            recipe(selection_of(ranks, kept), style, alpha=12)


@pytest.mark.parametrize(
    ("style", "kept", "dropped", "message"),
    [
        ("llama-factory", {"a.0.q": 2}, "x.a.0.q", r"kept site 'a\.0\.q' would also train 'x\.a\.0\.q'.*style 'peft'"),
        (
            "llama-factory",
            {"a.0.q": 2},
            "a.0.q_up",
            r"compares parts of .*'a\.0\.q' would also train 'a\.0\.q_up'",
        ),
        ("llama-factory", {"a.0.q": 2, "a.1.q": 8}, "a.2.q", r"ranks 2, 8, but LLaMA-Factory has one .*rank=8"),
        ("llama-factory", {"a.x,y": 2}, "a.2.q", r"splits lora_target at commas, and the name of 'a\.x,y' has one"),
        ("unsloth", {"a.0.q": 2}, "x.a.0.q", r"compares ends of names.*'a\.0\.q' would also train 'x\.a\.0\.q'"),
        ("unsloth", {"a.0.q": 2, "lm_head": 2}, "a.1.q", r"trains no LoRA on 'lm_head'.*Drop the site"),
        ("unsloth", {"a.embed_tokens": 2}, "a.1.q", r"trains no LoRA on 'a\.embed_tokens'"),
    ],
)
def test_what_a_trainer_cannot_be_told(style, kept, dropped, message):
    selection = selection_of({**kept, dropped: 2}, set(kept))
    with pytest.raises(SelectionError, match=message):
        recipe(selection, style, alpha=4)
    assert isinstance(recipe(selection, "peft", alpha=4), str)


@pytest.mark.parametrize(
    "name", ["vision_tower.layers.0.q", "visual.blocks.0.qkv", "multi_modal_projector.up", "a.0.q"]
)
def test_llama_factory_is_told_not_to_freeze_what_is_kept(name):
    read = yaml.safe_load(recipe(selection_of({name: 2}, {name}), "llama-factory", alpha=4))
    told = {key: value for key, value in read.items() if key.startswith("freeze")}
    assert told == ({} if name == "a.0.q" else {"freeze_vision_tower": False, "freeze_multi_modal_projector": False})


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=30)
@example(dropout=1e-05, alpha=8)  # a text in YAML 1.1
@given(dropout=st.floats(0, 1, exclude_max=True), alpha=st.integers(1, 10**6))
def test_numbers_arrive_as_they_were_given(style, dropout, alpha):
    config = read(style, recipe(selection_of({"layers.0.q": 2}, {"layers.0.q"}), style, alpha=alpha, dropout=dropout))
    assert (config.lora_alpha, config.lora_dropout) == (alpha, dropout)


@settings(max_examples=50)
@given(alpha=st.floats(0, exclude_min=True, allow_infinity=False))
def test_any_alpha_where_the_trainer_takes_it_and_an_error_elsewhere(alpha):
    selection = selection_of({"layers.0.q": 2}, {"layers.0.q"})
    for style in STYLES:
        if style in ("peft", "unsloth") or alpha.is_integer():
            assert read(style, recipe(selection, style, alpha=alpha)).lora_alpha == alpha
        else:
            with pytest.raises(SettingsError, match="whole numbers"):
                recipe(selection, style, alpha=alpha)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "torchtune"}, r"style='torchtune'.*peft, axolotl, llama-factory, unsloth"),
        ({"alpha": 0}, "alpha=0"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, r"rank=2\.5"),
    ],
)
def test_numbers_out_of_range(changes, message):
    selection = selection_of({"layers.0.q": 2}, {"layers.0.q"})
    with pytest.raises(SettingsError, match=message):
        recipe(selection, **{"style": "peft", "alpha": 8, **changes})


@pytest.mark.parametrize("style", STYLES)
def test_a_selection_that_keeps_nothing(style):
    with pytest.raises(SelectionError, match="keeps none of its 2 sites"):
        recipe(selection_of({"layers.0.q": 2, "layers.1.q": 2}, set()), style, alpha=8)


def test_what_is_printed_reads_well():
    names = {"model.layers.10.mlp.up_proj": 4, "model.layers.2.mlp.up_proj": 2, "lm_head": 4, "model.layers.3.mlp.x": 4}
    selection = selection_of(names, set(names) - {"model.layers.3.mlp.x"})
    assert recipe(selection, "axolotl", alpha=8.0, dropout=0.05, use_rslora=True).splitlines() == [
        "adapter: lora",
        "lora_r: 4",
        "lora_alpha: 8",
        "lora_dropout: 0.05",
        "lora_target_linear: false",
        "lora_target_modules:",
        "  - model.layers.2.mlp.up_proj",
        "  - model.layers.10.mlp.up_proj",
        "  - 'lm_head'",
        "peft_use_rslora: true",
        "# Axolotl 0.17 and older ignore this and train all sites at lora_r.",
        "lora_rank_pattern:",
        "  model.layers.2.mlp.up_proj: 2",
    ]
    assert recipe(selection, "llama-factory", alpha=8, rank=4).splitlines()[-4:] == [
        "lora_target: >-",
        "  model.layers.2.mlp.up_proj,",
        "  model.layers.10.mlp.up_proj,",
        "  lm_head",
    ]
