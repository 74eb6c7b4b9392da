"""Taking LoRA sites out of a model in training: module, gradient, optimizer state and entry, and PEFT's settings.

What stays is an ordinary PEFT model with fewer sites, an optimizer that knows the survivors only, and a learning-rate
schedule that goes on: parameter groups lose members, but none goes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from lorazor.adapter.directions import equal_norms_
from lorazor.adapter.experts import targets_of
from lorazor.adapter.growth import grow_site_, narrow_site_
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import AdapterError, BudgetError
from lorazor.naming import exact_keys
from lorazor.select.ranks import Shape
from lorazor.train.optimizers import exchange_parameter_, forget_parameters_, replace_parameter_


def disconnect_(
    model: nn.Module, sites: Sequence[LiveSite], is_kept: Sequence[bool], optimizer: torch.optim.Optimizer | None = None
) -> list[LiveSite]:
    """Put the base layers of the dropped sites back and forget everything about their LoRA.

    The adapter's `LoraConfig` follows: exact names of the survivors, sorted, so that what is saved loads with these and
    no others.

    Args:
        model: a PEFT model with one adapter.
        sites: all sites of that adapter.
        is_kept: which of them stay, at least one.
        optimizer: one that may hold their parameters, see `optimizers.units_of`.
    Returns:
        The sites that stay.
    Raises:
        BudgetError: no site stays.
        AdapterError: a layer carries another adapter as well.
    """
    kept = [site for site, stays in zip(sites, is_kept, strict=True) if stays]
    dropped = [site for site, stays in zip(sites, is_kept, strict=True) if not stays]
    if not kept:
        raise BudgetError(f"None of the {len(sites)} sites stays: that is the base model. Keep at least one.")
    for site in dropped:
        if others := {*site.module.lora_A.keys(), *site.module.lora_embedding_A.keys()} - {site.adapter}:
            raise AdapterError(f"{site.name} carries the adapter {min(others)!r} as well. Delete that adapter first.")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for site in dropped:
        parameters = site_parameters(site.module, site.adapter)
        holder, child = _holder(base, site)
        setattr(holder, child, cast(nn.Module, site.module).base_layer)
        if optimizer is not None:
            forget_parameters_(optimizer, parameters)
    config: Any = model.peft_config[kept[0].adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    modules, on_parameters = ([one.name for one in kept if one.is_on_parameter is which] for which in (False, True))
    for name, targets in targets_of(kept, [site.name for site in sites]).items():
        setattr(config, name, targets)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        tuner.targeted_module_names, tuner.targeted_parameter_names = modules, on_parameters
    describe_ranks_(model, kept)
    return kept


def _holder(base: nn.Module, site: LiveSite) -> tuple[nn.Module, str]:
    """The module that holds a site's, and under which name: a wrapper of a parameter may be inside another."""
    if not site.is_on_parameter:
        parent, _, child = site.name.rpartition(".")
        return base.get_submodule(parent), child
    return next(
        (module, child)
        for module in base.modules()
        for child, inner in module.named_children()
        if inner is cast(nn.Module, site.module)
    )


def shapes_of(sites: Sequence[LiveSite]) -> list[Shape]:
    """What a rank of each site costs, and how high it may be."""
    shapes = []
    for site in sites:
        A, B = site_parameters(site.module, site.adapter)[:2]
        d_in, d_out = A[0].numel(), len(B)
        shapes.append(Shape(site.rank, d_in + d_out, min(d_in, d_out)))
    return shapes


def grow_(
    model: nn.Module,
    sites: Sequence[LiveSite],
    ranks: Sequence[int],
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[LiveSite]:
    """Raise the rank of each site.

    New parameters take the places of the old ones in the optimizer, see `replace_parameter_`.

    Args:
        model: the PEFT model.
        sites: its sites.
        ranks: the new rank of each.
        generator: source of the new directions.
        optimizer: as in `disconnect_`.
    Returns:
        The sites with their new ranks; those passed in are out of date.
    """
    grown = []
    for site, rank in zip(sites, ranks, strict=True):
        old = site_parameters(site.module, site.adapter)
        grown.append(grow_site_(site, rank, generator))
        new = site_parameters(site.module, site.adapter)
        if optimizer is not None:
            for axis, (before, after) in enumerate(zip(old[:2], new[:2], strict=True)):  # A grows rows, B columns
                replace_parameter_(optimizer, before, after, axis)
    describe_ranks_(model, grown)
    return grown


@torch.no_grad()
def keep_directions_(
    model: nn.Module,
    sites: Sequence[LiveSite],
    components: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[LiveSite]:
    """Lower the rank of each site to that of some of its directions.

    The model computes what they compute. Norms are made equal, and scalings stay: with lora_alpha / r of the new ranks
    every step of the optimizer would move a site of low rank further (docs/LOG.md). What is saved has an
    `alpha_pattern`, which some serving stacks ignore and `lorazor export` takes away.
    New parameters take the places of the old ones in the optimizer, without a state.

    Args:
        model: the PEFT model.
        sites: its sites, all of which can be taken apart; in the basis of the directions.
        components: indices of the directions that stay at each site, rising, at least one.
        optimizer: as in `disconnect_`.
    Returns:
        The sites with their new ranks; those passed in are out of date.
    """
    config: Any = model.peft_config[sites[0].adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    config.use_rslora, narrowed = False, []
    for site, kept in zip(sites, components, strict=True):
        before = site_parameters(site.module, site.adapter)
        narrowed.append(narrow_site_(site, kept))
        if optimizer is not None:
            for old, new in zip(before, site_parameters(site.module, site.adapter), strict=True):
                exchange_parameter_(optimizer, old, new)
    equal_norms_(narrowed)
    describe_ranks_(model, narrowed)
    return narrowed


def describe_ranks_(model: nn.Module, sites: Sequence[LiveSite]) -> None:
    """Let the adapter's `LoraConfig` give its sites the rank and alpha that they have, by patterns if they differ."""
    config: Any = model.peft_config[sites[0].adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    alphas = {site.name: site.module.lora_alpha[site.adapter] for site in sites}
    alphas = {name: int(alpha) if alpha == int(alpha) else alpha for name, alpha in alphas.items()}
    largest = max(sites, key=lambda site: site.rank)  # serving stacks size their buffers by r
    config.r, config.lora_alpha = largest.rank, alphas[largest.name]
    ranks, keys = {site.name: site.rank for site in sites}, exact_keys(alphas)
    config.rank_pattern = {keys[name]: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {keys[name]: one for name, one in alphas.items() if one != config.lora_alpha}
