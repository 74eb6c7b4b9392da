"""Evaluations of several adapters."""

from __future__ import annotations

import json
import shutil
import weakref

import pytest
from safetensors.torch import load_file, save_file

from lorazor.settings import EvalSettings, ModelSettings
from lorazor.workflow import opening
from lorazor.workflow.evaluate import evaluate


def test_one_model_is_in_memory_at_a_time(tiny, out, monkeypatch):
    """Counted without our code: every model that was loaded is watched by a weak reference; adapters share one."""
    load, watched, alive = opening.load, [], []

    def watching(*arguments, **options):
        alive.append(sum(one() is not None for one in watched))
        loaded = load(*arguments, **options)
        watched.append(weakref.ref(loaded.model))
        vars(loaded.model)["circle"] = loaded.model  # as the hooks of a device map make one
        return loaded

    monkeypatch.setattr("lorazor.workflow.opening.load", watching)
    evaluate([tiny.adapter, f"{tiny.adapter}/"], str(tiny.held_out), out=out, settings=EvalSettings(base=True))
    assert len(watched) == 1 and alive == [0]


def test_another_base_model_takes_the_place_of_the_first(tiny, out, tmp_path, monkeypatch):
    """Two adapters of two copies of a base: the first model is gone before the second is loaded."""
    shutil.copytree(tiny.base, tmp_path / "base")
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    path.write_text(json.dumps(config))
    load, watched, alive = opening.load, [], []

    def watching(*arguments, **options):
        alive.append(sum(one() is not None for one in watched))
        loaded = load(*arguments, **options)
        watched.append(weakref.ref(loaded.model))
        vars(loaded.model)["circle"] = loaded.model  # as the hooks of a device map make one
        return loaded

    monkeypatch.setattr("lorazor.workflow.opening.load", watching)
    first, second = evaluate([tiny.adapter, tmp_path / "adapter"], str(tiny.held_out), out=out).results
    assert alive == [0, 0] and second.value == pytest.approx(first.value, abs=1e-6)


def test_a_swapped_adapter_is_measured_as_if_it_were_alone(tiny, tmp_path):
    """The second adapter on a base that had the first: the numbers of a model of its own."""
    other = tmp_path / "other"
    shutil.copytree(tiny.adapter, other)
    from safetensors.torch import load_file, save_file

    tensors = {
        key: -0.5 * tensor if "lora_B" in key else tensor
        for key, tensor in load_file(other / "adapter_model.safetensors").items()
    }
    save_file(tensors, other / "adapter_model.safetensors", metadata={"format": "pt"})
    both = EvalSettings(base=True)
    together = evaluate([tiny.adapter, other], str(tiny.held_out), out=tmp_path / "both", settings=both).results
    alone = [
        evaluate([one], str(tiny.held_out), out=tmp_path / f"alone-{index}").results[0].value
        for index, one in enumerate((tiny.adapter, other))
    ]
    base = ModelSettings(model=str(tiny.base))
    settings = EvalSettings(model=base)
    alone.append(evaluate([], str(tiny.held_out), out=tmp_path / "base", settings=settings).results[0].value)
    assert [one.value for one in together] == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 4) for value in alone}) == 3


def test_with_the_base_model_every_adapter_is_still_measured_on_its_own_base(tiny, out, tmp_path):
    """The base of the second is another model: what is measured beside `base` is what is measured without it."""
    shutil.copytree(tiny.base, tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    save_file({key: 1.1 * one for key, one in load_file(weights).items()}, weights, metadata={"format": "pt"})
    shutil.copytree(tiny.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    adapters, data = [tiny.adapter, tmp_path / "adapter"], str(tiny.held_out)
    alone = [one.value for one in evaluate(adapters, data, out=out / "alone").results]
    beside = evaluate(adapters, data, out=out / "beside", settings=EvalSettings(base=True)).results
    assert abs(alone[0] - alone[1]) > 1e-3
    assert [one.value for one in beside if one.adapter != "base"] == pytest.approx(alone, abs=1e-6)
