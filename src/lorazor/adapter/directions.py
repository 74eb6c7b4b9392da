"""Directions: a site's update as a sum of rank-one terms, `h = W x + s sum_j b_j (a_j . x)`.

In the singular form they are the singular directions of B A, largest first: independent of the basis in which A and B
were trained. In the balanced form they are those that data and loss make of it, the most important first. Which of them
stay makes a site's rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorazor.adapter.experts import of_each_expert, stacked
from lorazor.adapter.folder import MAGNITUDES, AdapterFolder, load_tensors
from lorazor.adapter.sites import LiveSite, Site, check_is_unmerged, site_parameters
from lorazor.errors import AdapterError


@torch.no_grad()
def singular_form(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite a pair of factors so that direction j is the j-th singular direction of their product.

        B = Q_b R_b,   A^T = Q_a R_a,   R_b R_a^T = U S V^T
        B' = Q_b U S^(1/2),   A' = S^(1/2) V^T Q_a^T,   B' A' = B A

    No (d_out, d_in) matrix is formed. Computed on the CPU in float64. Of the two signs of a direction, the one is
    taken whose largest number in A' is positive; directions of equal singular value are in no particular basis. Where
    r is more than the product can have (d_in, d_out), the last directions are zero.

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


def singular_form_of(A: Tensor, B: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular form of every expert, stacked as PEFT has them; the squared values of direction j are added up.

    Args:
        A: (E r, d_in).
        B: (d_out, r E).
        n_experts: E, 1 for a site without experts.
    Returns:
        A', B', and the length of the singular values of direction j over all experts, (r,) float64 on the CPU, falling.
    Raises:
        AdapterError: see `singular_form`.
    """
    forms = [singular_form(*pair) for pair in of_each_expert(A, B, n_experts)]
    new_A, new_B = stacked([(down, up) for down, up, _ in forms])
    return new_A, new_B, torch.stack([values for *_, values in forms]).norm(dim=0)


@contextmanager
def of_site(name: str) -> Iterator[None]:
    """Let the errors inside the block say which site they are about."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from error


@torch.no_grad()
def to_singular_form_(sites: Sequence[LiveSite]) -> dict[str, Tensor]:
    """Rewrite A and B of live sites to their singular form, in place; the model computes the same up to rounding.

    The parameters stay the same objects. An optimizer's moments belong to the old basis: start it anew. Sites that
    cannot be taken apart stay as they are.

    Returns:
        The singular values of B A by the names of the sites that can be taken apart, (r,) each, falling.
    Raises:
        AdapterError: a site is merged into its base weight, or is not finite. All sites are as before then.
    """
    return _rewrite_(sites, lambda site, A, B: singular_form_of(A, B, site.n_experts))


def _rewrite_(
    sites: Sequence[LiveSite], form: Callable[[LiveSite, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Give the sites that can be taken apart another basis, all of them or none; what each direction is worth there."""
    apart = [site for site in sites if site.has_directions]
    check_is_unmerged(apart)  # another basis would be taken out of the base weight again
    forms = {}
    for site in apart:
        with of_site(site.name):
            forms[site.name] = form(site, *site_parameters(site.module, site.adapter))
    for site in apart:
        for parameter, rewritten in zip(site_parameters(site.module, site.adapter), forms[site.name][:2], strict=True):
            parameter.copy_(rewritten)
    return {name: worth for name, (_, _, worth) in forms.items()}


@dataclass(frozen=True)
class SiteNorm:
    """A site and the size of its update.

    Attributes:
        site: the site.
        norm: Frobenius norm of s B A, in units of the base weight. Of DoRA that is not all that the site does.
    """

    site: Site
    norm: float

    @property
    def is_dead(self) -> bool:
        """Whether the site changes nothing: B A = 0."""
        return self.norm == 0 and not self.site.is_dora


def site_norms(folder: AdapterFolder) -> list[SiteNorm]:
    """The size of every site's update, s ||B A||_F, in the order of `folder.sites`. No base model is loaded."""
    return [SiteNorm(site, site.scaling * _squared_norm(site, A, B) ** 0.5) for site, A, B in factors_of(folder)]


def energies(folder: AdapterFolder) -> dict[str, Tensor]:
    """How much of a site's update each singular direction carries: (s sigma_j)^2. No base model is loaded.

    The energies of a site add up to ||s B A||_F^2, and what a truncation keeps of them is the best that its rank can
    (Eckart & Young, 1936). They know nothing of the data.

    Args:
        folder: what `read_adapter` returned.
    Returns:
        By site name, (r,) float64, falling, in squared units of the base weight; (1,) for a site that cannot be taken
        apart.
    Raises:
        AdapterError: a site is not finite.
    """
    found = {}
    for site, A, B in factors_of(folder):
        if site.has_directions:
            with of_site(site.name):
                squares = singular_form_of(A, B, site.n_experts)[2].square()
        else:
            squares = torch.tensor([_squared_norm(site, A, B)], dtype=torch.float64)
        found[site.name] = site.scaling**2 * squares
    return found


def factors_of(folder: AdapterFolder) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """A and B of every site of a folder, in float64; kernels, (r, channels, ...) and (channels, r, ...), too."""
    tensors = load_tensors(folder)
    for site in folder.sites:
        beside, keys = ("bias", MAGNITUDES), sorted(folder.keys[site.name].items())
        A, B = (tensors[key].double() for part, key in keys if not part.endswith(beside))
        yield site, A, B


def _squared_norm(site: Site, A: Tensor, B: Tensor) -> float:
    """||B A||_F^2 = trace((B^T B) (A A^T)), from two r x r matrices, never from the (d_out, d_in) product."""
    pairs = of_each_expert(A.flatten(1), B.flatten(1), site.n_experts)
    return float(sum(torch.sum((up.T @ up) * (down @ down.T)).clamp(min=0) for down, up in pairs))


@torch.no_grad()
def balanced_form(A: Tensor, B: Tensor, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite a pair of factors so that direction j is worth sigma_j^2 to the loss, on data: balanced truncation.

        z = A x,  u = s B^T g           what A puts out, and the gradient of the loss with respect to it
        M_A = E[z z^T] = L L^T,   L^T E[u u^T] L = V S^2 V^T,   T = L V S^(-1/2)
        A' = T^-1 A,   B' = B T,   B' A' = B A,   E[z' z'^T] = E[u' u'^T] = S = diag(sigma)

    up to the lengths of each pair, which are made equal (`with_equal_norms`): both moments stay diagonal, sigma^2 is
    their product, and the numbers fit into half precision whatever the units of the loss. Computed on the CPU in
    float64. Variances below a millionth of a matrix's largest are taken for that much: float32 sums do not know them
    better, and a direction that no input reaches, or that the loss does not see, comes last instead of breaking the
    rest.

    Args:
        A: (r, d_in), any float dtype.
        B: (d_out, r).
        inputs: M_A, (r, r).
        gradients: M_B = E[u u^T], (r, r).
    Returns:
        A' (r, d_in) and B' (d_out, r), each with its dtype and device, and sigma^2, (r,) float64 on the CPU, falling.
        The singular form, and zeros, where either matrix is zero.
    Raises:
        AdapterError: something is not finite.
    Source: balanced truncation of Moore, IEEE Transactions on Automatic Control 26 (1981), on the two sides of a site;
        its matrices are the factors of K-FAC, Martens & Grosse, arXiv:1503.05671.
    """
    wide_A, wide_B = (one.to("cpu", torch.float64) for one in (A, B))
    if not all(bool(torch.isfinite(one).all()) for one in (wide_A, wide_B, inputs, gradients)):
        raise AdapterError("A or B, or what they make of the examples, holds NaN or infinite numbers.")
    change = balanced_change(inputs, gradients)
    if change is None:
        new_A, new_B, values = singular_form(A, B)
        return new_A, new_B, torch.zeros_like(values)
    inverse, T, sigma2 = change
    new_A, new_B = with_equal_norms(inverse @ wide_A, wide_B @ T)
    return new_A.to(A), new_B.to(B), sigma2


@torch.no_grad()
def balanced_change(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The change of basis of `balanced_form`, before norms are made equal.

    Args:
        inputs: M_A, (r, r), finite.
        gradients: M_B, (r, r), finite.
    Returns:
        T^-1 and T, (r, r), and sigma^2, (r,), float64 on the CPU; None where either matrix is zero.
    """
    inputs, gradients = (one.to("cpu", torch.float64) for one in (inputs, gradients))
    if not inputs.any() or not gradients.any():
        return None
    (variances, axes), (steepness, slopes) = map(torch.linalg.eigh, (inputs, gradients))
    variances, steepness = (one.clamp(min=1e-6 * one.max()) for one in (variances, steepness))
    left, inverse = axes * variances.sqrt(), (axes / variances.sqrt()).T  # L, L^-1
    # singular values instead of L^T M_B L, which would square the condition
    rotation, values, _ = torch.linalg.svd(left.T @ slopes * steepness.sqrt())
    roots = values.sqrt()  # S^(1/2), as the values are sigma
    return (roots * rotation).T @ inverse, left @ (rotation / roots), values.square()


@torch.no_grad()
def to_balanced_form_(sites: Sequence[LiveSite], matrices: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Rewrite A and B of live sites to their balanced form, in place, as `to_singular_form_` does.

    Args:
        sites: live sites; those that cannot be taken apart stay as they are.
        matrices: M_A and M_B by site name, from `measure.gradients.gram_matrices`. Sites on parameters, where no token
            is seen, get their singular form.
    Returns:
        sigma^2 by site name, (r,) each, falling; (1,) zero of a site that cannot be taken apart, of which nothing is
        known.
    Raises:
        AdapterError: see `balanced_form`. All sites are as before then.
    """

    def form(site: LiveSite, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if site.is_on_parameter:
            new_A, new_B, values = singular_form_of(A, B, site.n_experts)
            return new_A, new_B, torch.zeros_like(values)
        return balanced_form(A, B, *matrices[site.name])

    values = _rewrite_(sites, form)
    return {site.name: values.get(site.name, torch.zeros(1, dtype=torch.float64)) for site in sites}


def with_equal_norms(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same directions with |a_j| = |b_j|, so that a step of an optimizer means as much to one as to the other.

    Args:
        A: (r, d_in).
        B: (d_out, r).
    """
    a, b = A.norm(dim=1), B.norm(dim=0)
    factor = torch.where((a > 0) & (b > 0), (b / a).sqrt(), torch.ones_like(a))
    return A * factor[:, None], B / factor


@torch.no_grad()
def equal_norms_(sites: Sequence[LiveSite]) -> None:
    """Make |a_j| = |b_j| for every direction of live sites; the model computes the same up to rounding."""
    for site in sites:
        if site.has_directions:
            down, up = site_parameters(site.module, site.adapter)
            pairs = of_each_expert(down, up, site.n_experts)
            for live, equal in zip((down, up), stacked([with_equal_norms(*pair) for pair in pairs]), strict=True):
                live.copy_(equal)
