"""`lorazor select` and `lorazor train --method` as a user types them."""

from __future__ import annotations

import json
import shlex
from unittest.mock import Mock

import pytest
import torch
import yaml
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorazor.adapter.folder import read_adapter
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
def test_a_choice_that_a_trainer_cannot_be_told_is_printed_otherwise(lorazor, tiny, out):
    words = choosing(tiny, out, "--params-fraction", 0.3, "--by", "direction")
    status, _, messages = lorazor("select", *words, "--format", "llama-factory")
    assert status == 1 and "The choice is made: the same command with --resume --format all prints it" in messages
    status, text, _ = lorazor("select", *words, "--resume", "--format", "all")
    assert status == 0 and "rank_pattern" in text


@pytest.mark.slow
def test_a_share_of_memory_is_predicted_met_and_reported(lorazor, tiny, out, monkeypatch):
    words = choosing(tiny, out, "--memory", "0.8", "--score", "loss-change", "--dropout", 0.1)
    status, _, messages = lorazor("select", *words)
    assert status == 0, messages
    costs, run = (json.loads((out / name).read_text()) for name in ("costs.json", "run.json"))
    assert costs["limit"] == pytest.approx(0.8 * costs["all_sites"])
    assert costs["predicted"] <= costs["limit"] and costs["measured"] == pytest.approx(costs["predicted"], rel=0.1)
    assert 0 < len(Selection.load(out / "selection.json").kept) < 28
    notes = "\n".join(run["notes"])
    assert costs["recomputed"] < costs["all_sites"] and "With --gradient-checkpointing and more time" in notes
    assert "The peak of memory with LoRA on all 28 sites" in notes and "measured in turn with it" in notes
    assert all(note in messages for note in run["notes"])
    # the same selection run without probing: the gates have seen nothing of it
    other = out.parent / "other"
    status, _, messages = lorazor(
        "select", *choosing(tiny, other, "--keep", 4, "--score", "loss-change", "--dropout", 0.1)
    )
    assert status == 0, messages
    assert (other / "gates.jsonl").read_bytes() == (out / "gates.jsonl").read_bytes()
    assert (other / "scores.jsonl").read_bytes() == (out / "scores.jsonl").read_bytes()


@pytest.mark.slow
def test_training_under_a_share_of_the_time_reports_both_figures(lorazor, tiny, out, monkeypatch):
    words = ["--method", "weightlora", "--step-time", 0.95, "--json"]
    interrupt = Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        patch.setattr("lorazor.train.choose.ChooseSites.finish", interrupt)
        assert lorazor("train", *choosing(tiny, out, *words))[0] == 130
    probes = json.loads((out / "costs.json").read_text())["probes"]
    monkeypatch.setattr("lorazor.train.probing.Probing.costs", None)  # a run that goes on probes no more
    status, text, messages = lorazor("train", *choosing(tiny, out, *words, "--resume"))
    assert status == 0, messages
    cost = json.loads(text)["cost"]
    assert cost["budget"] == "step_time=0.95" and cost["unit"] == "seconds"
    assert 0 < cost["predicted"] <= cost["limit"] and cost["measured"] > 0 and cost["in_training"] > 0
    assert json.loads((out / "costs.json").read_text())["probes"] == probes


@pytest.mark.slow
def test_a_budget_that_the_model_cannot_meet_is_refused_before_the_selection_run(lorazor, tiny, out):
    status, text, error = lorazor("select", *choosing(tiny, out, "--memory", "100kB"))
    assert status == 1 and text == ""
    assert "memory=100kB leaves no room for a site: on the frozen model" in error.strip().splitlines()[-1]
    assert "Pass more. With --gradient-checkpointing" in error
    assert not (out / "selection.json").exists() and not (out / "costs.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["select", "train"])
def test_a_score_that_looks_at_no_data_chooses_before_the_first_step(lorazor, tiny, out, command):
    common = [
        "--model", tiny.base, "--data", tiny.validation, "--steps", 6, "--rise-steps", 1, "--batch-size", 2,
        "--rank", 2, "--alpha", 4,
    ]  # fmt: skip
    words = [*common, "--keep", 7, "--score", "last-layers", "--out", out]
    words += ["--method", "weightlora"] if command == "train" else []
    status, _, messages = lorazor(command, *words)
    assert status == 0 and "by last-layers, before the first step" in messages, messages
    kept = Selection.load(out / "selection.json").kept
    assert len(kept) == 7 and {site.layer for site in kept} == {3}
    assert len((out / "scores.jsonl").read_text().splitlines()) == 28 and not (out / "gates.jsonl").exists()
    if command == "select":
        assert not (out / "training.jsonl").exists() and not (out / "select").exists()
        return
    other = out.parent / "other"
    status, _, messages = lorazor("train", *common, "--selection", out / "selection.json", "--out", other)
    assert status == 0, messages
    logs = [(one / "training.jsonl").read_text().splitlines() for one in (out, other)]
    mine, theirs = ([(row["step"], row["loss"]) for row in map(json.loads, log)] for log in logs)
    assert [step for step, _ in mine] == [1, 2, 3, 4, 5, 6] and mine == theirs
    mine, theirs = (load_file(one / "adapter_model.safetensors") for one in (out, other))
    assert mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    status, _, messages = lorazor("train", *words, "--resume")
    assert status == 0 and "has finished" in messages


@pytest.mark.slow
def test_a_limit_on_a_step_is_filled_in_the_order_of_a_score_from_the_first_step_on(lorazor, tiny, out, monkeypatch):
    words = [
        "train", "--method", "weightlora", "--memory", "0.8", "--score", "last-layers", "--model", tiny.base,
        "--data", tiny.validation, "--steps", 6, "--rise-steps", 1, "--batch-size", 2, "--rank", 2, "--out", out,
    ]  # fmt: skip
    with monkeypatch.context() as patch:  # broken off between the choice and the end
        patch.setattr("lorazor.train.fit.CountSteps.on_step_end", Mock(side_effect=KeyboardInterrupt))
        assert lorazor(*words)[0] == 130
    monkeypatch.setattr("lorazor.train.probing.Probing.costs", None)  # a run that goes on probes no more
    status, text, messages = lorazor(*words, "--resume", "--json")
    assert status == 0, messages
    document, places = json.loads(text), {}
    for site in read_adapter(out).sites:
        places.setdefault(site.layer, []).append(site.name)
    assert document["n_sites"] == sum(map(len, places.values())) < 28 and max(places) == 3
    assert all(len(places[layer]) == 7 for layer in range(min(places) + 1, 4)), "a layer is full before the next one"
    assert document["cost"]["measured"] == pytest.approx(document["cost"]["predicted"], rel=0.1)
    assert len((out / "training.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("score", ["gate", "loss-change", "random"])
def test_a_budget_with_room_for_all_sites_keeps_them(lorazor, tiny, out, score):
    status, text, messages = lorazor(
        "train", *choosing(tiny, out, "--method", "weightlora", "--memory", "1GB", "--score", score, "--json")
    )
    assert status == 0 and json.loads(text)["n_sites"] == 28, messages
    assert "It has room for all sites, and all are kept" in messages
    assert len(read_adapter(out).sites) == 28


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
        (["train", "--method", "weightlora"], "Pass one of --params N"),
        (["train", "--keep", 3], "Pass --method weightlora"),
        (["select", "--keep", 99], "keep=99 sites, but the model has 28 LoRA sites"),
        (["select", "--keep", 3, "--score", "luck"], "score='luck' is unknown"),
        (["select", "--keep", 3, "--keep-fraction", 0.5], "keep=3 and keep_fraction=0.5 given"),
        (["select", "--step-time", 0.5, "--memory", "1GB"], "step_time=0.5 and memory=1GB given"),
        (
            ["select", "--step-time", 1],
            "step_time=1.0 of the time of LoRA on all sites",
        ),
        (["select", "--memory", "12 elephants"], "memory='12 elephants' is no size"),
        (["select", "--memory", "1.5"], "memory='1.5' is no size"),
        (["select", "--step-time", 0.5, "--schedule", "progressive"], "cannot meet step_time=0.5"),
        (["select", "--memory", "0.5", "--grow"], "which WeightLoRA+ raises"),
        (["select", "--step-time", 0.5, "--select-steps", 9], "select_steps=9 of steps=6"),
        (
            ["train", "--selection", "nowhere.json"],
            "select_steps=3 says what is chosen, but a selection names its sites",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_1(lorazor, tiny, out, arguments, message):
    status, text, error = lorazor(arguments[0], *choosing(tiny, out, *arguments[1:]))
    last = error.strip().splitlines()[-1]
    assert status == 1 and text == "" and message in last and "Traceback" not in error
    assert not out.exists()


def test_a_selection_that_is_not_there_is_refused(lorazor, tiny, out):
    words = ["--model", tiny.base, "--data", tiny.validation, "--selection", "nowhere.json", "--out", out]
    status, _, error = lorazor("train", *words)
    assert status == 1 and "Cannot read the selection file" in error and not out.exists()


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
