"""Another rank for a LoRA site: growing without changing what it computes (WeightLoRA+), and keeping some directions.

    h = W x + s B A x,   A: (r, d_in),  B: (d_out, r)

The new rows of A are directions that A does not have yet, the new columns of B are zero: B' A' = B A, and the
gradient of the new columns is not zero, so they learn from the first step on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorazor.adapter.sites import LiveSite, check_is_unmerged, site_parameters
from lorazor.errors import AdapterError, BudgetError, UnsupportedAdapterError

# Length of a row of A as LoRA starts it: d_in numbers, uniform in +-1 / sqrt(d_in).
_INITIAL_ROW_NORM = 1 / math.sqrt(3)


def grow(A: Tensor, B: Tensor, new_rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Raise the rank of one pair of factors; their product stays.

        A' = [A; c N],  B' = [B, 0],  N N^T = I,  N A^T = 0,  c = ||A||_F / sqrt(r)

    The published form, with A^T = Q R, is A' = [Q^T; N], B' = [B R^T, 0]: the same rows in another basis, the same
    span. It is not used because it replaces the trained A by unit rows and moves their lengths into B, which changes
    the step size of every direction and leaves the optimizer's moments describing other numbers. Here the old rows
    and columns stay bit for bit, and the new rows are as long as the old ones are on average (root mean square; as
    long as LoRA's initial rows where A is zero), so that one learning rate suits both.

    Computed on the CPU in float64, so that a seed gives the same rows on every device. No (d_in, d_in) matrix is
    formed: one QR of [row space of A, noise] projects, (I - Q Q^T) noise, and orthonormalises to machine precision.

    Args:
        A: (r, d_in), any float dtype; may be rank-deficient or zero.
        B: (d_out, r).
        new_rank: r', r <= r' <= d_in; r' = r returns copies.
        generator: source of the new directions.
    Returns:
        A' (r', d_in) and B' (d_out, r'), each with its dtype and device, without gradient history.
    Raises:
        BudgetError: `new_rank` is outside its range.
        AdapterError: A and B do not fit each other, or A is not finite.
    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA+).
    """
    A, B = A.detach(), B.detach()
    if A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
        raise AdapterError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no (r, d_in) and (d_out, r) of one rank r.")
    rank, d_in = A.shape
    n_new = new_rank - rank
    if n_new < 0 or (n_new > 0 and new_rank > d_in):
        raise BudgetError(
            f"new_rank={new_rank}, but the site has rank {rank} and only {d_in} directions to grow into. "
            f"Pass {rank}..{max(rank, d_in)}."
        )
    if n_new == 0:
        return A.clone(), B.clone()
    if not torch.isfinite(A).all():
        raise AdapterError(
            "A holds NaN or infinite numbers, so its rank cannot grow. Go back to an earlier checkpoint."
        )
    rows = A.to(device="cpu", dtype=torch.float64)
    left, singular, _ = torch.linalg.svd(rows.T, full_matrices=False)
    # Only the directions that A really has: a zero row must not shut out an arbitrary one.
    tolerance = singular.max() * max(rows.shape) * torch.finfo(rows.dtype).eps
    span = left[:, singular > tolerance]  # (d_in, rank of A)
    noise = torch.randn(d_in, n_new, generator=generator, dtype=rows.dtype, device=generator.device)
    q, r = torch.linalg.qr(torch.cat([span, noise.to(rows.device)], dim=1))
    q = q * r.diagonal().sign()  # Householder reflections choose signs by the first coordinate; undo that
    row_norm = float(torch.linalg.matrix_norm(rows)) / math.sqrt(rank) or _INITIAL_ROW_NORM
    new_rows = row_norm * q[:, span.shape[1] :].T  # N, (n_new, d_in)
    return torch.cat([A, new_rows.to(A)]), torch.cat([B, B.new_zeros(len(B), n_new)], dim=1)


def grown_rank(rank: int, n_sites: int, n_kept: int, max_rank: int | None = None) -> int:
    """The rank that K survivors get when they share what n sites had: r' = floor(r n / K).

    Spends the freed parameters exactly where all sites have one size.

    Args:
        rank: r, of every site before.
        n_sites: n.
        n_kept: K, 1 <= K <= n.
        max_rank: upper limit of r', such as min(d_in, d_out); a limit below r changes nothing.
    Returns:
        r', at least r.
    Raises:
        BudgetError: `rank` is less than 1, or `n_kept` is outside its range.
    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA+).
    """
    if rank < 1 or not 1 <= n_kept <= n_sites:
        raise BudgetError(f"rank={rank}, {n_kept} of {n_sites} sites kept. Pass a rank from 1 and 1..{n_sites} sites.")
    new_rank = rank * n_sites // n_kept
    return new_rank if max_rank is None else max(rank, min(new_rank, max_rank))


def grow_site_(site: LiveSite, new_rank: int, generator: torch.Generator) -> LiveSite:
    """Raise the rank of one site of a loaded model in place; see `grow`.

    `r` and `lora_alpha` of PEFT's layer follow, so that its present `scaling` (also a gated one) stays as it is and a
    later `set_scale` gives the same. A and B become new parameters with the old dtype, device and `requires_grad`: an
    optimizer that holds the old ones must be told. The adapter's `LoraConfig` belongs to the whole model: whoever
    saves it sets its `r` and `lora_alpha`, or its patterns, to match.

    Args:
        site: a site of a PEFT model: a linear map (Conv1D too) or an embedding.
        new_rank: r', from the site's rank to d_in (d_out for an embedding); the same rank changes nothing.
        generator: source of the new directions.
    Returns:
        The site with its new rank and number of parameters; the one passed in is out of date.
    Raises:
        BudgetError: `new_rank` is outside its range.
        AdapterError: the adapter is merged into the base weight.
        UnsupportedAdapterError: the site is a convolution, on a parameter, or DoRA.
    """
    module, adapter = site.module, site.adapter
    check_is_unmerged([site])
    rank = module.r[adapter]
    if new_rank == rank:
        return site
    if site.is_on_parameter:
        raise UnsupportedAdapterError(
            f"{site.name}: the rank of LoRA on a parameter cannot grow. Leave it out of target_modules."
        )
    if site.is_dora:
        raise UnsupportedAdapterError(f"{site.name} is DoRA, whose rank cannot grow. Train plain LoRA.")
    A, B = site_parameters(module, adapter)[:2]
    if adapter in module.lora_embedding_A:
        # PEFT starts embeddings the other way round, A at zero and B at random: B gets the directions, A the zeros.
        new_B, new_A = (one.T.contiguous() for one in grow(B.T, A.T, new_rank, generator))
        module.lora_embedding_A[adapter] = nn.Parameter(new_A, requires_grad=A.requires_grad)
        module.lora_embedding_B[adapter] = nn.Parameter(new_B, requires_grad=B.requires_grad)
    else:
        down, up = module.lora_A[adapter], module.lora_B[adapter]
        if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
            raise UnsupportedAdapterError(
                f"{site.name}: the rank of LoRA on {type(down).__name__} cannot grow. Leave it out."
            )
        new_A, new_B = grow(A, B, new_rank, generator)
        down.weight = nn.Parameter(new_A, requires_grad=A.requires_grad)
        up.weight = nn.Parameter(new_B, requires_grad=B.requires_grad)
        down.out_features = up.in_features = new_rank
    module.r[adapter] = new_rank
    alpha = module.lora_alpha[adapter]  # alpha / r stays, or alpha / sqrt(r) with rsLoRA
    is_root = module.use_rslora[adapter]
    module.lora_alpha[adapter] = alpha * math.sqrt(new_rank / rank) if is_root else alpha * new_rank / rank
    n_parameters = sum(parameter.numel() for parameter in site_parameters(module, adapter))
    return dataclasses.replace(site, rank=new_rank, n_parameters=n_parameters)


@torch.no_grad()
def narrow_site_(site: LiveSite, components: Sequence[int]) -> LiveSite:
    """Lower the rank of one site of a loaded model in place to some of its directions; its scaling stays.

    A and B become new parameters, as in `grow_site_`.

    Args:
        site: a linear map without a bias of B.
        components: indices of the directions that stay, rising, at least one.
    Returns:
        The site with its new rank and number of parameters; the one passed in is out of date.
    Raises:
        AdapterError: the adapter is merged into the base weight.
        UnsupportedAdapterError: the site has no directions.
    """
    module, adapter, rank = site.module, site.adapter, len(components)
    check_is_unmerged([site])
    if not site.has_directions or site.is_on_parameter:
        raise UnsupportedAdapterError(f"{site.name} has no directions to choose from. Keep or drop it as a whole.")
    down: Any = module.lora_A[adapter]
    up: Any = module.lora_B[adapter]
    chosen = list(components)
    down.weight = nn.Parameter(down.weight[chosen], requires_grad=down.weight.requires_grad)
    up.weight = nn.Parameter(up.weight[:, chosen].contiguous(), requires_grad=up.weight.requires_grad)
    down.out_features = up.in_features = module.r[adapter] = rank
    module.lora_alpha[adapter], module.use_rslora[adapter] = site.scaling * rank, False
    n_parameters = sum(parameter.numel() for parameter in site_parameters(module, adapter))
    return dataclasses.replace(site, rank=rank, n_parameters=n_parameters)


@torch.no_grad()
def rescale_site_(site: LiveSite, scaling: float) -> LiveSite:
    """Give one site of a loaded model another scaling s' in place: B' = s / s' B, so that it computes the same.

    Args:
        site: without a bias of B.
        scaling: s', above 0, which is alpha / r from here on, without rsLoRA.
    Returns:
        The site with its new scaling; the one passed in is out of date.
    """
    module, adapter = site.module, site.adapter
    site_parameters(module, adapter)[1].mul_(site.scaling / scaling)
    module.lora_alpha[adapter], module.use_rslora[adapter] = scaling * site.rank, False
    module.scaling[adapter] = scaling
    return dataclasses.replace(site, scaling=scaling)
