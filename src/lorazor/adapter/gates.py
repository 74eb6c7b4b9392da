"""Gates: the multiplier of each site, `h = W x + gate * s B A x`.

Gate 1 is plain LoRA, gate 0 the base model. Everything here but `fold_` is undone when its block ends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.adapter.rows import split_rows
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import SettingsError


@contextmanager
def gated(sites: Sequence[LiveSite], gates: Tensor | Sequence[float]) -> Iterator[None]:
    """Multiply each site's output by its gate inside the block.

        h = W x + gate_i * s_i * B_i A_i x

    Args:
        sites: the sites, in any order.
        gates: shape (n_sites,). A tensor that requires gradients gets them.
    Raises:
        SettingsError: `gates` has another length than `sites`.
    """
    if len(gates) != len(sites):
        raise SettingsError(f"{len(gates)} gates for {len(sites)} sites. Pass one gate per site.")
    before = [site.module.scaling[site.adapter] for site in sites]
    try:
        for site, gate in zip(sites, gates, strict=True):
            site.module.set_scale(site.adapter, gate)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for site, scaling in zip(sites, before, strict=True):
            site.module.scaling[site.adapter] = scaling


@contextmanager
def silenced(sites: Iterable[LiveSite]) -> Iterator[None]:
    """Switch sites off inside the block: they compute what the base model computes, whatever is in A and B.

    Where no other adapter is active, PEFT's own switch is used: it also saves computing B A x, a seventh of the time of
    a small model.
    """
    with ExitStack() as stack:
        for site in sites:
            is_alone = list(site.module.active_adapters) == [site.adapter]
            stack.enter_context(_switched_off(site.module) if is_alone else gated([site], [0.0]))
        yield


@contextmanager
def _switched_off(module: Any) -> Iterator[None]:
    """Disable the adapters of one LoRA layer; PEFT's switch also moves requires_grad, which is put back."""
    if module.disable_adapters:
        yield
        return
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.enable_adapters(False)
    try:
        yield
    finally:
        module.enable_adapters(True)
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def row_gated(sites: Sequence[LiveSite], gates: Tensor, lengths: Collection[int] | None = None) -> Iterator[None]:
    """Give every row of the batch gates of its own inside the block.

    The gate multiplies the output of B, where that says what belongs to which row (`split_rows`).

    Args:
        sites: the sites, in any order.
        gates: shape (n_sites, rows). A tensor that requires gradients gets them, one for every row.
        lengths: tokens that a row has, for the modules that see (rows * tokens, d); any number if left out.
    Raises:
        SettingsError: `gates` has another number of sites.
        RowsUnclearError: from the model inside the block: a module mixes rows. Batches of one row always work.
    """
    if gates.ndim != 2 or len(gates) != len(sites):
        raise SettingsError(f"gates of shape {tuple(gates.shape)} for {len(sites)} sites. Pass (n_sites, rows).")
    with ExitStack() as stack:
        is_uniform = (gates == gates[:, :1]).all(dim=1)
        uniform = [] if gates.requires_grad else [index for index, same in enumerate(is_uniform.tolist()) if same]
        stack.enter_context(gated([sites[i] for i in uniform], gates[uniform, 0].tolist()))
        for index in sorted(set(range(len(sites))) - set(uniform)):
            site = sites[index]
            if site.adapter in site.module.lora_B:
                up = site.module.lora_B[site.adapter]
                stack.callback(up.register_forward_hook(_row_gate(site, gates[index], lengths)).remove)
            else:  # an embedding, whose B is no module
                stack.callback(site.module.register_forward_pre_hook(_row_check(site, len(gates[index]))).remove)
                of_rows = gates[index] if gates.shape[1] == 1 else gates[index][:, None, None]  # on (rows, tokens, d)
                stack.enter_context(gated([site], of_rows[None]))
        yield


@torch.no_grad()
def fold_(sites: Sequence[LiveSite], gates: Tensor | Sequence[float]) -> None:
    """Multiply each site's B (and its bias) by its gate, for good.

    Args:
        sites: the sites.
        gates: shape (n_sites,).
    Raises:
        SettingsError: `gates` has another length than `sites`.
    """
    if len(gates) != len(sites):
        raise SettingsError(f"{len(gates)} gates for {len(sites)} sites. Pass one gate per site.")
    for site, gate in zip(sites, gates, strict=True):
        for parameter in site_parameters(site.module, site.adapter)[1:]:
            parameter.mul_(float(gate))


def _row_gate(site: LiveSite, gates: Tensor, lengths: Collection[int] | None):
    """A forward hook on B that scales each row of the batch."""

    def scale(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        rows = split_rows(output, len(gates), site, lengths)  # (rows, tokens, d_out)
        return (rows * gates.to(rows)[:, None, None]).view(output.shape)

    return scale


def _row_check(site: LiveSite, n_rows: int):
    """A hook in front of an embedding that refuses token ids which are not (rows, tokens)."""

    def check(module: nn.Module, inputs: tuple) -> None:
        split_rows(torch.atleast_2d(inputs[0])[..., None], n_rows, site)

    return check
