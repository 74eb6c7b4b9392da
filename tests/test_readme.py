"""The README's commands and Python run as they stand."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from lorazor.cli.app import main
from lorazor.settings import ModelSettings, TrainSettings
from lorazor.workflow.train import TrainingSettings, train_adapter
from tests.tiny_folders import write_rows

ROOT = Path(__file__).resolve().parents[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """An adapter that has learnt something worth keeping."""
    folder = tmp_path_factory.mktemp("trained") / "my-adapter"
    training = TrainSettings(steps=20, learning_rate=0.05, warmup_steps=2)
    settings = TrainingSettings(model=ModelSettings(str(tiny.base)), training=training)
    train_adapter(str(tiny.validation), folder, settings)
    return folder


@pytest.fixture
def workplace(tiny, trained, tmp_path, monkeypatch) -> Path:
    """A folder with the files that the README speaks of."""
    shutil.copytree(trained, tmp_path / "my-adapter")
    shutil.copytree(tiny.base, tmp_path / "my-model")
    write_rows(tmp_path / "train.jsonl", range(20, 26))
    shutil.copy(tiny.validation, tmp_path / "validation.jsonl")
    shutil.copy(tiny.held_out, tmp_path / "test.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run(workplace, monkeypatch):
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        # a hundred times as many steps show nothing more
        arguments = command.replace("--steps 300", "--steps 9 --warmup-steps 1").split()
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), command
    for folder in ("run/adapter", "half", "search/adapter", "small", "smaller"):
        assert (workplace / folder / "adapter_model.safetensors").exists()


def test_the_python_runs(workplace):
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert (workplace / "smaller-adapter" / "adapter_config.json").exists()
    assert [result.adapter for result in names["results"]] == ["my-adapter", "smaller-adapter"]


def test_every_file_it_points_to_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
    tree = re.search(r"```\nsrc/lorazor/\n(.*?)```", text, flags=re.DOTALL)
    assert tree is not None
    for name in re.findall(r"^  (\w+/|\w+\.py)", tree[1], flags=re.MULTILINE):
        assert (ROOT / "src" / "lorazor" / name).exists(), name
