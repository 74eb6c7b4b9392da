"""From numbers to sites: projection onto a budget, and choice by score.

Budgets are checked before, by `WeightLoraSettings.check`; gates and credits that are no numbers, where they arise.
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
