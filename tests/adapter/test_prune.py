"""Pruned folders in stock PEFT and transformers, against the original with dropped sites silenced by hand."""

import errno
import json
import os
import re
import resource
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import prune, select_boundary
from lorazor.errors import BoundaryError, OutputError, SelectionError
from lorazor.selection import SelectedSite, Selection
from tests.tiny_models import (
    CLASSIFIERS,
    FAMILIES,
    STACKS,
    randomise_b_,
    tiny_inputs,
    tiny_model,
    tiny_peft_model,
    write_adapter_folder,
)

PREFIX = "base_model.model."
SHAPES = {f"model.layers.{layer}.{kind}": (2, 3, 4) for layer in range(3) for kind in ("q_proj", "v_proj")}


def logits(model, family="llama"):
    with torch.no_grad():
        return model(**tiny_inputs(family)).logits


def is_beyond(name, stack, boundary):
    """Whether a module belongs to layer `boundary` of the stack or a later one; names are cut by hand."""
    found = re.search(rf"(?:^|\.){re.escape(stack)}\.(\d+)\.", name)
    return found is not None and int(found[1]) >= boundary


def zero_b_by_hand(model, is_dropped):
    """Silence sites the pedestrian way: overwrite B with zeros. Returns the number of sites silenced."""
    silenced = 0
    for name, parameter in model.named_parameters():
        if re.search(r"\.lora_(embedding_)?B\.", name) and is_dropped(name):
            parameter.data.zero_()
            silenced += 1
    return silenced


def selection_of(folder, keep, weight=lambda name: 1.0):
    """A selection over an adapter folder, from a rule about names."""
    return Selection(
        sites=tuple(
            SelectedSite(s.name, s.layer, s.stack, s.kind, s.rank, keep=keep(s.name), weight=weight(s.name))
            for s in read_adapter(folder).sites
        ),
        method="manual",
    )


def kept_sites(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        keys = list(file.keys())
    return sorted({key.removeprefix(PREFIX).split(".lora_")[0] for key in keys if ".lora_" in key})


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_and_transformers_compute_the_silenced_model(family, tmp_path):
    model = tiny_peft_model(family)
    if family in CLASSIFIERS:  # a trained head
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9))
    model.save_pretrained(tmp_path / "full")
    stack = STACKS[family][-1]
    before = logits(model, family)
    for boundary in (2, 1):
        out = tmp_path / f"pruned-{boundary}"
        selection = select_boundary(read_adapter(tmp_path / "full").sites, boundary)
        result = prune(tmp_path / "full", selection, out)
        assert zero_b_by_hand(model, lambda name, boundary=boundary: is_beyond(name, stack, boundary)) > 0
        expected = logits(model, family)
        assert (expected - before).abs().max() > 1e-2  # the sites mattered

        loaded = PeftModel.from_pretrained(tiny_model(family), out)
        torch.testing.assert_close(logits(loaded, family), expected, rtol=0, atol=1e-5)
        assert result.n_sites_kept == sum("lora_B" in name for name, _ in loaded.named_parameters())
    native = tiny_model(family)
    native.load_adapter(str(out))
    torch.testing.assert_close(logits(native, family), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"q_proj": 1, "layers.0.mlp.up_proj": 24}},
        {"rank_pattern": {"q_proj": 2, r"layers\.[01]\.mlp\.down_proj": 7}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"k_proj|v_proj": 3}},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {
            "target_modules": r"model\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)",
            "exclude_modules": r".*\.1\..*v_proj",
        },
        {"target_modules": ["q_proj", "k_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ],
    ids=["alpha", "rank", "rslora", "layers", "regex", "modules-to-save"],
)
def test_patterns_weights_and_gaps_survive(settings, tmp_path):
    """Any subset, any weights: an independent oracle scales B of the live model."""
    model = tiny_peft_model("llama", n_layers=3, **settings)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    model.save_pretrained(tmp_path / "full")
    names = [site.name for site in read_adapter(tmp_path / "full").sites]
    weights = dict(zip(names, [1.0, 0.0, -1.5, 0.3, 1.0, 0.7] * 4, strict=False))
    dropped = set(names[2::3])
    selection = selection_of(tmp_path / "full", lambda name: name not in dropped, weights.__getitem__)
    prune(tmp_path / "full", selection, tmp_path / "pruned")

    for name in names:
        b = model.get_submodule(PREFIX + name).lora_B["default"].weight
        b.data *= 0.0 if name in dropped else weights[name]
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "pruned")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert kept_sites(tmp_path / "pruned") == sorted(set(names) - dropped)


def test_the_config_is_exact_and_without_patterns(tmp_path):
    settings = {
        "alpha_pattern": {"v_proj": 5},
        "rank_pattern": {r"layers\.1\..*": 3},
        "layers_to_transform": [0, 1, 2],
        "layers_pattern": "layers",
        "exclude_modules": ["nothing"],
        "base_model_name_or_path": "some/model",
        "lora_dropout": 0.1,
        "a_field_of_tomorrow": [1],
    }
    shapes = {name: (3 if ".1." in name else 2, 3, 4) for name in SHAPES}
    write_adapter_folder(tmp_path / "full", shapes, **settings)
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    prune(tmp_path / "full", selection, tmp_path / "pruned")
    text = (tmp_path / "pruned/adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config == {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 2,
        "rank_pattern": {
            r"^model\.layers\.0\.q_proj": 2,
            r"^model\.layers\.0\.v_proj": 2,
        },
        "alpha_pattern": {},
        "target_modules": [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")],
        "base_model_name_or_path": "some/model",
        "lora_dropout": 0.1,
        "a_field_of_tomorrow": [1],
    }
    # One rank left: no pattern, and r is that rank.
    prune(tmp_path / "full", selection_of(tmp_path / "full", lambda name: ".1." in name), tmp_path / "middle")
    config = json.loads((tmp_path / "middle/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (3, {}, 2)
    reread = {site.name: site.scaling for site in read_adapter(tmp_path / "middle").sites}
    assert set(reread.values()) == {2 / 3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_what_needs_a_factor_changes_its_bytes(dtype, tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, dtype=dtype, alpha_pattern={"layers.0.v_proj": 3})
    weight = {"model.layers.1.q_proj": 0.3}
    keep = lambda name: not name.endswith("2.v_proj")  # noqa: E731
    selection = selection_of(tmp_path / "full", keep, lambda name: weight.get(name, 1.0))
    prune(tmp_path / "full", selection, tmp_path / "pruned")
    before = load_file(tmp_path / "full/adapter_model.safetensors")
    after = load_file(tmp_path / "pruned/adapter_model.safetensors")
    assert sorted(after) == sorted(key for key in before if "layers.2.v_proj" not in key)
    factors = {
        f"{PREFIX}model.layers.0.v_proj.lora_B.weight": 3 / 2,  # alpha 3 where lora_alpha is 2
        f"{PREFIX}model.layers.1.q_proj.lora_B.weight": 0.3,
    }
    for key, tensor in after.items():
        assert tensor.dtype == dtype
        exact = before[key].double() * factors.get(key, 1.0)
        if key not in factors:
            assert torch.equal(tensor, before[key])
        else:  # rounded once to float32 and once to the dtype, not more
            spacing = torch.finfo(dtype).eps + (torch.finfo(torch.float32).eps if dtype != torch.float64 else 0)
            assert not torch.equal(tensor, before[key])
            assert ((tensor.double() - exact).abs() <= spacing * exact.abs()).all()


def test_a_weight_too_large_for_the_dtype_is_refused(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, dtype=torch.float16)
    selection = selection_of(tmp_path / "full", lambda name: True, lambda name: 1e6)
    with pytest.raises(SelectionError, match="Folding 1e.06 into B of model.layers.* overflows torch.float16"):
        prune(tmp_path / "full", selection, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape")  # PEFT takes the bias for a broken matrix
def test_the_bias_of_b_is_folded_too(tmp_path):
    model = tiny_peft_model("opt", lora_bias=True, alpha_pattern={"q_proj": 2})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data += 0.3
    model.save_pretrained(tmp_path / "full")
    selection = selection_of(tmp_path / "full", lambda name: True, lambda name: 0.5)
    prune(tmp_path / "full", selection, tmp_path / "pruned")
    for site in model.modules():
        if hasattr(site, "set_scale"):
            site.set_scale("default", 0.5)
    loaded = PeftModel.from_pretrained(tiny_model("opt"), tmp_path / "pruned")
    torch.testing.assert_close(logits(loaded, "opt"), logits(model, "opt"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("drop_outside", [False, True])
def test_embedding_and_output_layer_outside_the_stack(drop_outside, tmp_path):
    """The base weights that PEFT saves along with an embedding's LoRA stay, also when that LoRA goes."""
    model = tiny_peft_model("llama", target_modules=["embed_tokens", "q_proj", "lm_head"])
    for name, parameter in model.named_parameters():
        if "base_layer" in name and "q_proj" not in name:  # as after resizing the vocabulary
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "full", save_embedding_layers=True)
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 1, drop_outside=drop_outside)
    prune(tmp_path / "full", selection, tmp_path / "pruned")

    is_outside = lambda name: "embed_tokens" in name or "lm_head" in name  # noqa: E731
    is_dropped = lambda name: is_beyond(name, "model.layers", 1) or drop_outside and is_outside(name)  # noqa: E731
    assert zero_b_by_hand(model, is_dropped) == (4 if drop_outside else 2)
    base = tiny_model("llama")
    assert (logits(base) - logits(model)).abs().max() > 0.1  # the changed base weights matter
    loaded = PeftModel.from_pretrained(base, tmp_path / "pruned")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_tied_lora_of_embedding_and_output_layer_stays_or_goes_together(tmp_path):
    shapes = {"lm_head": (2, 3, 4), "model.embed_tokens": (2, 3, 4), **SHAPES}
    write_adapter_folder(tmp_path / "full", shapes, ensure_weight_tying=True)
    with pytest.raises(SelectionError, match="ensure_weight_tying"):
        prune(tmp_path / "full", selection_of(tmp_path / "full", lambda name: name != "lm_head"), tmp_path / "no")
    with pytest.raises(SelectionError, match="ensure_weight_tying"):
        halved = selection_of(tmp_path / "full", lambda name: True, lambda name: 0.5 if name == "lm_head" else 1.0)
        prune(tmp_path / "full", halved, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    for name, outside in (("with", True), ("without", False)):
        keep = lambda site, outside=outside: outside or site in SHAPES  # noqa: E731
        prune(tmp_path / "full", selection_of(tmp_path / "full", keep), tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["ensure_weight_tying"] is outside


def test_what_is_not_lora_keeps_its_bytes(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, modules_to_save=["classifier"])
    weights = tmp_path / "full/adapter_model.safetensors"
    head = {f"{PREFIX}classifier.weight": torch.randn(3, 4), f"{PREFIX}classifier.bias": torch.randn(3).half()}
    save_file({**load_file(weights), **head}, weights)
    prune(tmp_path / "full", select_boundary(read_adapter(tmp_path / "full").sites, 1), tmp_path / "pruned")
    after = load_file(tmp_path / "pruned/adapter_model.safetensors")
    for key, tensor in head.items():
        assert after[key].dtype == tensor.dtype and torch.equal(after[key], tensor)
    assert json.loads((tmp_path / "pruned/adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


class TwoEncoders(nn.Module):
    """`encoder.layers.0.fc` also ends the name `text.encoder.layers.0.fc`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.text = self._encoder(), nn.ModuleDict({"encoder": self._encoder()})

    @staticmethod
    def _encoder():
        return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2)])})

    def forward(self, x):
        for encoder in (self.encoder, self.text["encoder"]):
            for layer in encoder["layers"]:
                x = torch.tanh(layer["fc"](x))
        return x


@pytest.mark.parametrize("ranks", [{}, {r"^encoder\.layers\.0\.fc": 3}])
def test_a_kept_name_that_ends_a_dropped_name_does_not_bring_it_back(ranks, tmp_path):
    model = get_peft_model(TwoEncoders(), LoraConfig(r=2, target_modules=["fc"], rank_pattern=ranks))
    randomise_b_(model)
    model.save_pretrained(tmp_path / "full")
    selection = selection_of(tmp_path / "full", lambda name: name != "text.encoder.layers.0.fc")
    prune(tmp_path / "full", selection, tmp_path / "pruned")
    loaded = PeftModel.from_pretrained(TwoEncoders(), tmp_path / "pruned")
    wrapped = {name.removeprefix(PREFIX) for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {"encoder.layers.0.fc", "encoder.layers.1.fc", "text.encoder.layers.1.fc"}
    assert zero_b_by_hand(model, lambda name: "text.encoder.layers.0" in name) == 1
    x = torch.randn(5, 4)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bytes_fall_with_the_parameters(dtype, tmp_path):
    """Within 2 %: the whole file, header included, where tensors are of a usual size."""
    shapes = {f"model.layers.{i}.{kind}": (8, 256, 512) for i in range(8) for kind in ("q", "v")}
    write_adapter_folder(tmp_path / "full", shapes, dtype=dtype)
    for boundary in (1, 4, 7):
        selection = select_boundary(read_adapter(tmp_path / "full").sites, boundary)
        result = prune(tmp_path / "full", selection, tmp_path / f"pruned-{boundary}")
        assert (result.n_sites_kept, result.n_sites) == (2 * boundary, 16)
        assert (result.n_parameters_kept, result.n_parameters) == (2 * boundary * 8 * 768, 16 * 8 * 768)
        assert result.n_bytes == (result.path / "adapter_model.safetensors").stat().st_size
        share = result.n_parameters_kept / result.n_parameters
        assert result.n_bytes / result.n_bytes_before == pytest.approx(share, rel=0.02)
        data = load_file(result.path / "adapter_model.safetensors").values()  # without the header: exact
        assert sum(tensor.nbytes for tensor in data) == result.n_parameters_kept * dtype.itemsize


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_give_the_same_bytes_whatever_the_order_of_the_input(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, alpha_pattern={"q_proj": 3})
    shutil.copytree(tmp_path / "full", tmp_path / "shuffled")
    weights = tmp_path / "shuffled/adapter_model.safetensors"
    save_file(dict(reversed(load_file(weights).items())), weights, metadata={"written": "today"})
    config_path = tmp_path / "shuffled/adapter_config.json"
    config = json.loads(config_path.read_text())
    config["target_modules"].reverse()
    config_path.write_text(json.dumps(dict(reversed(config.items())), indent=4))
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    reversed_selection = replace(selection, sites=tuple(reversed(selection.sites)))
    for source, out, chosen in (
        ("full", "one", selection),
        ("full", "two", selection),
        ("shuffled", "three", reversed_selection),
    ):
        prune(tmp_path / source, chosen, tmp_path / out, note="BLEU 51.2 to 51.0")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    with safe_open(tmp_path / "one/adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_pickle_adapter_becomes_safetensors(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES)
    shutil.copytree(tmp_path / "full", tmp_path / "old")
    (tmp_path / "old/adapter_model.safetensors").unlink()
    torch.save(load_file(tmp_path / "full/adapter_model.safetensors"), tmp_path / "old/adapter_model.bin")
    selection = select_boundary(read_adapter(tmp_path / "full").sites, 2)
    prune(tmp_path / "full", selection, tmp_path / "from-new")
    prune(tmp_path / "old", selection, tmp_path / "from-old")
    assert contents(tmp_path / "from-new") == contents(tmp_path / "from-old")


def test_small_files_are_carried_over_and_training_state_is_not(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    carried = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    carried += ["additional_chat_templates/tool.jinja", "generation_config.json"]
    left = ["optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth", "model.safetensors", ".git/config"]
    left += ["checkpoint-10/adapter_config.json", "runs/events.tfevents", "other/adapter_config.json", "large.txt"]
    for name in carried + left:
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(os.urandom(8))
    (full / "tokenizer.json").rename(tmp_path / "blob")
    (full / "tokenizer.json").symlink_to(tmp_path / "blob")  # as in the cache of the model hub
    (full / "large.txt").write_bytes(bytes(2000))
    monkeypatch.setattr("lorazor.adapter.prune._MAX_CARRIED_BYTES", 1000)
    result = prune(full, select_boundary(read_adapter(full).sites, 2), tmp_path / "pruned")
    written = contents(tmp_path / "pruned")
    assert sorted(written) == sorted([*carried, "README.md", "adapter_config.json", "adapter_model.safetensors"])
    assert all(written[name] == (full / name).read_bytes() for name in carried)
    assert not (tmp_path / "pruned/tokenizer.json").is_symlink()
    assert result.left_out == tuple(sorted({name.split("/")[0] for name in left}))


def test_files_are_as_readable_as_any_other(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES)
    result = prune(tmp_path / "full", select_boundary(read_adapter(tmp_path / "full").sites, 2), tmp_path / "pruned")
    (tmp_path / "any").touch()
    usual = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in result.path.iterdir()} == {usual}


CARD = "---\nbase_model: some/model\ntags:\n- lora\n---\n\n# My adapter\r\n\nCaf\u00e9.\n"


def test_the_card_says_what_was_removed_and_keeps_the_rest(tmp_path):
    full = write_adapter_folder(tmp_path / "full", {**SHAPES, "lm_head": (2, 3, 4)})
    (full / "README.md").write_bytes(CARD.encode() + b"\xff\n")  # a stray byte must survive
    chosen = select_boundary(read_adapter(full).sites, 2)
    prune(full, chosen, tmp_path / "one", note="BLEU 51.2 to 51.0")
    one = (tmp_path / "one/README.md").read_bytes()
    assert one.startswith(CARD.encode() + b"\xff\n")
    section = one[len(CARD.encode()) + 2 :].decode()
    assert "keeps 5 of 7 LoRA sites and 70 of 98 LoRA parameters (71.4 %), chosen by `boundary`." in section
    assert "| `model.layers` 0, 1 | 4 of 4 | 56 of 56 |" in section
    assert "| `model.layers` 2 | 0 of 2 | 0 of 28 |" in section
    assert "| outside the layers | 1 of 1 | 14 of 14 |" in section
    assert "Cost: BLEU 51.2 to 51.0" in section

    # The next pruning replaces the section, and only the section.
    (tmp_path / "one/README.md").write_bytes(one + b"Written below.\n")
    only_q = selection_of(tmp_path / "one", lambda name: name.endswith("q_proj"), lambda name: 0.5)
    prune(tmp_path / "one", only_q, tmp_path / "two")
    two = (tmp_path / "two/README.md").read_bytes()
    assert two.startswith(CARD.encode() + b"\xff\n") and two.endswith(b"Written below.\n")
    assert two.count(b"## Pruned with lorazor") == 1 and b"51.2" not in two
    assert b"| `model.layers` 0, 1 | 2 of 4: `q_proj` | 28 of 56 |" in two
    assert b"Into 2 of them a weight other than 1 was folded." in two
    assert b"Cost: not measured." in two


def test_a_missing_card_is_made(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES, base_model_name_or_path="some/model: \u00e9")
    prune(full, select_boundary(read_adapter(full).sites, 3), tmp_path / "pruned")
    card = (tmp_path / "pruned/README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nbase_model: "some/model: \u00e9"\nlibrary_name: peft\n---\n\n# LoRA adapter\n')
    assert "| `model.layers` 0 to 2 | 6 of 6 | 84 of 84 |" in card


def test_selections_that_do_not_fit_are_refused(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    first, *rest = selection.sites
    renamed = replace(first, name="model.layers.9.q_proj")
    for sites, message in [
        ((*selection.sites, renamed), "the adapter has no site 'model.layers.9.q_proj'. Select"),
        ((*rest, renamed), "the adapter has no site 'model.layers.9.q_proj'"),
        (tuple(rest), "says nothing about 'model.layers.0.q_proj'. Give"),
        (tuple(rest[1:]), r"says nothing about 'model.layers.0.q_proj' \(nor 1 more\)"),
        ((*rest, replace(first, rank=5)), "gives model.layers.0.q_proj rank 5, but the adapter has rank 2"),
        (
            tuple(replace(site, keep=False) for site in selection.sites),
            "what remains is the base model; use it without",
        ),
    ]:
        with pytest.raises(SelectionError, match=message):
            prune(full, replace(selection, sites=sites), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_places_that_are_taken_are_left_alone(tmp_path):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is the adapter itself"):
        prune(full, selection, full / ".." / "full")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        prune(full, selection, tmp_path / "taken")
    with pytest.raises(OutputError, match="is a file"):
        prune(full, selection, tmp_path / "taken/mine.txt")
    assert contents(tmp_path) == {**before, "taken/mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    assert prune(full, selection, tmp_path / "empty").n_sites_kept == 6


def no_space(*arguments, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["shutil.copyfile", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_a_full_disk_leaves_nothing(call, tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    (full / "tokenizer.json").write_text("{}")
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(call, no_space)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        prune(full, selection, tmp_path / "pruned")
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    """A real refusal by the operating system, in safetensors' own writing."""
    full = write_adapter_folder(tmp_path / "full", {name: (8, 512, 512) for name in SHAPES})
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match="Cannot write .*File too large") as caught:
            prune(full, selection, tmp_path / "pruned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES)
    selection = selection_of(full, lambda name: True)
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorazor.adapter.prune.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(full, selection, tmp_path / "pruned")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_boundary_cuts_one_stack_only(tmp_path):
    names = [f"{side}.block.{layer}.q" for side in ("encoder", "decoder") for layer in range(3)]
    full = write_adapter_folder(tmp_path / "full", {name: (2, 3, 4) for name in [*names, "lm_head"]})
    sites = read_adapter(full).sites
    in_encoder, in_decoder = set(names[:3]), set(names[3:])

    def kept(*arguments, **settings):
        return {site.name for site in select_boundary(sites, *arguments, **settings).kept}

    assert kept(0) == {*in_encoder, "lm_head"}
    assert kept(2) == {*in_encoder, *names[3:5], "lm_head"}
    assert kept(3) == {*in_encoder, *in_decoder, "lm_head"}
    assert kept(1, stack="encoder") == {names[0], *in_decoder, "lm_head"}
    assert kept(1, drop_outside=True) == {*in_encoder, names[3]}
    selection = select_boundary(sites, np.int64(2))
    assert selection.method == "boundary"
    settings = {"boundary": 2, "stack": "decoder.block", "n_layers": 3, "drop_outside": False}
    assert json.loads(selection.to_json())["settings"] == settings
    for boundary in (-1, 4, 1.5):
        with pytest.raises(
            BoundaryError, match=f"boundary={boundary}, but LoRA reaches over 3 layers of decoder.block"
        ):
            select_boundary(sites, boundary)


def test_the_base_model_is_never_loaded(tmp_path, monkeypatch):
    full = write_adapter_folder(tmp_path / "full", SHAPES, base_model_name_or_path=str(Path("/nowhere/at/all")))

    def refuse(*arguments, **settings):
        raise AssertionError("a module was built")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    assert prune(full, select_boundary(read_adapter(full).sites, 1), tmp_path / "pruned").n_sites_kept == 2
