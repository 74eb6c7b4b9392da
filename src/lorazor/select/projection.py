"""From numbers to sites: projection onto a budget, the budget's schedule, and choice by score.

Budgets and steps are checked before, by `WeightLoraSettings.check`; gates and credits that are no numbers, where they
arise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorazor.errors import BudgetError


def keep_largest(gates: Tensor, budget: int) -> Tensor:
    """Zero all but the `budget` gates of largest magnitude.

        H_K(w) = argmin ||v - w||_2  subject to  ||v||_0 <= K

    Args:
        gates: w, shape (n_sites,), any float dtype, finite.
        budget: K, in sites, 1 <= K <= n_sites.
    Returns:
        (n_sites,), dtype and device of `gates`; ties keep the earlier site.
    Source: Nguyen, Needell & Woolf, arXiv:1407.0088 (StoIHT).
    """
    return torch.where(sites_for_count(gates.abs(), budget), gates, torch.zeros_like(gates))


def progressive_budget(step: int, select_steps: int, n_sites: int, budget: int, dense_steps: int = 0) -> int:
    """How many sites are kept after `step` steps of a warm-up that ends with `budget` of them.

        k_t = n                                              t <= t0
        k_t = K + ceil((n - K) (1 - (t - t0) / (T - t0))^3)  t0 <= t <= T
        k_t = K                                              t >= T

    Most sites go early, when many are alike, and the last few late, when each of them counts. The source's schedule
    is for the share of zeros; this is the same curve, counted in sites. Rounding up reaches K at T and not before.

    Args:
        step: t, steps taken so far, counting the present one.
        select_steps: T, in steps, at least 1.
        n_sites: n.
        budget: K, in sites, 1 <= K <= n.
        dense_steps: t0, steps at the start that keep every site, 0 <= t0 < T.
    Returns:
        k_t, in sites; never rises with `step`.
    Source: Zhu & Gupta, arXiv:1710.01878, equation 1.
    """
    if step <= dense_steps:
        return n_sites
    n_left, n_pruning = max(select_steps - step, 0), select_steps - dense_steps
    # Whole numbers, so that no rounding error of a cube keeps one site too many.
    return budget + -(-(n_sites - budget) * n_left**3 // n_pruning**3)


def check_keep(keep: int, n_sites: int | None = None, unit: str = "site") -> None:
    """Refuse a number of sites, or of directions, that cannot be kept.

    Args:
        keep: K.
        n_sites: n; None before the model is loaded.
        unit: what is counted.
    Raises:
        BudgetError: not a whole number of 1 or more, or more than there are.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1 or (n_sites is not None and keep > n_sites):
        there = "" if n_sites is None else f", but the model has {n_sites} LoRA {unit}s"
        allowed = "1 or more" if n_sites is None else f"1..{n_sites}"
        raise BudgetError(f"keep={keep!r} {unit}s{there}. Pass a whole number, {allowed}.")


def check_parameters(n_parameters: int) -> None:
    """Raise BudgetError unless a budget of parameters is a whole number of 1 or more."""
    if isinstance(n_parameters, bool) or not isinstance(n_parameters, int) or n_parameters < 1:
        raise BudgetError(f"params={n_parameters!r} numbers in A and B. Pass a whole number, 1 or more.")


def sites_for_count(scores: Tensor | Sequence[float], budget: int) -> Tensor:
    """The `budget` sites of highest score (signed: a negative score is a low one).

    Args:
        scores: shape (n_sites,), any unit, none of them NaN; higher is more worth keeping.
        budget: K, in sites, 1 <= K <= n_sites.
    Returns:
        (n_sites,) bool, True for kept sites; ties keep the earlier site.
    """
    scores = torch.as_tensor(scores)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    # topk leaves the order of ties open; a stable sort keeps the earlier site.
    kept[torch.argsort(scores, descending=True, stable=True)[:budget]] = True
    return kept


def budget_for_fraction(fraction: float, n_sites: int) -> int:
    """K for a share of the sites: the nearest whole number, and never less than one site.

    Args:
        fraction: 0 < fraction <= 1, of sites, not of parameters.
        n_sites: n.
    Returns:
        K, in sites, 1 <= K <= n_sites.
    """
    return max(1, round(fraction * n_sites))


def sites_for_parameters(
    scores: Tensor | Sequence[float], n_parameters_per_site: Sequence[int], budget_parameters: int
) -> Tensor:
    """Sites in order of score until the parameters are used up.

    Greedy: from the highest score to the lowest, a site that still fits is kept, one that does not is skipped and
    the next is tried. The best possible sum of scores would be a knapsack problem; greedy never leaves out a site
    for the sake of several that score less, which is what "the most necessary sites" asks for.

    Args:
        scores: shape (n_sites,), any unit, none of them NaN; higher is more worth keeping.
        n_parameters_per_site: `Site.n_parameters` of every site, each at least 1.
        budget_parameters: trainable numbers that all kept sites may have together.
    Returns:
        (n_sites,) bool, True for kept sites; ties try the earlier site first.
    Raises:
        BudgetError: not one site fits.
    """
    scores = torch.as_tensor(scores)
    if budget_parameters < min(n_parameters_per_site):
        raise BudgetError(
            f"A budget of {budget_parameters} parameters holds no site: the smallest has {min(n_parameters_per_site)}. "
            f"Pass more parameters, or a lower rank."
        )
    kept = torch.zeros(len(scores), dtype=torch.bool)
    n_left = budget_parameters
    for site_index in torch.argsort(scores, descending=True, stable=True).tolist():
        if n_parameters_per_site[site_index] <= n_left:
            kept[site_index] = True
            n_left -= n_parameters_per_site[site_index]
    return kept.to(scores.device)
