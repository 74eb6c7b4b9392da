"""LoKr (arXiv:2309.14859): the Kronecker product of a small matrix and an update of low rank."""

from pathlib import Path

from peft import LoKrConfig

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment, *, decompose_factor: int = -1) -> Path:
    """PEFT's, with the recipe's rank and alpha."""
    own = experiment.cell.recipe
    return experiment.fit_peft(LoKrConfig(r=own.rank, alpha=own.alpha, decompose_factor=decompose_factor))  # pyright: ignore[reportArgumentType]
