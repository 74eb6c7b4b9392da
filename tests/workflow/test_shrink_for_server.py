"""Shrunk for a server: what is written is computed right by the server's own code, with no zero in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import lorazor
from lorazor.errors import BudgetError, SettingsError, UnsupportedAdapterError
from lorazor.serve.table import SERVERS
from tests.serve.forms import forms_once, is_same
from tests.serve.loaders import LOADERS
from tests.workflow.shrinking import READING

KEYS = {"vllm==0.31": "vllm-old"}


@pytest.fixture(scope="module")
def formed(tiny, tmp_path_factory):
    return forms_once(tiny.base, tmp_path_factory.mktemp("forms"))


def deltas_in_peft(base, path) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(path)).get_base_model()
    found = ((name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight"))
    return {f"{name}.weight": module.get_delta_weight("default").detach() for name, module in found}


@pytest.mark.parametrize(
    ("server", "form", "settings"),
    [
        ("sglang", "rsLoRA", {"params_fraction": 0.4}),
        ("sglang", "alpha_pattern", {"params_fraction": 0.4, "by": "prefix"}),
        ("sglang", "mixed ranks", {"max_rank": 2}),
        ("tgi", "plain", {"params_fraction": 0.6}),
        ("tgi", "mixed ranks", None),
        ("lorax", "alpha_pattern", {"params_fraction": 0.6}),
        ("vllm", "mixed ranks", {"params_fraction": 0.2}),
        ("vllm==0.31", "rsLoRA", {"params_fraction": 0.2}),
        ("vllm", "rsLoRA", {"max_rank": 1}),
        ("llama.cpp", "rsLoRA", {"params_fraction": 0.2}),
        ("tensorrt-llm", "alpha_pattern", {"params_fraction": 0.2}),
    ],
)
def test_the_server_computes_what_peft_computes(tiny, formed, tmp_path, server, form, settings):
    adapter = formed(form).path
    if settings is None:  # of several ranks, none of which a smaller adapter of it would lose
        with pytest.raises(UnsupportedAdapterError, match="Shrink what 'lorazor export --for tgi' makes of it"):
            lorazor.shrink(adapter, out=tmp_path / "run", server=server, params_fraction=0.6)
        return
    result = lorazor.shrink(adapter, out=tmp_path / "run", server=server, **settings)
    path = tmp_path / "run" / "adapter"
    assert result.pruned is not None and 0 < result.pruned.n_parameters_kept < result.pruned.n_parameters
    wanted = deltas_in_peft(tiny.base, path)
    assert max(float(one.abs().max()) for one in wanted.values()) > 1e-3
    base = LlamaForCausalLM.from_pretrained(tiny.base)
    assert is_same(LOADERS[KEYS.get(server, server)](path, base), wanted)
    assert all(bool(one.any()) for one in load_file(path / "adapter_model.safetensors").values())  # nothing is filled
    assert result.server == next(one.title for one in SERVERS if one.key == KEYS.get(server, server))
    assert (result.flags is not None) == server.startswith("vllm")


def test_flags_are_those_of_what_was_written(tiny, formed, tmp_path):
    result = lorazor.shrink(formed("plain").path, out=tmp_path / "run", server="vllm", params_fraction=0.1)
    sites = {one.site.name for one in lorazor.inspect(tmp_path / "run" / "adapter").sites}
    assert result.flags is not None and len(sites) < 10 and result.flags.max_rank == 8
    assert len(result.flags.targets) <= len(sites)
    assert result.flags.slot_bytes is not None and result.flags.slot_bytes_untold is not None
    assert result.flags.slot_bytes < 0.5 * result.flags.slot_bytes_untold


def test_by_examples_groups_go_together_and_a_run_is_resumed_for_the_same_server_only(tiny, formed, tmp_path):
    settings = {"params_fraction": 0.5, "points": 1, "reading": READING, "model": lorazor.ModelSettings(str(tiny.base))}
    arguments: Any = {"out": tmp_path / "run", **settings}
    result = lorazor.shrink(formed("plain").path, tiny.validation, server="sglang", **arguments)
    assert result.pruned is not None and result.loaded_differs_by is not None
    assert lorazor.inspect(tmp_path / "run" / "adapter", model=str(tiny.base)).judgement("sglang").is_right
    with pytest.raises(lorazor.LorazorError):
        lorazor.shrink(formed("plain").path, tiny.validation, server="vllm", resume=True, **arguments)


@pytest.mark.parametrize(
    ("server", "form", "settings", "error", "message"),
    [
        ("sglang", "plain", {"by": "site"}, SettingsError, "by='site' leaves .* --by group, layer, prefix, window or"),
        ("tgi", "plain", {"by": "layer"}, SettingsError, "by='layer' leaves adapters that tgi .* Pass --by kind or"),
        ("tgi", "plain", {"max_rank": 4}, SettingsError, "ranks of 8 and multiples of 16"),
        ("vllm", "plain", {"max_rank": 3}, SettingsError, "max_rank=3 saves nothing in vllm >= 0.32, .* 1, 8, 16"),
        ("sglang", "plain", {"max_rank": 9}, BudgetError, "max_rank=9"),
        ("sglang", "q alone", {}, UnsupportedAdapterError, "raises KeyError .* Shrink what .*--for sglang"),
        ("tgi", "two layers", {}, UnsupportedAdapterError, "drops a kind of module in all layers"),
        ("vllm", "DoRA", {"by": "site"}, UnsupportedAdapterError, "does not take DoRA: .* No form of it is"),
        ("half-life", "plain", {}, SettingsError, "Known are: peft"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_at_the_start(formed, tmp_path, server, form, settings, error, message):
    goal = {} if "max_rank" in settings else {"params_fraction": 0.5}
    with pytest.raises(error, match=message):
        lorazor.shrink(formed(form).path, out=tmp_path / "run", server=server, **goal, **settings)
    assert not (tmp_path / "run").exists()
