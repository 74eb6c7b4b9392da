"""What a user asks for, turned into the settings of a warm-up on a given model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorazor.adapter.growth import grown_rank
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import BudgetError, SettingsError
from lorazor.select.projection import budget_for_fraction, check_fraction, check_keep, check_parameters
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.settings import BudgetSettings, ChoosingSettings, FitSettings


def check_budget(budget: BudgetSettings) -> None:
    """Refuse none or several of the three budgets, before anything is loaded.

    Raises:
        BudgetError: not exactly one, or one that is out of any range.
    """
    given = {
        name: value
        for name, value in (
            ("keep", budget.keep),
            ("keep_fraction", budget.keep_fraction),
            ("params", budget.params),
        )
        if value is not None
    }
    if len(given) != 1:
        what = "None" if not given else " and ".join(f"{name}={value}" for name, value in given.items())
        raise BudgetError(
            f"{what} given as the budget. Pass one of --keep K (sites), --keep-fraction F (of the sites) or --params N."
        )
    checks = {"keep": check_keep, "keep_fraction": check_fraction, "params": check_parameters}
    for name, value in given.items():
        checks[name](value)


def steps_of_selection(choosing: ChoosingSettings, training: FitSettings) -> int:
    """T, optimizer steps of the selection run: the ones asked for, or a third of the training.

    Raises:
        SettingsError: they do not fit into the training, or end while the learning rate still rises.
    """
    steps = max(1, training.steps // 3) if choosing.select_steps is None else choosing.select_steps
    if not 1 <= steps < training.steps:
        raise SettingsError(
            f"select_steps={steps} of steps={training.steps}: the selection run is the first part of the training. "
            f"Pass 1..{training.steps - 1}."
        )
    if steps < training.warmup_steps:
        raise SettingsError(
            f"select_steps={steps} end while the learning rate rises, in warmup_steps={training.warmup_steps}. "
            f"Pass select_steps of at least {training.warmup_steps}, or a shorter rise."
        )
    return steps


def warmup_settings(
    sites: Sequence[LiveSite], budget: BudgetSettings, choosing: ChoosingSettings, training: FitSettings, grow: bool
) -> WeightLoraSettings:
    """The settings of a selection run, checked for the model.

    Args:
        sites: all sites of the model.
        budget: exactly one of its three.
        choosing: how sites are chosen.
        training: of the whole training.
        grow: WeightLoRA+.
    Raises:
        BudgetError: the budget does not fit the sites.
        SettingsError: settings that contradict each other.
    """
    keep = budget.keep
    if budget.keep_fraction is not None:
        keep = budget_for_fraction(budget.keep_fraction, len(sites))
    steps = steps_of_selection(choosing, training)
    settings = WeightLoraSettings(
        keep, steps, choosing.schedule, choosing.gate_lr, choosing.dense_steps, grow, choosing.score, budget.params
    )
    settings.check(len(sites), training.steps)
    # a budget that holds no site is noticed now, not after the selection run
    settings.choose(torch.zeros(len(sites)), [site.n_parameters for site in sites])
    return settings


def survivors_rank(sites: Sequence[LiveSite], n_kept: int, names: set[str]) -> int:
    """The one rank that the kept sites get when they share what all had: r' = floor(r n / K), as far as all can.

    Args:
        sites: all sites, of one rank r.
        n_kept: K.
        names: of the kept sites.
    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA+).
    """
    kept = [site for site in sites if site.name in names]
    limits = []
    for site in kept:
        A, B = site_parameters(site.module, site.adapter)[:2]
        limits.append(min(A.shape[1], B.shape[0]))
    return grown_rank(kept[0].rank, len(sites), n_kept, min(limits))
