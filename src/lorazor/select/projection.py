"""From numbers to sites: projection onto a budget, and choice by score.

Everything here is one primitive, `sites_for_count`, and what follows from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorazor.errors import BudgetError, MeasureError


def keep_largest(gates: Tensor, budget: int) -> Tensor:
    """Zero all but the `budget` gates of largest magnitude.

        H_K(w) = argmin ||v - w||_2  subject to  ||v||_0 <= K

    Args:
        gates: w, shape (n_sites,), any float dtype, finite.
        budget: K, in sites, 1 <= K <= n_sites.
    Returns:
        (n_sites,), dtype and device of `gates`; ties keep the earlier site.
    Raises:
        BudgetError: `budget` is outside its range.
    Source: Nguyen, Needell & Woolf, arXiv:1407.0088 (StoIHT).
    """
    return torch.where(_highest(gates.abs(), budget), gates, torch.zeros_like(gates))


def sites_for_count(scores: Tensor | Sequence[float], budget: int) -> Tensor:
    """The `budget` sites of highest score (signed: a negative score is a low one).

    Args:
        scores: shape (n_sites,), any unit; higher is more worth keeping.
        budget: K, in sites, 1 <= K <= n_sites.
    Returns:
        (n_sites,) bool, True for kept sites; ties keep the earlier site.
    Raises:
        BudgetError: `budget` is outside its range.
        MeasureError: a score is NaN.
    """
    return _highest(_checked_scores(scores), budget)


def budget_for_fraction(fraction: float, n_sites: int) -> int:
    """K for a share of the sites: the nearest whole number, and never less than one site.

    Args:
        fraction: 0 < fraction <= 1, of sites, not of parameters.
        n_sites: n.
    Returns:
        K, in sites, 1 <= K <= n_sites.
    Raises:
        BudgetError: `fraction` is outside its range.
    """
    if not 0 < fraction <= 1:
        raise BudgetError(f"A fraction of {fraction} of the sites cannot be kept. Pass more than 0 and at most 1.")
    return max(1, round(fraction * n_sites))


def sites_for_parameters(
    scores: Tensor | Sequence[float], n_parameters_per_site: Sequence[int], budget_parameters: int
) -> Tensor:
    """Sites in order of score until the parameters are used up.

    Greedy: from the highest score to the lowest, a site that still fits is kept, one that does not is skipped and
    the next is tried. The best possible sum of scores would be a knapsack problem; greedy never leaves out a site
    for the sake of several that score less, which is what "the most necessary sites" asks for.

    Args:
        scores: shape (n_sites,), any unit; higher is more worth keeping.
        n_parameters_per_site: `Site.n_parameters` of every site, each at least 1.
        budget_parameters: trainable numbers that all kept sites may have together.
    Returns:
        (n_sites,) bool, True for kept sites; ties try the earlier site first.
    Raises:
        BudgetError: not one site fits.
        MeasureError: a score is NaN, or scores and parameter counts differ in number.
    """
    scores = _checked_scores(scores)
    if len(n_parameters_per_site) != len(scores):
        raise MeasureError(f"{len(scores)} scores for {len(n_parameters_per_site)} sites. Pass one score per site.")
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


def _highest(values: Tensor, budget: int) -> Tensor:
    _check_budget(budget, len(values))
    kept = torch.zeros_like(values, dtype=torch.bool)
    # topk leaves the order of ties open; a stable sort keeps the earlier site.
    kept[torch.argsort(values, descending=True, stable=True)[:budget]] = True
    return kept


def _check_budget(budget: int, n_sites: int) -> None:
    if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= n_sites:
        raise BudgetError(
            f"budget={budget!r} sites to keep, but there are {n_sites}. "
            f"Pass 1..{n_sites}; 'lorazor inspect ADAPTER' lists them."
        )


def _checked_scores(scores: Tensor | Sequence[float]) -> Tensor:
    scores = torch.as_tensor(scores)
    if scores.ndim != 1 or len(scores) == 0:
        raise MeasureError(f"Scores of shape {tuple(scores.shape)}. Pass one score per site, shape (n_sites,).")
    if torch.isnan(scores).any():
        site_index = int(torch.isnan(scores).nonzero()[0])
        raise MeasureError(
            f"The score of site {site_index} is NaN, so sites cannot be ranked. Check the warm-up's loss."
        )
    return scores
