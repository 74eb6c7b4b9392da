"""The gates of a warm-up on a live model.

    h = W x + s w_i B_i (A_i x),   d Loss / d w_i = sum over tokens of <u, z>,   z = A_i x,  u = s B_i^T g

Every site's gate w_i is a leaf of the autograd graph, multiplied into what A puts out: it gathers gradients over
micro-steps by itself, and is the same tensor when activation checkpointing computes a layer again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorazor.adapter.gates import device_of, fold_, put_gate_, site_gates
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import MeasureError, SettingsError
from lorazor.select.weightlora import Gates


class GatedSites:
    """The sites of a model with learned gates on them, from `attach_` to `fold_`.

    `state_dict()` of the model, and with it every checkpoint and `save_pretrained`, has the gates multiplied into B:
    stock PEFT loads what the model computes. The model's own B stays as it is trained.

    Attributes:
        sites: the sites, in execution order.
        gates: their gates, on the device of the first site.
    """

    def __init__(self, sites: Sequence[LiveSite], gates: Gates) -> None:
        """Make the leaves; the model stays as it is."""
        self.sites = list(sites)
        self.gates = gates
        self._leaves = [torch.ones((), device=device_of(site), requires_grad=True) for site in sites]
        self._undo: list[Callable[[], None]] = []

    def attach_(self) -> None:
        """Put the gates on the model."""
        self.update_()
        for index, (site, leaf) in enumerate(zip(self.sites, self._leaves, strict=True)):
            own = self.gates.values, index
            self._undo += [put_gate_(site, leaf), _fold_what_is_saved_(site, *own), _fold_what_is_merged_(site, *own)]

    @torch.no_grad()
    def update_(self) -> None:
        """Let the sites follow the gates; to be called between a backward and the next forward pass."""
        values = list(self.gates.values.detach().unbind())
        torch._foreach_copy_(self._leaves, values)  # pyright: ignore[reportPrivateImportUsage] - not a launch per site

    def take_gradient(self) -> Tensor:
        """The gates' gradient, d Loss / d w, of all backward passes since the last call.

        Returns:
            (n_sites,) float32; zero for a site that took no part.
        Raises:
            MeasureError: not one gate got a gradient.
        """
        gradients = [leaf.grad for leaf in self._leaves]
        if all(gradient is None for gradient in gradients):
            raise MeasureError(
                "No gate got a gradient: the model's forward pass does not call PEFT's modules (kernels that replace "
                "them, such as Unsloth's, do not). Choose the sites on the unpatched model, in a run of its own."
            )
        for leaf in self._leaves:
            leaf.grad = None
        zero = torch.zeros((), device=self.gates.values.device)
        return torch.stack([zero if gradient is None else gradient.to(zero) for gradient in gradients])

    def fold_(self) -> list[float]:
        """Multiply the gates into B for good and take them off the sites.

        Returns:
            The gates, one per site.
        """
        while self._undo:
            self._undo.pop()()
        fold_(self.sites, site_gates(self.sites, self.gates.values.detach()))
        return self.gates.values.tolist()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint lacks to go on with the warm-up: the gates, and B before they are multiplied in."""
        return {
            "gates": self.gates.state_dict(),
            "B": {site.name: [parameter.detach().cpu() for parameter in _up(site)] for site in self.sites},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, before `attach_`; the model holds the checkpoint that was saved with it.

        Raises:
            SettingsError: the state is of other sites or settings, or does not belong to the model's weights, which
                then stay as they are.
        """
        if list(state["B"]) != [site.name for site in self.sites]:
            raise SettingsError("The saved warm-up is of other LoRA sites. Resume with the same target modules.")
        self.gates.load_state_dict(state["gates"])
        pairs = []
        for site, gate in zip(self.sites, self.gates.values, strict=True):
            for parameter, saved in zip(_up(site), state["B"][site.name], strict=True):
                saved = saved.to(parameter.device)
                if saved.shape != parameter.shape or not torch.equal(_folded(saved, gate).to(parameter), parameter):
                    raise SettingsError(
                        f"The saved warm-up does not belong to the weights of {site.name}. "
                        f"Resume from a checkpoint that is complete and unchanged."
                    )
                pairs.append((parameter, saved))
        for parameter, saved in pairs:
            parameter.copy_(saved)


def _fold_what_is_saved_(site: LiveSite, gates: Tensor, index: int) -> Callable[[], None]:
    """Multiply the gate into B in every state dict, until the function that is returned is called."""
    site_module = cast(nn.Module, site.module)  # PEFT's LoraLayer is a mixin of modules
    parameters = {id(parameter) for parameter in _up(site)}
    names = [name for name, parameter in site_module.named_parameters() if id(parameter) in parameters]

    def fold(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
        for name in names:
            if prefix + name in state_dict:
                state_dict[prefix + name] = _folded(state_dict[prefix + name].detach(), gates.detach()[index])

    return site_module.register_state_dict_post_hook(fold).remove


def _fold_what_is_merged_(site: LiveSite, gates: Tensor, index: int) -> Callable[[], None]:
    """Have PEFT merge what the site computes, until the function that is returned is called.

    Merging does not see what is hooked to A: the update that it asks a site for is multiplied here. Other sites refuse.
    """
    module: Any = site.module

    def gated_update(adapter: str, *args: Any) -> Tensor:
        update = update_of(adapter, *args)
        return update * gates.detach()[index].to(update) if adapter == site.adapter else update

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise SettingsError(f"{site.name} cannot be merged while gates are on it. Save the adapter, and merge that.")

    if not site.has_directions:
        module.merge = refuse
        return lambda: module.__dict__.pop("merge")
    update_of, module.get_delta_weight = module.get_delta_weight, gated_update
    return lambda: module.__dict__.pop("get_delta_weight")


def _folded(parameter: Tensor, gate: Tensor) -> Tensor:
    """The same numbers as `adapter.gates.fold_`: the product in float32, rounded to the parameter's type."""
    wide = parameter if parameter.dtype == torch.float64 else parameter.float()
    return (wide * gate.to(wide)).to(parameter.dtype)


def _up(site: LiveSite) -> list[nn.Parameter]:
    """B, and its bias where there is one."""
    return site_parameters(site.module, site.adapter)[1:]
