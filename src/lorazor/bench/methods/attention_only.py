"""LoRA on the maps of attention alone, of the highest rank that fits."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.bench.methods.mlp_only import on_kinds

BUDGETS = ("params",)


def train(experiment: Experiment) -> Path:
    """Sites with attention in their name."""
    return on_kinds(experiment, is_attention=True)
