"""LoRA on the highest layers: as many sites as fit."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.bench.methods.weightlora import control

BUDGETS = ("params", "step_time", "memory")


def train(experiment: Experiment) -> Path:
    """Fresh LoRA on sites that no data chose."""
    return control(experiment, "last-layers")
