"""The command line as a user types it: results on stdout, one line of error on stderr, exit codes."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_folders import make_folders


def test_inspect_shows_layers_and_kinds(lorazor, tiny, tmp_path):
    status, text, _ = lorazor("inspect", tiny.adapter)
    assert status == 0 and "28 sites" in text and "q_proj" in text
    status, text, _ = lorazor("inspect", tiny.adapter, "--json")
    document = json.loads(text)
    assert document["stacks"] == {"model.layers": 4} and len(document["sites"]) == 28
    assert all(site["norm"] > 0 for site in document["sites"])


def test_prune_by_boundary_and_by_selection_give_the_same_bytes(lorazor, tiny, tmp_path):
    status, text, _ = lorazor("prune", tiny.adapter, "--boundary", 2, "--out", tmp_path / "a", "--json")
    assert status == 0 and json.loads(text)["n_sites_kept"] == 14
    arguments = ["--data", tiny.validation, "--rule", "manual", "--boundary", 2, "--out", tmp_path / "run"]
    assert lorazor("boundary", tiny.adapter, *arguments)[0] == 0
    selection = tmp_path / "run" / "selection.json"
    assert lorazor("prune", tiny.adapter, "--selection", selection, "--out", tmp_path / "b")[0] == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b", "run/adapter")]
    assert weights[0] == weights[1] == weights[2]


def test_boundary_prints_the_curve_and_the_verdict(lorazor, tiny, out):
    status, text, messages = lorazor(
        "boundary", tiny.adapter, "--data", tiny.validation, "--confirm", tiny.held_out, "--out", out,
        "--rule", "manual", "--boundary", 3, "--margin", "loss=0.1",
    )  # fmt: skip
    assert status == 0
    assert "95 % interval" in text and "held-out examples" in text and "Adapter:" in text
    assert "engine one-pass" in messages and "engine" not in text


def test_eval_compares_adapters_with_the_base(lorazor, tiny, tmp_path):
    lorazor("prune", tiny.adapter, "--boundary", 2, "--out", tmp_path / "small")
    status, text, _ = lorazor(
        "eval", tiny.adapter, tmp_path / "small", "--base", "--data", tiny.held_out, "--metrics", "loss,chrf",
        "--max-new-tokens", 4, "--out", tmp_path / "run", "--json",
    )  # fmt: skip
    results = json.loads(text)["results"]
    assert status == 0 and len(results) == 6
    assert [one["difference"]["estimate"] for one in results[::3]] == [0.0, 0.0]
    assert len({round(one["value"], 6) for one in results[:3]}) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    assert {row["adapter"] for row in rows} == {str(tiny.adapter), str(tmp_path / "small"), "base"}


@pytest.mark.slow
def test_train_makes_an_adapter_that_inspect_reads(lorazor, tiny, out):
    status, text, _ = lorazor(
        "train", "--model", tiny.base, "--data", tiny.validation, "--steps", 2, "--rank", 2, "--batch-size", 2,
        "--out", out, "--json",
    )  # fmt: skip
    assert status == 0 and json.loads(text)["n_parameters"] > 0
    status, text, messages = lorazor("inspect", out)
    assert status == 0 and "28 sites" in text and "dead" not in messages
    assert not (out / "training_args.bin").exists()


def break_adapter(tiny, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / how
    shutil.copytree(tiny.adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = folder / "adapter_model.safetensors"
    if how == "no-config":
        (folder / "adapter_config.json").unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "dora":
        (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [("no-config", "adapter_config.json"), ("truncated", "safetensors"), ("dora", "magnitude_vector")],
)
def test_broken_adapters_are_one_line_and_exit_1(lorazor, tiny, tmp_path, out, how, message):
    folder = break_adapter(tiny, tmp_path, how)
    for arguments in (["inspect", folder], ["boundary", folder, "--data", tiny.validation, "--out", out]):
        status, text, error = lorazor(*arguments)
        assert status == 1 and text == "" and message in error
        assert error.count("\n") == 1 and "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no such file"),
        ("", "empty"),
        ('{"prompt": "a", "completion": " b"}\n{broken\n', "line 2"),
        ('{"prompt": "a", "completion": ""}\n', "answer"),
        ('{"query": "a", "reply": "b"}\n', "query"),
        (json.dumps({"prompt": "a", "completion": " b" * 400}) + "\n", "256"),
    ],
)
def test_bad_data_is_one_line_and_exit_1(lorazor, tiny, tmp_path, out, rows, message):
    data = tmp_path / "data.jsonl"
    if rows is not None:
        data.write_text(rows)
    status, text, error = lorazor("boundary", tiny.adapter, "--data", data, "--out", out, "--max-length", 256)
    assert status == 1 and text == ""
    last = error.strip().splitlines()[-1]
    assert message.lower() in last.lower() and "Traceback" not in error


def test_an_adapter_for_another_base_is_said(lorazor, tiny, tmp_path, out):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    small = {"vocab_size": 300, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, **small)).save_pretrained(tmp_path / "narrow")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(tmp_path / "gpt2")
    for name, message in (("narrow", "size mismatch"), ("gpt2", "28 of 28 sites")):
        shutil.copy(tiny.base / "tokenizer.json", tmp_path / name)
        status, _, error = lorazor(
            "boundary",
            tiny.adapter,
            "--model",
            tmp_path / name,
            "--data",
            tiny.validation,
            "--out",
            tmp_path / f"r{name}",
        )
        last = error.strip().splitlines()[-1]
        assert status == 1 and message in last and "--model" in last, error


def test_usage_errors_exit_2(lorazor, tiny, out):
    for arguments in (["boundry"], ["boundary", tiny.adapter, "--dta", "x"], ["prune", tiny.adapter], ["inspect"]):
        status, text, error = lorazor(*arguments)
        assert status == 2 and text == "" and "Error" in error
    status, _, error = lorazor("prune", tiny.adapter, "--out", out)
    assert status == 1 and "Pass one of --selection FILE and --boundary N" in error


def test_an_output_folder_that_holds_something_is_not_touched(lorazor, tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for arguments in (
        ["prune", tiny.adapter, "--boundary", 2],
        ["boundary", tiny.adapter, "--data", tiny.validation],
        ["shrink", tiny.adapter, "--data", tiny.validation],
        ["eval", tiny.adapter, "--data", tiny.validation],
        ["train", "--model", tiny.base, "--data", tiny.validation],
    ):
        status, _, error = lorazor(*arguments, "--out", tmp_path)
        assert status == 1 and "not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_says_how_to_go_on(lorazor, tiny, tmp_path, monkeypatch):
    """The command that is printed is the one to type: it goes on, and with it nothing else has to be thought of."""
    out = tmp_path / "my run"
    monkeypatch.setattr("lorazor.workflow.opening.load", interrupt)
    arguments = ["boundary", tiny.adapter, "--data", tiny.validation, "--out", out]
    status, _, error = lorazor(*arguments)
    advice = error.strip().splitlines()[-1]
    assert status == 130 and advice.endswith(f"--out '{out}' --resume")
    again = shlex.split(advice.partition(": lorazor ")[2])
    assert again == [*map(str, arguments), "--resume"]
    status, _, error = lorazor(*again)
    assert status == 130 and error.count("--resume") == 1
    monkeypatch.undo()
    assert lorazor(*again)[0] == 0


@pytest.mark.parametrize("arguments", [["prune", "--boundary", 2], ["inspect"]])
def test_ctrl_c_names_no_option_that_a_command_lacks(lorazor, tiny, out, monkeypatch, arguments):
    """What is said is what the command can do: the same again is not refused for something left behind."""
    for place in ("adapter.prune.pruned_tensors", "workflow.inspect.site_norms"):
        monkeypatch.setattr(f"lorazor.{place}", interrupt)
    command, *rest = map(str, arguments)
    place = ["--out", out] if command != "inspect" else []
    status, _, error = lorazor(command, tiny.adapter, *rest, *place)
    assert status == 130 and "Interrupted" in error and "--resume" not in error
    assert not out.exists() and "starts anew" in error


def test_help_and_version(lorazor):
    assert lorazor("--version") == (0, "lorazor 0.1.0\n", "")
    status, text, _ = lorazor("--help")
    assert status == 0 and all(name in text for name in ("shrink", "inspect", "train", "boundary", "prune", "eval"))


def test_inspect_warns_of_dead_sites(lorazor, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "dead"
    shutil.copytree(tiny.adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for key in tensors:
        if "layers.1" in key and "lora_B" in key:
            tensors[key] = tensors[key] * 0
    save_file(tensors, folder / "adapter_model.safetensors")
    status, _, messages = lorazor("inspect", folder)
    assert status == 0 and "7 of 28 sites are dead" in messages


def test_what_inspect_says_of_dora_leads_to_a_shrink_that_it_has(lorazor, tmp_path):
    folders = make_folders(tmp_path, use_dora=True, target_modules=["q_proj"])
    status, text, _ = lorazor("inspect", folders.adapter)
    assert status == 0 and "4 sites of DoRA, 1,152 parameters" in text and "--by site" in text
    n_bytes = (folders.adapter / "adapter_model.safetensors").stat().st_size
    assert f"{n_bytes:,} bytes" in text


def test_changed_rows_are_offered_and_stored(lorazor, tiny, tmp_path, out):
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(tiny.base)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    get_peft_model(model, config).save_pretrained(adapter)
    status, text, _ = lorazor("inspect", adapter)
    assert status == 0 and "bytes of it are as in the base model: 'lorazor prune --changed-rows-only'" in text
    status, text, error = lorazor("prune", adapter, "--changed-rows-only", "--out", out)
    assert status == 0, error
    assert {key.partition(".lora_")[1] for key in load_file(out / "adapter_model.safetensors")} == {".lora_"}
