"""Adapters of every origin: wrapped while they were trained, of other tools, and in places on a hub."""

from __future__ import annotations

import fnmatch
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorazor.adapter.find import find_adapter
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load
from lorazor.adapter.prune import write_pruned
from lorazor.errors import AdapterError
from lorazor.selection import Selection
from tests.adapter.test_folder import PREFIX, SHAPES
from tests.tiny_models import write_adapter_folder

FSDP = "._fsdp_wrapped_module"
WRAPPED = {
    "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "FSDP": lambda key: key.replace(".layers.", "._fsdp_wrapped_module.layers.").replace(
        ".mlp.", "._fsdp_wrapped_module.mlp."
    ),
    "recomputed": lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    "DDP": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_names_of_wrappers_are_left_out(tiny, tmp_path, rename, pickled):
    """PEFT itself loads nothing of such a file."""
    tensors = load_file(tiny.adapter / "adapter_model.safetensors")
    odd, ids = tmp_path / "odd", torch.tensor([[5, 6, 7, 8]])
    shutil.copytree(tiny.adapter, odd)
    wrapped = {rename(key): tensor for key, tensor in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    if pickled:
        (odd / "adapter_model.safetensors").unlink()
        torch.save(wrapped, odd / "adapter_model.bin")
    else:
        save_file(wrapped, odd / "adapter_model.safetensors")
    plain, folder = read_adapter(tiny.adapter), read_adapter(odd)
    assert folder.sites == plain.sites
    with torch.no_grad():
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), tiny.adapter)
        expected = stock(input_ids=ids).logits
        torch.testing.assert_close(load(odd).model(input_ids=ids).logits, expected)
        entries = tuple(site.entry(True) for site in folder.sites)
        write_pruned(odd, Selection(entries, "all", {}), tmp_path / "out")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), tmp_path / "out")
        torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_tensors_that_are_there_twice_are_refused(tmp_path):
    weights = write_adapter_folder(tmp_path, SHAPES) / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {f"_orig_mod.{key}": tensor.clone() for key, tensor in tensors.items()}, weights)
    with pytest.raises(AdapterError, match="with and without the names of wrappers"):
        read_adapter(tmp_path)


def test_folders_of_other_tools_are_named(tmp_path):
    mlx, diffusers, kohya, parts, parent = (tmp_path / name for name in ("mlx", "images", "kohya", "parts", "parent"))
    for folder in (mlx, diffusers, kohya):
        folder.mkdir()
    one = {"x": torch.zeros(1)}
    save_file(one, mlx / "adapters.safetensors")
    (mlx / "adapter_config.json").write_text('{"fine_tune_type": "lora", "num_layers": 16}')
    save_file(one, diffusers / "pytorch_lora_weights.safetensors")
    save_file({"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(1, 1)}, kohya / "style.safetensors")
    weights = write_adapter_folder(parts, SHAPES) / "adapter_model.safetensors"
    weights.rename(parts / "adapter_model-00001-of-00002.safetensors")
    for name in ("checkpoint-900", "checkpoint-1000"):
        write_adapter_folder(parent / name, SHAPES)
    for folder, said in {
        mlx: "an adapter of MLX", diffusers: "LoRA of diffusers", kohya: "kohya", parts: "PEFT reads no parts",
        parent: "has 'checkpoint-900', 'checkpoint-1000' inside.*checkpoint-1000'.$",
    }.items():  # fmt: skip
        with pytest.raises(AdapterError, match=said):
            read_adapter(folder)
    assert len(read_adapter(parent / "checkpoint-900").sites) == 3


def test_a_fused_projection_of_another_rank_is_named_and_what_it_says_helps(tmp_path):
    """Three projections of rank 2 and alpha 6, in one tensor of rank 6."""
    shapes = {"model.layers.0.self_attn.qkv_proj": (6, 8, 24), "model.layers.0.self_attn.o_proj": (2, 8, 8)}
    write_adapter_folder(tmp_path, shapes)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text()) | {"r": 2, "lora_alpha": 6, "rank_pattern": {}}
    path.write_text(json.dumps(config))
    said = r"qkv_proj has rank 6, but adapter_config.json says 2\. As LoRA of 3 projections that were joined in one"
    with pytest.raises(AdapterError, match=said) as caught:
        read_adapter(tmp_path)
    assert "rank_pattern {'qkv_proj': 6}" in str(caught.value) and "alpha_pattern {'qkv_proj': 18}" in str(caught.value)
    path.write_text(json.dumps(config | {"rank_pattern": {"qkv_proj": 6}, "alpha_pattern": {"qkv_proj": 18}}))
    assert {site.rank: site.scaling for site in read_adapter(tmp_path).sites} == {2: 6 / 2, 6: 6 / 2}


@pytest.mark.parametrize(
    ("name", "repo", "inside", "revision"),
    [
        ("someone/adapter", "someone/adapter", None, None),
        ("someone/adapter@v1.0", "someone/adapter", None, "v1.0"),
        ("someone/adapter@refs/pr/3", "someone/adapter", None, "refs/pr/3"),
        ("someone/adapter/checkpoint-100", "someone/adapter", "checkpoint-100", None),
        ("someone/adapter/a/b@main", "someone/adapter", "a/b", "main"),
    ],
)
def test_hub_ids_with_folders_and_revisions(tmp_path, monkeypatch, name, repo, inside, revision):
    asked = {}

    def download(repo_id, revision, allow_patterns):
        asked.update(repo=repo_id, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("lorazor.adapter.find.snapshot_download", download)
    assert find_adapter(name) == (tmp_path / inside if inside else tmp_path)
    assert (asked["repo"], asked["revision"]) == (repo, revision)
    files = ["adapter_config.json", "adapter_model.safetensors", "vocab.txt", "merges.txt", "qwen.tiktoken"]
    for file in files:
        path = f"{inside}/{file}" if inside else file
        assert any(fnmatch.fnmatch(path, pattern) for pattern in asked["patterns"])
    assert not any(fnmatch.fnmatch(f"{inside or 'x'}/optimizer.pt", pattern) for pattern in asked["patterns"])


def test_what_is_no_hub_id_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("org/repo/../other", "org/repo/a/..", "org/repo/..@main", "org/.."):
        with pytest.raises(AdapterError, match=r"'\.\.'"):
            find_adapter(name)
    for name in ("nowhere", "./a/b", "../a/b", "/a/b", "runs/x/y", "~/a/b"):
        with pytest.raises(AdapterError, match="There is no adapter folder"):
            read_adapter(find_adapter(name))
