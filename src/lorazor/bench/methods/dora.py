"""DoRA (arXiv:2402.09353): LoRA that learns the norms of the weights' columns apart."""

from pathlib import Path

from peft import LoraConfig

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment) -> Path:
    """PEFT's, with the recipe's rank and alpha."""
    own = experiment.cell.recipe
    return experiment.fit_peft(LoraConfig(r=own.rank, lora_alpha=own.alpha, lora_dropout=own.dropout, use_dora=True))  # pyright: ignore[reportArgumentType]
