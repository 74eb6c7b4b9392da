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
    scores: Mapping[str, Tensor], n_parameters_per_component: Mapping[str, int], budget_parameters: int
) -> dict[str, list[int]]:
    """Components in order of score per parameter until the parameters are used up, each site at a rank of its own.

    Greedy, as `sites_for_parameters`: a component that does not fit is skipped and the next is tried. Where all
    components have one size, the sum of scores is the greatest possible. A component whose score is not above 0 never
    stays, even where there is room: with it, the adapter is no better.

    Args:
        scores: of the components of each site, (r_i,), by its name; one unit for all, higher is more worth keeping.
        n_parameters_per_component: d_in + d_out of each site, which is `Site.n_parameters` / `Site.rank`, by its name.
        budget_parameters: numbers in A and B that all kept components may have together.
    Returns:
        For each site, in the order of `scores`, the components that stay, rising; empty where the site is dropped.
        Ties keep the earlier site, then the earlier component.
    Raises:
        BudgetError: the budget is below one component.
        MeasureError: a score is not finite, none is above 0, or scores and sizes are not of the same sites.
    """
    _check(scores, n_parameters_per_component, budget_parameters)
    ranks = [len(of_site) for of_site in scores.values()]
    values = torch.cat([of_site.detach().double().cpu() for of_site in scores.values()])
    sizes = torch.tensor([n_parameters_per_component[name] for name in scores for _ in scores[name]])
    is_kept = sites_for_parameters(values / sizes, sizes.tolist(), budget_parameters) & (values > 0)
    kept = [of_site.nonzero().flatten().tolist() for of_site in is_kept.split(ranks)]
    return dict(zip(scores, kept, strict=True))


def uniform_rank(
    scores: Mapping[str, Tensor],
    n_parameters_per_component: Mapping[str, int],
    budget_parameters: int,
    ranks: Sequence[int] | None = None,
) -> tuple[int, dict[str, list[int]]]:
    """The one rank, and the sites that get it, whose components have the highest score together.

    For each rank r', a site is worth the sum of its r' best components, and sites are taken in order of worth per
    parameter until the parameters are used up; of the ranks, the one of highest total wins. Some serving stacks take
    adapters of one rank only. Where all sites have one size, the total is the greatest possible.

    Args:
        scores: of the components of each site, (r_i,), by its name; one unit for all, higher is more worth keeping.
        n_parameters_per_component: d_in + d_out of each site, by its name.
        budget_parameters: numbers in A and B that all kept components may have together.
        ranks: the ranks to try; all from 1 to the largest r_i if left out. A site of lower rank than r' cannot have
            r' and is dropped at r', and so is a site that is worth nothing or less.
    Returns:
        r', and for each site, in the order of `scores`, the r' components that stay, rising; empty where the site is
        dropped. Ties prefer the smaller rank, then the earlier site.
    Raises:
        BudgetError: at no rank a site fits into the budget, or a rank is less than 1.
        MeasureError: a score is not finite, none is above 0, or scores and sizes are not of the same sites.
    """
    _check(scores, n_parameters_per_component, budget_parameters)
    largest = max(len(of_site) for of_site in scores.values())
    tried = sorted(set(range(1, largest + 1) if ranks is None else ranks))
    if not tried or tried[0] < 1:
        raise BudgetError(f"ranks={tried}. Pass ranks from 1 to {largest}, or leave them out.")
    sizes = [n_parameters_per_component[name] for name in scores]
    best = [torch.sort(one.detach().double().cpu(), descending=True, stable=True) for one in scores.values()]
    worths = {rank: _worths_at_rank(rank, [one.values for one in best], sizes, budget_parameters) for rank in tried}
    winner = max(tried, key=lambda rank: float(worths[rank].sum()))  # the first of equals
    if not worths[winner].any():
        raise BudgetError(
            f"A budget of {budget_parameters} parameters holds no site at a rank of {', '.join(map(str, tried))}. "
            f"Pass more parameters, or lower ranks, from 1."
        )
    stays = worths[winner] > 0
    return winner, {
        name: sorted(one.indices[:winner].tolist()) if is_kept else []
        for name, one, is_kept in zip(scores, best, stays, strict=True)
    }


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
    kept: Mapping[str, Sequence[int]],
    method: str,
    settings: Mapping[str, Any] | None = None,
    scores: Mapping[str, float] | None = None,
) -> Selection:
    """What `mixed_ranks` or `uniform_rank` chose, as a selection.

    Args:
        sites: all sites of the adapter.
        kept: the components that stay of each, by its name; none drops the site, all leave its factors as trained.
        method: what the selection says chose them.
        settings: of the method.
        scores: of each site by its name, for the record.
    Returns:
        A selection over all `sites`.
    Raises:
        SelectionError: a site does not have such components.
    """
    entries = []
    for site in sites:
        components = kept[site.name]
        is_whole = len(components) in (0, site.rank)
        entries.append(
            SelectedSite(
                name=site.name,
                layer=site.layer,
                stack=site.stack,
                kind=site.kind,
                rank=site.rank,
                keep=len(components) > 0,
                score=None if scores is None else float(scores[site.name]),
                components=None if is_whole else tuple(components),
            )
        )
    return Selection(sites=tuple(entries), method=method, settings=settings or {})


def _check(scores: Mapping[str, Tensor], sizes: Mapping[str, int], budget_parameters: int) -> None:
    if scores.keys() != sizes.keys() or not scores or any(one.ndim != 1 or len(one) == 0 for one in scores.values()):
        raise MeasureError(
            f"Scores of {len(scores)} sites and sizes of {len(sizes)}. Pass a size and scores of shape (r,) for each, "
            "by the name of the site."
        )
    for name, of_site in scores.items():
        if not torch.isfinite(of_site).all():
            component = int((~torch.isfinite(of_site)).nonzero()[0])
            raise MeasureError(
                f"The score of component {component} of {name} is {float(of_site[component])}, so components "
                f"cannot be ranked. Check the data for examples whose loss is not a number."
            )
    if not any(bool((of_site > 0).any()) for of_site in scores.values()):
        raise MeasureError("No component has a score above 0: the adapter is no better than its base. Keep none of it.")
    smallest = min(sizes.values())
    if budget_parameters < smallest:
        raise BudgetError(
            f"A budget of {budget_parameters} parameters holds no component: the smallest has {smallest}. "
            f"Pass at least that."
        )
