"""The basis in which an adapter is shrunk, and what its parts are worth there; both are kept in the run.

What was measured is known by its gates, and gates mean nothing without the basis that they are on: a resumed run takes
up the same one, whatever its batch size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorazor.adapter.directions import to_balanced_form_
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.files import explained
from lorazor.measure.gradients import gram_matrices
from lorazor.measure.meter import DATA, Meter
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.credit import Completeness
from lorazor.select.goal import default_score
from lorazor.select.scoring import NEEDS_DATA, PartScores, Scoring, score_named
from lorazor.settings import ShrinkSettings
from lorazor.train.evidence import SCORES_FILE

_FACTORS_FILE, _VALUES_FILE = "basis.safetensors", "basis.json"


@dataclass(frozen=True, eq=False)
class Basis:
    """What gates are on.

    Attributes:
        name: what the directions are: "trained", "singular" or "balanced".
        score: what the parts were scored by.
        scores: of all parts.
        factors: A and B in this basis, by the names of the sites that can be taken apart.
    """

    name: str
    score: str
    scores: PartScores
    factors: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def n_passes(self) -> int:
        """Forward-backward passes over each example: those of the score, and one for the basis where it is another."""
        return self.scores.n_passes + (self.name == "balanced" and self.score != "balanced")

    @torch.no_grad()
    def put_on_(self, sites: Sequence[LiveSite]) -> None:
        """Rewrite live sites of the same adapter to this basis."""
        for site in sites:
            if site.name in self.factors:
                for live, kept in zip(site_parameters(site.module, site.adapter), self.factors[site.name], strict=True):
                    live.copy_(kept)


def score_parts(meter: Meter, run: RunFolder, folder: AdapterFolder, settings: ShrinkSettings) -> Basis:
    """Choose the basis that suits the units, score the parts in it, and keep both; or take up what the run has kept.

    Args:
        meter: the loaded adapter, which is rewritten to the basis, and the examples.
        run: where it is kept.
        folder: the adapter on disk.
        settings: what to score by, and how.
    """
    kept = from_main_process(lambda: _read(run.path))
    if kept is None:
        basis = _scored(meter, folder, settings)
        from_main_process(lambda: _write(run, basis))
        return basis
    document, factors = kept
    sums, n_passes = document["completeness"], document["n_passes"]
    scores = PartScores(
        meter.parts, np.array(document["values"]), completeness=sums and Completeness(**sums), n_passes=n_passes
    )
    basis = Basis(document["basis"], document["score"], scores, factors)
    basis.put_on_(meter.loaded.sites)
    return basis


def _scored(meter: Meter, folder: AdapterFolder, settings: ShrinkSettings) -> Basis:
    score, loaded, parts = settings.score or default_score(settings.by, folder.sites, True), meter.loaded, meter.parts
    batches, sigma2, name = meter.batches(DATA, about=settings.score_examples), None, "trained"
    if score == "balanced" or (settings.by == "direction" and score in NEEDS_DATA):
        matrices = gram_matrices(
            loaded.model, loaded.sites, batches, gradient_checkpointing=settings.gradient_checkpointing
        )
        sigma2, name = to_balanced_form_(loaded.sites, matrices), "balanced"
    elif settings.by == "direction":
        parts, name = Parts.singular_(loaded.sites), "singular"
    scoring = Scoring(
        parts, folder, loaded.model, batches, settings.points, settings.gradient_checkpointing, settings.seed,
        f"scoring by {score}", sigma2, meter.say,
    )  # fmt: skip
    factors = {}
    for site in loaded.sites:
        if site.has_directions:
            down, up = site_parameters(site.module, site.adapter)
            factors[site.name] = (down.detach().cpu().clone(), up.detach().cpu().clone())
    return Basis(name, score, score_named(score)(scoring), factors)


def _write(run: RunFolder, basis: Basis) -> None:
    """Keep the scores for people, and the basis for a resumed run; the values come last: what has them is whole."""
    scores = basis.scores
    run.write_rows(SCORES_FILE, scores.by_site())
    sides = {
        f"{name}.{side}": one for name, pair in basis.factors.items() for side, one in zip("AB", pair, strict=True)
    }
    path = run.path / _FACTORS_FILE
    with explained(path):
        save_file({key: tensor.contiguous() for key, tensor in sides.items()}, path)
    sums = scores.completeness
    run.write_json(
        _VALUES_FILE,
        {
            "basis": basis.name,
            "score": basis.score,
            "values": scores.values.tolist(),
            "completeness": sums and dataclasses.asdict(sums),
            "n_passes": scores.n_passes,
        },
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]] | None:
    if not (path / _VALUES_FILE).exists():
        return None
    return json.loads((path / _VALUES_FILE).read_text(encoding="utf-8")), read_factors(path)


def read_factors(run: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B in the basis of a run, by site name; none where it keeps no basis."""
    if not (run / _FACTORS_FILE).exists():
        return {}
    tensors = load_file(run / _FACTORS_FILE)
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
