"""Pruned folders in stock PEFT and transformers, against the original with dropped sites silenced by hand."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.prune import select_boundary, write_pruned
from lorazor.errors import SelectionError
from lorazor.selection import SelectedSite, Selection
from tests.tiers import fast_first
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


@pytest.mark.parametrize("family", fast_first(FAMILIES, "llama", "gpt2", "t5"))
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
        result = write_pruned(tmp_path / "full", selection, out)
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
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")

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
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")
    text = (tmp_path / "pruned/adapter_config.json").read_text()
    config = json.loads(text)
    assert list(config) == sorted(config)
    assert config == {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 2,
        "rank_pattern": {
            "model.layers.0.q_proj": 2,
            "model.layers.0.v_proj": 2,
        },
        "alpha_pattern": {},
        "target_modules": [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("q_proj", "v_proj")],
        "base_model_name_or_path": "some/model",
        "lora_dropout": 0.1,
        "a_field_of_tomorrow": [1],
    }
    # One rank left: no pattern, and r is that rank.
    write_pruned(tmp_path / "full", selection_of(tmp_path / "full", lambda name: ".1." in name), tmp_path / "middle")
    config = json.loads((tmp_path / "middle/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["lora_alpha"]) == (3, {}, 2)
    reread = {site.name: site.scaling for site in read_adapter(tmp_path / "middle").sites}
    assert set(reread.values()) == {2 / 3}


@pytest.mark.parametrize("ranks", [{}, {"v_proj": 9}], ids=["one rank", "two ranks"])
def test_rslora_is_folded_away(ranks, tmp_path):
    """SGLang and llama.cpp read `use_rslora` as nothing: alpha / r must be right."""
    model = tiny_peft_model("llama", n_layers=1, rank=3, use_rslora=True, rank_pattern=ranks)
    model.save_pretrained(tmp_path / "full")
    kept = selection_of(tmp_path / "full", lambda name: "up_proj" not in name)
    write_pruned(tmp_path / "full", kept, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned/adapter_config.json").read_text())
    assert config["use_rslora"] is False and config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "pruned/adapter_model.safetensors")
    for name in kept_sites(tmp_path / "pruned"):
        A, B = (tensors[f"{PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        update = model.get_submodule(PREFIX + name).get_delta_weight("default")
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B @ A, update, rtol=1e-5, atol=1e-6)
    zero_b_by_hand(model, lambda name: "up_proj" in name)
    loaded = PeftModel.from_pretrained(tiny_model("llama", n_layers=1), tmp_path / "pruned")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_what_needs_a_factor_changes_its_bytes(dtype, tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, dtype=dtype, alpha_pattern={"layers.0.v_proj": 3})
    weight = {"model.layers.1.q_proj": 0.3}
    keep = lambda name: not name.endswith("2.v_proj")  # noqa: E731
    selection = selection_of(tmp_path / "full", keep, lambda name: weight.get(name, 1.0))
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")
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
        write_pruned(tmp_path / "full", selection, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape")  # PEFT takes the bias for a broken matrix
def test_the_bias_of_b_is_folded_too(tmp_path):
    model = tiny_peft_model("opt", lora_bias=True, alpha_pattern={"q_proj": 2})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data += 0.3
    model.save_pretrained(tmp_path / "full")
    selection = selection_of(tmp_path / "full", lambda name: True, lambda name: 0.5)
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")
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
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")

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
        kept = selection_of(tmp_path / "full", lambda name: name != "lm_head")
        write_pruned(tmp_path / "full", kept, tmp_path / "no")
    with pytest.raises(SelectionError, match="ensure_weight_tying"):
        halved = selection_of(tmp_path / "full", lambda name: True, lambda name: 0.5 if name == "lm_head" else 1.0)
        write_pruned(tmp_path / "full", halved, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    for name, outside in (("with", True), ("without", False)):
        keep = lambda site, outside=outside: outside or site in SHAPES  # noqa: E731
        write_pruned(tmp_path / "full", selection_of(tmp_path / "full", keep), tmp_path / name)
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["ensure_weight_tying"] is outside


def test_what_is_not_lora_keeps_its_bytes(tmp_path):
    write_adapter_folder(tmp_path / "full", SHAPES, modules_to_save=["classifier"])
    weights = tmp_path / "full/adapter_model.safetensors"
    head = {f"{PREFIX}classifier.weight": torch.randn(3, 4), f"{PREFIX}classifier.bias": torch.randn(3).half()}
    save_file({**load_file(weights), **head}, weights)
    write_pruned(tmp_path / "full", select_boundary(read_adapter(tmp_path / "full").sites, 1), tmp_path / "pruned")
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
    write_pruned(tmp_path / "full", selection, tmp_path / "pruned")
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
        result = write_pruned(tmp_path / "full", selection, tmp_path / f"pruned-{boundary}")
        assert (result.n_sites_kept, result.n_sites) == (2 * boundary, 16)
        assert (result.n_parameters_kept, result.n_parameters) == (2 * boundary * 8 * 768, 16 * 8 * 768)
        assert result.n_bytes == (result.path / "adapter_model.safetensors").stat().st_size
        share = result.n_parameters_kept / result.n_parameters
        assert result.n_bytes / result.n_bytes_before == pytest.approx(share, rel=0.02)
        data = load_file(result.path / "adapter_model.safetensors").values()  # without the header: exact
        assert sum(tensor.nbytes for tensor in data) == result.n_parameters_kept * dtype.itemsize
