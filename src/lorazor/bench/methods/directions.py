"""WeightLoRA by directions: after a warm-up the directions of all sites stay that its last rows put first."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.select.weightlora import Schedule
from lorazor.settings import ChoosingSettings

BUDGETS = ("params",)


def train(
    experiment: Experiment, *, score: str = "fisher", schedule: Schedule = "one-cut", rank: int | None = None
) -> Path:
    """`lorazor train --method weightlora --by direction`, from the recipe's rank or from another."""
    steps = experiment.cell.recipe.select_steps
    choosing = ChoosingSettings(select_steps=steps, score=score, schedule=schedule, by="direction")
    settings = experiment.settings(rank, method="weightlora", choosing=choosing, budget=experiment.budget())
    return experiment.trained("directions", settings)
