"""A copy of a model that costs no memory for its base: two adapters on the same weights, in modules of their own."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)

_OF_ADAPTERS = ("lora_", "modules_to_save", "original_module")
"""Parts of the names of parameters that PEFT adds, or that an adapter's own head may be written over."""


def twin_of(model: Module) -> Module:
    """Copy a model, but for the numbers of its frozen base weights: these stay the same memory.

    What is done to the modules of one is not seen by the other: adapters, hooks, modes, configs, which parameters are
    trained. Weights of quantised layers are the same objects, since their class may hold more than numbers.

    Args:
        model: a transformers model, inside PEFT or not.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        is_own = parameter.requires_grad or any(part in name for part in _OF_ADAPTERS)
        if not is_own:
            is_plain = type(parameter) is nn.Parameter
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False) if is_plain else parameter
    return copy.deepcopy(model, memo)
