"""The boundary of arXiv:2503.23360: LoRA of all sites, cut above the layer that validation examples choose."""

from pathlib import Path

from lorazor import find_boundary
from lorazor.bench.experiment import Experiment
from lorazor.settings import DataSettings

BUDGETS = ()


def train(experiment: Experiment, *, rule: str = "one-se", select_by: str = "loss") -> Path | None:
    """`lorazor boundary`; None where nothing is left."""
    source = experiment.once("lora", lambda: experiment.trained("lora", experiment.settings()))
    reading = DataSettings(batch_size=experiment.cell.recipe.batch_size)
    result = find_boundary(
        source, experiment.validation, out=experiment.new("boundary"), rule=rule, select_by=select_by,
        model=experiment.model, reading=reading, seed=experiment.cell.seed,
    )  # fmt: skip
    if result.pruned is not None:
        return Path(result.pruned.path)
    return None if result.nothing_left else source
