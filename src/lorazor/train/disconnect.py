"""Taking LoRA sites out of a model in training: module, gradient, optimizer state and entry, and PEFT's settings.

What stays is an ordinary PEFT model with fewer sites, an optimizer that knows the survivors only, and a learning-rate
schedule that goes on: parameter groups lose members, but none goes away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lorazor.adapter.growth import grow_site_, grown_rank
from lorazor.adapter.sites import LiveSite, LoraLayer, site_parameters
from lorazor.errors import AdapterError, BudgetError
from lorazor.naming import exact_key, exact_targets

# Optimizer states by the power of the gradient they hold.
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def disconnect_(
    model: nn.Module, sites: Sequence[LiveSite], is_kept: Sequence[bool], optimizer: torch.optim.Optimizer | None = None
) -> list[LiveSite]:
    """Put the base layers of the dropped sites back and forget everything about their LoRA.

    The adapter's `LoraConfig` follows: exact names of the survivors, so that what is saved loads with these and no
    others.

    Args:
        model: a PEFT model with one adapter.
        sites: all sites of that adapter.
        is_kept: which of them stay, at least one.
        optimizer: a torch optimizer, or accelerate's wrapper of one, that may hold their parameters.
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
        if others := adapters_of(site.module) - {site.adapter}:
            raise AdapterError(f"{site.name} carries the adapter {min(others)!r} as well. Delete that adapter first.")
    base = base_model(model)
    for site in dropped:
        parameters = site_parameters(site.module, site.adapter)
        parent, _, child = site.name.rpartition(".")
        setattr(base.get_submodule(parent), child, site.module.get_base_layer())
        if optimizer is not None:
            forget_parameters_(optimizer, parameters)
    describe_targets_(model, kept, [site.name for site in sites])
    describe_ranks_(model, kept)
    return kept


def grow_survivors_(
    model: nn.Module,
    sites: Sequence[LiveSite],
    n_sites: int,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[LiveSite]:
    """Share the rank of `n_sites` sites among the survivors: r' = floor(r n / K), at most min(d_in, d_out).

    New parameters take the places of the old ones in the optimizer. The state of old rows stays; new rows start
    without momentum, and with the mean second moment of the old ones, so that their first steps are no larger.

    Args:
        model: the PEFT model.
        sites: its sites.
        n_sites: n, sites there were.
        generator: source of the new directions.
        optimizer: as in `disconnect_`.
    Returns:
        The sites with their new ranks; those passed in are out of date.
    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA+).
    """
    largest = [min(A.shape[1], B.shape[0]) for A, B, *_ in (site_parameters(one.module, one.adapter) for one in sites)]
    ranks = [grown_rank(site.rank, n_sites, len(sites), most) for site, most in zip(sites, largest, strict=True)]
    return grow_to_(model, sites, ranks, generator, optimizer)


def grow_to_(
    model: nn.Module,
    sites: Sequence[LiveSite],
    ranks: Sequence[int],
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[LiveSite]:
    """Raise the rank of each site; see `grow_survivors_`.

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


def describe_targets_(model: nn.Module, sites: Sequence[LiveSite], names: Collection[str]) -> None:
    """Let the adapter's `LoraConfig` target its sites by their exact names, sorted, so that it loads as it is saved.

    Args:
        model: the PEFT model.
        sites: the sites that it has now.
        names: of all modules that were sites before; those that are none now must not match again.
    """
    config: Any = model.peft_config[sites[0].adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    config.target_modules = exact_targets(sorted(site.name for site in sites), names)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        tuner.targeted_module_names = [site.name for site in sites]


def describe_ranks_(model: nn.Module, sites: Sequence[LiveSite]) -> None:
    """Let the adapter's `LoraConfig` give its sites the rank and alpha that they have, with patterns where they differ.

    Args:
        model: the PEFT model.
        sites: the sites that it has now.
    """
    config: Any = model.peft_config[sites[0].adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    alphas = {site.name: _whole(site.module.lora_alpha[site.adapter]) for site in sites}
    largest = max(sites, key=lambda site: site.rank)  # serving stacks size their buffers by r
    config.r, config.lora_alpha = largest.rank, alphas[largest.name]
    config.rank_pattern = {exact_key(site.name): site.rank for site in sites if site.rank != config.r}
    config.alpha_pattern = {exact_key(name): alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def forget_parameters_(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters and their state out of an optimizer; their groups stay, for the learning-rate schedule."""
    gone = {id(parameter): parameter for parameter in parameters}
    for group in optimizer.param_groups:
        stays = [place for place, parameter in enumerate(group["params"]) if id(parameter) not in gone]
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][place] for place in stays]
    for parameter in gone.values():
        optimizer.state.pop(parameter, None)
        parameter.grad = None


def replace_parameter_(optimizer: torch.optim.Optimizer, before: nn.Parameter, after: nn.Parameter, axis: int) -> None:
    """Put a parameter that grew along one axis in the place of the old one, with the state of its old part."""
    if before is after:
        return
    for group in optimizer.param_groups:
        group["params"] = [after if parameter is before else parameter for parameter in group["params"]]
    state = optimizer.state.pop(before, None)
    before.grad = None
    if state and all(_can_grow(value, before) for value in state.values()):
        optimizer.state[after] = {key: _grown(key, value, after.shape[axis], axis) for key, value in state.items()}


def rescale_state_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, factor: float) -> None:
    """Let an optimizer's moments follow a parameter that was multiplied: its gradients are divided.

        p' = f p:   m' = m / f,   v' = v / f^2

    Without it, momentum would push a site with a negative gate the wrong way. States of other kinds stay.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    for powers, names in ((1, _FIRST_MOMENTS), (2, _SECOND_MOMENTS)):
        for name in names:
            if isinstance(state.get(name), Tensor) and factor != 0:
                state[name].div_(factor**powers)


def adapters_of(module: LoraLayer) -> set[str]:
    """Names of all adapters that have LoRA on a layer."""
    return {*module.lora_A.keys(), *module.lora_embedding_A.keys()}


def base_model(model: nn.Module) -> nn.Module:
    """The model that site names are names in."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _can_grow(value: Any, before: nn.Parameter) -> bool:
    """Whether a state is shaped like its parameter, or is a number. Others (8-bit blocks) start anew."""
    return not isinstance(value, Tensor) or value.ndim == 0 or value.shape == before.shape


def _grown(key: str, value: Any, size: int, axis: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    shape = [size - value.shape[axis] if place == axis else length for place, length in enumerate(value.shape)]
    new = value.mean(axis, keepdim=True).expand(shape) if key in _SECOND_MOMENTS else value.new_zeros(shape)
    return torch.cat([value, new], dim=axis)


def _whole(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
