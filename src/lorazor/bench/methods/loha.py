"""LoHa (arXiv:2108.06098): the Hadamard product of two updates of low rank."""

from pathlib import Path

from peft import LoHaConfig

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment) -> Path:
    """PEFT's, of half of the recipe's rank, which has as many parameters as LoRA."""
    own, rank = experiment.cell.recipe, max(1, experiment.cell.recipe.rank // 2)
    return experiment.fit_peft(LoHaConfig(r=rank, alpha=own.alpha * rank / own.rank))  # pyright: ignore[reportArgumentType]
