"""What a warm-up came to: the scores of all sites, and the selection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from torch import Tensor

from lorazor.adapter.sites import LiveSite, site_parameters
from lorazor.runs import versions
from lorazor.select.scores import WarmupObserver, control_scores, gate_norm_score, gate_score
from lorazor.selection import SelectedSite, Selection
from lorazor.train.gating import GatedSites


def warmup_scores(gated: GatedSites, observer: WarmupObserver, seed: int) -> dict[str, Tensor]:
    """Every score of a finished warm-up, by name, (n_sites,) each on the CPU."""
    sites, gates = gated.sites, gated.gates.values.detach()
    pairs = [site_parameters(site.module, site.adapter)[:2] for site in sites]
    A, B = ([pair[place].detach().flatten(1) for pair in pairs] for place in (0, 1))  # convolutions too
    norms = gate_norm_score(gates, A, B, [site.scaling for site in sites])
    scores = {"gate": gate_score(gates), "gate-norm": norms, **observer.scores(), **control_scores(sites, seed)}
    return {name: values.float().cpu() for name, values in scores.items()}


def scores_text(sites: Sequence[LiveSite], scores: dict[str, Tensor]) -> str:
    """One JSON line per site: where it is, how large, and every score."""
    columns = {name: values.tolist() for name, values in scores.items()}
    rows = [
        {
            "site": site.name,
            "stack": site.stack,
            "layer": site.layer,
            "kind": site.kind,
            "n_parameters": site.n_parameters,
            **{name: values[index] for name, values in columns.items()},
        }
        for index, site in enumerate(sites)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_selection(gated: GatedSites, scores: Tensor, ranks: Mapping[str, int], seed: int) -> Selection:
    """All sites, each with its score; those in `ranks` stay, with the rank that they have now."""
    settings = gated.gates.settings
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
            for site, score in zip(gated.sites, scores.tolist(), strict=True)
        ),
        method="weightlora+" if settings.grow else "weightlora",
        settings=dataclasses.asdict(settings),
        provenance={"seed": seed, "n_changes": gated.gates.n_changes, "versions": versions()},
    )
