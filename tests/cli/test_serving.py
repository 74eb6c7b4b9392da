"""`inspect --for`, `export` and `fleet` as a user types them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorazor.serve.table import SERVERS
from tests.serve.forms import write_form

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rslora(tiny, tmp_path_factory) -> Path:
    """An adapter of rank 8 with rsLoRA."""
    return write_form(tiny.base, "rsLoRA", tmp_path_factory.mktemp("rslora") / "adapter").path


def test_inspect_has_a_line_for_every_server(lorazor, rslora):
    status, text, messages = lorazor("inspect", rslora)
    assert status == 0 and messages == ""
    lines = {
        server.title: [line for line in text.splitlines() if line.startswith(f"{server.title}: ")] for server in SERVERS
    }
    assert all(len(found) == 1 for found in lines.values())
    wrong = {title for title, (line,) in lines.items() if "WRONG" in line}
    assert wrong == {"sglang 0.5.23", "llama.cpp", "ollama"}
    assert "rsLoRA" in lines["sglang 0.5.23"][0] and "and 27 more" in lines["sglang 0.5.23"][0]


@pytest.mark.parametrize(("server", "status"), [("sglang", 1), ("vllm", 0), ("vllm==0.31.1", 0), ("llama.cpp", 1)])
def test_inspect_for_a_server_exits_1_if_it_computes_something_else(lorazor, rslora, server, status):
    found, text, _ = lorazor("inspect", rslora, "--for", server)
    assert found == status
    assert text.count("tgi") == 0 and f"export {rslora} --for {server}" in text
    found, text, _ = lorazor("inspect", rslora, "--for", server, "--json")
    document = json.loads(text)
    assert found == status and len(document["servers"]) == len(SERVERS)
    assert {one["outcome"] for one in document["servers"]} == {"right", "wrong"}


@pytest.mark.parametrize("command", [["inspect"], ["export", "--out", "out"], ["fleet"]])
@pytest.mark.parametrize("server", ["nope", "sglang==0.1"])
def test_an_unknown_server_is_one_line_that_lists_those_known(lorazor, rslora, tmp_path, monkeypatch, command, server):
    monkeypatch.chdir(tmp_path)
    status, text, messages = lorazor(command[0], rslora, *command[1:], "--for", server)
    assert status == 1 and text == "" and messages.count("\n") == 1
    assert all(one.title in messages for one in SERVERS) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message", "key"),
    [("dead", "1 of 28 sites are dead", "dead"), ("nan", "1 of 28 sites hold NaN", "broken"),
     ("strange", "7 of 28 sites are on no module of the base model", "strangers")],
)  # fmt: skip
def test_inspect_finds_what_is_wrong_whoever_serves_it(lorazor, tiny, tmp_path, how, message, key):
    adapter = shutil.copytree(tiny.adapter, tmp_path / how)
    tensors = load_file(adapter / WEIGHTS)
    first = next(name for name in tensors if "lora_B" in name)
    if how == "dead":
        tensors[first] *= 0
    elif how == "nan":
        tensors[first][0, 0] = math.nan
    else:
        tensors = {name.replace("layers.1.", "layers.9."): one for name, one in tensors.items()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    status, _, messages = lorazor("inspect", adapter)
    assert status == 0 and message in messages
    _, text, _ = lorazor("inspect", adapter, "--json")
    assert len(json.loads(text)[key]) == (7 if how == "strange" else 1)
    status, _, _ = lorazor("inspect", adapter, "--for", "vllm")
    assert status == (0 if how == "dead" else 1)


def test_inspect_says_when_it_does_not_know_the_base(lorazor, tiny, tmp_path):
    adapter = shutil.copytree(tiny.adapter, tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/at/all"}))
    _, text, _ = lorazor("inspect", adapter)
    assert "not on this machine" in text and "--model" in text
    _, text, _ = lorazor("inspect", adapter, "--model", tiny.base)
    assert "not on this machine" not in text


def test_export_prints_what_it_did_the_flags_and_what_they_save(lorazor, rslora, tmp_path):
    status, text, messages = lorazor("export", rslora, "--for", "vllm", "--max-rank", 1, "--out", tmp_path / "out")
    assert status == 0, messages
    assert "lora_alpha" in text and "largest singular directions" in text and "28 sites" in text
    assert "--enable-lora --max-lora-rank 1 --lora-target-modules down_proj gate_up_proj qkv_proj o_proj" in text
    assert "A slot has 7,424 bytes then, and 159,744 without these flags (4.6%)." in text
    status, text, _ = lorazor("export", rslora, "--for", "sglang", "--out", tmp_path / "json", "--json")
    document = json.loads(text)
    assert document["difference"] <= 1e-5 and document["flags"] is None and document["before"]["outcome"] == "wrong"
    status, text, _ = lorazor("export", rslora, "--for", "llama.cpp", "--out", tmp_path / "gguf", "--no-verify")
    assert status == 0 and "Not verified" in text and (tmp_path / "gguf" / "adapter.gguf").exists()


def test_pruning_says_who_does_not_compute_what_it_wrote(lorazor, rslora, tmp_path):
    _, text, _ = lorazor("prune", rslora, "--boundary", 2, "--out", tmp_path / "two")
    assert "Not computed right, as it is, by tgi, lorax: " in text
    _, text, _ = lorazor("prune", rslora, "--boundary", 4, "--out", tmp_path / "all")
    assert "Not computed" not in text  # rsLoRA is folded away


def test_export_without_its_base_says_how_to_go_on(lorazor, rslora, tmp_path):
    adapter = shutil.copytree(rslora, tmp_path / "adapter")
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    status, text, messages = lorazor("export", adapter, "--for", "vllm", "--out", tmp_path / "out")
    assert status == 1 and text == "" and messages.count("\n") == 1 and "--model" in messages
    assert not (tmp_path / "out").exists()


def test_fleet_prints_members_flags_and_what_would_save_more(lorazor, rslora, tiny, tmp_path):
    file = tmp_path / "fleet.json"
    status, text, messages = lorazor("fleet", rslora, tiny.adapter, "--for", "vllm", "--out", file)
    assert status == 0 and messages == ""
    assert "2 adapters of" in text and "--max-lora-rank 8" in text and "rank 1" in text and f"Fleet: {file}" in text
    status, text, _ = lorazor("fleet", tiny.adapter, "--for", "vllm", "--given", file, "--json")
    assert status == 0 and json.loads(text)["fleet"]["max_rank"] == 8
    lorazor("prune", tiny.adapter, "--boundary", 2, "--out", tmp_path / "small")
    lorazor("fleet", tmp_path / "small", "--for", "vllm", "--out", tmp_path / "small.json")
    status, text, messages = lorazor("fleet", rslora, "--for", "vllm", "--given", tmp_path / "small.json")
    assert status == 1 and text == "" and "without a word" in messages
