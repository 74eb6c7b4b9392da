"""The command line on the page repeats the run."""

from __future__ import annotations

import dataclasses
import shlex

import pytest
import typer.main

from lorazor.cli.app import app
from lorazor.report.contents import Run
from lorazor.report.reading import read_run
from lorazor.report.repeat import command_line
from tests.report import synthetic_runs


def parsed(line: str) -> dict:
    """What the command line makes of it."""
    program, command, *arguments = shlex.split(line)
    assert program == "lorazor"
    found = typer.main.get_command(app).commands[command]  # pyright: ignore[reportAttributeAccessIssue]
    return found.make_context(command, arguments).params


@pytest.mark.parametrize("name", ["boundary", "shrink", "weights", "evaluation"])
def test_the_command_has_the_settings_of_the_run(name, real):
    check_command(read_run(getattr(real, name), "run"))


def test_the_command_has_the_settings_of_a_choice_of_sites(training):
    check_command(read_run(training, "run"))


def check_command(run: Run) -> None:
    values = parsed(command_line(run))
    settings = run.document["settings"]
    for name, topic in settings.items():
        for key, value in topic.items() if isinstance(topic, dict) else [(name, topic)]:
            assert values.get(key, value) == value
    assert values["data"] == settings["data"] and values["out"] == run.path


def test_defaults_are_left_out_only_of_this_version(tmp_path):
    run = read_run(synthetic_runs.boundary_run(tmp_path / "run"), "run")
    assert "--seed" not in command_line(run) and "--rule best" in command_line(run)
    older = {**run.document, "versions": {**run.document["versions"], "lorazor": "0.0.9"}}
    assert "--seed 0" in command_line(dataclasses.replace(run, document=older))


def test_the_base_model_of_an_evaluation_is_a_flag(tmp_path):
    run = read_run(synthetic_runs.eval_run(tmp_path / "run"), "run")
    assert command_line(run).startswith(
        "lorazor eval runs/full runs/small --data test.jsonl --metrics loss,rougeL --base"
    )
    assert parsed(command_line(run))["base"] is True


def test_a_choice_with_higher_ranks_says_grow(training):
    run = read_run(training, "run")
    assert "--grow" not in command_line(run)
    settings = {**run.document["settings"], "grow": True}
    grown = dataclasses.replace(run, document={**run.document, "settings": settings})
    assert parsed(command_line(grown))["grow"] is True


def test_what_the_shell_would_read_is_quoted(tmp_path):
    path = synthetic_runs.weights_run(tmp_path / "my run; rm -rf")
    assert shlex.split(command_line(read_run(path, "run")))[-1] == str(path)
