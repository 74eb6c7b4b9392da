"""LoRA on parameters: the experts of a mixture, whose matrices PEFT adapts together, and routers.

A parameter (E, d_out, d_in), or (E, d_in, d_out), has a pair of factors for every expert, and PEFT stacks them:
`lora_A` expert after expert, (E r, d_in), and `lora_B` direction after direction, (d_out, r E).
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.adapter.sites import INSIDE, LiveSite, Site, target_modules_of, without_wrappers
from lorazor.errors import AdapterError
from lorazor.naming import exact_targets, is_named
from lorazor.selection import SelectedSite

# PEFT wraps the parameters of a module one around the other, in the order in which the model has them, and a file says
# only how deep each was. This is the order of the models of transformers.
_IN_ORDER = ("gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def of_each_expert(A: Tensor, B: Tensor, n_experts: int) -> list[tuple[Tensor, Tensor]]:
    """The factors of every expert, (r, d_in) and (d_out, r), out of PEFT's stack of them.

    Args:
        A: (E r, d_in).
        B: (d_out, r E).
        n_experts: E; 1 where there are none, and the pair is the only one.
    """
    if n_experts == 1:
        return [(A, B)]
    downs = A.view(n_experts, -1, A.shape[1])  # (E, r, d_in)
    ups = B.view(len(B), -1, n_experts)  # (d_out, r, E)
    return [(downs[expert], ups[:, :, expert]) for expert in range(n_experts)]


def stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The factors of all experts as PEFT stacks them, (E r, d_in) and (d_out, r E); see `of_each_expert`."""
    if len(pairs) == 1:
        return pairs[0]
    downs, ups = zip(*pairs, strict=True)
    return torch.cat(downs), torch.stack(ups, dim=2).flatten(1)


def names_of_parameters(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, str]:
    """Which parameter each tensor of LoRA on parameters belongs to.

    Args:
        config: the contents of an `adapter_config.json`.
        modules: what the file has LoRA on, by its names: `mlp.experts` and, further inside, `mlp.experts.base_layer`.
    Returns:
        The name of the parameter, `mlp.experts.down_proj`, by that of the module in the file; none of modules whose own
        output LoRA is added to.
    Raises:
        AdapterError: file and config have another number of parameters, or which is which cannot be told.
    """
    targets = config.get("target_parameters") or []
    if not targets:
        return {}
    is_module = target_modules_of(config)
    levels: dict[str, list[str]] = {}  # of each module, from the outside in
    for name in sorted(modules, key=len):
        levels.setdefault(without_wrappers(name), []).append(name)
    found = {}
    for module, wrappers in levels.items():
        if is_module(module):
            continue
        parameters = _in_order(module, _parameters_of(module, targets, len(wrappers)))
        found |= {name: f"{module}.{one}" for name, one in zip(wrappers, reversed(parameters), strict=True)}
    return found


def targets_of(kept: Sequence[Site] | Sequence[SelectedSite], everything: Collection[str]) -> dict[str, Any]:
    """PEFT's settings that put LoRA on the kept sites and on no other; `target_parameters` may be None.

    Args:
        kept: the sites that get LoRA.
        everything: names of what must not get it unless it is kept; may hold the kept ones.
    """
    modules, parameters = (sorted(one.name for one in kept if one.is_on_parameter is which) for which in (False, True))
    return {"target_modules": exact_targets(modules, everything), "target_parameters": parameters or None}


@contextmanager
def patterns_of_parameters() -> Iterator[None]:
    """Leave out PEFT's warning inside the block that ranks of parameters are ignored: it looks at modules alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match any targeted module")
        yield


def orders_of_parameters(model: nn.Module) -> dict[str, list[str]]:
    """The order in which modules have the parameters that PEFT can wrap, by module; none of those with one such.

    PEFT nests its wrappers by it, and takes a parameter out and back in, as the last, in every pass in which its LoRA
    is on: where the other one of the module has none, or is switched off, the two have changed places afterwards.
    """
    own = {
        name: [key for key, one in module.named_parameters(recurse=False) if one.ndim > 1]
        for name, module in model.named_modules()
    }
    return {name: keys for name, keys in own.items() if len(keys) > 1}


def orders_in_wrappers(sites: Iterable[LiveSite]) -> dict[str, list[str]]:
    """The order that modules had when PEFT wrapped their parameters: the first is the innermost."""
    found: dict[str, list[str]] = {}
    for site in sorted((one for one in sites if one.is_on_parameter), key=_depth):
        module, _, parameter = site.name.rpartition(".")
        found.setdefault(module, []).append(parameter)
    return found


def restore_orders_(model: nn.Module, orders: Mapping[str, Sequence[str]]) -> None:
    """Give modules without an adapter the order of their parameters back; see `orders_of_parameters`."""
    for name, keys in orders.items():
        own = model.get_submodule(name)._parameters
        for key in keys:
            own[key] = own.pop(key)


def _depth(site: LiveSite) -> int:
    inner, depth = site.module.base_layer, 0
    while isinstance(inner, type(site.module)):
        inner, depth = inner.base_layer, depth + 1
    return depth


def _parameters_of(module: str, targets: Collection[str], n_wrapped: int) -> list[str]:
    """The parameters of a module that the config names, with the module's name or without."""
    named = {one.rpartition(".")[2] for one in targets if "." in one and is_named(module, one.rpartition(".")[0])}
    anywhere = {one for one in targets if "." not in one}
    for choice in (named, named | anywhere):
        if len(choice) == n_wrapped:
            return sorted(choice)
    raise AdapterError(
        f"The adapter has LoRA on {n_wrapped} parameters of {module}, and target_parameters of its config names "
        f"{', '.join(sorted(named | anywhere)) or 'none'} there. Save the adapter again."
    )


def _in_order(module: str, parameters: list[str]) -> list[str]:
    if len(parameters) == 1:
        return parameters
    if unknown := [one for one in parameters if one not in _IN_ORDER]:
        raise AdapterError(
            f"The adapter has LoRA on {len(parameters)} parameters of {module}, and its file does not say which is "
            f"{unknown[0]!r}. Known are {', '.join(_IN_ORDER)}. Train one of them at a time."
        )
    return sorted(parameters, key=_IN_ORDER.index)


def keys_from_outside(parameters: Collection[str]) -> dict[str, str]:
    """The names that PEFT's file has for parameters, by their own: the reverse of `names_of_parameters`.

    Args:
        parameters: names of all parameters that have LoRA.
    """
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, parameter = name.rpartition(".")
        by_module.setdefault(module, []).append(parameter)
    return {
        f"{module}.{one}": module + INSIDE * depth
        for module, own in by_module.items()
        for depth, one in enumerate(reversed(_in_order(module, own)))
    }
