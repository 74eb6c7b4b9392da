"""Components: a site's update as a sum of rank-one terms, `h = W x + s sum_j g_j b_j (a_j . x)`.

In the singular form the terms are the singular directions of B A, largest first: independent of the basis in which A
and B were trained. A gate per component makes a site's rank a matter of which gates stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn

import torch
from torch import Tensor, nn

from lorazor.adapter.folder import AdapterFolder, keys_by_site, load_tensors
from lorazor.adapter.rows import split_rows
from lorazor.adapter.sites import LiveSite, Site
from lorazor.errors import AdapterError, SettingsError, UnsupportedAdapterError

LINEAR_PARTS = ("lora_A.weight", "lora_B.weight")


@torch.no_grad()
def singular_form(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite a pair of factors so that component j is the j-th singular direction of their product.

        B = Q_b R_b,   A^T = Q_a R_a,   R_b R_a^T = U S V^T
        B' = Q_b U S^(1/2),   A' = S^(1/2) V^T Q_a^T,   B' A' = B A

    No (d_out, d_in) matrix is formed. Computed on the CPU in float64. Of the two signs of a direction, the one is
    taken whose largest number in A' is positive; directions of equal singular value are in no particular basis. Where
    r is more than the product can have (d_in, d_out), the last components are zero.

    Args:
        A: (r, d_in), any float dtype.
        B: (d_out, r).
    Returns:
        A' (r, d_in) and B' (d_out, r), each with its dtype and device, and the singular values of B A, (r,) float64
        on the CPU, falling.
    Raises:
        AdapterError: A and B do not fit each other, or are not finite.
    """
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no (r, d_in) and (d_out, r) of one rank r.")
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise AdapterError("A or B holds NaN or infinite numbers, so it has no singular directions. Train it again.")
    q_b, r_b = torch.linalg.qr(B.to(device="cpu", dtype=torch.float64))
    q_a, r_a = torch.linalg.qr(A.to(device="cpu", dtype=torch.float64).T)
    u, values, v_t = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    left, right = q_b @ u, v_t @ q_a.T  # (d_out, n), (n, d_in), n = min(d_out, d_in, r)
    signs = right.gather(1, right.abs().argmax(dim=1, keepdim=True)).sign()  # (n, 1)
    n_missing = len(A) - len(values)
    values = torch.cat([values, values.new_zeros(n_missing)])
    roots = values.sqrt()
    new_A = roots[:, None] * nn.functional.pad(signs * right, (0, 0, 0, n_missing))
    new_B = roots * nn.functional.pad(left * signs.T, (0, n_missing))
    return new_A.to(A), new_B.to(B), values


def singular_form_of(name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`singular_form` of the factors of a site, whose name stands in the errors."""
    try:
        return singular_form(A, B)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error


@torch.no_grad()
def to_singular_form_(sites: Sequence[LiveSite]) -> list[Tensor]:
    """Rewrite A and B of live sites to their singular form, in place; the model computes the same up to rounding.

    The parameters stay the same objects. An optimizer's moments belong to the old basis: start it anew.

    Args:
        sites: linear maps, without a bias of B.
    Returns:
        The singular values of B A of every site, without its scaling: (r_i,) float64 each, falling.
    Raises:
        UnsupportedAdapterError: a site is an embedding, a convolution, or has a bias of B.
        AdapterError: a site is merged into its base weight, or is not finite. After any error, all sites are as before.
    """
    pairs = [_linear_pair(site) for site in sites]
    forms = [
        singular_form_of(site.name, *(one.weight for one in pair)) for site, pair in zip(sites, pairs, strict=True)
    ]
    for (down, up), (A, B, _) in zip(pairs, forms, strict=True):
        down.weight.copy_(A)
        up.weight.copy_(B)
    return [values for _, _, values in forms]


@contextmanager
def component_gated(sites: Sequence[LiveSite], gates: Tensor, lengths: Collection[int] | None = None) -> Iterator[None]:
    """Multiply each component of each site by its gate inside the block.

        h = W x + s_i sum_j gate_ij b_ij (a_ij . x)

    Components are rows of A and columns of B as they stand; `to_singular_form_` makes them singular directions. Gates
    act on what A puts out, behind dropout and before the scaling, so both stay as they are. Merging does not see
    them: `fold_components_` first. Under gradient checkpointing (non-reentrant), call backward inside the block.

    Args:
        sites: linear maps, in the order of the gates.
        gates: shape (n_components,), the components of the first site first, or (n_components, rows) for gates of
            each row of the batch. A tensor that requires gradients gets them, in its own dtype.
        lengths: tokens that a row has, for the modules that see (rows * tokens, d); any number if left out.
    Raises:
        RowsUnclearError: from the model inside the block: a module mixes rows that have gates of their own.
        SettingsError: `gates` has another number of components than the sites have together.
        UnsupportedAdapterError: a site is an embedding, a convolution, or has a bias of B, which no gate reaches.
        AdapterError: a site is merged into its base weight, so that hooks on A are not run.
    """
    if gates.ndim not in (1, 2):
        raise SettingsError(f"gates of shape {tuple(gates.shape)}. Pass (n_components,) or (n_components, rows).")
    pairs = [_linear_pair(site) for site in sites]
    with ExitStack() as stack:
        for site, (down, _), of_site in zip(sites, pairs, _by_site(pairs, gates), strict=True):
            stack.callback(down.register_forward_hook(_component_gate(site, of_site, lengths)).remove)
        yield


@torch.no_grad()
def fold_components_(sites: Sequence[LiveSite], gates: Tensor | Sequence[float]) -> None:
    """Multiply each column of each site's B by its component's gate, for good.

    Args:
        sites: linear maps, in the order of the gates.
        gates: shape (n_components,), the components of the first site first.
    Raises:
        SettingsError: `gates` has another shape.
        UnsupportedAdapterError, AdapterError: see `component_gated`; no site is changed then.
    """
    gates = torch.as_tensor(gates)
    if gates.ndim != 1:
        raise SettingsError(f"gates of shape {tuple(gates.shape)} cannot be folded. Pass (n_components,).")
    pairs = [_linear_pair(site) for site in sites]
    for (_, up), of_site in zip(pairs, _by_site(pairs, gates), strict=True):
        up.weight.mul_(of_site.to(up.weight.device))


def energy_scores(folder: AdapterFolder, sites: Sequence[Site] | None = None) -> dict[str, Tensor]:
    """How much of a site's update each singular direction carries: (s sigma_j)^2. No base model is loaded.

    The energies of a site add up to ||s B A||_F^2, and what a truncation keeps of them is the best that its rank can
    (Eckart & Young, 1936). They know nothing of the data.

    Args:
        folder: what `read_adapter` returned.
        sites: which of its sites; all if left out.
    Returns:
        (r_i,) float64 for each site by its name, falling, in squared units of the base weight.
    Raises:
        UnsupportedAdapterError: a site is an embedding, a convolution, or has a bias of B.
        AdapterError: a site is not finite.
    """
    keys = keys_by_site(folder)
    sites = folder.sites if sites is None else sites
    for site in sites:
        check_has_components(folder, site.name, keys[site.name])
    tensors = load_tensors(folder, [key for site in sites for key in keys[site.name].values()])
    scores = {}
    for site in sites:
        A, B = (tensors[keys[site.name][part]] for part in LINEAR_PARTS)
        scores[site.name] = (site.scaling * singular_form_of(site.name, A, B)[2]).square()
    return scores


def check_has_components(folder: AdapterFolder, name: str, keys: Mapping[str, str]) -> None:
    """Refuse sites of a folder that are not one linear map after another.

    Args:
        folder: the adapter.
        name: of the site.
        keys: of its tensors, by part, see `keys_by_site`.
    Raises:
        UnsupportedAdapterError: the site is an embedding, a convolution, or has a bias of B.
    """
    if set(keys) != set(LINEAR_PARTS):
        _refuse(name, "has a bias of B" if "lora_B.bias" in keys else "is an embedding")
    if any(len(folder.shapes[key]) != 2 for key in keys.values()):
        _refuse(name, "is a convolution")


def _linear_pair(site: LiveSite) -> tuple[nn.Linear, nn.Linear]:
    """A and B of a live site, checked."""
    module, adapter = site.module, site.adapter
    if adapter not in module.lora_A:
        _refuse(site.name, "is an embedding")
    down, up = module.lora_A[adapter], module.lora_B[adapter]
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
        _refuse(site.name, "is a convolution")
    if up.bias is not None:
        _refuse(site.name, "has a bias of B")
    if getattr(module, "merged", False):
        raise AdapterError(f"{site.name} is merged into its base weight. Call unmerge_adapter() on the model first.")
    return down, up


def _refuse(name: str, what: str) -> NoReturn:
    raise UnsupportedAdapterError(
        f"{name} {what}: components are those of linear maps without a bias of B. Keep or drop the site as a whole."
    )


def _by_site(pairs: Sequence[tuple[nn.Linear, nn.Linear]], gates: Tensor) -> Sequence[Tensor]:
    """The gates of each site, (r_i,) or (r_i, rows)."""
    ranks = [len(down.weight) for down, _ in pairs]
    if len(gates) != sum(ranks):
        raise SettingsError(
            f"{len(gates)} gates for {sum(ranks)} components of {len(ranks)} sites. Pass one gate per component."
        )
    return gates.split(ranks)


def _component_gate(
    site: LiveSite, gates: Tensor, lengths: Collection[int] | None
) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    """A forward hook on A that scales each number that it puts out. Gate and gradient keep the dtype of `gates`."""

    def scale(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        factors = gates.to(output.device)
        if factors.ndim == 1:
            return (output * factors).to(output.dtype)  # (..., r)
        rows = split_rows(output, factors.shape[1], site, lengths)  # (rows, tokens, r)
        return (rows * factors.T[:, None, :]).to(output.dtype).view(output.shape)

    return scale
