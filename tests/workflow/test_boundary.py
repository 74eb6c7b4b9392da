"""The boundary run: its files are a contract, and what was interrupted goes on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorazor.workflow.boundary as workflow
from lorazor.data.examples import read_examples
from lorazor.errors import BoundaryError, DataError, LorazorError, MeasureError, OutputError, SettingsError
from lorazor.settings import BoundarySettings, DataSettings, GenerationSettings
from lorazor.workflow.boundary import find_boundary
from tests.tiny_folders import N_LAYERS, write_rows

BOUNDARIES = {*(f"boundary {b}" for b in range(N_LAYERS)), "full"}
READING = DataSettings(batch_size=2)


def settings(**groups) -> BoundarySettings:
    return BoundarySettings(**{"reading": READING, **groups})


def name_of(boundary: int) -> str:
    return "full" if boundary == N_LAYERS else f"boundary {boundary}"


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def gaining(tiny, tmp_path_factory):
    """The adapter with B times -0.5: half of its gain comes with the last two of its four layers."""
    path = tmp_path_factory.mktemp("gaining") / "adapter"
    shutil.copytree(tiny.adapter, path)
    tensors = load_file(path / "adapter_model.safetensors")
    changed = {key: tensor * (-0.5 if "lora_B" in key else 1) for key, tensor in tensors.items()}
    save_file(changed, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def test_the_run_folder_holds_what_others_read(tiny, gaining, out):
    choosing = dict(rule="manual", boundary=2)
    result = find_boundary(
        gaining, str(tiny.validation), out=out, confirm=str(tiny.held_out), settings=settings(**choosing)
    )
    rows = read_rows(out / "losses.jsonl")
    assert list(rows[0]) == ["example", "adapter", "key", "nll_nats", "n_tokens", "n_correct"]
    assert {(row["example"], row["adapter"]) for row in rows} == {(e, b) for e in range(6) for b in BOUNDARIES}
    choice = json.loads((out / "choice.json").read_text())
    assert (choice["rule"], choice["metric"], choice["boundary"], choice["full"]) == ("manual", "loss", 2, N_LAYERS)
    assert {"estimate", "low", "high"} <= set(choice["candidates"][0]["difference"])
    assert choice["verdict"]["n_examples"] == 6 and choice["verdict"]["outcome"] in ("shown", "refuted", "undecided")
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] and run["command"] == "boundary"
    assert run["settings"]["boundary"] == 2
    assert set(run["hashes"]) == {"adapter", "data", "confirm"}
    assert any("one-pass" in note for note in run["notes"])
    assert (out / "selection.json").exists()
    assert result.pruned is not None and result.pruned.n_sites_kept == 14
    assert "Boundary 2" in (out / "adapter" / "README.md").read_text()


def test_the_pruned_adapter_in_stock_peft_has_the_loss_of_the_sweep(tiny, out):
    find_boundary(
        tiny.adapter,
        str(tiny.validation),
        out=out,
        settings=settings(rule="manual", boundary=3),
    )
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.base), out / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    measured = {
        row["example"]: row["nll_nats"] for row in read_rows(out / "losses.jsonl") if row["adapter"] == "boundary 3"
    }
    for example in read_examples(tiny.validation):
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = torch.tensor([[*tokenizer(example.prompt + example.completion)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        nll = -sum(logits[position - 1, ids[0, position]].item() for position in range(len(prompt), ids.shape[1]))
        assert measured[example.index] == pytest.approx(nll, abs=1e-3)


def test_a_text_metric_writes_predictions_of_the_shortlist(tiny, out):
    choosing = dict(select_by="chrf", rule="best")
    generation = GenerationSettings(max_new_tokens=4, shortlist=3)
    result = find_boundary(
        tiny.adapter,
        str(tiny.validation),
        out=out,
        settings=settings(**choosing, generation=generation),
    )
    rows = read_rows(out / "predictions.jsonl")
    assert list(rows[0]) == ["example", "adapter", "key", "text", "chrf"]
    written = {row["adapter"] for row in rows}
    assert written == {name_of(one.boundary) for one in result.choice.candidates}
    assert len(written) <= 3 and "full" in written
    assert len(rows) == 6 * len(written)


def test_a_text_metric_is_compared_among_what_may_be_chosen(tiny, gaining, out):
    """Of a part of the boundaries, boundary 0 is none, but is measured."""
    generation, chosen = GenerationSettings(max_new_tokens=4, shortlist=2), {2, 3, 4}
    everything = settings(select_by="chrf", rule="best", boundaries="2:4", generation=generation)
    choice = find_boundary(gaining, str(tiny.validation), out=out, settings=everything).choice
    assert choice.boundary in chosen
    assert {one.boundary for one in choice.candidates} <= {*chosen, N_LAYERS}
    measured = {row["adapter"] for row in read_rows(out / "losses.jsonl")}
    assert {name_of(one) for one in (0, *chosen, N_LAYERS)} <= measured


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_ends_the_same(tiny, out, tmp_path, monkeypatch):
    choosing = dict(rule="best")
    arguments = (tiny.adapter, str(tiny.validation))
    whole = find_boundary(*arguments, out=tmp_path / "whole", settings=settings(**choosing))
    append, n_calls = workflow.RunFolder.append, 0

    def interrupted(self, name, rows):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyboardInterrupt
        append(self, name, rows)

    monkeypatch.setattr(workflow.RunFolder, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_boundary(*arguments, out=out, settings=settings(**choosing))
    monkeypatch.setattr(workflow.RunFolder, "append", append)
    n_before = len(read_rows(out / "losses.jsonl"))
    assert 0 < n_before < 6 * (N_LAYERS + 1)
    with pytest.raises(OutputError, match="not empty"):
        find_boundary(*arguments, out=out, settings=settings(**choosing))
    less_memory = settings(**choosing, reading=DataSettings(batch_size=1))
    resumed = find_boundary(*arguments, out=out, settings=less_memory, resume=True)
    assert len(read_rows(out / "losses.jsonl")) == 6 * (N_LAYERS + 1)
    assert resumed.choice.boundary == whole.choice.boundary
    values = [one.value for one in resumed.choice.candidates]
    assert values == pytest.approx([one.value for one in whole.choice.candidates], abs=1e-6)
    # and a finished run is resumed without measuring anything
    assert find_boundary(*arguments, out=out, settings=settings(**choosing), resume=True).choice == resumed.choice


def test_boundary_zero_leaves_the_base_model_and_no_adapter(tiny, out):
    choosing = dict(rule="manual", boundary=0)
    result = find_boundary(tiny.adapter, str(tiny.validation), out=out, settings=settings(**choosing))
    assert result.pruned is None and not (out / "adapter").exists()


@pytest.mark.parametrize(
    ("choosing", "error", "message"),
    [
        (dict(rule="manual", boundary=9), BoundaryError, "boundary=9.*4 layers"),
        (dict(rule="manual"), SettingsError, "needs boundary"),
        (dict(select_by="bluerouge"), SettingsError, "'bluerouge' is unknown"),
        (dict(boundaries="0,7"), BoundaryError, "0..4"),
        (dict(rule="manual", boundary=1, boundaries="2:3"), BoundaryError, "not among"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_model_is_loaded(
    tiny, out, monkeypatch, choosing, error, message
):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(error, match=message):
        find_boundary(tiny.adapter, str(tiny.validation), out=out, settings=settings(**choosing))
    assert not out.exists()


def test_confirming_on_what_was_chosen_on_is_refused(tiny, out, tmp_path):
    with pytest.raises(SettingsError, match="6 of the 6 examples of --confirm"):
        find_boundary(tiny.adapter, str(tiny.validation), out=out, confirm=str(tiny.validation))
    overlapping = write_rows(tmp_path / "overlap.jsonl", range(5, 9))
    with pytest.raises(SettingsError, match="1 of the 4 examples of --confirm"):
        find_boundary(tiny.adapter, str(tiny.validation), out=out, confirm=str(overlapping))


def test_held_out_examples_that_do_not_fit_are_found_before_the_sweep(tiny, out, tmp_path):
    too_long = tmp_path / "long.jsonl"
    rows = [{"prompt": prompt, "completion": " b" * 300} for prompt in "ac"]
    too_long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = DataSettings(max_length=64)
    with pytest.raises(DataError, match="64"):
        find_boundary(
            tiny.adapter, str(tiny.validation), out=out, confirm=str(too_long), settings=settings(reading=reading)
        )
    assert not out.exists()


@pytest.mark.parametrize(("metric", "message"), [("accuracy", "needs labels"), ("numeric-match", "no number")])
def test_a_metric_that_does_not_fit_the_data_is_refused_before_the_model_is_loaded(
    tiny, out, tmp_path, monkeypatch, metric, message
):
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(LorazorError, match=message):
        find_boundary(tiny.adapter, str(words), out=out, settings=settings(select_by=metric))
    assert not out.exists()


def test_an_adapter_that_gains_nothing_is_refused_before_the_sweep(tiny, out):
    """Its loss on the held-out examples is above that of its base: a share of that is no margin."""
    with pytest.raises(MeasureError, match="gains nothing over its base model"):
        find_boundary(tiny.adapter, str(tiny.validation), out=out, confirm=str(tiny.held_out), settings=settings())
    assert not (out / "losses.jsonl").exists()
    choosing = dict(rule="manual", boundary=2, margin="loss=0.5")
    place = {"out": out.parent / "by-amount", "confirm": str(tiny.held_out)}
    result = find_boundary(tiny.adapter, str(tiny.validation), **place, settings=settings(**choosing))
    assert result.verdict is not None and result.verdict.margin == 0.5


@pytest.mark.parametrize(("choosing", "message"), [
    (dict(select_by="chrf"), "needs a margin: pass --margin chrf=AMOUNT"),
    (dict(select_by="chrf", margin="2%"), "is of loss, but select_by='chrf'"),
    (dict(margin="two"), "is no margin"),
])  # fmt: skip
def test_margins_that_cannot_judge_are_refused(tiny, out, choosing, message):
    with pytest.raises(SettingsError, match=message):
        find_boundary(
            tiny.adapter,
            str(tiny.validation),
            out=out,
            confirm=str(tiny.held_out),
            settings=settings(**choosing),
        )
    assert not out.exists()
