"""Exported adapters: what is written, what it loses, how it is verified, and what is refused before that."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lorazor
from lorazor.adapter.folder import read_adapter
from lorazor.serve import export as writing
from lorazor.serve.base import outline_base
from lorazor.serve.form import Form
from lorazor.serve.judging import judge, server_named
from lorazor.serve.table import SERVERS
from lorazor.settings import ModelSettings
from tests.serve.forms import write_form
from tests.serve.loaders import read_gguf
from tests.tiny_models import write_adapter_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """An adapter of ranks 8 and 3, rsLoRA."""
    path = write_form(tiny.base, "mixed ranks", tmp_path_factory.mktemp("mixed") / "adapter").path
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | {"use_rslora": True}))
    return path


def logits(base, adapter) -> torch.Tensor:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        return model(torch.arange(24).reshape(2, 12) + 3).logits


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi"])
def test_stock_peft_computes_the_same(tiny, mixed, out, server):
    result = lorazor.export(mixed, server, out=out)
    assert result.difference is not None and result.difference <= 1e-5 and result.largest_logit > 0.1
    torch.testing.assert_close(logits(tiny.base, out), logits(tiny.base, mixed), rtol=0, atol=1e-5)
    config = json.loads((out / CONFIG).read_text())
    assert not config["use_rslora"] and not config["alpha_pattern"]
    assert bool(config["rank_pattern"]) == (server == "vllm")
    assert result.n_sites == 28 and result.rank == 8


def test_what_was_wrong_is_right_after_export(mixed, tiny, out):
    result = lorazor.export(mixed, "sglang", out=out)
    assert result.before.outcome == "crashes"
    assert {one.rule.outcome for one in result.before.findings} == {"crashes", "wrong"}
    base = outline_base(read_adapter(out), ModelSettings(str(tiny.base)))
    assert judge(Form(read_adapter(out), base), server_named("sglang")).is_right


def test_the_same_adapter_gives_the_same_bytes(mixed, tmp_path):
    for name in ("one", "two"):
        lorazor.export(mixed, "tgi", out=tmp_path / name, verify=False)
    for file in (WEIGHTS, CONFIG, "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_one_scaling_is_in_alpha_and_leaves_every_number_as_it_is(tiny, tmp_path):
    """Nothing is rounded, whatever the number format: rsLoRA of rank 8 has a scaling of 12 / sqrt(8)."""
    adapter = write_form(tiny.base, "rsLoRA", tmp_path / "adapter").path
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    result = lorazor.export(adapter, "sglang", out=tmp_path / "out")
    assert (adapter / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["lora_alpha"] == pytest.approx(12 * 8**0.5)
    assert result.difference <= 1e-6


def test_a_factor_in_half_precision_is_rounded_and_not_refused(mixed, tiny, tmp_path):
    adapter = shutil.copytree(mixed, tmp_path / "adapter")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    result = lorazor.export(adapter, "sglang", out=tmp_path / "out")
    assert 1e-5 < result.difference < 0.05
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [1, 2])
def test_cut_ranks_keep_the_largest_singular_directions_and_say_what_is_lost(tiny, tmp_path, rank):
    """Against numpy's SVD of every update."""
    adapter = write_form(tiny.base, "plain", tmp_path / "adapter")
    result = lorazor.export(adapter.path, "vllm", out=tmp_path / "out", max_rank=rank)
    written = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.base), str(tmp_path / "out"))
    lost = total = 0.0
    for name, delta in adapter.deltas.items():
        u, s, v = torch.linalg.svd(delta.double())
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        module = written.get_base_model().get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(module.get_delta_weight("default").double(), best, rtol=1e-4, atol=1e-5)
        lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
    assert result.energy_lost == pytest.approx(lost / total, rel=1e-4)
    assert result.flags.max_rank == (1 if rank == 1 else 8) and result.difference > 1e-4
    assert f"{lost / total:.2%}" in (tmp_path / "out" / "README.md").read_text()


def test_added_sites_are_zero_and_said(tiny, tmp_path):
    lorazor.prune(tiny.adapter, out=tmp_path / "small", boundary=3)
    result = lorazor.export(tmp_path / "small", "tgi", out=tmp_path / "out")
    assert (result.n_sites, result.n_sites_before, result.n_filled, result.rank) == (28, 21, 7, 8)
    assert any("7 sites of zeros" in one and "save nothing" in one for one in result.said)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert not any(tensor.any() for key, tensor in tensors.items() if "layers.3." in key)
    assert result.n_bytes > result.n_bytes_before
    torch.testing.assert_close(
        logits(tiny.base, tmp_path / "out"), logits(tiny.base, tmp_path / "small"), rtol=0, atol=1e-5
    )


def test_the_card_keeps_what_pruning_wrote_and_is_not_written_twice(tiny, tmp_path):
    lorazor.prune(tiny.adapter, out=tmp_path / "small", boundary=3)
    lorazor.export(tmp_path / "small", "tgi", out=tmp_path / "one", verify=False)
    lorazor.export(tmp_path / "one", "vllm", out=tmp_path / "two", verify=False)
    card = (tmp_path / "two" / "README.md").read_text()
    assert card.count("Pruned with lorazor") == 1 and card.count("Exported with lorazor") == 1
    assert "for vllm" in card


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_has_every_number_in_its_format(tiny, tmp_path, dtype):
    adapter = write_form(tiny.base, "mixed ranks", tmp_path / "adapter")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(adapter.path / WEIGHTS).items()}
    save_file(tensors, adapter.path / WEIGHTS, metadata={"format": "pt"})
    lorazor.export(adapter.path, "llama.cpp", out=tmp_path / "out", verify=False)
    assert not (tmp_path / "out" / WEIGHTS).exists() and not (tmp_path / "out" / CONFIG).exists()
    if dtype != torch.bfloat16:  # NumPy has no such numbers to read
        found = read_gguf(tmp_path / "out" / "adapter.gguf", LlamaForCausalLM.from_pretrained(tiny.base))
        for name, delta in adapter.deltas.items():
            torch.testing.assert_close(found[name].float(), delta, rtol=2e-3, atol=2e-3)


def test_a_wrong_number_is_found_and_nothing_is_left(mixed, out, monkeypatch):
    def wrong(plan):
        tensors = right(plan)
        key = next(key for key in tensors if "lora_B" in key)
        return tensors | {key: tensors[key] * 1.01}

    right = writing.planned_tensors
    monkeypatch.setattr(writing, "planned_tensors", wrong)
    with pytest.raises(lorazor.LorazorError, match="other logits"):
        lorazor.export(mixed, "sglang", out=out)
    assert not out.exists() and not list(out.parent.glob(".out*"))


def test_modules_to_save_are_named_with_what_dropping_them_loses(tiny, tmp_path):
    adapter = write_form(tiny.base, "saved output layer", tmp_path / "adapter").path
    n_bytes = load_file(adapter / WEIGHTS)["base_model.model.lm_head.weight"].nbytes
    with pytest.raises(lorazor.LorazorError) as caught:
        lorazor.export(adapter, "vllm", out=tmp_path / "out")
    message = str(caught.value)
    assert f"lm_head ({n_bytes:,} bytes)" in message and "--drop-modules-to-save" in message
    assert not (tmp_path / "out").exists()
    result = lorazor.export(adapter, "vllm", out=tmp_path / "out", drop_modules_to_save=True)
    assert result.dropped == ("lm_head",) and result.difference > 1e-3
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] is None
    assert all("lora_" in key for key in load_file(tmp_path / "out" / WEIGHTS))
    for server in ("peft", "transformers"):  # they have a place for it, and drop nothing
        kept = lorazor.export(adapter, server, out=tmp_path / server, drop_modules_to_save=True)
        assert kept.dropped == () and kept.difference == 0


def test_an_adapter_of_another_base_is_refused(tiny, tmp_path, out):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=4, vocab_size=300
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    strange = write_adapter_folder(tmp_path / "strange", {"transformer.h.0.attn.c_attn": (8, 32, 96)})
    for adapter, base in ((tiny.adapter, tmp_path / "narrow"), (strange, tiny.base)):
        with pytest.raises(lorazor.LorazorError, match="none of the"):
            lorazor.export(adapter, "vllm", out=out, model=lorazor.ModelSettings(str(base)))
    assert not out.exists()


def test_bad_input_is_refused_before_anything_is_loaded(tiny, tmp_path, out, monkeypatch):
    dora = write_form(tiny.base, "DoRA", tmp_path / "dora").path
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    monkeypatch.setattr("lorazor.workflow.export.load", lambda *_: pytest.fail("loaded"))
    before = (tiny.adapter / WEIGHTS).read_bytes()
    for adapter, server, place, message in (
        (tiny.adapter, "vllm", tiny.adapter, "is the adapter itself"),
        (tiny.adapter, "vllm", tmp_path / "taken", "is not empty"),
        (tiny.adapter, "half-life", out, "Known are"),
        (tiny.adapter, "sglang==0.1", out, "Known are"),
        (dora, "vllm", out, r"does not take DoRA: model.* peft.save_as_lora"),
        (dora, "tgi", out, r"leaves out the magnitudes of DoRA: .* peft.save_as_lora"),
        (dora, "peft", out, r"_proj is DoRA, which is computed there as it is"),
    ):
        with pytest.raises(lorazor.LorazorError, match=message):
            lorazor.export(adapter, server, out=place)
    with pytest.raises(lorazor.LorazorError, match="max_rank"):
        lorazor.export(tiny.adapter, "vllm", out=out, max_rank=0)
    assert not out.exists() and (tiny.adapter / WEIGHTS).read_bytes() == before


def test_what_cannot_be_gguf_is_refused(tiny, tmp_path, out):
    from tests.tiny_models import tiny_model, tiny_peft_model

    tiny_model("opt").save_pretrained(tmp_path / "opt")
    tiny_peft_model("opt").save_pretrained(tmp_path / "adapter")
    settings = lorazor.ModelSettings(str(tmp_path / "opt"))
    with pytest.raises(lorazor.LorazorError, match="OPTForCausalLM cannot be written as GGUF"):
        lorazor.export(tmp_path / "adapter", "llama.cpp", out=out, model=settings)
    with_head = write_form(tiny.base, "embedding", tmp_path / "embedding").path
    with pytest.raises(lorazor.LorazorError, match="embed_tokens"):
        lorazor.export(with_head, "llama.cpp", out=out)


# Rules that no adapter of the tiny base meets


def test_a_tied_output_layer_a_huge_rank_and_ollamas_import(tiny, tmp_path):
    import dataclasses

    head = read_adapter(write_form(tiny.base, "output layer", tmp_path / "head").path)
    base = outline_base(head, ModelSettings(str(tiny.base)))
    rows = {server.key: server for server in SERVERS}
    tied = Form(head, dataclasses.replace(base, is_tied=True))
    assert judge(Form(head, base), rows["llama.cpp"]).is_right
    assert [one.names for one in judge(tied, rows["llama.cpp"]).incurable] == [("lm_head",)]
    huge = read_adapter(write_adapter_folder(tmp_path / "huge", {"model.layers.0.mlp.up_proj": (513, 32, 48)}))
    assert judge(Form(huge), rows["vllm"]).outcome == "refused" and judge(Form(huge), rows["peft"]).is_right
    fused = read_adapter(write_adapter_folder(tmp_path / "fused", {"model.layers.0.self_attn.qkv_proj": (8, 32, 96)}))
    assert judge(Form(fused), rows["tgi"]).outcome == "wrong" and judge(Form(fused), rows["lorax"]).is_right
    qwen_head = Form(head, dataclasses.replace(base, architecture="Qwen2ForCausalLM"))
    assert judge(qwen_head, rows["vllm"]).outcome == "refused" and judge(Form(head, base), rows["vllm"]).is_right
    qwen = Form(huge, dataclasses.replace(base, architecture="Qwen2ForCausalLM"))
    assert [one.rule.cure for one in judge(qwen, rows["ollama"]).findings] == ["gguf"]
