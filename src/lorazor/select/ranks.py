"""Ranks: which components of which sites stay under one budget of parameters.

A site without a component is dropped, so that choosing sites and lowering ranks are one problem. Scores are energies
(`adapter.components.energy_scores`) or credits of the components; this file does not care which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorazor.adapter.sites import Site
from lorazor.errors import BudgetError, MeasureError
from lorazor.select.projection import sites_for_parameters
from lorazor.selection import SelectedSite, Selection


def mixed_ranks(
    scores_per_component: Sequence[Tensor], n_parameters_per_component: Sequence[int], budget_parameters: int
) -> list[list[int]]:
    """Components in order of score per parameter until the parameters are used up, each site at a rank of its own.

    Greedy, as `sites_for_parameters`: a component that does not fit is skipped and the next is tried. Where all
    components have one size, the sum of scores is the greatest possible. A component whose score is not above 0 never
    stays, even where there is room: with it, the adapter is no better.

    Args:
        scores_per_component: (r_i,) of each site, one unit for all; higher is more worth keeping.
        n_parameters_per_component: d_in + d_out of each site, which is `Site.n_parameters` / `Site.rank`.
        budget_parameters: numbers in A and B that all kept components may have together.
    Returns:
        For each site the components that stay, rising; empty where the site is dropped. Ties keep the earlier site,
        then the earlier component.
    Raises:
        BudgetError: the budget is below one component.
        MeasureError: a score is not finite, none is above 0, or scores and sizes do not fit each other.
    """
    _check(scores_per_component, n_parameters_per_component, budget_parameters)
    ranks = [len(scores) for scores in scores_per_component]
    scores = torch.cat([scores.detach().double().cpu() for scores in scores_per_component])
    sizes = torch.tensor(n_parameters_per_component).repeat_interleave(torch.tensor(ranks))
    is_kept = sites_for_parameters(scores / sizes, sizes.tolist(), budget_parameters) & (scores > 0)
    return [of_site.nonzero().flatten().tolist() for of_site in is_kept.split(ranks)]


def uniform_rank(
    scores_per_component: Sequence[Tensor],
    n_parameters_per_component: Sequence[int],
    budget_parameters: int,
    ranks: Sequence[int] | None = None,
) -> tuple[int, list[list[int]]]:
    """The one rank, and the sites that get it, whose components have the highest score together.

    For each rank r', a site is worth the sum of its r' best components, and sites are taken in order of worth per
    parameter until the parameters are used up; of the ranks, the one of highest total wins. Some serving stacks take
    adapters of one rank only. Where all sites have one size, the total is the greatest possible.

    Args:
        scores_per_component: (r_i,) of each site, one unit for all; higher is more worth keeping.
        n_parameters_per_component: d_in + d_out of each site.
        budget_parameters: numbers in A and B that all kept components may have together.
        ranks: the ranks to try; all from 1 to the largest r_i if left out. A site of lower rank than r' cannot have
            r' and is dropped at r', and so is a site that is worth nothing or less.
    Returns:
        r', and for each site the r' components that stay, rising; empty where the site is dropped. Ties prefer the
        smaller rank, then the earlier site.
    Raises:
        BudgetError: at no rank a site fits into the budget, or a rank is less than 1.
        MeasureError: a score is not finite, none is above 0, or scores and sizes do not fit each other.
    """
    _check(scores_per_component, n_parameters_per_component, budget_parameters)
    largest = max(len(scores) for scores in scores_per_component)
    tried = sorted(set(range(1, largest + 1) if ranks is None else ranks))
    if not tried or tried[0] < 1:
        raise BudgetError(f"ranks={tried}. Pass ranks from 1 to {largest}, or leave them out.")
    best = [torch.sort(scores.detach().double().cpu(), descending=True, stable=True) for scores in scores_per_component]
    worths = {
        rank: _worths_at_rank(rank, [one.values for one in best], n_parameters_per_component, budget_parameters)
        for rank in tried
    }
    winner = max(tried, key=lambda rank: float(worths[rank].sum()))  # the first of equals
    if not worths[winner].any():
        raise BudgetError(
            f"A budget of {budget_parameters} parameters holds no site at a rank of {', '.join(map(str, tried))}. "
            f"Pass more parameters, or lower ranks, from 1."
        )
    stays = worths[winner] > 0
    return winner, [
        sorted(one.indices[:winner].tolist()) if is_kept else [] for one, is_kept in zip(best, stays, strict=True)
    ]


def _worths_at_rank(rank: int, scores: Sequence[Tensor], sizes: Sequence[int], budget_parameters: int) -> Tensor:
    """(n_sites,) sum of the `rank` best components of the sites that stay at that rank; 0 for the others.

    `scores` are (r_i,) of each site, falling.
    """
    worths = torch.stack([one[:rank].sum() if len(one) >= rank else one.new_zeros(()) for one in scores])
    costs = [rank * size for size in sizes]
    if budget_parameters < min(costs):
        return torch.zeros_like(worths)
    # Sites that are worth nothing come after all others, and so take no room from them.
    is_kept = sites_for_parameters(worths / torch.tensor(costs), costs, budget_parameters)
    return torch.where(is_kept, worths, torch.zeros_like(worths)).clamp(min=0)


def select_components(
    sites: Sequence[Site],
    kept: Sequence[Sequence[int]],
    method: str,
    settings: Mapping[str, Any] | None = None,
    scores: Sequence[float] | None = None,
) -> Selection:
    """What `mixed_ranks` or `uniform_rank` chose, as a selection.

    Args:
        sites: all sites of the adapter.
        kept: the components that stay of each; none drops the site, all leave its factors as trained.
        method: what the selection says chose them.
        settings: of the method.
        scores: of each site, for the record.
    Returns:
        A selection over all `sites`.
    Raises:
        SelectionError: a site does not have such components.
    """
    entries = []
    for index, (site, components) in enumerate(zip(sites, kept, strict=True)):
        is_whole = len(components) in (0, site.rank)
        entries.append(
            SelectedSite(
                name=site.name,
                layer=site.layer,
                stack=site.stack,
                kind=site.kind,
                rank=site.rank,
                keep=len(components) > 0,
                score=None if scores is None else float(scores[index]),
                components=None if is_whole else tuple(components),
            )
        )
    return Selection(sites=tuple(entries), method=method, settings=settings or {})


def _check(scores: Sequence[Tensor], sizes: Sequence[int], budget_parameters: int) -> None:
    if len(scores) != len(sizes) or not scores or any(one.ndim != 1 or len(one) == 0 for one in scores):
        raise MeasureError(
            f"Scores of {len(scores)} sites and sizes of {len(sizes)}. Pass a size and scores of shape (r,) for each."
        )
    for index, of_site in enumerate(scores):
        if not torch.isfinite(of_site).all():
            component = int((~torch.isfinite(of_site)).nonzero()[0])
            raise MeasureError(
                f"The score of component {component} of site {index} is {float(of_site[component])}, so components "
                f"cannot be ranked. Check the data for examples whose loss is not a number."
            )
    if not any(bool((of_site > 0).any()) for of_site in scores):
        raise MeasureError("No component has a score above 0: the adapter is no better than its base. Keep none of it.")
    if budget_parameters < min(sizes):
        raise BudgetError(
            f"A budget of {budget_parameters} parameters holds no component: the smallest has {min(sizes)}. "
            f"Pass at least that."
        )
