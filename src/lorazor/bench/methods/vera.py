"""VeRA (arXiv:2310.11454): vectors of scales on frozen random matrices that all sites share."""

from pathlib import Path

from peft import VeraConfig

from lorazor.bench.experiment import Experiment

BUDGETS = ()


def train(experiment: Experiment, *, rank: int = 256, d_initial: float = 0.1) -> Path:
    """PEFT's."""
    return experiment.fit_peft(VeraConfig(r=rank, d_initial=d_initial, projection_prng_key=experiment.cell.seed))
