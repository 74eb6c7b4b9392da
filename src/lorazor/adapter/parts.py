"""Parts: what one gate multiplies, a direction of a site or a whole site that cannot be taken apart.

The one table that lines numbers up with sites: scores, gates and sizes of parts come in its order, and leave it by the
names of their sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from lorazor.adapter.directions import to_singular_form_
from lorazor.adapter.gates import gated
from lorazor.adapter.sites import LiveSite, Site
from lorazor.selection import SelectedSite, Selection


@dataclass(frozen=True)
class Parts:
    """The parts of an adapter: all directions of the first site, then of the second, and so on.

    Attributes:
        sites: of a folder, or of a live model, in the one order of sites.
    """

    sites: tuple[Site, ...]

    @classmethod
    def singular_(cls, sites: Sequence[Site]) -> Parts:
        """The parts of sites in their singular form; live sites are rewritten to it, see `to_singular_form_`."""
        to_singular_form_([site for site in sites if isinstance(site, LiveSite)])
        return cls(tuple(sites))

    def __len__(self) -> int:
        return len(self.site_of)

    @cached_property
    def site_of(self) -> list[int]:
        """(n_parts,), index of the site of each part, rising."""
        return [index for index, site in enumerate(self.sites) for _ in range(site.n_gates)]

    @cached_property
    def n_parameters(self) -> list[int]:
        """(n_parts,), numbers in A and B that each part needs."""
        return [self.sites[index].n_parameters // self.sites[index].n_gates for index in self.site_of]

    def gated(self, gates: Tensor, lengths: Collection[int] | None = None) -> AbstractContextManager[None]:
        """Put gates on the parts of a live model inside the block: (n_parts,) or (n_parts, rows), see `gates.gated`."""
        return gated(cast("Sequence[LiveSite]", self.sites), gates, lengths)

    def by_site(self, values: Tensor | Sequence[float]) -> Mapping[str, Tensor]:
        """Numbers of parts, by the names of their sites: (r,) each, or (1,)."""
        split = torch.as_tensor(values).split([site.n_gates for site in self.sites])
        return {site.name: own for site, own in zip(self.sites, split, strict=True)}

    def from_sites(self, values: Mapping[str, Tensor]) -> Tensor:
        """Numbers by the names of sites, (r,) or (1,) each, as numbers of parts, (n_parts,)."""
        return torch.cat([torch.as_tensor(values[site.name]).reshape(-1) for site in self.sites])

    def n_sites_kept(self, gates: Tensor) -> int:
        """Sites with a gate that is not 0."""
        return len({self.site_of[part] for part in gates.nonzero().flatten().tolist()})

    def n_parameters_kept(self, gates: Tensor) -> int:
        """Numbers in A and B of the parts whose gate is not 0."""
        return sum(self.n_parameters[part] for part in gates.nonzero().flatten().tolist())

    def selection(
        self,
        gates: Tensor,
        method: str,
        settings: Mapping[str, Any],
        scores: Tensor | Sequence[float] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Selection:
        """The parts whose gate is not 0, with their gates as weights.

        Args:
            gates: (n_parts,).
            method: what chose them.
            settings: of the method.
            scores: of the parts, for the record: a site has the sum of its parts.
            provenance: where all this is from.
        """
        sums = {} if scores is None else {name: float(own.sum()) for name, own in self.by_site(scores).items()}
        of_sites = self.by_site(gates)
        entries = [_entry(site, of_sites[site.name].tolist(), sums.get(site.name)) for site in self.sites]
        return Selection(tuple(entries), method, settings, provenance or {})


def _entry(site: Site, gates: list[float], score: float | None) -> SelectedSite:
    """What a selection says of a site; one that stays whole says nothing of directions."""
    kept = tuple(index for index, gate in enumerate(gates) if gate)
    if not kept:
        return site.entry(False, score=score)
    if len(set(gates)) == 1:  # one gate for all of it
        return site.entry(True, score=score, weight=gates[0])
    weights = tuple(gates[index] for index in kept)
    is_weighted = any(weight != 1 for weight in weights)
    return site.entry(True, score=score, components=kept, component_weights=weights if is_weighted else None)
