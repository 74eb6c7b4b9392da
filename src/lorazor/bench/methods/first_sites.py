"""LoRA on the lowest layers: as many sites as fit."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.bench.methods.weightlora import control

BUDGETS = ("params", "step_time", "memory")


def train(experiment: Experiment, *, rank: int | None = None) -> Path:
    """Fresh LoRA on sites that no data chose, of the recipe's rank or of another."""
    return control(experiment, "first-layers", rank)
