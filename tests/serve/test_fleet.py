"""Many adapters on one server."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import lorazor
from tests.serve.forms import write_form

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Three of one base: all layers at rank 4, two layers at rank 8, one kind at rank 8."""
    root = tmp_path_factory.mktemp("fleet")
    return [tiny.adapter, *(write_form(tiny.base, form, root / form).path for form in ("two layers", "one kind"))]


def test_a_fleet_is_the_union_of_sites_and_the_largest_rank(adapters):
    result = lorazor.plan_fleet(adapters, "vllm")
    assert result.fleet.max_rank == 8 and len(result.fleet.sites) == 28
    assert [(one.n_sites, one.rank) for one in result.members] == [(28, 4), (14, 8), (4, 8)]
    assert set(result.flags.targets) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert all(one.judgement.is_right and one.n_bytes > 1000 for one in result.members)
    assert result.flags.slot_bytes < result.flags.slot_bytes_untold
    assert all(one.slot_bytes <= result.flags.slot_bytes for one in result.members)
    few = lorazor.plan_fleet(adapters[1:], "vllm")
    assert len(few.fleet.sites) == 16 and few.flags.slot_bytes < result.flags.slot_bytes


def test_more_common_forms_by_brute_force(adapters, tiny):
    """Rank 1 of everything, and what stays of the sites that all have, from the updates themselves."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    result = lorazor.plan_fleet(adapters, "vllm")
    forms = {one.what: one for one in result.common}
    assert list(forms) == ["rank 1", "the sites that all of them have", "these sites, rank 1"]
    shared = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    lost = {what: [] for what in forms}
    for adapter in adapters:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), str(adapter))
        values = {
            name: torch.linalg.svdvals(module.get_delta_weight("default")).square()
            for name, module in model.get_base_model().named_modules()
            if hasattr(module, "get_delta_weight")
        }
        total = sum(float(one.sum()) for one in values.values())
        lost["rank 1"].append(1 - sum(float(one[0]) for one in values.values()) / total)
        lost["the sites that all of them have"].append(1 - sum(float(values[name].sum()) for name in shared) / total)
        lost["these sites, rank 1"].append(1 - sum(float(values[name][0]) for name in shared) / total)
    for what, shares in lost.items():
        assert forms[what].energy_lost == pytest.approx(max(shares), rel=1e-4)
        assert forms[what].of == str(adapters[shares.index(max(shares))])
    assert forms["rank 1"].slot_bytes * 8 == result.flags.slot_bytes
    assert forms["the sites that all of them have"].n_sites == 2


def test_a_server_that_runs_refuses_what_it_would_cut(adapters, tmp_path):
    file = tmp_path / "fleet.json"
    lorazor.plan_fleet(adapters[1:2], "vllm", out=file)
    assert lorazor.plan_fleet(adapters[1:2], "vllm", given=file).fleet.max_rank == 8
    with pytest.raises(lorazor.LorazorError, match="14 of its 28 sites, such as 'model.layers.2"):
        lorazor.plan_fleet(adapters, "vllm", given=file)
    other = json.loads(file.read_text()) | {"base_model": "org/other"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(lorazor.LorazorError, match="a fleet of 'org/other'"):
        lorazor.plan_fleet(adapters[1:2], "vllm", given=tmp_path / "other.json")
    low = json.loads(file.read_text()) | {"max_rank": 1}
    file.write_text(json.dumps(low))
    with pytest.raises(lorazor.LorazorError, match="has rank 8, and slots have rank 1"):
        lorazor.plan_fleet(adapters[1:2], "vllm", given=file)


def test_modules_that_the_server_joins_with_others_have_room(adapters, tiny, tmp_path):
    """A server that is told of q wraps q, k and v."""
    file = tmp_path / "fleet.json"
    lorazor.plan_fleet([write_form(tiny.base, "q alone", tmp_path / "q").path], "vllm", out=file)
    lorazor.plan_fleet([write_form(tiny.base, "k alone", tmp_path / "k").path], "vllm", given=file)


def test_two_bases_are_an_error(adapters, tmp_path):
    other = shutil.copytree(adapters[1], tmp_path / "other")
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    with pytest.raises(lorazor.LorazorError, match="2 base models") as caught:
        lorazor.plan_fleet([*adapters, other], "vllm")
    assert "org/other" in str(caught.value) and str(other) in str(caught.value)


def test_bad_fleets_are_refused(adapters, tiny, tmp_path):
    file = tmp_path / "fleet.json"
    for text in ("{", "[]", "{}", '{"format": "lorazor.fleet/1"}'):
        file.write_text(text)
        with pytest.raises(lorazor.LorazorError):
            lorazor.plan_fleet(adapters, "vllm", given=file)
    with pytest.raises(lorazor.LorazorError, match="exists"):
        lorazor.plan_fleet(adapters, "vllm", out=file)
    with pytest.raises(lorazor.LorazorError, match="No adapters"):
        lorazor.plan_fleet([], "vllm")
    with pytest.raises(lorazor.LorazorError, match="no flags"):
        lorazor.plan_fleet(adapters, "sglang")
    strange = shutil.copytree(adapters[1], tmp_path / "strange")
    weights = strange / "adapter_model.safetensors"
    save_file({key.replace("layers.1", "layers.9"): one for key, one in load_file(weights).items()}, weights)
    with pytest.raises(lorazor.LorazorError, match="7 of the 14 sites"):
        lorazor.plan_fleet([*adapters, strange], "vllm")
