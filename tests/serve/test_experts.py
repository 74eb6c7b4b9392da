"""LoRA on the parameters of experts: what servers make of it, and what is refused because of that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.errors import RowsUnclearError, UnsupportedAdapterError
from lorazor.serve.base import outline_base, strangers
from lorazor.serve.form import Form
from lorazor.serve.judging import judge
from lorazor.serve.table import SERVERS
from lorazor.settings import ModelSettings
from tests.serve.forms import is_same
from tests.serve.loaders import LOADERS
from tests.tiny_mixtures import logits, on_experts, tiny_mixture, wrappers
from tests.tiny_models import tiny_peft_model

BY_KEY = {server.key: server for server in SERVERS}


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def mixture(request, tmp_path_factory):
    """Base folder, adapter folder and the model with LoRA on experts and o_proj."""
    root = tmp_path_factory.mktemp(request.param)
    model = on_experts(request.param, target_modules=["o_proj"])
    model.save_pretrained(str(root / "adapter"))
    tiny_mixture(request.param).save_pretrained(root / "base")
    return root / "base", root / "adapter", model


def form_of(base, adapter) -> Form:
    folder = read_adapter(adapter)
    return Form(folder, outline_base(folder, ModelSettings(str(base))))


def test_the_table_says_what_the_servers_do_with_experts(mixture):
    base, adapter, model = mixture
    said = {
        key: judge(form_of(base, adapter), BY_KEY[key]).outcome for key in ("sglang", "tgi", "lorax", "tensorrt-llm")
    }
    assert said == {"sglang": "crashes", "tgi": "wrong", "lorax": "wrong", "tensorrt-llm": "refused"}
    deltas: dict[str, Any] = {name: one.get_delta_weight("default").detach() for name, one in wrappers(model).items()}
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert deltas and not any(is_same(LOADERS[key](adapter, plain), deltas) for key in ("tgi", "lorax"))
    with pytest.raises(ValueError, match="Cannot find target module name for .*experts"):
        LOADERS["sglang"](adapter, plain)
    with pytest.raises(AssertionError, match="experts"):
        LOADERS["tensorrt-llm"](adapter, plain)


def test_transformers_computes_experts_as_peft(mixture):
    base, adapter, model = mixture
    assert judge(form_of(base, adapter), BY_KEY["transformers"]).is_right
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    before = logits(plain)
    plain.load_adapter(str(adapter))
    assert float((before - logits(model)).abs().max()) > 0.1
    torch.testing.assert_close(logits(plain), logits(model))


def test_what_vllm_does_depends_on_the_model(mixture):
    """As far as vLLM 0.32.0 was run: Mixtral's experts have other names there; gpt-oss takes a GPU."""
    base, adapter, _ = mixture
    found = judge(form_of(base, adapter), BY_KEY["vllm"])
    assert found.outcome == ("wrong" if "mixtral" in base.parent.name else "unknown")
    assert judge(Form(read_adapter(adapter)), BY_KEY["vllm"]).outcome == "unknown"  # no base is known
    assert judge(form_of(base, adapter), BY_KEY["vllm-old"]).outcome == "unknown"


def test_experts_are_no_strangers_to_their_base(mixture, tmp_path):
    base, adapter, _ = mixture
    form = form_of(base, adapter)
    assert form.base is not None and not strangers(form.folder, form.base)
    wider = tiny_mixture("mixtral")
    wider.config.num_local_experts = 4
    type(wider)(wider.config).save_pretrained(tmp_path / "wider")
    other = outline_base(form.folder, ModelSettings(str(tmp_path / "wider")))
    assert {site.name.partition(".mlp.")[2] for site in strangers(form.folder, other)} >= {"experts.down_proj"}


@pytest.mark.parametrize(
    ("server", "why"),
    [("sglang", "finds no place for LoRA on the parameters of experts"), ("vllm", "experts of this model"),
     ("llama.cpp", "has no name for LoRA on all experts|cannot be written as GGUF"), ("peft", "has no other form")],
)  # fmt: skip
def test_export_says_why_not(mixture, out, server, why):
    base, adapter, _ = mixture
    settings = ModelSettings(str(base))
    with pytest.raises(lorazor.LorazorError, match=why):
        lorazor.export(adapter, server, out=out, model=settings)
    assert not out.exists()


def test_rows_with_selections_of_their_own_are_refused(mixture):
    model = mixture[2]
    sites = lorazor.find_sites(model)
    each = [lorazor.Selection(tuple(site.entry(keep) for site in sites), "test", {}) for keep in (True, False)]
    with pytest.raises(RowsUnclearError, match="experts.* share. Pass one selection"):
        with lorazor.kept(model, each):
            pytest.fail("computed")
    with lorazor.kept(model, each[1]), torch.no_grad():
        nothing = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(nothing, logits(model), rtol=0, atol=0)


def test_dora_is_kept_whole_or_not_at_all():
    model = get_peft_model(tiny_peft_model("llama").unload(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    sites = lorazor.find_sites(model)
    half = lorazor.Selection(tuple(site.entry(True, weight=0.5) for site in sites), "test", {})
    with pytest.raises(UnsupportedAdapterError, match="is DoRA.* weight 1 or dropped"):
        with lorazor.kept(model, half):
            pytest.fail("computed")
