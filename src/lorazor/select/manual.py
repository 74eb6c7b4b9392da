"""A boundary read off the curves of the true token's probability: where they part, and where they settle.

Chen et al. (arXiv:2503.23360) read their manual boundary off such curves by eye. The rule here is our reading of it.
This module never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import SettingsError

_CLEAR = 2.0
"""Standard errors by which the curves must differ to have parted: about 95 % of a normal distribution."""


@dataclass(frozen=True)
class Proposal:
    """What the curves propose.

    Attributes:
        boundary: layers that keep LoRA; None where the curves do not part.
        parted_at: first layer from which the curves stay clearly apart, None likewise.
        reason: one plain sentence.
    """

    boundary: int | None
    parted_at: int | None
    reason: str


def propose_boundary(
    gap: NDArray[np.float64],
    standard_error: NDArray[np.float64],
    n_adapted: int | None = None,
    settled_within: float = 0.1,
) -> Proposal:
    """Read the boundary off the gap between the two curves.

        parted:   g_m > 2 se_m                   for all m >= layer
        settled:  |g_m - g_L| <= tolerance g_L   for all m >= boundary,   boundary >= parted

    The boundary is the first layer from which the gap stays close to what it is in the end: what the LoRA of later
    layers adds to it, or takes from it, is small. h_l depends on the LoRA of the first l layers only, so the point at
    layer l speaks for boundary l.

    Args:
        gap: g, probability of the true token with the adapter minus that of the base, after 0..L layers, (L + 1,).
        standard_error: of each, paired, (L + 1,).
        n_adapted: layers up to the highest with LoRA; the boundary is not above. L if left out.
        settled_within: tolerance, share of the final gap, above 0 and below 1.
    Raises:
        SettingsError: `settled_within` is outside its range.
    """
    check_settled_within(settled_within)
    n_layers = len(gap) - 1
    final = f"{gap[-1]:+.4f} ± {standard_error[-1]:.4f}"
    if not gap[-1] > _CLEAR * standard_error[-1]:
        does = "lowers" if gap[-1] < -_CLEAR * standard_error[-1] else "does not clearly change"
        return Proposal(
            None,
            None,
            f"No boundary: in the end the adapter {does} the probability of the true token ({final} against the base).",
        )
    parted_at = _first_lasting(gap > _CLEAR * standard_error)
    is_close = np.abs(gap - gap[-1]) <= settled_within * gap[-1]
    settled_at = max(parted_at, _first_lasting(is_close))
    boundary = min(settled_at, n_layers if n_adapted is None else n_adapted)
    reason = (
        f"Boundary {boundary} of {n_layers}: the curves part for good after layer {parted_at}, and from layer "
        f"{settled_at} on the gap stays within {settled_within:.0%} of what it is in the end ({final})."
    )
    if boundary == n_layers:
        reason += " They settle in the last layer only, so no layer can be dropped by this rule."
    return Proposal(boundary, parted_at, reason)


def check_settled_within(settled_within: float) -> None:
    """Raise SettingsError unless it is above 0 and below 1."""
    if not 0 < settled_within < 1:
        raise SettingsError(f"settled_within={settled_within} is not a share of the gap. Pass one between 0 and 1.")


def _first_lasting(is_true: NDArray[np.bool_]) -> int:
    """The first index from which on everything is true; the last one is."""
    false = np.flatnonzero(~is_true)
    return int(false[-1]) + 1 if len(false) else 0
