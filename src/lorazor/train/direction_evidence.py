"""WeightLoRA by direction: which directions of the sites a warm-up keeps.

Nothing is put on the model while it trains. Its last steps are watched, and after the last one A and B are rewritten to
the basis that data and loss make of them, B' A' = B A: what stays is some of its directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorazor.adapter.directions import balanced_change, to_balanced_form_, to_singular_form_
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.errors import MeasureError
from lorazor.runs import versions
from lorazor.select.scoring import PartScores, random_values
from lorazor.select.search import directions_within
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.selection import Selection
from lorazor.train.disconnect import disconnect_, keep_directions_
from lorazor.train.evidence import SCORES_FILE, Evidence
from lorazor.train.moments import DirectionMoments

N_ROWS = 64
"""Rows that scores rest on, those of the last steps: A and B move, and what they did before is of another adapter."""


class DirectionEvidence(Evidence):
    """What the last steps show of every direction.

    Attributes:
        parts: all directions.
        moments: what was seen; None for scores that look at no data.
    """

    def __init__(self, sites: Sequence[LiveSite], settings: WeightLoraSettings, seed: int, rows_per_step: int) -> None:
        """Plan when to watch.

        Args:
            sites: all sites; `check_sites` has refused those without directions.
            settings: of the warm-up.
            seed: of the score "random".
            rows_per_step: of all processes.
        """
        super().__init__(sites, settings, seed)
        self.parts = Parts(tuple(sites))
        is_observed = settings.score in ("fisher", "balanced")
        self.moments = DirectionMoments(sites, settings.score == "fisher") if is_observed else None
        self._n_unwatched = settings.select_steps - math.ceil(N_ROWS / rows_per_step)
        self._scores: dict[str, Tensor] = {}  # of all parts
        self._gates = torch.zeros(len(self.parts))

    def attach_(self, model: nn.Module) -> None:
        """Watch the model."""
        if self.moments is not None:
            self.moments.attach_(model)

    def begin_step(self, n_items: Tensor | float) -> None:
        """Gather what the step shows, if it is one of the last."""
        if self.moments is not None:
            self.moments.begin_step(n_items if self.n_steps >= self._n_unwatched else None)

    def before_step(self) -> None:
        """Count the step."""
        self.n_steps += 1

    def choose(self, has_one_rank: bool) -> list[int]:
        """Rewrite all sites to the basis that suits the score, then keep the best directions per parameter.

        Raises:
            MeasureError: a number is not finite, or no direction is worth anything.
        """
        self.fold_()
        for site in self.sites:
            if not all(bool(torch.isfinite(factor).all()) for factor in site_parameters(site.module, site.adapter)):
                raise MeasureError(f"{site.name} is not a number: the training diverged. Lower its learning rate.")
        self._scores = {"random": random_values(self.parts, self.seed)}
        if self.moments is None:
            values = to_singular_form_(self.sites)
            squares = {site.name: (site.scaling * values[site.name]).square() for site in self.sites}
            self._scores["energy"] = self.parts.from_sites(squares)
        else:
            matrices = self.moments.sums.matrices()
            if self.settings.score == "fisher":
                found = {name: balanced_change(*pair) for name, pair in matrices.items()}
                changes = {name: change and change[:2] for name, change in found.items()}
                self._scores["fisher"] = self.parts.from_sites(self.moments.fisher(changes))
            self._scores["balanced"] = self.parts.from_sites(to_balanced_form_(self.sites, matrices))
        ranked = self._scores[self.settings.score].numpy()
        self._gates[directions_within(self.parts, ranked, self.settings.keep, self.settings.n_parameters)] = 1
        return [int(own.sum()) for own in self.parts.by_site(self._gates).values()]

    def settle_(self) -> list[LiveSite]:
        """All directions stay in the model, in the basis of the choice."""
        kept = self.parts.by_site(self._gates)
        return [site for site in self.sites if kept[site.name].any()]

    def cut_(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[LiveSite]:
        """Take sites without a direction out of model and optimizer, and lower the ranks of the others.

        The optimizer's state of what stays starts anew: it is of another basis.
        """
        kept = {name: own.nonzero().flatten().tolist() for name, own in self.parts.by_site(self._gates).items()}
        survivors = disconnect_(model, self.sites, [bool(kept[site.name]) for site in self.sites], optimizer)
        return keep_directions_(model, survivors, [kept[site.name] for site in survivors], optimizer)

    def fold_(self) -> None:
        """Leave the model alone."""
        if self.moments is not None:
            self.moments.detach_()

    def selection(self, survivors: Sequence[LiveSite]) -> Selection:
        """All sites, each with the sum of its directions' scores, and the directions that stay."""
        basis = "singular" if self.moments is None else "balanced"
        settings = dataclasses.asdict(self.settings) | {"basis": basis}
        provenance = {"seed": self.seed, "versions": versions()}
        ranked = self._scores[self.settings.score]
        return self.parts.selection(self._gates, "weightlora by direction", settings, ranked, provenance)

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """A line for every site: the sum of its directions' scores, and every score of each of them."""
        lines = PartScores(self.parts, np.asarray(self._scores[self.settings.score])).by_site()
        for name, values in [*self._scores.items(), ("kept", self._gates.bool())]:
            for line, own in zip(lines, self.parts.by_site(values).values(), strict=True):
                line[name] = own.tolist()
        return {SCORES_FILE: lines}

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far; A and B are in the checkpoint."""
        seen = self.moments.state_dict() if self.moments is not None else {}
        return {"moments": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what was seen."""
        self.n_steps = state["n_steps"]
        if self.moments is not None:
            self.moments.load_state_dict(state["moments"])
