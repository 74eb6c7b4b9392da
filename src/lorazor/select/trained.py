"""The scores of a trained adapter by name, for sites and for components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lorazor.adapter.components import energy_scores
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site
from lorazor.adapter.summary import site_norms
from lorazor.data.batches import Batch
from lorazor.errors import SettingsError
from lorazor.select.credit import Completeness, gate_gradients, path_credit
from lorazor.select.output_norm import output_norms
from lorazor.select.scores import CONTROLS, control_scores
from lorazor.settings import ScoreMethod

NEEDS_DATA: tuple[ScoreMethod, ...] = ("credit", "taylor", "output-norm")
"""Methods that run the model on examples."""


@dataclass(frozen=True, eq=False)
class PartScores:
    """What every part is worth.

    Attributes:
        values: (n_parts,), higher is more worth keeping; `credit` and `taylor` in nats per answer token.
        standard_errors: (n_parts,), over examples; None where the score knows no examples.
        completeness: of path credits, else None.
        n_passes: forward-backward passes over each example.
    """

    values: NDArray[np.float64]
    standard_errors: NDArray[np.float64] | None = None
    completeness: Completeness | None = None
    n_passes: int = 0


def check_method(method: str) -> None:
    """Raise SettingsError for an unknown method."""
    if method not in get_args(ScoreMethod):
        raise SettingsError(f"method={method!r} is unknown. Pass one of {', '.join(get_args(ScoreMethod))}.")


def score_without_data(
    method: ScoreMethod, folder: AdapterFolder, parts: Parts | None = None, seed: int = 0
) -> PartScores:
    """The scores that need no examples, and no base model.

    Args:
        method: "norm" (||s B A||_F; of a component its energy), or a control.
        folder: the adapter.
        parts: components; sites if left out.
        seed: of "random".
    """
    if method == "norm":
        if parts is not None and parts.are_components:
            return PartScores(torch.cat(energy_scores(folder)).numpy())
        return PartScores(np.array([one.norm for one in site_norms(folder)]))
    assert method in CONTROLS
    owners: Sequence[Site] = folder.sites if parts is None else [folder.sites[index] for index in parts.site_of]
    return PartScores(control_scores(owners, seed)[method].double().numpy())


def score_on_data(
    method: ScoreMethod,
    model: PreTrainedModel,
    parts: Parts,
    batches: Sequence[Batch],
    *,
    is_kept: torch.Tensor | None = None,
    n_points: int = 8,
    gradient_checkpointing: bool = False,
    label: str | None = None,
    on_message: Callable[[str], None] = lambda message: None,
) -> PartScores:
    """The scores that run the model on examples.

    Args:
        method: "credit", "taylor" or "output-norm".
        model: in evaluation mode.
        parts: what is scored.
        batches: from `make_batches`.
        is_kept: (n_parts,) bool: the others are dropped already, and are worth nothing.
        n_points: of the path of "credit".
        gradient_checkpointing: recompute activations in the backward pass.
        label: text of a progress bar on stderr.
        on_message: receives why batches had to be taken apart.
    Raises:
        SettingsError: "output-norm" of components.
    """
    kept = torch.ones(len(parts), dtype=torch.bool) if is_kept is None else is_kept
    if method == "output-norm":
        if parts.are_components:
            raise SettingsError("method='output-norm' scores whole sites. Pass credit or norm for ranks.")
        ratios = output_norms(model, parts.sites, batches, label) * kept.numpy()  # (n_examples, n_sites)
        errors = ratios.std(axis=0, ddof=1) / len(ratios) ** 0.5 if len(ratios) > 1 else ratios[0] * np.nan
        return PartScores(ratios.mean(axis=0), errors)

    def gating(gates: torch.Tensor, lengths: Collection[int]):
        return parts.gated(gates, kept, lengths)

    options = {"gradient_checkpointing": gradient_checkpointing, "label": label, "on_message": on_message}
    if method == "credit":
        credits = path_credit(model, batches, gating, kept.float(), n_points, **options)
        return PartScores(credits.values, credits.standard_errors, credits.completeness, n_points)
    effects = gate_gradients(model, batches, gating, kept.float(), **options)
    return PartScores(np.abs(effects.values), effects.standard_errors, None, 1)
