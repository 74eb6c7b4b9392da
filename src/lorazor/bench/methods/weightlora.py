"""WeightLoRA (arXiv:2506.02724): a gate per site, learned in a warm-up that decides which sites are trained on."""

from pathlib import Path
from typing import Literal

from lorazor.bench.experiment import Experiment
from lorazor.select.weightlora import Schedule
from lorazor.settings import ChoosingSettings

BUDGETS = ("params", "step_time", "memory")


def train(
    experiment: Experiment,
    *,
    score: str = "gate",
    schedule: Schedule = "one-cut",
    dense: float = 0.25,
    start: Literal["warm", "fresh"] = "warm",
) -> Path:
    """`lorazor train --method weightlora`; in a share of the warm-up, `dense`, schedules drop nothing."""
    own = experiment.cell.recipe
    choosing = ChoosingSettings(
        select_steps=own.select_steps, score=score, schedule=schedule, gate_lr=own.gate_lr,
        dense_steps=int(dense * own.select_steps),
    )  # fmt: skip
    fields = {"method": "weightlora", "choosing": choosing, "budget": experiment.budget(schedule), "start": start}
    return experiment.trained("weightlora", experiment.settings(**fields))


def control(experiment: Experiment, score: str, rank: int | None) -> Path:
    """Fresh LoRA, for all steps, on the sites that a score without data puts first; None is the recipe's rank."""
    fields = {"choosing": ChoosingSettings(by="site", score=score), "budget": experiment.budget()}
    return experiment.trained("on-sites", experiment.settings(rank, method="weightlora", **fields))
