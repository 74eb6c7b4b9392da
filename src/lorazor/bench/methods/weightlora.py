"""WeightLoRA (arXiv:2506.02724): a gate per site, learned in a warm-up that decides which sites are trained on."""

from pathlib import Path
from typing import Any

from lorazor.bench.experiment import Experiment
from lorazor.select.scores import control_scores
from lorazor.settings import BudgetSettings, ChoosingSettings
from lorazor.workflow.train import select_sites

BUDGETS = ("params", "step_time", "memory")


def train(
    experiment: Experiment, *, score: str = "gate", schedule: str = "one-cut", dense: float = 0.25, start: str = "warm"
) -> Path:
    """`lorazor train --method weightlora`; in a share of the warm-up, `dense`, schedules drop nothing."""
    own = experiment.cell.recipe
    choosing = ChoosingSettings(
        select_steps=own.select_steps, score=score, schedule=schedule, gate_lr=own.gate_lr,  # pyright: ignore
        dense_steps=int(dense * own.select_steps),
    )  # fmt: skip
    fields = {"method": "weightlora", "choosing": choosing, "budget": budget_of(experiment, schedule), "start": start}
    return experiment.trained("weightlora", experiment.settings(**fields))


def control(experiment: Experiment, score: str, rank: int | None) -> Path:
    """Fresh LoRA, for all steps, on the sites that a score without data puts first; None is the recipe's rank."""
    budget = budget_of(experiment)
    if budget.params is not None:
        scores = control_scores(experiment.sites, experiment.cell.seed)[score]
        return experiment.on_sites(experiment.best(scores.tolist(), rank))
    settings = experiment.settings(rank)
    return experiment.on_sites(select_sites(
        experiment.train, out=experiment.new("chosen"), budget=budget,
        choosing=ChoosingSettings(select_steps=max(1, settings.fit.rise_steps), score=score),
        lora=settings.lora, fit=settings.fit, model=settings.model, batch_size=settings.batch_size,
    ).selection)  # fmt: skip


def budget_of(experiment: Experiment, schedule: str = "one-cut") -> BudgetSettings:
    """The cell's, as `lorazor train` takes it; schedules that drop sites one by one count sites."""
    budget: Any = experiment.cell.budget
    if budget.kind != "params":
        share: Any = budget.share if budget.kind == "step_time" else str(budget.share)
        return BudgetSettings(**{budget.kind: share})
    if schedule == "one-cut":
        return BudgetSettings(params=experiment.n_parameters)
    mean = sum(site.n_parameters for site in experiment.sites) / len(experiment.sites)
    return BudgetSettings(keep=max(1, int(experiment.n_parameters / mean)))
