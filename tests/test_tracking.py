"""What trackers are told, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lorazor import tracking
from lorazor.errors import SettingsError
from lorazor.runs import RunFolder
from lorazor.settings import (
    BoundarySettings,
    BudgetSettings,
    ChoosingSettings,
    DataSettings,
    EvalSettings,
    FitSettings,
    LoraSettings,
    ModelSettings,
    TrainSettings,
)
from lorazor.tracking import check_tracker, reporters, track
from lorazor.workflow.boundary import find_boundary
from lorazor.workflow.curves import measure_curves
from lorazor.workflow.evaluate import evaluate
from lorazor.workflow.train import train_adapter

READING = DataSettings(batch_size=2)


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar in a folder of TensorBoard, by name."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@pytest.fixture
def without(monkeypatch):
    """Pretend that a package is not installed."""

    def hide(package: str) -> None:
        monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == package else find_spec(name))

    return hide


def test_a_boundary_run_logs_the_metric_with_the_boundary_as_step(tiny, out):
    settings = BoundarySettings(reading=READING, rule="manual", boundary=2, margin="loss=1")
    places = {"out": out, "confirm": str(tiny.held_out)}
    result = find_boundary(tiny.adapter, str(tiny.validation), **places, settings=settings, tracker="tensorboard")
    seen = logged(out / "tensorboard")
    candidates = result.choice.candidates
    assert seen["boundary/loss"] == [(one.boundary, pytest.approx(one.value)) for one in candidates]
    assert seen["boundary/to_full"][-1] == (4, 0.0)
    assert seen["boundary/chosen"] == [(2, 2.0)]
    assert result.verdict is not None
    assert seen["confirmation/value"] == [(2, pytest.approx(result.verdict.value))]
    # a finished run that is gone on with, without a tracker and with one: nothing is logged twice
    for tracker in ("none", "tensorboard"):
        find_boundary(tiny.adapter, str(tiny.validation), **places, settings=settings, resume=True, tracker=tracker)
        assert logged(out / "tensorboard") == seen


def test_an_evaluation_logs_every_metric_of_every_adapter(tiny, out):
    settings = EvalSettings(base=True)
    results = evaluate([tiny.adapter], str(tiny.held_out), out=out, settings=settings, tracker="tensorboard").results
    name = str(tiny.adapter).strip("/")
    assert logged(out / "tensorboard") == {
        f"loss/{name}": [(0, pytest.approx(results[0].value))],
        "loss/base": [(0, pytest.approx(results[1].value))],
    }


def test_curves_are_logged_with_the_layer_as_step(tiny, out):
    result = measure_curves(tiny.adapter, str(tiny.validation), out=out, tracker="tensorboard")
    seen = logged(out / "tensorboard")
    base = [(one.layer, pytest.approx(one.probability)) for one in result.curves if one.variant == "base"]
    assert seen["probability/base"] == base
    assert set(seen) == {f"{what}/{variant}" for what in ("probability", "entropy") for variant in ("adapter", "base")}


@pytest.mark.slow
def test_a_training_logs_its_steps_and_gates_through_the_trainer(tiny, out):
    settings = TrainSettings(
        model=ModelSettings(str(tiny.base)),
        batch_size=2,
        lora=LoraSettings(rank=2),
        fit=FitSettings(steps=6, warmup_steps=1, save_steps=2),
        method="weightlora",
        budget=BudgetSettings(keep=5),
        choosing=ChoosingSettings(select_steps=3),
        report_to="tensorboard",
    )
    train_adapter(str(tiny.validation), out=out, settings=settings)
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


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_package_that_is_missing_is_said_before_any_work(tiny, out, tmp_path, monkeypatch, without, tracker):
    without(tracker)
    message = rf"track='{tracker}' needs the package {tracker}.*pip install 'lorazor\[{tracker}\]'"
    nothing = str(tmp_path / "no-such-data.jsonl")
    for work in (
        lambda: find_boundary(tiny.adapter, nothing, out=out, tracker=tracker),
        lambda: evaluate([tiny.adapter], nothing, out=out, tracker=tracker),
        lambda: measure_curves(tiny.adapter, nothing, out=out, tracker=tracker),
    ):
        with pytest.raises(SettingsError, match=message):
            work()
    settings = TrainSettings(model=ModelSettings(str(tiny.base)), report_to=tracker)
    with pytest.raises(SettingsError, match=rf"report_to='{tracker}'.*lorazor\[{tracker}\]"):
        train_adapter(nothing, out=out, settings=settings)
    assert not out.exists()


def test_names_of_trackers():
    assert reporters("none") == reporters("") == []
    assert reporters("tensorboard") == reporters(" tensorboard, ") == ["tensorboard"]
    with pytest.raises(SettingsError, match="'tensorbord' is unknown.*tensorboard"):
        reporters("tensorboard,tensorbord")
    with pytest.raises(SettingsError, match="'tensorbord' is unknown.*trackio"):
        check_tracker("tensorbord")  # pyright: ignore[reportArgumentType]
    check_tracker("none")


def test_a_reporter_of_transformers_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: [])
    with pytest.raises(SettingsError, match="report_to='wandb' needs a package that is not installed"):
        reporters("wandb")


def test_only_the_process_that_writes_the_run_logs(out):
    run = RunFolder.start(out, "eval", {}, {}, resume=False)
    run.is_writer = False
    track(run, "tensorboard", [(0, {"loss": 1.0})])
    assert not out.exists()


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_gets_a_run_named_like_the_folder(out, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = RunFolder.start(out, "eval", {"seed": 0}, {}, resume=False)
    track(run, "trackio", [(1, {"loss": 2.5}), (2, {"loss": 1.5})])
    assert list((tmp_path / "trackio").glob("lorazor*"))
