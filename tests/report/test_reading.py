"""What is read is what the folder holds; what is wrong with a folder is said."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from lorazor.errors import DataError, OutputError
from lorazor.report.reading import read_run, read_runs
from tests.report import synthetic_runs
from tests.tiny_folders import N_LAYERS


def n_numbers(weights: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    data = weights.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return sum(entry["shape"][0] * entry["shape"][1] for name, entry in header.items() if name != "__metadata__")


def ranks_written(weights: Path) -> dict[str, int]:
    """Rows of A of every site in a safetensors file, from its header."""
    data = weights.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    end = ".lora_A.weight"
    names = {name: name.removeprefix("base_model.model.").removesuffix(end) for name in header if name.endswith(end)}
    return {site: header[name]["shape"][0] for name, site in names.items()}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_boundary_run_knows_sizes_and_held_out_answers(real, tiny):
    run = read_run(real.boundary, "run")
    choice = run.choice
    assert choice is not None and choice.boundary is not None and choice.verdict is not None
    assert (choice.metric, choice.boundary.boundary, choice.boundary.full) == ("chrf", 2, N_LAYERS)
    assert choice.verdict.margin == 50
    assert choice.chosen.n_parameters == n_numbers(real.boundary / "adapter" / "adapter_model.safetensors")
    assert choice.full.n_parameters == n_numbers(tiny.adapter / "adapter_model.safetensors")
    assert len(run.kept) == choice.chosen.n_sites == 14
    assert run.variants == ("full adapter", "boundary 2")
    assert sorted(one.index for one in run.examples) == list(range(6))
    held_out = rows(tiny.held_out)
    answers = {(row["example"], row["adapter"]): row for row in rows(real.boundary / "confirm-predictions.jsonl")}
    for one in run.examples:
        assert (one.prompt, *one.references) == (held_out[one.index]["prompt"], held_out[one.index]["completion"])
        for answer, label in zip(one.answers, ("full", "boundary 2"), strict=True):
            written = answers[one.index, label]
            assert (answer.text, answer.scores) == (written["text"], {"chrf": written["chrf"]})
    decreases = [one.answers[0].scores["chrf"] - one.answers[1].scores["chrf"] for one in run.examples]
    assert decreases == sorted(decreases, reverse=True)


def test_a_shrink_run_knows_sizes_ranks_verdict_and_held_out_losses(real, tiny):
    run = read_run(real.shrink, "run")
    choice, document = run.choice, json.loads((real.shrink / "shrink.json").read_text())
    assert choice is not None and choice.verdict is not None
    weights = real.shrink / "adapter" / "adapter_model.safetensors"
    assert choice.chosen.n_parameters == sum(site.n_parameters_kept or 0 for site in run.sites) == n_numbers(weights)
    assert choice.full.n_parameters == n_numbers(tiny.adapter / "adapter_model.safetensors")
    assert {site.name: site.ranks[0] for site in run.kept if site.ranks} == ranks_written(weights)
    assert all(site.ranks == (0, 4) for site in run.sites if not site.keep)
    assert (choice.margin, choice.verdict.outcome) == (0.5, document["verdict"]["outcome"])
    assert run.variants == ("full adapter", choice.chosen.label)
    losses = {(row["example"], row["adapter"]): row for row in rows(real.shrink / "confirm-losses.jsonl")}
    for one in run.examples:
        for answer, label in zip(one.answers, ("full", choice.chosen.label), strict=True):
            loss = losses[one.index, label]
            assert answer.loss == pytest.approx(loss["nll_nats"] / loss["n_tokens"])
    increases = [(one.answers[1].loss or 0) - (one.answers[0].loss or 0) for one in run.examples]
    assert increases == sorted(increases, reverse=True) and len(increases) == 6


def test_a_shrink_by_weights_knows_the_ranks_and_measured_nothing(real):
    run = read_run(real.weights, "run")
    assert run.choice is None and run.scoring is None and run.examples == () and run.score_name == "energy"
    weights = real.weights / "adapter" / "adapter_model.safetensors"
    assert {site.name: site.ranks[0] for site in run.kept if site.ranks} == ranks_written(weights)
    assert sum(site.n_parameters_kept or 0 for site in run.sites) == n_numbers(weights)


def test_an_evaluation_compares_its_adapters(real):
    run = read_run(real.evaluation, "run")
    assert [(one.metric, Path(one.adapter).parent.name) for one in run.measured][1] == ("loss", "boundary")
    assert run.variants[1] == "boundary/adapter" and len(run.variants) == 2 and len(run.examples) == 6
    assert all(set(answer.scores) == {"chrf"} for one in run.examples for answer in one.answers)


def test_a_choice_of_sites_has_their_scores(training):
    run = read_run(training, "run")
    written = {row["site"]: row for row in rows(training / "scores.jsonl")}
    assert run.score_name == "gate"
    assert {site.name: site.score for site in run.sites} == {name: row["gate"] for name, row in written.items()}
    assert len(run.kept) == 5 and run.training


@pytest.mark.parametrize("command", ["boundary", "shrink", "weights", "curves", "train", "eval"])
def test_runs_of_every_command_are_read(command, tmp_path):
    path = getattr(synthetic_runs, f"{command}_run")(tmp_path / command)
    run = read_run(path, "run")
    assert run.command == {"weights": "shrink"}.get(command, command)
    has = {"boundary": run.choice, "shrink": run.scoring, "weights": run.kept, "curves": run.curves}
    assert has.get(command, run.gates if command == "train" else run.measured)


def test_of_labelled_texts_it_is_known_which_were_right(small):
    examples = [{**row, "label": 1, "references": []} for row in rows(small / "examples.jsonl")]
    synthetic_runs.write_rows(small / "examples.jsonl", examples)
    losses = [{**row, "n_tokens": 1, "n_correct": row["example"] % 2} for row in rows(small / "confirm-losses.jsonl")]
    synthetic_runs.write_rows(small / "confirm-losses.jsonl", losses)
    assert {one.index: one.answers[0].is_right for one in read_run(small, "run").examples} == {
        0: False, 1: True, 2: False, 3: True
    }  # fmt: skip


def test_without_losses_the_worst_text_comes_first(small):
    (small / "confirm-losses.jsonl").unlink()
    texts = rows(small / "confirm-predictions.jsonl")
    for row in texts:
        row["rougeL"] = 50.0 if row["adapter"] == "full" else 10.0 * row["example"]
    synthetic_runs.write_rows(small / "confirm-predictions.jsonl", texts)
    assert [one.index for one in read_run(small, "run").examples] == [0, 1, 2, 3]


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


DAMAGES = {
    "not JSON": ("confirm-losses.jsonl", lambda text: text.replace('"nll_nats"', "nll_nats", 1), "line 1 .*not JSON"),
    "a key is missing": ("confirm-losses.jsonl", lambda text: text.replace("n_tokens", "tokens", 1), "no 'n_tokens'"),
    "cut short": ("scores.jsonl", lambda text: text[:-30], "line 22 is damaged"),
    "an empty line": ("examples.jsonl", lambda text: text.replace("\n", "\n\n", 1), "line 2 is damaged"),
    "no object": ("examples.jsonl", lambda text: "[1]\n" + text, "line 1 is damaged"),
    "a broken document": ("shrink.json", lambda text: text[:100], "shrink.json' is damaged: not JSON"),
    "a document without a key": ("shrink.json", lambda text: text.replace("candidates", "x"), "it has no 'candidates'"),
    "no division": ("confirm-losses.jsonl", lambda text: text.replace('"n_tokens": 20', '"n_tokens": 0'), "line 1 "),
    "other sites": ("scores.jsonl", lambda text: text[text.index("\n") + 1 :], "do not have the same sites"),
    "an outcome": ("shrink.json", lambda text: text.replace('"shown"', '"held"'), "a verdict is not 'held'"),
    "run.json by hand": ("run.json", lambda text: text.replace('"hashes"', '"hash"'), "has no 'hashes'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_its_place(damage, small):
    file, change, message = DAMAGES[damage]
    (small / file).write_text(change((small / file).read_text()))
    with pytest.raises(DataError, match=message):
        read_run(small, "run")


def test_gates_for_other_sites_are_refused(tmp_path):
    path = synthetic_runs.train_run(tmp_path / "run", n_layers=1, n_steps=3)
    (path / "gates.jsonl").write_text('{"step": 1, "gates": [1.0, 1.0]}\n')
    with pytest.raises(DataError, match="line 1 is damaged: 2 gates for 7 sites"):
        read_run(path, "run")


def test_gates_are_read_with_the_scores_that_name_their_sites(tmp_path):
    path = synthetic_runs.train_run(tmp_path / "run", n_layers=1, n_steps=3)
    assert len(read_run(path, "run").gates) == 3
    (path / "scores.jsonl").unlink()
    assert read_run(path, "run").gates == ()


def test_an_unfinished_run_is_refused_and_read_when_asked(small):
    edit(small / "run.json", lambda document: document.update(finished=False))
    losses = small / "confirm-losses.jsonl"
    text = losses.read_text()
    losses.write_text(text[:-30])  # Ctrl-C in the middle of a line
    with pytest.raises(OutputError, match="not finished.*--resume.*--partial"):
        read_run(small, "run")
    run = read_run(small, "run", is_partial_allowed=True)
    assert not run.is_finished and len(run.examples) == 4
    assert losses.read_text() == text[:-30], "a report mends nothing"


def test_what_is_no_run_of_this_version_is_refused(tmp_path, small):
    with pytest.raises(OutputError, match="not a run folder"):
        read_run(tmp_path, "run")
    with pytest.raises(OutputError, match="given twice"):
        read_runs([small, small / ".." / "small"])
    edit(small / "run.json", lambda document: document.update(format="lorazor.run/2"))
    with pytest.raises(OutputError, match="'lorazor.run/2'.*newer"):
        read_run(small, "run")


def test_without_sites_no_boundary_has_a_size(tmp_path):
    path = synthetic_runs.boundary_run(tmp_path / "run", n_layers=2, n_examples=2)
    (path / "sites.jsonl").unlink()
    with pytest.raises(DataError, match="no sites.jsonl beside it"):
        read_run(path, "run")


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    paths = [synthetic_runs.weights_run(tmp_path / name / "run", n_layers=1) for name in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run"]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]
