"""Runs to make pages of: real ones of a tiny model, and made-up ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from lorazor.settings import (
    BoundarySettings,
    BudgetSettings,
    ChoosingSettings,
    DataSettings,
    EvalSettings,
    FitSettings,
    GenerationSettings,
    ModelSettings,
    SelectSettings,
    ShrinkSettings,
)
from tests.report import synthetic_runs
from tests.tiny_folders import TinyFolders

READING = DataSettings(batch_size=2)


@dataclass(frozen=True)
class RealRuns:
    """What the workflows left, of one tiny adapter."""

    boundary: Path
    shrink: Path
    weights: Path
    evaluation: Path


@pytest.fixture(scope="session")
def real(tiny: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> RealRuns:
    """Boundary and shrink with held-out data, a shrink by weights, an evaluation; read only."""
    from lorazor.workflow.boundary import find_boundary
    from lorazor.workflow.evaluate import evaluate
    from lorazor.workflow.shrink import shrink

    root = tmp_path_factory.mktemp("runs")
    runs = RealRuns(*(root / name for name in ("boundary", "shrink", "weights", "evaluation")))
    generation = GenerationSettings(max_new_tokens=4, shortlist=3)
    settings = BoundarySettings("chrf", "manual", "chrf=50", boundary=2, reading=READING, generation=generation)
    sets = {"data": str(tiny.validation), "confirm": str(tiny.held_out)}
    find_boundary(tiny.adapter, **sets, out=runs.boundary, settings=settings)
    shrinking = ShrinkSettings(margin="loss=0.5", reading=READING, generation=generation)
    shrink(tiny.adapter, **sets, out=runs.shrink, settings=shrinking)
    shrink(tiny.adapter, out=runs.weights, settings=ShrinkSettings(max_rank=2))
    adapters = [tiny.adapter, runs.boundary / "adapter"]
    comparing = EvalSettings("loss,chrf", reading=READING, generation=generation)
    evaluate(adapters, str(tiny.held_out), out=runs.evaluation, settings=comparing)
    return runs


@pytest.fixture(scope="session")
def training(tiny: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A choice of sites in a selection run; read only."""
    from lorazor.workflow.train import select_sites

    out = tmp_path_factory.mktemp("runs") / "training"
    settings = SelectSettings(
        model=ModelSettings(model=str(tiny.base)),
        batch_size=2,
        fit=FitSettings(steps=3, rise_steps=0),
        budget=BudgetSettings(keep=5),
        choosing=ChoosingSettings(select_steps=2, dense_steps=1),
    )
    select_sites(str(tiny.validation), out=out, settings=settings)
    return out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A made-up shrink run of 3 layers and 4 examples, to be damaged."""
    return synthetic_runs.shrink_run(tmp_path / "small", n_layers=3, n_examples=4)
