"""Models that do not fit where they run: accelerate keeps weights elsewhere, and fetches them for each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from lorazor.adapter.sites import LiveSite


def fetch_(sites: Sequence[LiveSite]) -> None:
    """Bring A and B of offloaded sites to where they are computed, for good; the base weights stay offloaded.

    Between two forward passes an offloaded weight has no numbers (`meta`): nothing can be read from it or written.
    """
    for site in sites:
        for factors in (site.module.lora_A, site.module.lora_B):
            if site.adapter not in factors:  # of an embedding
                continue
            module: Any = factors[site.adapter]
            if (hook := _offloading(module)) is not None:
                weights = {name: hook.weights_map[name] for name, _ in module.named_parameters()}
                remove_hook_from_module(module)
                for name, value in weights.items():
                    set_module_tensor_to_device(module, name, hook.execution_device, value=value)


def device_of_inputs(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; of one whose first weights are offloaded, where these are fetched to."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = (_offloading(module) for module in model.modules())
    device: Any = next((hook.execution_device for hook in hooks if hook is not None), first)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _offloading(module: nn.Module) -> Any:
    """The hook that fetches the own weights of a module; None where they are not offloaded."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)
