"""Pruned ranks in stock PEFT, against the dense truncated singular value decomposition of s B A in NumPy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import write_pruned
from lorazor.errors import AdapterError, SelectionError, UnsupportedAdapterError
from lorazor.selection import Selection
from tests.adapter.test_prune import PREFIX, SHAPES, selection_of
from tests.tiny_models import tiny_model, tiny_peft_model, write_adapter_folder

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank": {"rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.down_proj": 7}},
    "alpha": {"alpha_pattern": {"q_proj": 1, "layers.0.mlp.up_proj": 24}},
    "all": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"k_proj|v_proj": 3}},
}
# How many of a site's components stay, by its place and rank: one rank for all, or different ones.
RANKS = {"uniform": lambda place, rank: 2, "mixed": lambda place, rank: 1 + place % rank}


def dense_updates(model):
    """The dense update s B A of every site of a live PEFT model, float64, with PEFT's own scaling."""
    updates = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = (part["default"].weight.detach().double().numpy() for part in (module.lora_A, module.lora_B))
            updates[name] = module.scaling["default"] * B @ A
    return updates


def chosen_part(dense, components, weights):
    u, singular, v = np.linalg.svd(dense, full_matrices=False)
    terms = (w * singular[c] * np.outer(u[:, c], v[c]) for c, w in zip(components, weights, strict=True))
    return sum(terms, np.zeros_like(dense))


def with_components(selection, choose, weigh=None):
    """Components for every kept site: `choose(place, rank)` of the largest, with weights by `weigh(component)`."""
    sites = []
    for place, site in enumerate(selection.sites):
        if site.keep:
            components = tuple(range(choose(place, site.rank)))
            weights = tuple(weigh(component) for component in components) if weigh else None
            site = replace(site, components=components, component_weights=weights)
        sites.append(site)
    return replace(selection, sites=tuple(sites))


@pytest.mark.parametrize("choose", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_stock_peft_merges_the_truncated_decomposition(settings, choose, tmp_path):
    model = tiny_peft_model("llama", 2, **settings)
    model.save_pretrained(tmp_path / "full")
    weights = {"model.layers.0.self_attn.q_proj": 0.3}
    whole = selection_of(tmp_path / "full", lambda name: "k_proj" not in name, lambda name: weights.get(name, 1.0))
    selection = with_components(whole, choose, lambda component: 1.5 - component)
    result = write_pruned(tmp_path / "full", selection, tmp_path / "pruned")

    updates, base = dense_updates(model), tiny_model("llama", 2)
    expected = {
        name: module.weight.detach().double().numpy() for name, module in base.named_modules() if name in updates
    }
    for site in selection.kept:
        part = chosen_part(updates[site.name], site.components, site.component_weights)
        expected[site.name] = expected[site.name] + weights.get(site.name, 1.0) * part
        assert np.abs(part).max() > 1e-2  # it matters
    merged = PeftModel.from_pretrained(tiny_model("llama", 2), tmp_path / "pruned").merge_and_unload()
    for name, wanted in expected.items():
        np.testing.assert_allclose(merged.get_submodule(name).weight.detach().numpy(), wanted, atol=2e-6, rtol=0)

    ranks = {site.name: site.kept_rank for site in selection.kept}
    config = json.loads((tmp_path / "pruned/adapter_config.json").read_text())
    assert config["r"] == max(ranks.values()) and config["alpha_pattern"] == {}
    assert len(config["rank_pattern"]) == sum(rank != config["r"] for rank in ranks.values())
    assert {site.name: site.rank for site in read_adapter(tmp_path / "pruned").sites} == ranks
    saved = load_file(tmp_path / "pruned/adapter_model.safetensors")
    assert result.n_parameters_kept == sum(tensor.numel() for tensor in saved.values())


def test_any_components_may_stay_and_other_sites_keep_their_bytes(tmp_path):
    """Not only the largest: a credit may prefer others."""
    full = write_adapter_folder(tmp_path / "full", {name: (3, 5, 6) for name in SHAPES})
    changed, *others = sorted(SHAPES)
    whole = selection_of(full, lambda name: True)
    sites = [replace(site, components=(0, 2)) if site.name == changed else site for site in whole.sites]
    write_pruned(full, replace(whole, sites=tuple(sites)), tmp_path / "pruned")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("full", "pruned"))

    def product(tensors):
        key = f"{PREFIX}{changed}.lora_"
        return tensors[f"{key}B.weight"].double().numpy() @ tensors[f"{key}A.weight"].double().numpy()

    # alpha = 3 is 1 at rank 3 and 1.5 at rank 2
    np.testing.assert_allclose(1.5 * product(after), chosen_part(product(before), (0, 2), (1, 1)), atol=1e-5)
    for name in others:
        for part in "AB":
            key = f"{PREFIX}{name}.lora_{part}.weight"
            assert torch.equal(before[key], after[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_stay_and_two_runs_give_the_same_bytes(dtype, tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES, dtype=dtype)
    selection = with_components(selection_of(full, lambda name: True), lambda place, rank: 1 + place % 2)
    for out in ("one", "two"):
        write_pruned(full, selection, tmp_path / out)
    one, two = ((tmp_path / out / "adapter_model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("full", "one"))
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    spacing = max(torch.finfo(dtype).eps, 1e-10)
    for site in selection.kept:
        A, B, new_A, new_B = (
            tensors[f"{PREFIX}{site.name}.lora_{part}.weight"].double().numpy()
            for tensors in (before, after)
            for part in "AB"
        )
        scaling = 2 / site.kept_rank  # lora_alpha = 2, which was 1 at rank 2
        expected = chosen_part(B @ A, site.components, [1] * site.kept_rank)
        np.testing.assert_allclose(scaling * new_B @ new_A, expected, atol=4 * spacing * np.linalg.norm(B @ A))


def test_the_card_says_which_ranks_are_left(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: ".2." not in name)
    write_pruned(full, selection, tmp_path / "whole")
    assert "ranks" not in (tmp_path / "whole/README.md").read_text()
    first = replace(selection.sites[0], components=(1,), component_weights=(2.0,))
    write_pruned(full, replace(selection, sites=(first, *selection.sites[1:])), tmp_path / "pruned")
    card = (tmp_path / "pruned/README.md").read_text()
    assert "keeps 4 of 6 LoRA sites and 49 of 84 LoRA parameters (58.3 %)" in card
    assert "Into 1 of them a weight other than 1 was folded." in card
    assert "Of 1 of the kept sites some directions of B A were removed too: their rank was 2 and is 1." in card
    assert "| layers | LoRA sites kept | ranks | parameters kept |\n|---|---|---|---|\n" in card
    assert "| `model.layers` 0, 1 | 4 of 4 | 1 to 2 | 49 of 56 |" in card
    assert "| `model.layers` 2 | 0 of 2 |  | 0 of 28 |" in card


def test_components_of_what_has_none_are_refused_before_anything_is_written(tmp_path):
    def refuses(folder, error, message, **changes):
        selection = selection_of(folder, lambda name: True)
        sites = tuple(replace(site, components=(0,), **changes) for site in selection.sites)
        with pytest.raises(error, match=message):
            write_pruned(folder, Selection(sites=sites, method="manual"), tmp_path / "pruned")
        assert not (tmp_path / "pruned").exists()

    plain = write_adapter_folder(tmp_path / "plain", SHAPES, torch.float16)
    refuses(plain, SelectionError, "Folding .* overflows torch.float16", component_weights=(1e6,))
    tied = write_adapter_folder(tmp_path / "tied", {"lm_head": (2, 3, 4), **SHAPES}, ensure_weight_tying=True)
    refuses(tied, SelectionError, "ensure_weight_tying.*with weight 1 and all components")
    key = f"{PREFIX}lm_head.lora_"
    weights = tied / "adapter_model.safetensors"
    tensors = load_file(weights)
    torch.save({**tensors, f"{key}A.weight": torch.full((2, 3), torch.nan)}, tied / "adapter_model.bin")
    config = json.loads((tied / "adapter_config.json").read_text())
    (tied / "adapter_config.json").write_text(json.dumps({**config, "ensure_weight_tying": False}))
    weights.unlink()
    refuses(tied, AdapterError, "lm_head: A or B holds NaN")
    for change in (
        {f"{key}B.bias": torch.zeros(4)},
        {f"{key}A.weight": torch.ones(2, 3, 1, 1), f"{key}B.weight": torch.ones(4, 2, 1, 1)},
    ):
        torch.save({**tensors, **change}, tied / "adapter_model.bin")
        refuses(tied, UnsupportedAdapterError, "lm_head is an embedding, a convolution, DoRA, or has a bias of B")
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.ones(2, 9),
        "model.embed_tokens.lora_embedding_B": torch.ones(3, 2),
    }
    torch.save({PREFIX + name: tensor for name, tensor in embedding.items()}, tied / "adapter_model.bin")
    refuses(tied, UnsupportedAdapterError, "model.embed_tokens is an embedding")
