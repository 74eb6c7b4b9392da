"""Adapters of other versions of transformers, against updates added by hand and the model that was saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import load
from lorazor.errors import AdapterError
from lorazor.settings import ModelSettings
from tests.data.test_batches import byte_tokenizer
from tests.tiny_folders import write_rows
from tests.tiny_mixtures import N_EXPERTS, N_LAYERS, RANK, SIZES, logits, tiny_mixture, wrappers
from tests.tiny_models import randomise_b_

# PEFT 0.21 looks for patterns among modules alone; the ranks are those of the patterns nonetheless.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")

ALPHA = 5
GATE, DOWN, UP = "w1", "w2", "w3"


@pytest.fixture
def base(tmp_path) -> Path:
    tiny_mixture().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def of_transformers_4(
    folder: Path, base: Path, parts=(GATE, DOWN, UP), left_out: Callable[[str], bool] = lambda name: False
) -> dict[str, torch.Tensor]:
    """Write such an adapter; its updates s B A by module."""
    generator, tensors, updates = torch.Generator().manual_seed(1), {}, {}
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    names = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
        for layer in range(N_LAYERS)
        for expert in range(N_EXPERTS)
        for part in parts
    ]
    queries = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(N_LAYERS)]
    for name in filter(lambda name: not left_out(name), [*names, *queries]):
        d_in, d_out = (
            (hidden, hidden) if "q_proj" in name else (inner, hidden) if name.endswith(DOWN) else (hidden, inner)
        )
        A, B = (torch.randn(shape, generator=generator) / 3 for shape in ((RANK, d_in), (d_out, RANK)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
        updates[name] = ALPHA / RANK * B @ A
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    config |= {"target_modules": [*parts, "q_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return updates


def added_by_hand(updates: dict[str, torch.Tensor]):
    """The base model with the updates in its weights: gate above up in one parameter, as transformers 5 has them."""
    model, inner = tiny_mixture(), SIZES["intermediate_size"]
    for name, update in updates.items():
        _, _, layer, *_, expert, part = f"{name}.".split(".")[:-1] if "q_proj" not in name else [*name.split("."), ""]
        if "q_proj" in name:
            model.get_submodule(name).weight.data += update
            continue
        experts = model.model.layers[int(layer)].mlp.experts
        place = {GATE: slice(0, inner), UP: slice(inner, None), DOWN: slice(None)}[part]
        (experts.down_proj if part == DOWN else experts.gate_up_proj).data[int(expert), place] += update
    return model


@pytest.mark.parametrize("parts", [(GATE, DOWN, UP), (DOWN,), (GATE, UP)])
def test_it_computes_what_every_expert_has_of_its_own(base, parts, tmp_path):
    updates = of_transformers_4(tmp_path / "adapter", base, parts)
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.model), logits(added_by_hand(updates)), rtol=1e-4, atol=1e-4)
    assert len(loaded.sites) == N_LAYERS * (1 + (DOWN in parts) + (GATE in parts))


def test_stock_peft_alone_loses_gate_and_up_without_down(base, tmp_path):
    """Why the names are mended; where this fails, PEFT does it itself."""
    of_transformers_4(tmp_path / "adapter", base, (GATE, UP))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        stock = PeftModel.from_pretrained(tiny_mixture(), tmp_path / "adapter")
    assert all(not one.lora_B["default"].weight.any() for one in wrappers(stock).values())


def test_what_is_written_of_it_is_right_in_stock_peft(base, tmp_path):
    updates = of_transformers_4(tmp_path / "adapter", base)
    lorazor.prune(tmp_path / "adapter", boundary=1, out=tmp_path / "small")
    stock = PeftModel.from_pretrained(tiny_mixture(), tmp_path / "small").eval()
    kept = {name: update for name, update in updates.items() if ".layers.0." in name}
    torch.testing.assert_close(logits(stock), logits(added_by_hand(kept)), rtol=1e-4, atol=1e-4)
    assert [site.kind for site in read_adapter(tmp_path / "small").sites] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "self_attn.q_proj",
    ]


def test_a_layer_without_lora_stays_without(base, tmp_path):
    updates = of_transformers_4(tmp_path / "adapter", base, left_out=lambda name: "layers.1.block" in name)
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.model), logits(added_by_hand(updates)), rtol=1e-4, atol=1e-4)
    assert len(loaded.sites) == 2 + N_LAYERS


def test_it_is_shrunk_and_resumed_under_its_own_name(base, tmp_path):
    of_transformers_4(tmp_path / "adapter", base)
    data = write_rows(tmp_path / "val.jsonl", range(6))
    settings = {"out": tmp_path / "run", "data": data, "params_fraction": 0.5}
    lorazor.shrink(tmp_path / "adapter", **settings)
    lorazor.shrink(tmp_path / "adapter", **settings, resume=True)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["adapter"] == str(tmp_path / "adapter")
    assert {site.kind for site in read_adapter(tmp_path / "run" / "adapter").sites} == {
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
        "self_attn.q_proj",
    }


@pytest.mark.parametrize(
    ("parts", "left_out", "message"),
    [
        ((GATE, DOWN), "none", "cannot translate it: Cannot convert PEFT target.* w1 without also targeting w3"),
        ((GATE, DOWN, UP), "experts.1.", r"for 2 of the 3 experts of model.layers.0.mlp.experts.\w+_proj"),
    ],
)
def test_what_stock_peft_cannot_load_is_refused_before_anything_is_written(base, parts, left_out, message, tmp_path):
    of_transformers_4(tmp_path / "adapter", base, parts, lambda name: left_out in name)
    with pytest.raises(AdapterError, match=message):
        lorazor.prune(tmp_path / "adapter", boundary=1, out=tmp_path / "small")
    with pytest.raises(AdapterError, match=message):
        load(tmp_path / "adapter", ModelSettings(model=str(base)))
    assert not (tmp_path / "small").exists()


def test_a_base_beside_the_adapter_is_beside_what_is_written(base, tmp_path):
    of_transformers_4(tmp_path / "adapter", base)
    shutil.move(base, tmp_path / "adapter" / "base")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"base_model_name_or_path": "base"}))
    lorazor.prune(tmp_path / "adapter", boundary=1, out=tmp_path / "deep" / "small")
    config = json.loads((tmp_path / "deep" / "small" / "adapter_config.json").read_text())
    assert (tmp_path / "deep" / "small" / config["base_model_name_or_path"]).resolve() == tmp_path / "adapter" / "base"
    assert load(tmp_path / "deep" / "small").sites


def test_a_family_that_peft_does_not_fuse_is_named(base, tmp_path):
    of_transformers_4(tmp_path / "adapter", base)
    tiny_mixture("gpt_oss").save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"does not translate 'model\.layers\.0\.block_\S+' for a gpt_oss"):
        load(tmp_path / "adapter", ModelSettings(model=str(tmp_path / "other")))


def test_inspect_shows_it_as_it_is(base, tmp_path):
    of_transformers_4(tmp_path / "adapter", base)
    assert len(lorazor.inspect(tmp_path / "adapter").sites) == 3 * N_EXPERTS * N_LAYERS + N_LAYERS


PREFIX = "base_model.model."
SEEING = r".*language_model.*\.(q_proj|v_proj|up_proj)"


def seeing_model():
    """A tiny Gemma 3 that looks at images."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    looks = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={"vocab_size": 288, "num_key_value_heads": 2, "head_dim": 8, **sizes},
        vision_config={"image_size": 28, "patch_size": 14, **looks}, mm_tokens_per_image=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def of_before_4_52(folder: Path, base: Path, targets: str | list[str], **lora_kwargs: Any) -> PeftModel:
    """Write an adapter as transformers 4.51 named its modules; the model that computes it."""
    settings = {"r": 2, "target_modules": SEEING, "task_type": "CAUSAL_LM", **lora_kwargs}
    model = get_peft_model(seeing_model(), LoraConfig(**settings))
    randomise_b_(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    old, new = f"{PREFIX}language_model.model.", f"{PREFIX}model.language_model."
    save_file({key.replace(new, old): tensor for key, tensor in load_file(weights).items()}, weights)
    written = config.read_text().replace('"model.language_model.', '"language_model.model.')
    config.write_text(
        json.dumps(json.loads(written) | {"target_modules": targets, "base_model_name_or_path": str(base)})
    )
    return model.eval()


@pytest.mark.parametrize("by_name", [False, True])
def test_names_of_before_4_52_are_todays(by_name, tmp_path):
    seeing_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    names = [f"language_model.model.layers.{n}.{one}" for n in (0, 1) for one in ("self_attn.q_proj", "mlp.up_proj")]
    names += [f"language_model.model.layers.{n}.self_attn.v_proj" for n in (0, 1)]
    model = of_before_4_52(tmp_path / "old", tmp_path / "base", names if by_name else SEEING)
    torch.testing.assert_close(logits(load(tmp_path / "old").model), logits(model))
    lorazor.prune(tmp_path / "old", boundary=1, out=tmp_path / "small")
    for name, module in model.named_modules():
        if "layers.1" in name and hasattr(module, "lora_A"):
            module.enable_adapters(False)
    stock = PeftModel.from_pretrained(seeing_model(), tmp_path / "small").eval()
    torch.testing.assert_close(logits(stock), logits(model))


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_ranks_and_scalings_of_single_modules_are_translated_with_their_names(name, tmp_path):
    """PEFT leaves these keys as they are: ranks do not fit then, and scalings are others without a word."""
    seeing_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    pattern = {name: {"model.language_model.layers.0.self_attn.q_proj": 3, "v_proj": 1}}
    model = of_before_4_52(tmp_path / "old", tmp_path / "base", SEEING, **pattern)
    torch.testing.assert_close(logits(load(tmp_path / "old").model), logits(model))
    lorazor.prune(tmp_path / "old", boundary=2, out=tmp_path / "same")
    stock = PeftModel.from_pretrained(seeing_model(), tmp_path / "same").eval()
    torch.testing.assert_close(logits(stock), logits(model))


def test_trained_weights_that_are_not_translated_are_named_with_the_folder(tmp_path):
    seeing_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    of_before_4_52(tmp_path / "old", tmp_path / "base", SEEING, modules_to_save=["layers.1.input_layernorm"])
    with pytest.raises(
        AdapterError, match=r"old'.* does not translate 'language_model\.model\.layers\.1\.input_layernorm"
    ):
        load(tmp_path / "old")


def test_an_output_layer_that_is_not_translated_is_named_with_what_can_be_done(tmp_path):
    seeing_model().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    of_before_4_52(tmp_path / "old", tmp_path / "base", ["lm_head"])
    shapes = {"A": (2, 32), "B": (288, 2)}
    tensors = {f"{PREFIX}language_model.lm_head.lora_{one}.weight": torch.ones(shape) for one, shape in shapes.items()}
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"translate 'language_model\.lm_head'.* Use it with the transformers"):
        load(tmp_path / "old")
