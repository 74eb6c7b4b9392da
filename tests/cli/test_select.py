"""`lorazor select` and `lorazor train --method` as a user types them."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lorazor.adapter.sites import find_sites
from lorazor.selection import Selection


def choosing(tiny, out, *more):
    return [
        "--model", tiny.base, "--data", tiny.validation, "--steps", 6, "--select-steps", 3, "--rise-steps", 1,
        "--batch-size", 2, "--rank", 2, "--alpha", 4, "--out", out, *more,
    ]  # fmt: skip


def next_command(text: str) -> list[str]:
    """The words after `lorazor` in the last line."""
    name, *words = shlex.split(text.splitlines()[-1])
    assert name == "lorazor"
    return words


@pytest.mark.slow
def test_the_choice_is_printed_as_settings_that_train_these_sites(lorazor, tiny, out):
    more = ["--keep", 4, "--format", "peft", "--gradient-checkpointing", "--weight-decay", 0, "--limit", 5]
    status, text, messages = lorazor("select", *choosing(tiny, out, *more))
    assert status == 0, messages
    names: dict = {}
    exec(text, names)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.base), names["peft_config"])
    kept = {site.name for site in Selection.load(out / "selection.json").kept}
    assert {site.name for site in find_sites(model)} == kept and len(kept) == 4
    assert "selection.json" in messages and "selection.json" not in text
    assert f"Scores of all sites: {out}/scores.jsonl" in messages
    command = next_command(messages)
    status, text, messages = lorazor(*command)  # as it stands, with all settings of the choice
    assert status == 0, messages
    assert text.startswith("Trained 4 sites")
    run = json.loads((out.parent / f"{out.name}-adapter" / "run.json").read_text())
    settings = {name: run["settings"][name] for name in ("fit", "lora", "reading", "batch_size")}
    assert settings == {name: json.loads((out / "run.json").read_text())["settings"][name] for name in settings}


@pytest.mark.slow
def test_every_trainer_is_told_the_same_sites(lorazor, tiny, out):
    status, text, _ = lorazor("select", *choosing(tiny, out, "--keep", 4, "--grow"))
    assert status == 0
    parts = dict(part.partition("\n")[::2] for part in ("\n" + text).split("\n# ")[1:])
    kept = {site.name for site in Selection.load(out / "selection.json").kept}
    axolotl, factory = (yaml.safe_load(parts[name]) for name in ("Axolotl", "LLaMA-Factory"))
    assert set(axolotl["lora_target_modules"]) == kept
    assert {name.strip() for name in factory["lora_target"].split(",")} == kept
    assert axolotl["lora_r"] == factory["lora_rank"] == 16 and axolotl["lora_alpha"] == 32  # 2 * 28 / 4 as served
    assert set(parts) >= {"PEFT", "Axolotl", "LLaMA-Factory", "Unsloth"}


@pytest.mark.slow
def test_json_is_one_document(lorazor, tiny, out):
    status, text, _ = lorazor("select", *choosing(tiny, out, "--params", 600, "--json"))
    document = json.loads(text)
    assert status == 0 and document["n_sites"] == 28
    assert all(site["keep"] for site in document["kept"])


@pytest.mark.slow
def test_train_with_a_method_makes_an_adapter_that_inspect_reads(lorazor, tiny, out):
    arguments = choosing(tiny, out, "--method", "weightlora", "--keep", 4, "--score", "loss-change")
    status, text, messages = lorazor("train", *arguments)
    assert status == 0, messages
    assert text.startswith("Trained 4 sites") and "Choosing among 28 sites by loss-change" in messages
    files = {"VALIDATION.jsonl": tiny.validation, "TEST.jsonl": tiny.held_out}
    status, _, messages = lorazor(*(files.get(word, word) for word in next_command(text)))
    assert status == 0 and (out.parent / f"{out.name}-boundary" / "choice.json").exists(), messages
    status, text, _ = lorazor("inspect", out)
    assert status == 0 and "4 sites" in text
    status, _, messages = lorazor("train", *arguments)
    assert status == 1 and "is not empty" in messages
    status, text, messages = lorazor("train", *arguments, "--resume")
    assert status == 0 and "has finished" in messages and text.startswith("Trained 4 sites")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "weightlora"], "Pass one of --keep K"),
        (["train", "--keep", 3], "Pass --method weightlora"),
        (["select", "--keep", 99], "keep=99 sites, but the model has 28 LoRA sites"),
        (["select", "--keep", 3, "--score", "luck"], "score='luck' is unknown"),
        (["select", "--keep", 3, "--keep-fraction", 0.5], "keep=3 and keep_fraction=0.5 given"),
        (["train", "--selection", "nowhere.json"], "Cannot read the selection file"),
    ],
)
def test_mistakes_are_one_line_and_exit_1(lorazor, tiny, out, arguments, message):
    status, text, error = lorazor(arguments[0], *choosing(tiny, out, *arguments[1:]))
    last = error.strip().splitlines()[-1]
    assert status == 1 and text == "" and message in last and "Traceback" not in error
    assert not out.exists()


def test_unknown_choices_are_usage_errors(lorazor, tiny, out):
    for arguments in (["select", "--format", "keras"], ["train", "--method", "magic"]):
        status, _, error = lorazor(arguments[0], *choosing(tiny, out, *arguments[1:]))
        assert status == 2 and "Error" in error


def test_ctrl_c_in_a_training_says_how_to_go_on(lorazor, tiny, out, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorazor.train.choose.ChooseSites.finish", interrupt)
    arguments = choosing(tiny, out, "--method", "weightlora", "--keep", 4, "--save-steps", 1)
    status, _, error = lorazor("train", *arguments)
    assert status == 130 and "--save-steps 1 --resume" in error
    monkeypatch.undo()
