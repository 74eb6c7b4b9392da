"""The ranks of WeightLoRA+: what the removed sites free, spent on those that stay.

Two ways: that of the paper, and one whose adapters serving stacks take without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lorazor.adapter.growth import grown_rank

Growth = Literal["served", "paper"]

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes of vLLM's slots (`--max-lora-rank`): an adapter of rank 80 takes the memory and the time of 128."""


class Shape(NamedTuple):
    """What a site's rank costs.

    Attributes:
        rank: r, as it is trained so far.
        n_per_rank: numbers in A and B of one rank, d_in + d_out.
        limit: the highest rank that says more than a lower one, min(d_in, d_out).
    """

    rank: int
    n_per_rank: int
    limit: int


def served_ranks(scores: Tensor | Sequence[float], is_kept: Tensor, is_open: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """One rank of `SERVED_RANKS` for all sites that stay, and more sites for what that leaves of the budget.

        R = the largest with  sum_kept R (d_in + d_out) <= N = sum_all r (d_in + d_out),  R <= min(d_in, d_out) of each

    Sites that were not chosen then stay as well, at the same R, from the highest score to the lowest, where they still
    fit into N. Where no R is above the present ranks, these stay as they are, and no site is added.

    Args:
        scores: (n_sites,), none of them NaN; higher is more worth keeping.
        is_kept: (n_sites,) bool, the sites that were chosen; at least one.
        is_open: (n_sites,) bool, the sites that may be added: those whose gate has not been projected to zero.
        shapes: of every site.
    Returns:
        (n_sites,) int64: the rank of every site, 0 for those that go.
    """
    kept = [shape for shape, stays in zip(shapes, is_kept.tolist(), strict=True) if stays]
    n_all = sum(shape.rank * shape.n_per_rank for shape in shapes)
    n_kept_per_rank = sum(shape.n_per_rank for shape in kept)
    highest, limit = max(shape.rank for shape in kept), min(shape.limit for shape in kept)
    fitting = [one for one in SERVED_RANKS if highest < one <= limit and one * n_kept_per_rank <= n_all]
    if not fitting:
        return torch.tensor([shape.rank for shape in shapes]) * is_kept.cpu()
    rank = max(fitting)
    stays, n_left = is_kept.cpu().clone(), n_all - rank * n_kept_per_rank
    for index in torch.as_tensor(scores).argsort(descending=True, stable=True).tolist():
        n_more = rank * shapes[index].n_per_rank
        if not stays[index] and is_open[index] and rank <= shapes[index].limit and n_more <= n_left:
            stays[index], n_left = True, n_left - n_more
    return rank * stays.long()


def paper_ranks(is_kept: Tensor, shapes: Sequence[Shape], one_rank: bool) -> Tensor:
    """The ranks of the paper: r' = floor(r n / K), at most min(d_in, d_out), on the K sites that were chosen.

    Args:
        is_kept: (n_sites,) bool, the sites that were chosen; at least one.
        shapes: of every site.
        one_rank: all that stay get the rank that the smallest of them can have.
    Returns:
        (n_sites,) int64: the rank of every site, 0 for those that go.
    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA+).
    """
    stays = is_kept.tolist()
    grown = torch.tensor(
        [
            grown_rank(shape.rank, len(shapes), sum(stays), shape.limit) if one else 0
            for shape, one in zip(shapes, stays, strict=True)
        ]
    )
    return grown.where(grown == 0, grown[grown > 0].min()) if one_rank else grown
