"""LoRA of the recipe's rank on all sites."""

from pathlib import Path

from lorazor.bench.experiment import Experiment

BUDGETS = ()
IS_SHARED = True


def train(experiment: Experiment) -> Path:
    """Plain LoRA; methods that cut it afterwards share it."""
    return experiment.lora()
