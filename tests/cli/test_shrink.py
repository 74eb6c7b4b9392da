"""`lorazor shrink` as a user types it."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.workflow.planted import Planted, plant


@pytest.fixture(scope="module")
def gaining(tiny, tmp_path_factory) -> Planted:
    """The adapter of the tests, and data on which it gains."""
    root = tmp_path_factory.mktemp("gaining")
    return plant(tiny.base, shutil.copytree(tiny.adapter, root / "adapter"), root)


def test_help_names_first_what_a_person_must_decide(lorazor, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, text, _ = lorazor("shrink", "--help")
    assert status == 0 and all(len(line) <= 80 for line in text.splitlines())
    _, first, more = text.replace("More options:", "Options:").split("Options:")
    assert "Adapter folder or hub id" in first
    for option in ("--data", "--confirm", "--margin", "--params-fraction", "--max-rank", "--heal", "--by", "--help"):
        assert f"{option} " in first or f"{option}\n" in first, option
    for option in ("--points", "--score", "--heal-lr", "--batch-size", "--device-map", "--max-new-tokens"):
        assert f"  {option} " in more and f"  {option} " not in first, option
    assert "--help" not in more


def test_what_is_printed(lorazor, gaining, out, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, text, messages = lorazor(
        "shrink", gaining.adapter, "--data", gaining.data, "--confirm", gaining.held_out, "--margin", "40%",
        "--points", 2, "--out", out,
    )  # fmt: skip
    assert status == 0
    for expected in ("On the validation examples", "full", "directions", "worse by", "held-out examples", "Adapter:"):
        assert expected in text
    table = text[: text.index(" sites with ")].splitlines()[:-1]
    assert all(len(line) <= 80 for line in table)
    assert "Loaded again in PEFT" in messages and "lorazor report" in text
    assert "| | full adapter | this adapter | worse by (95 % bounds) |" in (out / "adapter" / "README.md").read_text()


def test_where_no_layer_goes_the_directions_are_next(lorazor, gaining, out):
    arguments = ["--data", gaining.data, "--confirm", gaining.held_out, "--margin", "loss=1e-9", "--points", 1]
    status, text, _ = lorazor("shrink", gaining.adapter, *arguments, "--by", "prefix", "--out", out)
    assert status == 0 and "Nothing is dropped: no smaller adapter" in text and "Adapter:" not in text
    assert "--by direction, --heal TRAIN." in text and "undecided" not in text and "It took" in text
    command = text.splitlines()[-1]
    assert command.startswith("  lorazor shrink") and command.endswith(f"{out}-by-direction") and "--by" not in command
    assert f"--data {gaining.data} --margin loss=1e-9" in command and "--points 1" in command


def test_what_is_said_before_and_after(lorazor, gaining, out):
    arguments = ["--data", gaining.data, "--params-fraction", 0.5, "--confirm", gaining.held_out, "--points", 1]
    status, text, messages = lorazor("shrink", gaining.adapter, *arguments, "--out", out)
    assert status == 0 and "8 held-out prompts about 4.5 % of the gain" in messages
    weights = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert "Saved: " in text and " parameters (" in text and f"; {weights:,} of " in text
    assert text.index("Saved: ") < text.index("It took ") < text.index("lorazor report")


def test_json_is_one_document(lorazor, gaining, out):
    arguments = ["--data", gaining.data, "--params-fraction", 0.5, "--points", 1, "--out", out, "--json"]
    status, text, _ = lorazor("shrink", gaining.adapter, *arguments)
    document = json.loads(text)
    assert status == 0 and document["verdict"] is None and document["loaded_differs_by"] < 1e-4
    assert document["pruned"]["n_parameters_kept"] <= 0.5 * document["pruned"]["n_parameters"]


def test_scoring_with_checkpointing_gives_the_same(lorazor, gaining, tmp_path):
    scores = []
    for name, options in (("a", []), ("b", ["--gradient-checkpointing"])):
        words = ["--data", gaining.data, "--points", 2, "--params-fraction", 0.5, "--out", tmp_path / name]
        assert lorazor("shrink", gaining.adapter, *words, *options)[0] == 0
        lines = (tmp_path / name / "scores.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["score"] for line in lines])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_ctrl_c_says_how_to_go_on(lorazor, gaining, out, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorazor.workflow.basis.gram_matrices", interrupt)
    arguments = ["shrink", gaining.adapter, "--data", gaining.data, "--params-fraction", "0.5", "--out", out]
    status, _, error = lorazor(*arguments)
    assert status == 130 and error.strip().splitlines()[-1].endswith(f"--out {out} --resume")
    monkeypatch.undo()
    assert lorazor(*arguments, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{adapter}"], "SettingsError: A margin is measured on examples. Pass --data, or a size"),
        (["{adapter}", "--data", "{data}", "--params", "3"], "BudgetError: params=3"),
        (["{adapter}", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["nowhere", "--data", "{data}"], "AdapterError"),
        (["{adapter}", "--energy", "0.9", "--confirm", "{data}"], "--confirm without --data"),
        (["{adapter}", "--data", "{data}", "--confirm", "{data}"], "of --confirm"),
        (["{adapter}", "--data", "{data}", "--margin", "1%", "--max-rank", "2"], "pass one goal"),
    ],
)
def test_errors_are_one_line(lorazor, gaining, out, arguments, message):
    arguments = [part.format(adapter=gaining.adapter, data=gaining.data) for part in arguments]
    status, text, messages = lorazor("shrink", *arguments, "--out", out)
    assert status == 1 and text == ""
    assert message in messages and len(messages.strip().splitlines()) == 1
    assert not out.exists()


def test_wrong_usage_is_2(lorazor, gaining):
    for arguments in (
        ["shrink", gaining.adapter],
        ["shrink"],
        ["shrink", gaining.adapter, "--by", "colour", "--out", "x"],
    ):
        status, text, error = lorazor(*arguments)
        assert status == 2 and text == "" and "Error" in error


def test_bounds_without_an_end_are_null_in_every_file(lorazor, gaining, out):
    """All texts of a model that writes nonsense have a BLEU of 0: no bound can be had."""
    arguments = ["--data", gaining.data, "--confirm", gaining.held_out, "--margin", "bleu=50", "--by", "layer"]
    arguments += ["--max-new-tokens", 2, "--points", 1, "--out", out, "--json"]
    status, text, _ = lorazor("shrink", gaining.adapter, *arguments)

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    assert status == 0
    document = json.loads(text, parse_constant=refuse)
    compared = [one for one in document["candidates"] if one["lost"] is not None]
    assert compared and all(one["lost_at_most"] is None for one in compared)
    for path in [*out.glob("*.json"), *out.glob("*.jsonl")]:
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
    assert lorazor("report", out, "--out", out.with_name("page.html"))[0] == 0


def test_for_a_server_what_it_gains_from_is_chosen_and_its_flags_are_printed(lorazor, gaining, out):
    arguments = ["--data", gaining.data, "--params-fraction", 0.5, "--points", 1]
    status, text, messages = lorazor("shrink", gaining.adapter, *arguments, "--for", "vllm", "--out", out)
    assert status == 0 and "--max-lora-rank" in text and "--lora-target-modules" in text
    status, text, _ = lorazor("inspect", out / "adapter", "--for", "vllm")
    assert status == 0 and "vllm >= 0.32: computes what PEFT computes" in text


@pytest.mark.parametrize(
    ("server", "more", "message"),
    [
        ("sglang", ["--by", "site"], "by='site' leaves"),
        ("vlm", [], "Known are"),
        ("vllm", ["--max-rank", 3], "slots of"),
    ],
)
def test_a_server_that_cannot_is_refused_before_anything_is_written(lorazor, gaining, out, server, more, message):
    arguments = ["shrink", gaining.adapter, "--data", gaining.data, "--for", server, *more, "--out", out]
    status, _, messages = lorazor(*arguments)
    assert status == 1 and message in messages and not out.exists()
