"""LoRA of equal parameters: the highest rank on all sites that fits."""

from pathlib import Path

from lorazor.bench.experiment import Experiment

BUDGETS = ("params",)


def train(experiment: Experiment) -> Path:
    """Plain LoRA of a lower rank."""
    return experiment.trained("low-rank", experiment.settings(experiment.rank_on(experiment.sites)))
