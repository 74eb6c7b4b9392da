"""What a training tells: TensorBoard, read back with its own reader; the bar; and notes of what was cut off."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.progress import Progress
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorazor.data_settings import ExampleSettings
from lorazor.errors import SettingsError
from lorazor.settings import BudgetSettings, ChoosingSettings, FitSettings, LoraSettings, ModelSettings, TrainSettings
from lorazor.train import fit
from lorazor.train.fit import reporters
from lorazor.workflow.train import train_adapter


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar in a folder of TensorBoard, by name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def settings_of(tiny) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(str(tiny.base)),
        batch_size=2,
        lora=LoraSettings(rank=2),
        fit=FitSettings(steps=6, rise_steps=1, save_steps=2),
        method="weightlora",
        budget=BudgetSettings(keep=5),
        choosing=ChoosingSettings(select_steps=3),
    )


@pytest.mark.slow
def test_a_training_logs_its_steps_and_gates_through_the_trainer(tiny, out):
    train_adapter(str(tiny.validation), out=out, settings=settings_of(tiny), report_to="tensorboard")
    (chosen,), (trained,) = (list((out / name / "runs").iterdir()) for name in ("select", "train"))
    rows = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    first, second = logged(chosen), logged(trained)
    losses = [value for run in (first, second) for _, value in run["train/loss"]]
    assert losses == pytest.approx([row["loss"] for row in rows], abs=1e-3)
    assert [step for step, _ in first["train/lorazor/gates_kept"]] == [1, 2, 3]
    assert first["train/lorazor/gates_kept"][-1] == (3, 5.0)
    # the checkpoints are gone, and the adapter is there
    assert {path.name for name in ("select", "train") for path in (out / name).iterdir()} == {"runs"}
    assert (out / "adapter_model.safetensors").exists()
    assert "report_to" not in json.loads((out / "run.json").read_text())["settings"]


@pytest.mark.slow
def test_each_of_two_runs_counts_its_own_steps_on_its_bar(tiny, out, monkeypatch):
    seen = []

    class Bar(Progress):
        def add_task(self, description, **kwargs):
            seen.append([(description, kwargs["completed"], kwargs["total"])])
            return super().add_task(description, **kwargs)

        def update(self, task_id, **kwargs):
            super().update(task_id, **kwargs)
            seen[-1].append((self.tasks[task_id].completed, self.tasks[task_id].total))

    monkeypatch.setattr(fit, "Progress", Bar)
    settings = dataclasses.replace(
        settings_of(tiny),
        fit=FitSettings(steps=5, rise_steps=0),
        choosing=ChoosingSettings(select_steps=2),
    )
    train_adapter(str(tiny.validation), out=out, settings=settings)
    choosing, training = seen
    assert choosing[0] == ("choosing sites", 0, 2) and training[0] == ("training", 0, 3)
    assert list(dict.fromkeys(choosing[1:])) == [(1, 2), (2, 2)]
    assert list(dict.fromkeys(training[1:])) == [(1, 3), (2, 3), (3, 3)]


def test_names_of_trackers(tiny, out, monkeypatch):
    assert reporters("none") == reporters("") == []
    assert reporters("tensorboard") == reporters(" tensorboard, ") == ["tensorboard"]
    with pytest.raises(SettingsError, match="'tensorbord' is unknown.*tensorboard"):
        reporters("tensorboard,tensorbord")
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: [])
    settings = TrainSettings(model=ModelSettings(str(tiny.base)), report_to="wandb")
    with pytest.raises(SettingsError, match="report_to='wandb' needs a package that is not installed"):
        train_adapter("no-such-data.jsonl", out=out, settings=settings)  # before any work
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prompts", "texts"])
def test_what_was_cut_off_is_said_once_and_kept_in_the_run(tiny, tmp_path, kind):
    rows = {"prompts": {"prompt": "a" * 30, "completion": "b"}, "texts": {"text": "a" * 30, "label": 1}}
    short = {"prompts": {"prompt": "a", "completion": "b"}, "texts": {"text": "a", "label": 0}}
    data, messages = tmp_path / "data.jsonl", []
    data.write_text("".join(json.dumps(row) + "\n" for row in (rows[kind], short[kind])))
    settings = dataclasses.replace(settings_of(tiny), reading=ExampleSettings(max_length=16))
    train_adapter(str(data), out=tmp_path / "run", settings=settings, say=messages.append)
    end = "start" if kind == "prompts" else "end"
    note = f"1 of 2 {kind} lost their {end} to fit into 16 tokens (--max-length)."
    assert messages.count(note) == 1
    assert note in json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
