"""Runs to make pages of: real ones of a tiny model, and made-up ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lorazor.settings import (
    BudgetSettings,
    ChoiceSettings,
    DataSettings,
    GenerationSettings,
    MethodSettings,
    ModelSettings,
    TrainSettings,
    WarmupSettings,
)
from tests.report import synthetic_runs
from tests.tiny_folders import TinyFolders

READING = DataSettings(batch_size=2)


@dataclass(frozen=True)
class RealRuns:
    """What the workflows left, of one tiny adapter."""

    boundary: Path
    evaluation: Path
    training: Path


@pytest.fixture(scope="session")
def real(tiny: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    """A boundary run by a text metric with held-out data, an evaluation, a choice of sites; read only."""
    from lorazor.workflow.boundary import BoundarySettings, find_boundary
    from lorazor.workflow.evaluate import EvaluationSettings, evaluate
    from lorazor.workflow.train import TrainingSettings, select_sites

    root = tmp_path_factory.mktemp("runs")
    runs = RealRuns(root / "boundary", root / "evaluation", root / "training")
    generation = GenerationSettings(max_new_tokens=4, shortlist=3)
    choosing = ChoiceSettings(select_by="chrf", rule="manual", boundary=2)
    settings = BoundarySettings(reading=READING, choosing=choosing, generation=generation)
    find_boundary(tiny.adapter, str(tiny.validation), runs.boundary, str(tiny.held_out), settings)
    adapters = [tiny.adapter, runs.boundary / "adapter"]
    metrics = ["loss", "chrf"]
    evaluate(
        adapters,
        str(tiny.held_out),
        metrics,
        runs.evaluation,
        EvaluationSettings(reading=READING, generation=generation),
    )
    training = TrainingSettings(
        model=ModelSettings(model=str(tiny.base)),
        reading=READING,
        training=TrainSettings(steps=3, warmup_steps=1),
        method=MethodSettings(method="weightlora"),
        budget=BudgetSettings(keep=5),
        warmup=WarmupSettings(select_steps=2, dense_steps=1),
    )
    select_sites(str(tiny.validation), runs.training, training)
    return runs


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    """A made-up subset run of 3 layers and 4 examples, to be damaged."""
    return synthetic_runs.subset_run(tmp_path / "subset", n_layers=3, n_examples=4)
