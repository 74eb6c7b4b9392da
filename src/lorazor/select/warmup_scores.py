"""Scores of a warm-up: how much each LoRA site is worth keeping.

Higher is more worth keeping; every score has shape (n_sites,). Credit is a sum over parameters, not a mean, so that a
larger site can earn more: compare at equal parameters (`sites_for_parameters`), not only at equal K. The controls know
nothing of the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorazor.adapter.sites import Site
from lorazor.errors import MeasureError

WARMUP_SCORES = ("gate", "credit", "random", "first-layers", "last-layers")

# One entry per site: its A, B (and bias of B), as `site_parameters` lists them; a gradient may be None.
SiteTensors = Sequence[Sequence[Tensor]]
SiteGradients = Sequence[Sequence[Tensor | None]]


@torch.no_grad()
def credit_of_step(before: SiteTensors, after: SiteTensors, gradients: SiteGradients) -> Tensor:
    """The loss decrease each site earned in one optimizer step, to first order.

        -( <grad A_i, Delta A_i> + <grad B_i, Delta B_i> )

    Summed over the steps of a warm-up this is the score `credit`. Moving size from B to A (c A and B / c, all along the
    path) changes none of its terms.

    Args:
        before: every site's parameters before the optimizer step.
        after: the same after it.
        gradients: of the loss at `before`; None counts as zero. Where gradients are clipped, the clipped ones weigh
            steps of large gradient less, the same for all sites.
    Returns:
        (n_sites,) float32, in loss; negative where a step made the loss worse. On the first site's device.
    Source: ours; a path integral of the loss, as in Lan et al., arXiv:1909.01440 (loss change allocation).
    """
    earned = [
        [
            (gradient.float() * (old.float() - new.float())).sum()
            for old, new, gradient in zip(*site, strict=True)
            if gradient is not None
        ]
        for site in zip(before, after, gradients, strict=True)
    ]
    device = before[0][0].device  # sites may be spread over several
    return torch.stack([sum(own, torch.zeros(())).to(device) for own in earned])


def control_scores(sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
    """The scores that know nothing of the data, by name, (n_sites,) float32 each.

    They are places in an order, from 1, and no amounts: no site is worth nothing by them, and none is divided by the
    size of a site. By layers, those of all stacks count as one row, sites outside them come last, and sites of one
    layer tie.

    Args:
        sites: in the order of `in_order`, which is that of `find_sites` and of `read_adapter`.
        seed: of the score "random", a uniformly random order.
    """
    layers = [(site.stack, site.name if site.layer is None else site.layer) for site in sites]
    places = {layer: place for place, layer in enumerate(dict.fromkeys(layers))}
    depths = torch.tensor([places[layer] for layer in layers])
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(seed))
    scores = {"random": 1 + order, "first-layers": depths.max() - depths + 1, "last-layers": depths + 1}
    return {name: places.float() for name, places in scores.items()}


def warmup_scores(gates: Tensor, credit: Tensor, sites: Sequence[Site], seed: int) -> dict[str, Tensor]:
    """All scores of a finished warm-up, by name, (n_sites,) float32 each on the CPU. The gate's is its magnitude.

    Args:
        gates: w, (n_sites,), as they were learned.
        credit: the sum of `credit_of_step` over the warm-up, (n_sites,).
        sites: see `control_scores`.
        seed: of the score "random".
    Raises:
        MeasureError: a credit is not finite.
    Source: Veprikov et al., arXiv:2506.02724, on the magnitude of gates.
    """
    if not torch.isfinite(credit).all():
        index = int((~torch.isfinite(credit)).nonzero()[0])
        raise MeasureError(
            f"The credit of {sites[index].name} is {float(credit[index])}. Lower the learning rate, or check the data "
            "for examples whose loss is not a number."
        )
    learned = {"gate": gates.detach().abs(), "credit": credit}
    return {name: values.float().cpu() for name, values in learned.items()} | control_scores(sites, seed)
