"""What a training step costs with LoRA on some sites, and the sites that spend a budget of it best.

    cost(S) = constant + sum of the amounts of the parts that S makes happen

A part happens with any of some sites, or behind the lowest trained one: the backward pass ends there, and what runs
before needs no gradient and saves nothing. A site's own work is a part of one site; an input that q, k and v save once
is a part of three; the backward pass through a frozen map is a part that hangs on the depth alone. The same model is
for seconds and for bytes; it knows nothing of networks and trainers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        amount: of its cost, at least 0.
        sites: it happens with any one of them, by place in the list of all sites.
        time: it happens with any site that runs before; None: it does not hang on the depth.
    """

    amount: float
    sites: tuple[int, ...] = ()
    time: int | None = None


@dataclass(frozen=True)
class Costs:
    """The cost of a step for every choice of sites.

    Attributes:
        constant: what every choice costs.
        times: when each site runs in the forward pass, in any unit; sites of one input run at one time.
        parts: what the choices differ by.
    """

    constant: float
    times: tuple[int, ...]
    parts: tuple[Part, ...]

    def of(self, is_kept: Sequence[bool]) -> float:
        """The cost of a step that trains these sites, (n_sites,) bool; without any, no part happens."""
        kept = {site for site, stays in enumerate(is_kept) if stays}
        start = min((self.times[site] for site in kept), default=None)
        return self.constant + sum(
            part.amount
            for part in self.parts
            if not kept.isdisjoint(part.sites) or (part.time is not None and start is not None and start < part.time)
        )

    @property
    def least(self) -> float:
        """The cost of the cheapest site alone."""
        n_sites = len(self.times)
        return min(self.of([one == site for one in range(n_sites)]) for site in range(n_sites))

    def in_order(self, scores: Tensor | Sequence[float], limit: float) -> Tensor:
        """Sites in order of score, each that still fits: for scores that are places in an order and no amounts.

        Args:
            scores: (n_sites,), higher is taken earlier.
            limit: most that a step may cost, at least `least`.
        Returns:
            (n_sites,) bool; ties try the earlier site first.
        """
        kept = [False] * len(self.times)
        for site in torch.argsort(torch.as_tensor(scores), descending=True, stable=True).tolist():
            kept[site] = True
            kept[site] = self.of(kept) <= limit
        return torch.tensor(kept)

    def choose(self, scores: Tensor | Sequence[float], limit: float) -> Tensor:
        """Sites with a high sum of scores under a limit.

            max_S  sum of scores over S   subject to   cost(S) <= limit,  S not empty

        For every depth that the backward pass may have, its cost is paid first; then sites, and groups of sites that
        share a part, are taken by score per cost, each that still fits. The best depth wins. Without shared parts the
        sum misses the best one by less than the highest score.

        Args:
            scores: (n_sites,), finite; a site is never kept for a score of 0 or less while there are others.
            limit: most that a step may cost, at least `least`.
        Returns:
            (n_sites,) bool; ties keep the earlier site.
        """
        gains = torch.as_tensor(scores).tolist()
        best = max(
            (self._fill(start, gains, limit) for start in sorted({*self.times})),
            key=lambda kept: sum(gains[site] for site in kept),
        )
        singles = [site for site in range(len(gains)) if self.of([one == site for one in range(len(gains))]) <= limit]
        first = max(singles, key=lambda site: gains[site])
        if not best or gains[first] > sum(gains[site] for site in best):
            best = {first}
        return torch.tensor([site in best for site in range(len(gains))])

    def _fill(self, start: int, gains: Sequence[float], limit: float) -> set[int]:
        """Sites that run at `start` or later, by score per cost, as long as they fit."""
        room = limit - self.constant
        room -= sum(part.amount for part in self.parts if part.time is not None and start < part.time)
        allowed = {site for site, time in enumerate(self.times) if time >= start and gains[site] > 0}
        parts = [part for part in self.parts if part.sites and (part.time is None or start >= part.time)]
        touching = [frozenset(allowed.intersection(part.sites)) for part in parts]
        groups = [frozenset([site]) for site in sorted(allowed)]
        groups += dict.fromkeys(sites for sites in touching if len(sites) > 1)
        groups_at, parts_at = _places_by_site(groups), _places_by_site(touching)
        parts_of = [{one for site in group for one in parts_at.get(site, ())} for group in groups]
        groups_of = [{index for site in sites for index in groups_at[site]} for sites in touching]
        kept: set[int] = set()
        paid: set[int] = set()

        def entry(index: int) -> tuple[float, int, float]:
            amount = sum(parts[one].amount for one in parts_of[index] - paid)
            gain = sum(gains[site] for site in groups[index] - kept)
            return -gain / max(amount, 1e-300), index, amount

        heap = [entry(index) for index in range(len(groups))]
        heapify(heap)
        while heap:
            first = heappop(heap)
            _, index, amount = first
            if groups[index] <= kept or amount > room:
                continue
            if first != (now := entry(index)):  # a site of the group is kept, or a part of it paid for
                heappush(heap, now)
                continue
            kept |= groups[index]
            room -= amount
            news = {other for one in parts_of[index] - paid for other in groups_of[one]}
            paid |= parts_of[index]
            for other in news:
                heappush(heap, entry(other))
        return kept


def _places_by_site(collections: Sequence[Iterable[int]]) -> dict[int, list[int]]:
    """In which of some collections of sites each of these is."""
    places: dict[int, list[int]] = {}
    for place, sites in enumerate(collections):
        for site in sites:
            places.setdefault(site, []).append(place)
    return places


def fit_costs(features: Sequence[Costs], probes: Sequence[Sequence[bool]], measured: Sequence[float]) -> Costs:
    """The cost as a sum of features, each times a number of at least 0 that fits what was measured.

        min over c >= 0  sum over probes p of ((sum over k of c_k f_k(S_p) - measured_p) / measured_p)^2

    Args:
        features: f_k, with the same times.
        probes: S_p, (n_sites,) bool each.
        measured: the cost of a step of each, above 0.
    Source: Lawson & Hanson, non-negative least squares, in scipy.
    """
    matrix = np.array([[feature.of(probe) for feature in features] for probe in probes])
    scales = np.abs(matrix).max(axis=0)
    scales[scales == 0] = 1.0
    weights = 1 / np.asarray(measured, dtype=float)
    numbers = nnls(matrix / scales * weights[:, None], np.ones(len(probes)))[0] / scales
    return Costs(
        sum(number * feature.constant for number, feature in zip(numbers.tolist(), features, strict=True)),
        features[0].times,
        tuple(
            Part(number * part.amount, part.sites, part.time)
            for number, feature in zip(numbers.tolist(), features, strict=True)
            if number
            for part in feature.parts
        ),
    )
