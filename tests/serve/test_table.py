"""The table of rules against servers' own code, on adapters of every form; and what export makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lorazor.adapter.folder import read_adapter
from lorazor.errors import SettingsError, UnsupportedAdapterError
from lorazor.serve.base import outline_base
from lorazor.serve.form import Form
from lorazor.serve.judging import judge, server_named
from lorazor.serve.table import RULES, SERVERS
from lorazor.settings import ModelSettings
from lorazor.workflow.export import export
from tests.serve.forms import FORMS, forms_once, is_same
from tests.serve.loaders import LOADERS
from tests.tiers import fast_first

# PEFT on lora_bias of linear maps without a bias: it cannot merge them, and nobody does here
pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings(
        "ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape"
    ),  # it takes biases for B
]

BY_KEY = {server.key: server for server in SERVERS}


@pytest.fixture(scope="module")
def formed(tiny, tmp_path_factory):
    """Adapters of every form, each written once."""
    return forms_once(tiny.base, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def base(tiny):
    return LlamaForCausalLM.from_pretrained(tiny.base)


@pytest.mark.parametrize("form", ["rsLoRA", "alpha_pattern", "mixed ranks", "two layers"])
def test_a_headline_is_what_decides_and_leads_to_the_rest(formed, form):
    for server in SERVERS:
        judgement = judge(Form(read_adapter(formed(form).path)), server)
        headline, _, hint = judgement.headline.partition(" more: --for ")
        if judgement.is_right or len(judgement.findings) == 1:
            assert headline == judgement.sentence
            continue
        assert server_named(hint.removesuffix(")")) is server
        assert headline.endswith(f"({len(judgement.findings) - 1}")
        deciding = {one.sentence for one in judgement.findings if one.rule.outcome == judgement.outcome}
        assert headline.split(": it ", 1)[1].rpartition(" (")[0] in deciding


def outcome_of(server: str, path: Path, base, deltas) -> str:
    """What the server's own code makes of a folder."""
    try:
        return "right" if is_same(LOADERS[server](path, base), deltas) else "wrong"
    except (KeyError, ValueError, RuntimeError, AssertionError, SystemExit):
        return "raises"


@pytest.mark.parametrize("form", FORMS)
def test_the_table_says_what_the_servers_do(formed, tiny, base, form):
    adapter = formed(form)
    folder = read_adapter(adapter.path)
    outline = outline_base(folder, ModelSettings(str(tiny.base)))
    said, done = {}, {}
    for server in LOADERS:
        found = judge(Form(folder, outline), BY_KEY[server]).outcome
        said[server] = "raises" if found in ("crashes", "refused") else found
        done[server] = outcome_of(server, adapter.path, base, adapter.deltas)
    assert said == done


FAST = ("rank 4", "rsLoRA", "alpha_pattern", "mixed ranks in a group", "two layers", "k alone", "up alone")


@pytest.mark.parametrize("form", fast_first(FORMS, *FAST))
def test_what_is_exported_the_servers_compute_right(formed, base, tmp_path, form):
    adapter = formed(form)
    for server in LOADERS:
        was_right = outcome_of(server, adapter.path, base, adapter.deltas) == "right"
        if was_right and form not in ("plain", "mixed ranks", "two layers", "expression"):
            continue  # nothing to be done, which takes its time
        name = "vllm==0.31" if server == "vllm-old" else BY_KEY[server].name
        out = tmp_path / server
        try:
            result = export(adapter.path, name, out=out, verify=False)
        except UnsupportedAdapterError as error:
            assert not out.exists() and "\n" not in str(error)
            assert not was_right
            continue
        assert outcome_of(server, out, base, adapter.deltas) == "right", (server, result.said)


def test_every_rule_is_met_by_a_form_of_these_tests(formed, tiny):
    folders = [read_adapter(formed(form).path) for form in FORMS]
    forms = [Form(folder, outline_base(folder, ModelSettings(str(tiny.base)))) for folder in folders]
    # other tests have these
    elsewhere = (
        "rank 512",
        "expert",
        "on a parameter",
        "of its own",
        "of this model",
        "than Llama has",
        "imports folders",
    )
    silent = [rule.what for rule in RULES if not any(getattr(form, rule.form) for form in forms)]
    assert all(any(part in what for part in elsewhere) for what in silent), silent


@pytest.mark.parametrize("form", fast_first(FORMS, "mixed ranks in a group", "two layers", "saved norm"))
def test_peft_and_transformers_compute_every_form(formed, tiny, form):
    adapter = formed(form)
    outcome = judge(Form(read_adapter(adapter.path)), BY_KEY["transformers"]).outcome
    assert judge(Form(read_adapter(adapter.path)), BY_KEY["peft"]).is_right
    ids = torch.arange(14).reshape(2, 7) + 3
    wanted = LlamaForCausalLM.from_pretrained(tiny.base)
    with torch.no_grad():
        base_logits = wanted(ids).logits
        for name, delta in adapter.deltas.items():
            if name.endswith(".bias"):  # of a linear map without one
                module = wanted.get_submodule(name.removesuffix(".bias"))
                module.bias = torch.nn.Parameter(delta)
            else:
                wanted.get_parameter(name).add_(delta)
        expected = wanted(ids).logits
        peft_model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), str(adapter.path))
        model = AutoModelForCausalLM.from_pretrained(tiny.base)
        model.load_adapter(str(adapter.path))
        assert float((expected - base_logits).abs().max()) > 1e-3
        torch.testing.assert_close(peft_model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        is_right = torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert outcome == ("right" if is_right else "wrong")


def test_every_server_and_rule_is_well_formed():
    assert {key for rule in RULES for key in rule.servers} <= BY_KEY.keys()
    assert all(rule.outcome != "right" and rule.by.startswith(("run: ", "read: ")) for rule in RULES)
    assert len(BY_KEY) == len(SERVERS)


@pytest.mark.parametrize(
    ("text", "key"),
    [("vllm", "vllm"), ("vLLM==0.32.1", "vllm"), ("vllm==1.0", "vllm"), ("vllm==0.31.3", "vllm-old"),
     ("vllm==0.9", "vllm-old"), ("sglang", "sglang"), ("sglang==0.5.23", "sglang"), ("llama.cpp==b9000", "llama.cpp")],
)  # fmt: skip
def test_servers_are_named_with_or_without_a_version(text, key):
    assert server_named(text).key == key


@pytest.mark.parametrize("text", ["nope", "", "sglang==0.4", "vllm==new"])
def test_an_unknown_server_or_version_lists_those_known(text):
    with pytest.raises(SettingsError) as caught:
        server_named(text)
    assert all(server.title in str(caught.value) for server in SERVERS)
