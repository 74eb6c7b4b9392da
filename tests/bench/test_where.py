"""Where cells run: what is refused before any begins, and folders that appear whole."""

from __future__ import annotations

import fcntl
import importlib.util
import json
from pathlib import Path

import pytest

from lorazor.bench import on_ray, run
from lorazor.bench.copies import Copies
from lorazor.bench.experiment import Experiment
from lorazor.bench.reading import read_suite
from lorazor.bench.run import run_suite
from lorazor.cli.app import _advice
from lorazor.errors import OutputError, SettingsError
from lorazor.measure.suite_rows import note_failure, write_results
from lorazor.report.suites import read_suite_results
from lorazor.runs import RunFolder
from lorazor.settings import ModelSettings
from tests.bench.small import SUITE
from tests.report.made_up_suites import make_row


@pytest.fixture
def suite(tmp_path) -> Path:
    (tmp_path / "small.toml").write_text(SUITE)
    return tmp_path / "small.toml"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on": "devices", "devices": "cuda:9"}, "no 'cuda:9'. Pass any of .*cpu"),
        ({"on": "devices", "devices": "cpu,gpu"}, "no 'gpu'. Pass any of .*cpu"),
        ({"devices": "cpu,cpu"}, "Pass on='devices'"),
    ],
)
def test_devices_that_are_not_there_are_refused(suite, out, fields, said):
    with pytest.raises(SettingsError, match=said):
        run_suite(suite, out=out, **fields)
    assert not out.exists()


def test_ray_that_is_not_installed_is_refused(suite, out, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'lorazor\[ray\]'"):
        run_suite(suite, out=out, on="ray")
    assert not out.exists()


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
        ("raise ConnectionError('none runs')", "none runs"),
    ],
)
def test_a_cluster_that_does_not_answer_is_refused(suite, out, tmp_path, monkeypatch, init, said):
    (tmp_path / "ray.py").write_text(f"def init(*arguments, **fields):\n    {init}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(on_ray, "_SECONDS", 1)
    with pytest.raises(SettingsError, match=f"'10.0.0.1:6379'.*{said}.*ray start --head"):
        run_suite(suite, out=out, on="ray", ray_address="10.0.0.1:6379")
    assert not out.exists()


def test_a_node_that_does_not_see_the_folder_says_so(suite, out):
    failure = on_ray.on_node(read_suite(suite).cells[0], out, Copies(), "cpu")
    assert isinstance(failure, str) and f"does not see '{out}/suite'" in failure and not out.exists()


def test_after_ctrl_c_the_same_command_is_named():
    assert "The same command goes on" in _advice(["bench", "small.toml"])


def test_of_two_commands_in_one_folder_the_second_is_refused(suite, out):
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="Another process works in"):
            run_suite(suite, out=out)


def test_cells_that_finished_before_results_had_them_are_not_run_again(suite, out):
    """Killed between a cell's folder and the results."""
    for cell in (cells := read_suite(suite).cells):
        run = RunFolder.start(out / "cells" / cell.folder, "bench", {}, {}, resume=False)
        run.document["result"] = make_row(cell.task, cell.method, None, 0, {"loss": 1.0}, cell=cell.key)
        run.finish()
    RunFolder.start(out / "suite", "bench", {"suite": "small"}, {}, resume=False).finish()
    result = run_suite(suite, out=out)
    assert not result.left and not result.failed
    rows = [json.loads(line)["cell"] for line in (out / "results.jsonl").read_text().splitlines()]
    assert rows == [cell.key for cell in cells]


def test_rows_of_cells_that_the_suite_has_no_more_are_kept_aside(suite, out):
    cells = read_suite(suite).cells
    rows = [make_row(one.task, one.method, None, 0, {"loss": 1.0}, cell=one.key) for one in cells]
    stranger = make_row("numbers", "base", None, 0, {"loss": 2.0}, cell="of-an-older-suite")
    out.mkdir()
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [stranger, *rows]))
    for _ in range(2):
        assert len(run_suite(suite, out=out).rows) == len(cells)
    kept = [
        [json.loads(line) for line in (out / name).read_text().splitlines()]
        for name in ("results.jsonl", "other-results.jsonl")
    ]
    assert [row["cell"] for row in kept[0]] == [one.key for one in cells]
    assert kept[1] == [stranger]


def test_the_last_failure_of_a_cell_is_kept_until_it_finishes(tmp_path):
    path = tmp_path / "failures.jsonl"
    for cell, error in [("a", "first"), ("b", "other\u2028line"), ("a", "second")]:
        note_failure(path, cell, f"cell {cell}", error)
    lines = [json.loads(line) for line in path.read_text().strip().split("\n")]
    assert [(one["cell"], one["error"]) for one in lines] == [("b", "other\u2028line"), ("a", "second")]
    note_failure(path, "b", "cell b", None)
    assert [json.loads(line)["cell"] for line in path.read_text().splitlines()] == ["a"]


class TestOnce:
    @pytest.fixture
    def experiment(self, suite, tmp_path) -> Experiment:
        cell = read_suite(suite).cells[0]
        return Experiment(cell, ModelSettings("base"), [], [], tmp_path / "work", tmp_path / "shared")

    @staticmethod
    def made(folder: Path, text: str) -> Path:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
        return folder

    def test_of_two_that_make_it_at_one_time_the_first_to_end_is_taken(self, experiment):
        def slower() -> Path:
            experiment.once("lora", lambda: self.made(experiment.folder / "faster", "faster"))
            return self.made(experiment.folder / "slower", "slower")

        place = experiment.once("lora", slower)
        assert (place / "weights").read_text() == "faster" and experiment.seconds_before == experiment.peak_before == 0
        assert [path.name for path in experiment.shared.iterdir()] == [place.name]
        assert experiment.once("lora", lambda: pytest.fail("made again")) == place
        assert experiment.seconds_before > 0 and experiment.peak_before > 1e6, "what others took counts"

    def test_one_that_cannot_be_kept_is_an_error(self, experiment, monkeypatch):
        def refused(self: Path, target: Path) -> None:
            raise PermissionError("not here")

        monkeypatch.setattr(Path, "rename", refused)
        with pytest.raises(PermissionError):
            experiment.once("lora", lambda: self.made(experiment.folder / "made", "weights"))
        assert not list(experiment.shared.iterdir())


def rows_of(suite: Path) -> list[dict]:
    return [
        make_row("numbers", one.method, one.budget and one.budget.share, 0, {"loss": float(place)}, cell=one.key)
        for place, one in enumerate(read_suite(suite).cells)
    ]


def rows_in(file: Path) -> dict[str, float]:
    return {row["method"]: row["metrics"]["loss"] for row in map(json.loads, file.read_text().splitlines())}


def test_what_is_on_disk_follows_the_names_and_the_cells_of_an_edited_suite(suite, out, tmp_path):
    """Rows belong to what a method is, not to what it was called when it ran."""
    write_results(tmp_path / "out" / "results.jsonl", rows_of(suite))
    run_suite(suite, out=out, teraflops=1.0)
    names = {"base": 0, "lora": 1, "low-rank": 2, "shrink": 3, "fisher": 4}
    assert rows_in(out / "results.jsonl") == names and len(list((out / "peft").iterdir())) == 5
    (out / "peft" / "theirs.json").write_text("{}")
    note_failure(out / "failures.jsonl", "gone", "of a cell that was corrected", "x")
    renamed = SUITE.replace("lora = {}", '"a_b c" = { uses = "lora" }').replace("[methods.fisher]", '[methods."a/b c"]')
    suite.write_text(renamed.replace("shrink = {}", 'fisher = { uses = "shrink" }'))
    assert run_suite(suite, out=out, teraflops=1.0).left == []
    assert rows_in(out / "results.jsonl") == {"a_b c": 1, "base": 0, "low-rank": 2, "fisher": 3, "a/b c": 4}
    assert {path.name.partition("--")[0] for path in (out / "peft").iterdir()} == {
        "base", "low-rank", "fisher", "a%2Fb c", "a_b c", "theirs.json",
    }  # fmt: skip
    assert (out / "failures.jsonl").read_text() == ""
    suite.write_text(SUITE.split("[methods.fisher]")[0].replace("shrink = {}\n", ""))
    run_suite(suite, out=out, teraflops=1.0)
    assert rows_in(out / "other-results.jsonl").keys() == {"fisher", "a/b c"}
    suite.write_text(SUITE)
    assert run_suite(suite, out=out, dry_run=True, teraflops=1.0).left == []
    run_suite(suite, out=out, teraflops=1.0)
    assert rows_in(out / "results.jsonl") == names and rows_in(out / "other-results.jsonl") == {}
    assert read_suite_results(out).n_cells == 5


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rows_that_move_are_never_in_no_file(suite, out, monkeypatch, number):
    """A kill before any of the writes, with one cell that leaves the suite and one that comes back."""
    *stays, comes_back = rows = rows_of(suite)
    write_results(out / "results.jsonl", stays)
    write_results(out / "other-results.jsonl", [comes_back])
    suite.write_text(SUITE.replace("shrink = {}\n", ""))
    calls = []

    def killed(path, own):
        calls.append(path)
        if len(calls) == number:
            raise KeyboardInterrupt
        write_results(path, own)

    monkeypatch.setattr(run, "write_results", killed)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, out=out, teraflops=1.0)
    there = {**rows_in(out / "results.jsonl"), **rows_in(out / "other-results.jsonl")}
    assert there == {row["method"]: row["metrics"]["loss"] for row in rows}
    monkeypatch.undo()
    run_suite(suite, out=out, teraflops=1.0)
    assert rows_in(out / "results.jsonl").keys() == {"base", "lora", "low-rank", "fisher"}
    assert rows_in(out / "other-results.jsonl").keys() == {"shrink"}
