"""Scores: what every part of a trained adapter is worth. One function per score, all of one signature.

score(of: Scoring) -> PartScores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.directions import energies
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.parts import Parts
from lorazor.data.batches import Batch
from lorazor.errors import SettingsError
from lorazor.select.credit import Completeness, gate_slopes, path_credit, ratio_errors


@dataclass(frozen=True, eq=False)
class Scoring:
    """What a score may look at.

    Attributes:
        parts: what is scored.
        folder: the adapter on disk.
        model: in evaluation mode; None for the scores that need none.
        batches: examples, as batches for the model.
        points: of the path of credit.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of "random".
        label: text of a progress bar on stderr.
        sigma2: by site, what each direction of the balanced basis is worth, from `to_balanced_form_`; None in other
            bases.
        say: receives messages.
    """

    parts: Parts
    folder: AdapterFolder
    model: PreTrainedModel | None = None
    batches: Sequence[Batch] = ()
    points: int = 8
    gradient_checkpointing: bool = False
    seed: int = 0
    label: str | None = None
    sigma2: Mapping[str, Tensor] | None = None
    say: Callable[[str], None] = lambda message: None


@dataclass(frozen=True, eq=False)
class PartScores:
    """What every part is worth.

    Attributes:
        parts: what was scored.
        values: (n_parts,), higher is more worth keeping; scores of parts that go together add up.
        per_example: (n_examples, n_parts), what each example adds, in nats summed over its answer tokens; None for
            scores that look at no examples.
        n_tokens: (n_examples,), answer tokens; None likewise.
        completeness: of path credits, else None.
        n_passes: forward-backward passes over each example.
    """

    parts: Parts
    values: NDArray[np.float64]
    per_example: NDArray[np.float64] | None = None
    n_tokens: NDArray[np.float64] | None = None
    completeness: Completeness | None = None
    n_passes: int = 0

    def by_site(self) -> list[dict[str, Any]]:
        """The lines of `scores.jsonl`: every site with the sum of its parts, in the order of the sites.

        Its standard error is over examples, None where no examples were looked at.
        """
        site_of, sites = np.array(self.parts.site_of), self.parts.sites
        sums = np.zeros(len(sites))
        np.add.at(sums, site_of, self.values)
        errors: list[float | None] = [None] * len(sites)
        if self.per_example is not None and self.n_tokens is not None and len(self.n_tokens) > 1:
            of_sites = np.zeros((len(self.n_tokens), len(sites)))
            np.add.at(of_sites.T, site_of, self.per_example.T)
            errors = ratio_errors(of_sites, self.n_tokens).tolist()
        return [
            site.to_row() | {"score": score, "standard_error": error, "score_per_parameter": score / site.n_parameters}
            for site, score, error in zip(sites, sums.tolist(), errors, strict=True)
        ]


def credit(of: Scoring) -> PartScores:
    """What each part earns of the adapter's gain in loss, in nats per answer token; see `path_credit`."""
    assert of.model is not None
    found = path_credit(
        of.model, of.batches, of.parts.gated, torch.ones(len(of.parts)), of.points,
        gradient_checkpointing=of.gradient_checkpointing, label=of.label, on_message=of.say,
    )  # fmt: skip
    return PartScores(of.parts, found.values, found.credits, found.n_tokens, found.completeness, of.points)


def balanced(of: Scoring) -> PartScores:
    """What reaches each balanced direction times what the loss makes of it, sigma^2, from one pass over the examples.

    All sites can be taken apart: `Goal.of` refuses others.
    """
    assert of.sigma2 is not None
    return PartScores(of.parts, of.parts.from_sites(of.sigma2).double().numpy(), n_passes=1)


def fisher(of: Scoring) -> PartScores:
    """Mean square of what opening each gate does to the loss of an example: the empirical Fisher information of it.

    Where an adapter is at its best for the data, the slopes of the examples cancel out, and their squares say how far
    the loss bends: half of it is about what closing the gate costs. In nats^2 per answer token.

    Source: Theis et al., arXiv:1801.05787 (Fisher pruning), here on the gates of the directions.
    """
    assert of.model is not None
    slopes, n_tokens = gate_slopes(
        of.model, of.batches, of.parts.gated, torch.ones(len(of.parts)),
        gradient_checkpointing=of.gradient_checkpointing, label=of.label, on_message=of.say,
    )  # fmt: skip
    return PartScores(of.parts, (slopes**2).sum(axis=0) / n_tokens.sum(), slopes**2, n_tokens, n_passes=1)


def energy(of: Scoring) -> PartScores:
    """How much of the update each singular direction carries, (s sigma)^2, from the weights alone; see `energies`."""
    return PartScores(of.parts, of.parts.from_sites(energies(of.folder)).numpy())


def random(of: Scoring) -> PartScores:
    """A control: any order, from the seed."""
    return PartScores(of.parts, random_values(of.parts, of.seed).numpy())


def random_values(parts: Parts, seed: int) -> Tensor:
    """(n_parts,) float64, of which each part has any per parameter."""
    drawn = torch.rand(len(parts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * torch.tensor(parts.n_parameters)


def by_layer(of: Scoring, last_first: bool) -> PartScores:
    """A control: the first layers first, or the last; per parameter, so that units of any size are ranked by it."""
    layers = np.array([of.parts.sites[index].layer or 0 for index in of.parts.site_of], dtype=np.float64)
    worths = 1 + layers if last_first else 1 + layers.max() - layers
    return PartScores(of.parts, worths * of.parts.n_parameters)


SCORES: Mapping[str, Callable[[Scoring], PartScores]] = {
    "credit": credit,
    "balanced": balanced,
    "fisher": fisher,
    "energy": energy,
    "random": random,
    "first-layers": partial(by_layer, last_first=False),
    "last-layers": partial(by_layer, last_first=True),
}
NEEDS_DATA = ("credit", "balanced", "fisher")
"""Scores that run the model on examples."""


def score_named(name: str) -> Callable[[Scoring], PartScores]:
    """Look a score up.

    Raises:
        SettingsError: no score has this name.
    """
    if name not in SCORES:
        raise SettingsError(f"score={name!r} is unknown. Pass one of {', '.join(SCORES)}.")
    return SCORES[name]
