"""A run is resumed with what its numbers depend on; how they are computed may change, so that less memory suffices."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from lorazor.errors import OutputError
from lorazor.settings import DataSettings, FitSettings, ModelSettings
from lorazor.workflow.reading import start_run


def settings(**changed: Any) -> dict[str, Any]:
    groups = {"model": ModelSettings(), "reading": DataSettings()}
    groups |= {"fit": FitSettings()}
    own = {"score": "credit", "heal": None, "gradient_checkpointing": False, "engine": "auto"}  # not in a group
    everything: dict[str, Any] = {"adapter": "a", "data": "d", **own}
    everything |= {name: changed[name] for name in own if name in changed}
    for name, group in groups.items():
        fields = {field.name for field in dataclasses.fields(group)}
        everything[name] = vars(group) | {key: value for key, value in changed.items() if key in fields}
    return everything


def resume(out, command: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    start_run(out, command, settings(**before), {}).append("rows.jsonl", [])
    run = start_run(out, command, settings(**now), {}, resume=True)
    run.finish()
    found = json.loads((out / "run.json").read_text())["settings"]
    assert found == json.loads(json.dumps(settings(**now)))  # the settings that the run ended with


@pytest.mark.parametrize("command", ["boundary", "curves", "shrink", "eval"])
@pytest.mark.parametrize(
    "changed",
    [
        {"batch_size": 1},
        {"device_map": "cpu"},
        {"gradient_checkpointing": True},
        {"engine": "naive"},
        {"accumulation": 4},
    ],
)
def test_less_memory_goes_on(out, command, changed):
    resume(out, command, {}, changed)


@pytest.mark.parametrize("changed", [{"device_map": "cpu"}, {"gradient_checkpointing": True}, {"accumulation": 4}])
def test_a_training_goes_on_with_less_memory(out, changed):
    resume(out, "train", {}, changed)


@pytest.mark.parametrize(
    ("command", "before", "now"),
    [
        ("train", {}, {"batch_size": 1}),
        ("select", {}, {"batch_size": 1}),
        ("shrink", {"heal": "train.jsonl"}, {"heal": "train.jsonl", "batch_size": 1}),  # healing is a training
        ("boundary", {}, {"dtype": "bfloat16"}),
        ("boundary", {}, {"max_length": 9}),
        ("eval", {}, {"limit": 9}),
        ("shrink", {}, {"score": "energy"}),
        ("curves", {}, {"model": "b"}),
    ],
)
def test_what_changes_the_numbers_is_another_run(out, command, before, now):
    name, value = list(now.items())[-1]
    with pytest.raises(OutputError, match=f"{name} was .* and is now {value!r}"):
        resume(out, command, before, now)
