"""WeightLoRA+ (arXiv:2506.02724): the rank of the sites that stay grows by what the others free."""

from pathlib import Path

from lorazor.bench.experiment import Experiment
from lorazor.select.ranks import Growth
from lorazor.select.weightlora import Schedule
from lorazor.settings import BudgetSettings, ChoosingSettings

BUDGETS = ()


def train(
    experiment: Experiment, *, keep_fraction: float = 0.1, growth: Growth = "served", schedule: Schedule = "one-cut"
) -> Path:
    """`lorazor train --method weightlora+`: as many parameters as LoRA on all sites; published with `every-step`."""
    own = experiment.cell.recipe
    choosing = ChoosingSettings(
        select_steps=own.select_steps, gate_lr=own.gate_lr, growth=growth, schedule=schedule,
        dense_steps=0,
    )  # fmt: skip
    budget = BudgetSettings(keep_fraction=keep_fraction)
    settings = experiment.settings(method="weightlora+", choosing=choosing, budget=budget)
    return experiment.trained("weightlora-plus", settings)
