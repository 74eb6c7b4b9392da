"""Many adapters on one server."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import lorazor
from tests.serve.forms import write_form
from tests.workflow.planted import plant
from tests.workflow.shrinking import READING, stock_losses

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
    result = lorazor.plan_fleet(adapters, "vllm")
    forms = {one.what: one for one in result.common}
    shares = ["50% of the sites", "25% of the sites", "10% of the sites"]
    assert list(forms) == ["rank 1", "the sites that all of them have", "these sites, rank 1", *shares]
    shared = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    lost = {what: [] for what in list(forms)[:3]}
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
    for what, each in lost.items():
        assert forms[what].energy_lost == pytest.approx(max(each), rel=1e-4)
        assert forms[what].of == str(adapters[each.index(max(each))])
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


def test_the_sites_of_a_smaller_fleet_hold_most_of_what_its_adapters_do(adapters, tiny, tmp_path):
    """Groups as the server joins them, by the mean over adapters of their share of the energy, each counted alike."""
    small = lorazor.plan_fleet(adapters[:1], "vllm", sites_fraction=0.4, max_rank=1, out=tmp_path / "fleet.json")
    assert small.fleet.max_rank == 1 and not small.members[0].fits
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    energy: dict[tuple, list[float]] = {}
    for key in (one for one in tensors if "lora_A" in one):
        parent, _, last = key.partition(".lora_A")[0].removeprefix("base_model.model.").rpartition(".")
        update = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        joined = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gu", "up": "gu"}.get(last.removesuffix("_proj"), last)
        energy.setdefault((parent, joined), []).append(float(update.double().svd().S[0] ** 2))
    kept, n = set(), 0
    for group in sorted(energy, key=lambda one: -sum(energy[one]) / len(energy[one])):
        if not kept or n + len(energy[group]) <= round(0.4 * 28):
            kept.add(group)
            n += len(energy[group])
    assert len(small.fleet.sites) == n and {one.rpartition(".")[0] for one in small.fleet.sites} == {g[0] for g in kept}


def test_an_adapter_is_shrunk_into_a_slot_and_judged_at_its_own_margin(adapters, tiny, tmp_path):
    file = tmp_path / "fleet.json"
    before = lorazor.plan_fleet(adapters, "vllm", max_rank=1, sites_fraction=0.5, out=file)
    assert [one.fits for one in before.members] == [False, False, False]
    assert before.flags.slot_bytes < before.slot_bytes_now / 8
    one = plant(tiny.base, tiny.adapter, tmp_path)
    places: Any = {"out": tmp_path / "run", "fleet": file, "confirm": one.held_out}
    result = lorazor.shrink(one.adapter, one.data, margin="30%", reading=READING, **places)
    made, verdict = tmp_path / "run" / "adapter", result.verdict
    assert result.server == "vllm >= 0.32" and verdict is not None
    full, small, base = (
        sum(stock_losses(tiny.base, folder, one.held_out).values()) for folder in (tiny.adapter, made, None)
    )
    assert verdict.margin / verdict.lost == pytest.approx(0.3 * (base - full) / (small - full), rel=1e-3)
    config = json.loads((made / CONFIG).read_text())
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), str(made)).get_base_model()
    sites = {name for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    assert sites and sites <= {*before.fleet.sites} and config["r"] == 1 and not config["rank_pattern"]
    assert lorazor.plan_fleet([made], "vllm", given=file).members[0].fits


def test_what_does_not_go_with_a_fleet_is_refused(adapters, tiny, tmp_path):
    file = tmp_path / "fleet.json"
    for bad, reason in [({"max_rank": 2}, "can have 1, 8"), ({"sites_fraction": 1.5}, "is no share")]:
        with pytest.raises(lorazor.LorazorError, match=reason):
            lorazor.plan_fleet(adapters, "vllm", out=file, **bad)
    lorazor.plan_fleet(adapters[2:], "vllm", out=file, max_rank=1)
    with pytest.raises(lorazor.LorazorError, match="plan a fleet"):
        lorazor.plan_fleet(adapters, "vllm", given=file, max_rank=1)
    elsewhere, other = tmp_path / "elsewhere.json", tmp_path / "other.json"
    elsewhere.write_text(json.dumps(json.loads(file.read_text()) | {"sites": ["model.layers.9.mlp.up_proj"]}))
    other.write_text(json.dumps(json.loads(file.read_text()) | {"base_model": "org/other"}))
    for fleet, bad, reason in [
        (file, {"max_rank": 1}, "max_rank=1, but the fleet says the size"),
        (file, {"uniform": True}, "uniform, but the fleet"),
        (file, {"by": "site"}, "by='site' keeps them"),
        (file, {"server": "sglang"}, "is a fleet for vllm >= 0.32"),
        (elsewhere, {}, "none of its 28 sites"),
        (other, {}, "a fleet of 'org/other'"),
    ]:
        with pytest.raises(lorazor.LorazorError, match=reason):
            lorazor.shrink(tiny.adapter, tiny.validation, out=tmp_path / "no", fleet=fleet, **bad)
    assert not (tmp_path / "no").exists()
