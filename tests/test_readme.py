"""The README's commands and Python run as they stand."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from lorazor.cli.app import main
from lorazor.settings import FitSettings, ModelSettings, TrainSettings
from lorazor.workflow.train import train_adapter
from tests.tiny_folders import write_rows

ROOT = Path(__file__).resolve().parents[1]
OUTCOMES = ("shown", "refuted", "undecided")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """An adapter that has learnt something worth keeping."""
    folder = tmp_path_factory.mktemp("trained") / "my-adapter"
    training = FitSettings(steps=40, learning_rate=0.002, rise_steps=2)
    settings = TrainSettings(model=ModelSettings(str(tiny.base)), fit=training)
    train_adapter(str(write_rows(folder.with_name("train.jsonl"), range(20, 40))), out=folder, settings=settings)
    return folder


@pytest.fixture
def workplace(tiny, trained, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the README speaks of."""
    shutil.copytree(trained, tmp_path / "my-adapter")
    shutil.copytree(tiny.base, tmp_path / "my-model")
    for name, numbers in (("train", range(20, 40)), ("validation", range(20)), ("test", range(40, 60))):
        write_rows(tmp_path / f"{name}.jsonl", numbers)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run(workplace, monkeypatch):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 7
    for command in commands:
        # a hundred times as many steps show nothing more
        for long, short in (
            ("--steps 300", "--steps 9 --rise-steps 1"),
            ("train.jsonl --margin", "train.jsonl --heal-steps 4 --margin"),
        ):
            command = command.replace(long, short)
        arguments = command.replace("loss,rougeL", "loss").split()
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), command
    assert json.loads((workplace / "run" / "shrink.json").read_text())["verdict"]["outcome"] in OUTCOMES
    for folder in ("run/adapter", "small", "smaller"):
        assert (workplace / folder / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_python_runs(workplace):
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert (workplace / "smaller/adapter/adapter_config.json").exists()
    assert names["result"].pruned.path == Path("smaller/adapter")
    assert names["result"].verdict.outcome in OUTCOMES


def test_every_file_it_points_to_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    tree = re.search(r"```\nsrc/lorazor/\n(.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  (\w+/|\w+\.py)", tree[1], flags=re.MULTILINE):
        assert (ROOT / "src" / "lorazor" / name).exists(), name
