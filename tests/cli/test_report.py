"""`lorazor report` as a user types it."""

from __future__ import annotations

import json

import pytest

from tests.report import made_up_suites, synthetic_runs


@pytest.fixture
def run(tmp_path):
    return synthetic_runs.shrink_run(tmp_path / "run", n_layers=2, n_examples=3)


def test_the_page_goes_into_the_run_folder(lorazor, run):
    status, output, _ = lorazor("report", run)
    assert status == 0 and "✓ shown" in output and "report.html" in output
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_several_runs_go_into_this_folder(lorazor, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = synthetic_runs.boundary_run(tmp_path / "other", n_layers=2, n_examples=3)
    status, output, _ = lorazor("report", run, other, "--json")
    document = json.loads(output)
    assert status == 0 and document["out"] == "report.html" and (tmp_path / "report.html").exists()
    assert [one["command"] for one in document["runs"]] == ["shrink", "boundary"]
    assert document["runs"][0]["numbers"][0]["label"] == "of the LoRA parameters dropped"


def test_nothing_is_replaced_unasked(lorazor, run):
    (run / "report.html").write_text("mine")
    status, _, error = lorazor("report", run)
    assert status == 1 and "--force" in error and (run / "report.html").read_text() == "mine"
    assert lorazor("report", run, "--force")[0] == 0
    assert (run / "report.html").read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--examples", "-1"], "0 or more"), (["--out", "."], "is a folder"), (["--figures", "f"], "kaleido")],
)
def test_what_cannot_be_done_is_refused_in_one_line(arguments, message, lorazor, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kaleido", None)
    status, _, error = lorazor("report", run, *arguments, *(["--force"] if "--out" in arguments else []))
    assert status == 1 and message in error and error.count("\n") == 1
    assert not (run / "report.html").exists()


def test_an_unfinished_run_needs_partial(lorazor, run):
    document = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(document | {"finished": False}))
    status, _, error = lorazor("report", run)
    assert status == 1 and "--resume" in error and "--partial" in error
    status, output, _ = lorazor("report", run, "--partial")
    assert status == 0 and "has not finished" in output


@pytest.fixture
def suite(tmp_path):
    rows = made_up_suites.grid(["rte"], [("base", [None]), ("lora", [None])], [0, 1, 2], lambda *cell: len(cell[1]) / 9)
    return made_up_suites.write_suite(tmp_path / "suite", rows, [{"cell": "z", "name": "rte, dora", "error": "no"}])


def test_a_suite_has_leaderboards_a_page_and_markdown(lorazor, suite, tmp_path):
    status, output, _ = lorazor("report", suite, "--markdown", tmp_path / "results.md")
    assert status == 0 and output.startswith("rte\n") and "±" in output and "report.html" in output
    assert "rte, dora" in (suite / "report.html").read_text(encoding="utf-8")
    assert "rte, dora" in (tmp_path / "results.md").read_text(encoding="utf-8")
    status, _, error = lorazor("report", suite, "--out", "new.html", "--markdown", tmp_path / "results.md")
    assert status == 1 and "another --markdown" in error
    status, output, _ = lorazor("report", suite, "--force", "--json")
    document = json.loads(output)
    assert status == 0 and document["suite"] == "tiny" and document["failures"] == [["rte, dora", "no"]]
    (board,) = document["boards"]
    assert board["against"] == "lora" and [line["n_seeds"] for line in board["lines"]] == [3, 3]


def test_a_suite_stands_alone(lorazor, suite, run, tmp_path):
    status, _, error = lorazor("report", suite, run, "--out", tmp_path / "new.html")
    assert status == 1 and "Pass it alone" in error
    for option in ("--markdown", "--against"):
        status, _, error = lorazor("report", run, option, "new")
        assert status == 1 and "is for suites" in error and error.count("\n") == 1
