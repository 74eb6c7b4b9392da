"""What a warm-up came to: the scores of all sites, and the selection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.runs import versions
from lorazor.select.scores import WarmupObserver, control_scores, gate_norm_score, gate_score
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


def settle(gated: GatedSites, observer: WarmupObserver, seed: int) -> WarmupOutcome:
    """Choose the sites that stay, by the scores of a finished warm-up.

    Args:
        gated: the sites with their learned gates.
        observer: what it saw in the warm-up.
        seed: of the score "random".
    """
    sites, gates = gated.sites, gated.gates.values.detach()
    pairs = [site_parameters(site.module, site.adapter)[:2] for site in sites]
    A, B = ([pair[place].detach().flatten(1) for pair in pairs] for place in (0, 1))  # convolutions too
    norms = gate_norm_score(gates, A, B, [site.scaling for site in sites])
    by_name = {"gate": gate_score(gates), "gate-norm": norms, **observer.scores(), **control_scores(sites, seed)}
    scores = {name: values.float().cpu() for name, values in by_name.items()}
    settings = gated.gates.settings
    kept = settings.choose(scores[settings.score], [site.n_parameters for site in sites])
    return WarmupOutcome(gated, kept, scores, gated.gates.trajectory.cpu())
