"""The base model, with the head that every training starts from."""

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment) -> None:
    """Nothing."""
