"""Whole commands on a base model of which accelerate keeps some layers on disk, against the same in memory."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorazor
import lorazor.adapter.load as loading
from lorazor.adapter.load import load
from lorazor.errors import AdapterError, BaseModelError
from tests.adapter.test_beside import write_adapter
from tests.tiny_folders import N_LAYERS, write_rows

WHOLE = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
PLACES = [*WHOLE, *(f"model.layers.{layer}" for layer in range(N_LAYERS))]
READING = lorazor.DataSettings(batch_size=2)


@pytest.fixture
def offload(monkeypatch, tmp_path):
    """A function that keeps modules of every base model that is loaded from then on away, on disk."""
    before, folders = loading.load_base, count()

    def start(*names):
        def load_base(*arguments):
            model, untrained = before(*arguments)
            places = {name: "disk" if name in names else "cpu" for name in PLACES}
            folder = tmp_path / f"weights-{next(folders)}"  # accelerate would take up what is in an old one
            dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
            assert any(parameter.is_meta for parameter in model.parameters())
            return model, untrained

        monkeypatch.setattr(loading, "load_base", load_base)

    return start


def run_all(tiny, out, heal):
    shrunk = lorazor.shrink(tiny.adapter, tiny.validation, out=out / "run", params_fraction=0.5, heal=str(heal),
                            heal_steps=2, reading=READING)  # fmt: skip
    cut = lorazor.find_boundary(
        tiny.adapter, tiny.validation, out=out / "cut", rule="manual", boundary=2, reading=READING
    )
    weights = load_file(shrunk.pruned.path / "adapter_model.safetensors")
    numbers = [one.value for one in shrunk.candidates] + [one.value for one in cut.choice.candidates]
    return numbers, weights


@pytest.mark.slow
def test_shrink_heal_and_boundary_are_what_they_are_in_memory(tiny, tmp_path, offload):
    heal = write_rows(tmp_path / "heal.jsonl", range(30, 34))
    numbers, weights = run_all(tiny, tmp_path / "memory", heal)
    offload("model.embed_tokens", "model.layers.1", "model.layers.3", "lm_head")
    found, of_offloaded = run_all(tiny, tmp_path / "disk", heal)
    assert found == pytest.approx(numbers, abs=1e-5)
    assert weights.keys() == of_offloaded.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(of_offloaded[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT, as it saves them
@pytest.mark.parametrize("kind", ["both saved", "old tokens", "new tokens"])
def test_embeddings_of_the_adapter_in_the_place_of_offloaded_ones_are_refused(tiny, tmp_path, offload, kind):
    adapter = write_adapter(tiny, tmp_path / "adapter", kind)
    offload("model.embed_tokens", "lm_head")
    with pytest.raises(BaseModelError, match=r"brings its own 'model.embed_tokens.weight', .* another --device-map"):
        load(adapter)
    offload("model.layers.0")
    assert load(adapter).sites


def test_a_model_in_memory_whose_adapter_is_offloaded_is_refused(tiny, tmp_path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), tiny.adapter)
    places = {f"base_model.model.{name}": "disk" if name == "model.layers.1" else "cpu" for name in PLACES}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
    with pytest.raises(AdapterError, match=r"layers.1\S* are offloaded .* pass its folder with device_map="):
        lorazor.evaluate(model, tiny.validation, tokenizer=AutoTokenizer.from_pretrained(tiny.base))
