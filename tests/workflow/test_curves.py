"""The run of curves: its files are a contract, and what was interrupted goes on."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from lorazor.errors import AdapterError, DataError, OutputError, SettingsError
from lorazor.runs import RunFolder
from lorazor.settings import BoundarySettings, CurvesSettings, DataSettings
from lorazor.workflow.boundary import find_boundary
from lorazor.workflow.curves import measure_curves
from tests.tiny_folders import N_LAYERS, write_rows

SETTINGS = CurvesSettings(reading=DataSettings(batch_size=2))
POINT = {
    "variant", "layer", "probability", "probability_standard_error", "entropy_nats", "entropy_standard_error",
    "median_rank",
}  # fmt: skip


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_folder_holds_what_others_read(tiny, out):
    result = measure_curves(tiny.adapter, str(tiny.validation), out=out, settings=SETTINGS)
    rows = read_rows(out / "curves.jsonl")
    assert list(rows[0]) == ["example", "variant", "layer", "n_tokens", "probability", "entropy_nats", "ranks"]
    assert len(rows) == 2 * (N_LAYERS + 1) * 6
    assert all(len(row["ranks"]) == row["n_tokens"] and min(row["ranks"]) >= 1 for row in rows)
    document = json.loads((out / "curves.json").read_text())
    assert (document["n_examples"], document["stack"], document["n_layers"]) == (6, "model.layers", N_LAYERS)
    assert document["n_tokens"] == sum(r["n_tokens"] for r in rows if (r["variant"], r["layer"]) == ("base", 0))
    assert [(one["variant"], one["layer"]) for one in document["curves"]] == [
        (variant, layer) for variant in ("adapter", "base") for layer in range(N_LAYERS + 1)
    ]
    assert all(set(one) == POINT for one in document["curves"])
    assert document["boundary"] == result.proposal.boundary and document["reason"] == result.proposal.reason
    assert [one["layer"] for one in document["gap"]] == list(range(N_LAYERS + 1))
    run = json.loads((out / "run.json").read_text())
    assert run["finished"] and run["command"] == "curves" and set(run["hashes"]) == {"adapter", "data"}
    assert run["settings"]["settled_within"] == 0.1


def test_layer_0_knows_no_adapter_and_the_last_layer_knows_all(tiny, out, tmp_path):
    """Before the first layer both are the same; at the end they are the full adapter and the base of the sweep."""
    result = measure_curves(tiny.adapter, str(tiny.validation), out=out, settings=SETTINGS)
    assert result.gap[0] == {"layer": 0, "gap": 0.0, "standard_error": 0.0}
    choosing = dict(rule="manual", boundary=2)
    find_boundary(tiny.adapter, str(tiny.validation), out=tmp_path / "sweep", settings=BoundarySettings(**choosing))
    n_correct = {
        (row["adapter"], row["example"]): row["n_correct"] for row in read_rows(tmp_path / "sweep/losses.jsonl")
    }
    for row in read_rows(out / "curves.jsonl"):
        if row["layer"] == N_LAYERS:
            boundary = "full" if row["variant"] == "adapter" else "boundary 0"
            assert sum(rank == 1 for rank in row["ranks"]) == n_correct[boundary, row["example"]]


def test_an_interrupted_run_goes_on_and_ends_the_same(tiny, out, tmp_path, monkeypatch):
    arguments = (tiny.adapter, str(tiny.validation))
    whole = measure_curves(*arguments, out=tmp_path / "whole", settings=SETTINGS)
    append, n_calls = RunFolder.append, 0

    def interrupted(self, name, rows):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            raise KeyboardInterrupt
        append(self, name, rows)

    monkeypatch.setattr(RunFolder, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_curves(*arguments, out=out, settings=SETTINGS)
    monkeypatch.setattr(RunFolder, "append", append)
    assert 0 < len(read_rows(out / "curves.jsonl")) < 2 * (N_LAYERS + 1) * 6
    with pytest.raises(OutputError, match="not empty"):
        measure_curves(*arguments, out=out, settings=SETTINGS)
    resumed = measure_curves(*arguments, out=out, settings=SETTINGS, resume=True)
    assert len(read_rows(out / "curves.jsonl")) == 2 * (N_LAYERS + 1) * 6
    assert resumed.proposal.boundary == whole.proposal.boundary
    for one, other in zip(resumed.curves, whole.curves, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-6)
    assert measure_curves(*arguments, out=out, settings=SETTINGS, resume=True).curves == resumed.curves


def test_an_adapter_that_does_nothing_proposes_no_boundary(tiny, out, tmp_path):
    folder = tmp_path / "nothing"
    folder.mkdir()
    for path in tiny.adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor * ("lora_B" not in name) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    result = measure_curves(folder, str(tiny.validation), out=out, settings=SETTINGS)
    assert result.proposal.boundary is None and "No boundary" in result.proposal.reason
    assert {one["gap"] for one in result.gap} == {0.0}


@pytest.mark.parametrize(
    ("settings", "n_rows", "error", "message"),
    [
        (CurvesSettings(stack="encoder"), 6, AdapterError, "stack='encoder'"),
        (CurvesSettings(settled_within=1.5), 6, SettingsError, "settled_within=1.5"),
        (CurvesSettings(), 1, DataError, "at least 2"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(
    tiny, out, tmp_path, monkeypatch, settings, n_rows, error, message
):
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *args: pytest.fail("the model was loaded"))
    data = write_rows(tmp_path / "data.jsonl", range(n_rows))
    with pytest.raises(error, match=message):
        measure_curves(tiny.adapter, str(data), out=out, settings=settings)
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [("QUESTION_ANS", ["q_proj"], "a span"), ("SEQ_2_SEQ_LM", ["q_proj"], "encoder of an encoder-decoder")],
)
def test_adapters_without_answer_tokens_are_refused(tiny, out, tmp_path, task, targets, message):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in tiny.adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": task}))
    with pytest.raises(SettingsError, match=message):
        measure_curves(folder, str(tiny.validation), out=out)


def test_the_command_prints_both_curves_and_the_proposal(tiny, out, monkeypatch, capsys):
    from lorazor.cli.app import main

    arguments = ["curves", tiny.adapter, "--data", tiny.validation, "--out", out]
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.argv", ["lorazor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    text = capsys.readouterr().out
    assert stop.value.code in (0, None)
    document = json.loads((out / "curves.json").read_text())
    assert "probability of the true token" in text and document["reason"] in text.replace("\n", " ")
    assert f"{document['curves'][2]['probability']:.4f}" in text
    monkeypatch.setattr("sys.argv", ["lorazor", *map(str, arguments), "--resume", "--json"])
    with pytest.raises(SystemExit):
        main()
    assert json.loads(capsys.readouterr().out) == {"out": str(out), **document}
