"""The scores of a trained adapter by name, for sites and for components."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lorazor.adapter.components import energy_scores
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site, in_order
from lorazor.adapter.summary import site_norms
from lorazor.data.batches import Batch
from lorazor.errors import SettingsError
from lorazor.select.credit import Completeness, gate_gradients, path_credit
from lorazor.select.output_norm import output_norms
from lorazor.select.scores import CONTROLS, control_scores
from lorazor.select.subsets import Divisor
from lorazor.settings import ScoreMethod

NEEDS_DATA: tuple[ScoreMethod, ...] = ("credit", "taylor", "output-norm")
"""Methods that run the model on examples."""


@dataclass(frozen=True, eq=False)
class PartScores:
    """What every part is worth, and of which site it is.

    Attributes:
        owners: (n_parts,), name of the site of each part; see `Parts.owners`.
        values: (n_parts,), higher is more worth keeping; `credit` and `taylor` in nats per answer token.
        standard_errors: (n_parts,), over examples; None where the score knows no examples.
        completeness: of path credits, else None.
        n_passes: forward-backward passes over each example.
    """

    owners: tuple[str, ...]
    values: NDArray[np.float64]
    standard_errors: NDArray[np.float64] | None = None
    completeness: Completeness | None = None
    n_passes: int = 0

    def of_sites(self) -> dict[str, float]:
        """The score of each site by its name: of components, their sum."""
        sums = dict.fromkeys(self.owners, 0.0)
        for owner, value in zip(self.owners, self.values.tolist(), strict=True):
            sums[owner] += value
        return sums

    def errors_of_sites(self) -> dict[str, float | None]:
        """The standard error of each site's score by its name; None where it is not known, as that of a sum."""
        if self.standard_errors is None or len(set(self.owners)) < len(self.owners):
            return dict.fromkeys(self.owners)
        return dict(zip(self.owners, self.standard_errors.tolist(), strict=True))


def check_method(method: str) -> None:
    """Raise SettingsError for an unknown method."""
    if method not in get_args(ScoreMethod):
        raise SettingsError(f"method={method!r} is unknown. Pass one of {', '.join(get_args(ScoreMethod))}.")


def divisor(method: str, raw: bool) -> Divisor:
    """What the score of a unit is divided by before units are compared.

    Args:
        method: of the score. Those that measure something are compared per parameter; controls are places in an order,
            and a unit of several parts has their mean.
        raw: compare the score itself.
    """
    return "parts" if method in CONTROLS else "nothing" if raw else "parameters"


def score_without_data(
    method: ScoreMethod, folder: AdapterFolder, parts: Parts | None = None, seed: int = 0
) -> PartScores:
    """The scores that need no examples, and no base model.

    Args:
        method: "norm" (||s B A||_F; of a component its energy), or a control.
        folder: the adapter.
        parts: of the same adapter, loaded, in whose order the scores are; the sites of the folder if left out.
        seed: of "random".
    """
    sites: Sequence[Site] = folder.sites if parts is None else parts.sites
    by_components = parts is not None and parts.are_components
    if method == "norm":
        norms = {one.site.name: torch.tensor([one.norm], dtype=torch.float64) for one in site_norms(folder)}
        return _lined_up(energy_scores(folder) if by_components else norms, sites)
    assert method in CONTROLS
    n_parts = {site.name: site.rank if by_components else 1 for site in sites}
    ordered = in_order(sites)
    owners = [site for site in ordered for _ in range(n_parts[site.name])]
    values = control_scores(owners, seed)[method].double().split([n_parts[site.name] for site in ordered])
    return _lined_up({site.name: own for site, own in zip(ordered, values, strict=True)}, sites)


def _lined_up(values: Mapping[str, torch.Tensor], sites: Sequence[Site]) -> PartScores:
    """The scores of the parts of each site, by its name, in the order of `sites`."""
    owners = tuple(site.name for site in sites for _ in values[site.name])
    return PartScores(owners, torch.cat([values[site.name] for site in sites]).numpy())


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
        return PartScores(parts.owners, ratios.mean(axis=0), errors)

    def gating(gates: torch.Tensor, lengths: Collection[int]):
        return parts.gated(gates, kept, lengths)

    options = {"gradient_checkpointing": gradient_checkpointing, "label": label, "on_message": on_message}
    if method == "credit":
        credits = path_credit(model, batches, gating, kept.float(), n_points, **options)
        return PartScores(parts.owners, credits.values, credits.standard_errors, credits.completeness, n_points)
    effects = gate_gradients(model, batches, gating, kept.float(), **options)
    return PartScores(parts.owners, np.abs(effects.values), effects.standard_errors, None, 1)
