"""Adapter folders against what PEFT itself makes of them."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorazor.adapter.folder import load_tensors, read_adapter, split_key
from lorazor.adapter.sites import find_sites
from lorazor.errors import AdapterError, UnsupportedAdapterError
from tests.tiny_models import FAMILIES, lora_config, tiny_model, tiny_peft_model, write_adapter_folder

SHAPES = {"model.layers.0.q_proj": (2, 3, 4), "model.layers.10.q_proj": (2, 3, 4), "model.layers.9.q_proj": (2, 3, 4)}
PREFIX = "base_model.model."


def described(sites):
    return [(s.name, s.stack, s.layer, s.kind, s.rank, s.scaling, s.n_parameters) for s in sites]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_has_the_sites_of_the_live_model_in_the_same_order(family, tmp_path):
    model = tiny_peft_model(family, n_layers=2)
    model.save_pretrained(tmp_path)
    folder = read_adapter(tmp_path)
    assert described(folder.sites) == described(find_sites(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 6, "use_rslora": True, "rank_pattern": {"q_proj": 9}},
        {"rank_pattern": {"layers.1.mlp.up_proj": 8, "up_proj": 2}, "alpha_pattern": {r"layers\.\d+\..*_proj": 5}},
        {"alpha_pattern": {"^model.layers.1.self_attn.k_proj": 7, "k_proj|v_proj": 3}},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"], "rank_pattern": {"lm_head": 3}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]},
    ],
    ids=["rslora", "both-patterns", "anchored", "outside", "modules-to-save"],
)
def test_ranks_and_scalings_are_those_that_peft_computes(settings, tmp_path):
    model = tiny_peft_model("llama", n_layers=2, **settings)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    by_peft = sorted((site.name, site.rank, site.module.scaling["default"]) for site in find_sites(model))
    folder = read_adapter(tmp_path)
    assert sorted((site.name, site.rank, site.scaling) for site in folder.sites) == by_peft
    assert described(folder.sites) == described(find_sites(model))


def test_a_folder_saved_by_transformers_is_read(tmp_path):
    model = tiny_model("llama")
    model.add_adapter(lora_config("llama"))
    model.save_pretrained(tmp_path)
    assert described(read_adapter(tmp_path).sites) == described(find_sites(model))


def test_layers_are_in_order_and_sites_outside_come_last(tmp_path):
    write_adapter_folder(tmp_path, {"lm_head": (2, 3, 4), **SHAPES})
    assert [site.layer for site in read_adapter(tmp_path).sites] == [0, 9, 10, None]


def test_reading_does_not_touch_the_data(tmp_path, monkeypatch):
    write_adapter_folder(tmp_path, SHAPES)
    weights = tmp_path / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    data[header_bytes:] = b"\xff" * (len(data) - header_bytes)  # every number becomes NaN
    weights.write_bytes(data)
    assert len(read_adapter(tmp_path).sites) == 3


def test_tensors_are_loaded_as_they_are(tmp_path):
    write_adapter_folder(tmp_path, SHAPES, dtype=torch.bfloat16)
    folder = read_adapter(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors")
    loaded = load_tensors(folder)
    assert list(loaded) == sorted(expected)
    assert all(loaded[key].dtype == torch.bfloat16 and torch.equal(loaded[key], expected[key]) for key in expected)
    one = f"{PREFIX}lm_head.lora_A.weight".replace("lm_head", "model.layers.9.q_proj")
    assert list(load_tensors(folder, [one])) == [one]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (f"{PREFIX}model.layers.0.q.lora_A.weight", ("model.layers.0.q", "lora_A.weight")),
        (f"{PREFIX}h.0.c_attn.lora_B.bias", ("h.0.c_attn", "lora_B.bias")),
        (f"{PREFIX}model.embed_tokens.lora_embedding_B", ("model.embed_tokens", "lora_embedding_B")),
        (f"{PREFIX}classifier.weight", None),
        (f"{PREFIX}model.embed_tokens.base_layer.weight", None),
    ],
)
def test_split_key(key, expected):
    assert split_key(key) == expected


def make_bin(folder: Path, content=None) -> Path:
    write_adapter_folder(folder, SHAPES)
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights) if content is None else content, folder / "adapter_model.bin")
    weights.unlink()
    return folder


def test_an_old_pickle_adapter_is_read(tmp_path):
    plain = read_adapter(write_adapter_folder(tmp_path / "safe", SHAPES))
    pickled = read_adapter(make_bin(tmp_path / "pickle"))
    assert pickled.weights.name == "adapter_model.bin"
    assert pickled.sites == plain.sites
    for key, tensor in load_tensors(pickled).items():
        assert torch.equal(tensor, load_tensors(plain)[key])


def test_tensors_of_a_pickle_do_not_share_memory(tmp_path):
    content = load_file(write_adapter_folder(tmp_path, SHAPES) / "adapter_model.safetensors")
    shared = torch.ones(5)
    folder = read_adapter(make_bin(tmp_path, content | {f"{PREFIX}one.weight": shared, f"{PREFIX}two.weight": shared}))
    tensors = load_tensors(folder)
    assert tensors[f"{PREFIX}one.weight"].data_ptr() != tensors[f"{PREFIX}two.weight"].data_ptr()


class _Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "was run"
    write_adapter_folder(tmp_path, SHAPES)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"weight": _Malicious(str(marker))}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="could run foreign code") as caught:
        read_adapter(tmp_path)
    assert not marker.exists()
    assert "\n" not in str(caught.value)
    (tmp_path / "adapter_model.bin").write_bytes(
        pickle.dumps(_Malicious(str(marker)), protocol=2)
    )  # without torch's zip around it
    with pytest.raises(AdapterError, match="could run foreign code"):
        read_adapter(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}])
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    with pytest.raises(AdapterError, match="must hold a dictionary of tensors"):
        read_adapter(make_bin(tmp_path, content))


def test_folders_that_are_none_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="There is no adapter folder '.*nowhere'"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="has no adapter_config.json, so it is not a PEFT adapter"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"')
    with pytest.raises(AdapterError, match="adapter_config.json' is not a JSON file"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match="adapter_config.json' is not a JSON file"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match="must hold a JSON object, not list"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(AdapterError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, -1])
@pytest.mark.parametrize("pickled", [False, True])
def test_truncated_weights_are_refused(size, pickled, tmp_path):
    if pickled:
        weights = make_bin(tmp_path) / "adapter_model.bin"
    else:
        weights = write_adapter_folder(tmp_path, SHAPES) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(AdapterError, match="damaged") as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.q.lora_A.weight": (2, 3)}, "model.layers.0.q has no lora_B.weight, only lora_A.weight"),
        ({"model.layers.0.q.lora_B.weight": (3, 2)}, "model.layers.0.q has no lora_A.weight, only lora_B.weight"),
        ({"e.lora_embedding_A": (2, 3)}, "e has no lora_embedding_B"),
        ({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 3)}, r"shapes of q disagree: A is \(2, 3\), B is \(4, 3\)"),
        ({"q.lora_A.weight": (0, 3), "q.lora_B.weight": (4, 0)}, "shapes of q disagree"),
        ({"q.lora_A.weight": (2,), "q.lora_B.weight": (4, 2)}, "shapes of q disagree"),
        ({"q.lora_A.weight": (4, 3), "q.lora_B.weight": (4, 4)}, "q has rank 4, but adapter_config.json says 2"),
        ({"classifier.weight": (2, 2)}, "has no LoRA tensors"),
    ],
)
def test_tensors_that_disagree_are_refused(tensors, message, tmp_path):
    write_adapter_folder(tmp_path, SHAPES)
    zeros = {PREFIX + key: torch.zeros(shape) for key, shape in tensors.items()}
    save_file(zeros, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("key", ["q.lora_magnitude_vector.weight", "q.lora_A.default.weight"])
def test_tensors_of_other_kinds_of_lora_are_refused(key, tmp_path):
    write_adapter_folder(tmp_path, SHAPES)
    save_file({PREFIX + key: torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapterError, match="does not belong to plain LoRA"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_dora": True}, AdapterError, r"has no lora_magnitude_vector, only lora_A.weight, lora_B.weight"),
        ({"peft_type": "LOHA"}, UnsupportedAdapterError, r"is a LOHA adapter.*peft.save_as_lora"),
        ({"peft_type": "ADALORA"}, AdapterError, "does not belong to AdaLoRA"),
        ({"peft_type": "IA3"}, UnsupportedAdapterError, "is a IA3 adapter"),
        ({"init_lora_weights": "pissa"}, UnsupportedAdapterError, "'pissa'"),
        ({"bias": "all"}, UnsupportedAdapterError, "trains biases"),
        ({"lora_alpha": 0}, AdapterError, "lora_alpha is 0"),
        ({"lora_alpha": "16"}, AdapterError, "lora_alpha is '16'"),
        ({"alpha_pattern": {"q_proj": None}}, AdapterError, r"alpha_pattern\['q_proj'\] is None"),
        ({"alpha_pattern": {"q_proj(": 2}}, AdapterError, "alpha_pattern has a key that is no regular expression"),
        ({"rank_pattern": [1]}, AdapterError, "rank_pattern must be an object"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(settings, error, message, tmp_path):
    write_adapter_folder(tmp_path, SHAPES, **settings)
    with pytest.raises(error, match=message) as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_settings_left_out_are_the_defaults_of_peft(tmp_path):
    write_adapter_folder(tmp_path, {"q": (8, 3, 4)})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["r"], config["lora_alpha"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert [(site.rank, site.scaling) for site in read_adapter(tmp_path).sites] == [(8, 1.0)]
