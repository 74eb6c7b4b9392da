"""`lorazor shrink` on LoRA of all sites, healed within the same steps or not."""

from pathlib import Path
from typing import Any

from lorazor import shrink
from lorazor.bench.experiment import Experiment
from lorazor.bench.recipes import data_settings
from lorazor.settings import By, Score

BUDGETS = ("params",)


def train(experiment: Experiment, *, score: Score = "fisher", by: By = "direction", heal: bool = True) -> Path:
    """LoRA for the first steps, then the cut, then healing on rows that the training has seen least."""
    own = experiment.cell.recipe
    steps = experiment.steps_before_healing if heal else own.steps
    source = experiment.lora(steps if heal else None)
    rows = experiment.unseen(own.batch_size * steps, own.batch_size * own.heal_steps)
    healing: dict[str, Any] = {"heal": rows, "heal_steps": own.heal_steps, "heal_lr": own.heal_lr} if heal else {}
    result = shrink(
        source, experiment.validation, out=experiment.new("shrunk"), params=experiment.n_parameters, score=score,
        by=by, seed=experiment.cell.seed, model=experiment.model, reading=data_settings(experiment.cell), **healing,
    )  # fmt: skip
    assert result.pruned is not None
    return Path(result.pruned.path)
