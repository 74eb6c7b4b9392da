"""What a warm-up came to: the scores of all sites, and the selection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorazor.adapter.sites import LiveSite
from lorazor.runs import versions
from lorazor.select.warmup_scores import warmup_scores
from lorazor.selection import SelectedSite, Selection
from lorazor.train.gating import GatedSites


@dataclass(frozen=True)
class WarmupOutcome:
    """The end of a warm-up, with the gates still on the model, as they were learned.

    Attributes:
        gated: the sites with their gates.
        is_kept: which sites stay, (n_sites,) bool.
        scores: every score by name, (n_sites,) each on the CPU.
        trajectory: the gates after every step, (n_steps, n_sites) on the CPU.
    """

    gated: GatedSites
    is_kept: Tensor
    scores: dict[str, Tensor]
    trajectory: Tensor

    @property
    def scores_text(self) -> str:
        """One JSON line per site: where it is, how large, and every score."""
        columns = {name: values.tolist() for name, values in self.scores.items()}
        rows = [
            {**site.to_row(), **{name: values[index] for name, values in columns.items()}}
            for index, site in enumerate(self.gated.sites)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    @property
    def gates_text(self) -> str:
        """One JSON line per step of the warm-up: the gates after it, in the order of the scores."""
        rows = [{"step": step, "gates": gates} for step, gates in enumerate(self.trajectory.tolist(), start=1)]
        return "".join(json.dumps(row) + "\n" for row in rows)

    def selection(self, survivors: Sequence[LiveSite], seed: int) -> Selection:
        """All sites, each with its score; the survivors stay, with the rank that they have now."""
        settings, ranks = self.gated.gates.settings, {site.name: site.rank for site in survivors}
        return Selection(
            sites=tuple(
                SelectedSite(
                    name=site.name,
                    layer=site.layer,
                    stack=site.stack,
                    kind=site.kind,
                    rank=ranks.get(site.name, site.rank),
                    keep=site.name in ranks,
                    score=score,
                )
                for site, score in zip(self.gated.sites, self.scores[settings.score].tolist(), strict=True)
            ),
            method="weightlora+" if settings.grow else "weightlora",
            settings=dataclasses.asdict(settings),
            provenance={"seed": seed, "n_changes": self.gated.gates.n_changes, "versions": versions()},
        )


def settle(gated: GatedSites, credit: Tensor, seed: int) -> WarmupOutcome:
    """Choose the sites that stay, by the scores of a finished warm-up.

    Args:
        gated: the sites with their learned gates.
        credit: what each earned in the warm-up, (n_sites,).
        seed: of the score "random".
    Raises:
        MeasureError: a credit is not finite.
    """
    settings, sites = gated.gates.settings, gated.sites
    scores = warmup_scores(gated.gates.values, credit, sites, seed)
    kept = settings.choose(scores[settings.score], [site.n_parameters for site in sites])
    return WarmupOutcome(gated, kept, scores, gated.gates.trajectory.cpu())
