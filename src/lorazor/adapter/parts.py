"""Parts: what one gate multiplies when a trained adapter is taken apart, either a whole site or one of its components.

Scores, subsets and refits work on parts and do not care which of the two they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorazor.adapter.components import component_gated, to_singular_form_
from lorazor.adapter.gates import gated, row_gated, silenced
from lorazor.adapter.sites import LiveSite
from lorazor.selection import SelectedSite, Selection


@dataclass(frozen=True)
class Parts:
    """The parts of an adapter on a loaded model.

    Attributes:
        sites: of one adapter; their order is that of everything of shape (n_parts,).
        site_of: (n_parts,), index of the site of each part, rising.
        n_parameters: (n_parts,), numbers in A and B that the part needs.
        are_components: whether parts are components of sites; else each site is one part.
    """

    sites: list[LiveSite]
    site_of: list[int]
    n_parameters: list[int]
    are_components: bool = False

    @classmethod
    def sites_of(cls, sites: Sequence[LiveSite]) -> Parts:
        """Each site is a part."""
        return cls(list(sites), list(range(len(sites))), [site.n_parameters for site in sites])

    @classmethod
    def components_of_(cls, sites: Sequence[LiveSite]) -> Parts:
        """Each singular direction of each site is a part; rewrites the sites to their singular form.

        Raises:
            UnsupportedAdapterError: a site is an embedding, a convolution, or has a bias of B.
        """
        to_singular_form_(sites)
        owners = [index for index, site in enumerate(sites) for _ in range(site.rank)]
        sizes = [sites[index].n_parameters // sites[index].rank for index in owners]
        return cls(list(sites), owners, sizes, are_components=True)

    def __len__(self) -> int:
        return len(self.site_of)

    @property
    def owners(self) -> tuple[str, ...]:
        """(n_parts,), name of the site of each part."""
        return tuple(self.sites[index].name for index in self.site_of)

    def digest(self, gates: Tensor) -> str:
        """A name for gates that is the same for the same gates on the same sites, and for no others.

        Args:
            gates: (n_parts,).
        """
        numbers = gates.detach().to("cpu", torch.float32) + 0.0  # so that -0 and 0 are the same gate
        what = "\n".join(self.owners).encode() + numbers.numpy().tobytes()
        return hashlib.sha256(what).hexdigest()[:16]

    @contextmanager
    def gated(
        self, gates: Tensor, is_kept: Tensor | None = None, lengths: Collection[int] | None = None
    ) -> Iterator[None]:
        """Put a gate on each part inside the block.

        Args:
            gates: (n_parts,), or (n_parts, rows) for gates of each row of the batch; gradients reach them.
            is_kept: (n_parts,) bool; sites without a kept part are switched off, and not computed. All if left out.
            lengths: tokens that a row has, see `row_gated`.
        """
        kept = torch.ones(len(self), dtype=torch.bool) if is_kept is None else is_kept.cpu()
        on = {self.site_of[part] for part in kept.nonzero().flatten().tolist()}
        parts = [part for part, site in enumerate(self.site_of) if site in on]
        own, sites = gates[parts], [self.sites[index] for index in sorted(on)]
        if self.are_components:
            put = component_gated(sites, own, lengths)
        else:
            put = row_gated(sites, own, lengths) if gates.ndim == 2 else gated(sites, own)
        off = (site for index, site in enumerate(self.sites) if index not in on)
        with silenced(off), put:
            yield

    def n_sites_kept(self, gates: Tensor) -> int:
        """Sites with a gate that is not 0."""
        return len({self.site_of[part] for part in gates.nonzero().flatten().tolist()})

    def n_parameters_kept(self, gates: Tensor) -> int:
        """Numbers in A and B of the parts whose gate is not 0."""
        return sum(self.n_parameters[part] for part in gates.nonzero().flatten().tolist())

    def gates_of(self, selection: Selection) -> Tensor:
        """(n_parts,), the weights that a selection gives to the parts; 0 where it drops them."""
        entries = {entry.name: entry for entry in selection.sites}
        gates = []
        for site in self.sites:
            entry = entries[site.name]
            if not self.are_components:
                gates.append(entry.weight * entry.keep)
                continue
            own = range(site.rank) if entry.components is None else entry.components
            weights = dict(zip(own, entry.component_weights or [1.0] * len(own), strict=True))
            gates += [entry.weight * entry.keep * weights.get(component, 0.0) for component in range(site.rank)]
        return torch.tensor(gates)

    def selection(
        self, gates: Tensor, scores: Mapping[str, float] | None, method: str, settings: Mapping[str, Any]
    ) -> Selection:
        """The parts whose gate is not 0, with their gates as weights.

        Args:
            gates: (n_parts,).
            scores: of each site by its name, for the record.
            method: what chose them.
            settings: of the method.
        """
        values = gates.tolist()
        entries = []
        for index, site in enumerate(self.sites):
            own = [part for part, owner in enumerate(self.site_of) if owner == index]
            kept = [place for place, part in enumerate(own) if values[part]]
            weights = [values[own[place]] for place in kept]
            score = None if scores is None else scores[site.name]
            entry = SelectedSite(site.name, site.layer, site.stack, site.kind, site.rank, bool(kept), score=score)
            entries.append(_with_weights(entry, kept, weights, self.are_components))
        return Selection(tuple(entries), method, settings)


def _with_weights(
    entry: SelectedSite, kept: Sequence[int], weights: Sequence[float], are_components: bool
) -> SelectedSite:
    """The entry of a site with what stays of it; a site that stays as it was trained says nothing of components."""
    if not kept:
        return entry
    if not are_components:
        return dataclasses.replace(entry, weight=weights[0])
    is_as_trained = len(kept) == entry.rank and all(weight == 1 for weight in weights)
    if is_as_trained:
        return entry
    is_weighted = any(weight != 1 for weight in weights)
    return dataclasses.replace(entry, components=tuple(kept), component_weights=tuple(weights) if is_weighted else None)
