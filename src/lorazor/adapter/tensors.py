"""The tensors of a pruned adapter: which stay, in which basis, and what is multiplied into B."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorazor.adapter.directions import of_site, singular_form_of
from lorazor.adapter.experts import keys_from_outside, of_each_expert, stacked
from lorazor.adapter.folder import (
    BASE_PREFIX,
    LINEAR_PARTS,
    AdapterFolder,
    load_tensors,
    setting_of,
    split_key,
)
from lorazor.adapter.sites import AS_PLAIN_LORA, Site
from lorazor.errors import SelectionError, UnsupportedAdapterError
from lorazor.selection import SelectedSite


def remaining_sites(folder: AdapterFolder, entries: Mapping[str, SelectedSite]) -> list[Site]:
    """The kept sites as pruning leaves them: with the ranks and sizes of their kept components, and one alpha for all.

    Args:
        folder: the adapter.
        entries: what the selection says, by site name.
    Returns:
        The kept sites in the order of `folder.sites`.
    Raises:
        AdapterError: the config's `lora_alpha` is not a number, or 0.
    """
    alpha = setting_of(folder.config, "lora_alpha")
    return [
        dataclasses.replace(
            site,
            rank=entries[site.name].kept_rank,
            scaling=alpha / entries[site.name].kept_rank,  # serving stacks ignore rsLoRA, so it is folded into B
            n_parameters=n_parameters_kept(site, entries[site.name]),
        )
        for site in folder.sites
        if entries[site.name].keep
    ]


def n_parameters_kept(site: Site, entry: SelectedSite) -> int:
    """Numbers in A and B that stay of a site. Sites that lose components have no bias, so all numbers go by rank."""
    return site.n_parameters * entry.kept_rank // site.rank if entry.keep else 0


def pruned_tensors(
    folder: AdapterFolder,
    entries: Mapping[str, SelectedSite],
    remaining: Sequence[Site],
    bases: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of the pruned adapter by their new keys, sorted; all that needs no change keeps its bytes.

        B' = s / s' w (B_0)_c diag(w_c),   A' = (A_0)_c                    where components c are chosen
        B' = s / s' w B                                                    elsewhere

    with the site's scaling s, the scaling s' that one `lora_alpha` gives its new rank, weight w and weights w_c of the
    components. A factor is multiplied in float32 (components in float64) and cast once.

    Args:
        folder: the adapter.
        entries: what the selection says, by site name; one for each site of the folder.
        remaining: from `remaining_sites`.
        bases: A_0 and B_0 by site name, with the product of the folder's; the singular form of the folder's elsewhere.
        dtype: of A and B; each as in the folder if left out.
    Raises:
        UnsupportedAdapterError: components are chosen at a site that has none, or a weight other than 1 of DoRA.
        SelectionError: a factor makes B overflow its dtype, or unties what is tied.
    """
    before = {site.name: site.scaling for site in folder.sites}
    factors = {site.name: before[site.name] / site.scaling * entries[site.name].weight for site in remaining}
    if folder.config.get("ensure_weight_tying"):
        _check_ties(folder, entries, factors)
    keys, places = folder.keys, _new_places(remaining)
    dropped = {site.name for site in folder.sites} - factors.keys()
    n_experts = {site.name: site.n_experts for site in folder.sites}
    truncated = [name for name in factors if entries[name].components is not None]
    _check_wholes(remaining, entries)
    new_keys = {key: f"{BASE_PREFIX}{places[name]}.{part}" for name in factors for part, key in keys[name].items()}
    for key in folder.shapes:
        if split_key(key) is None:  # base weights are saved along with an embedding's LoRA, and stay without it
            name, _, part = key.rpartition(".base_layer.")
            new_keys[key] = f"{name}.{part}" if name.removeprefix(BASE_PREFIX) in dropped else key
    tensors = load_tensors(folder, new_keys.keys())
    for name in truncated:
        down, up = (keys[name][part] for part in LINEAR_PARTS)
        A, B = tensors[down], tensors[up]
        with of_site(name):
            basis = bases[name] if name in bases else singular_form_of(A.double(), B.double(), n_experts[name])[:2]
        dtypes = dtype or A.dtype, dtype or B.dtype
        tensors[down], tensors[up] = _truncated(basis, dtypes, entries[name], factors[name], n_experts[name])
    for name in factors.keys() - set(truncated):
        for part, key in keys[name].items():
            factor = factors[name] if part.startswith(("lora_B", "lora_embedding_B")) else 1.0
            tensors[key] = _multiplied(tensors[key], factor, name, dtype or tensors[key].dtype)
    return {new_keys[key]: tensors[key] for key in sorted(tensors, key=new_keys.__getitem__)}


def _check_wholes(remaining: Sequence[Site], entries: Mapping[str, SelectedSite]) -> None:
    """Refuse components of sites that have none, and weights of DoRA."""
    whole = next(
        (site.name for site in remaining if not site.has_directions and entries[site.name].components is not None), None
    )
    if whole is not None:
        raise UnsupportedAdapterError(
            f"{whole} is an embedding, a convolution, DoRA, or has a bias of B: it has no directions to choose from. "
            "Keep or drop it as a whole."
        )
    weighted = next((site.name for site in remaining if site.is_dora and entries[site.name].weight != 1), None)
    if weighted is not None:
        raise UnsupportedAdapterError(
            f"{weighted} is DoRA, which divides by the norm of W + s B A: the weight {entries[weighted].weight:g} "
            f"cannot be multiplied into B. Give it weight 1, or drop it. {AS_PLAIN_LORA}"
        )


def _check_ties(folder: AdapterFolder, entries: Mapping[str, SelectedSite], factors: Mapping[str, float]) -> None:
    tied = [site.name for site in folder.sites if site.stack is None]
    outside = [factors.get(name, 0.0) for name in tied]
    is_truncated = any(entries[name].components is not None for name in tied)
    if is_truncated or (any(outside) and any(factor != 1.0 for factor in outside)):
        raise SelectionError(
            "The adapter ties the LoRA of embedding and output layer (ensure_weight_tying), so they can only stay "
            "together, with weight 1 and all components and without rsLoRA, or go together."
        )


def _new_places(remaining: Sequence[Site]) -> dict[str, str]:
    """The names that PEFT's file has for the sites: how deep parameters of one module are depends on which remain."""
    inside = keys_from_outside([site.name for site in remaining if site.is_on_parameter])
    return {site.name: inside.get(site.name, site.name) for site in remaining}


def _truncated(
    basis: tuple[Tensor, Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
    entry: SelectedSite,
    factor: float,
    n_experts: int,
) -> tuple[Tensor, Tensor]:
    """The chosen components of a basis, of every expert, with the factor and their weights in B."""
    (new_A, new_B), (dtype_A, dtype_B) = (one.double() for one in basis), dtypes
    assert entry.components is not None
    chosen = list(entry.components)
    weights = new_B.new_tensor(entry.component_weights or [1.0] * len(chosen))
    largest = factor * float(weights.abs().max())
    pairs = of_each_expert(new_A, new_B, n_experts)
    kept_A, kept_B = stacked([(A[chosen], B[:, chosen] * (factor * weights)) for A, B in pairs])
    return _narrowed(kept_A, dtype_A, 1.0, entry.name), _narrowed(kept_B, dtype_B, largest, entry.name)


def _multiplied(tensor: Tensor, factor: float, name: str, dtype: torch.dtype) -> Tensor:
    """`tensor * factor` in float32 (or float64), cast once; the tensor itself where nothing changes."""
    if factor == 1.0 and tensor.dtype == dtype:
        return tensor
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        return (wide * factor).to(dtype)
    return _narrowed(wide * factor, dtype, factor, name)


def _narrowed(wide: Tensor, dtype: torch.dtype, factor: float, name: str) -> Tensor:
    """`wide` in another dtype, which it must not overflow."""
    result = wide.to(dtype).contiguous()
    if not bool(torch.isfinite(result).all()):
        what = f"A or B of {name}" if factor == 1.0 else f"Folding {factor:g} into B of {name}"
        raise SelectionError(f"{what} overflows {dtype}. Use a smaller weight, or a wider number format.")
    return result
