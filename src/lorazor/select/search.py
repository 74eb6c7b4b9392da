"""The search: which units stay, for a budget or within a margin. Pure functions of units, scores and a measurement.

Units are ranked by score per parameter, and the candidates are the first so many of them: a *nested* family that ends
in the full adapter. Of layers in a row ("prefix", "window") the candidates are the first n, or the best n neighbours.
Under a budget, a unit whose score is not above 0 never stays; under a margin the measurement decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import BudgetError, MeasureError
from lorazor.select.units import IN_A_ROW, Units

Kept = tuple[int, ...]
"""Indices of the units that stay, rising."""


@dataclass(frozen=True)
class Family:
    """Candidates of every size, each inside the next larger one where units are ranked.

    Attributes:
        units: what they are made of.
        scores: (n_units,), of the units.
        candidates: from the smallest to the largest.
    """

    units: Units
    scores: NDArray[np.float64]
    candidates: tuple[Kept, ...]

    @classmethod
    def of(cls, units: Units, values: Sequence[float] | NDArray[np.float64]) -> Family:
        """The candidates for given scores of parts.

        Raises:
            MeasureError: a score is not finite, or none is above 0.
        """
        scores, n_units = units.scores(values), len(units.movable)
        if units.by == "prefix":
            first = 0 if units.fixed else 1  # of no unit at all, the base model is left
            candidates = [tuple(range(size)) for size in range(first, n_units + 1)]
        elif units.by == "window":
            candidates = [_best_window(scores, size) for size in range(1, n_units + 1)]
        else:
            order = ranking(units, scores)
            candidates = [tuple(sorted(order[:size])) for size in range(1, n_units + 1)]
        if units.by not in IN_A_ROW and not (scores > 0).any():
            raise MeasureError("No score is above 0: the adapter is no better than its base. Keep none of it.")
        return cls(units, scores, tuple(candidates))

    def n_parameters(self, kept: Kept) -> int:
        """Numbers in A and B of the parts that stay with these units, without those that always stay."""
        return sum(self.units.movable[unit].n_parameters for unit in kept)

    def within(self, budget: int) -> Kept:
        """The units that stay within a budget of parameters.

        Ranked units: in order of score per parameter until the budget is used up; one that does not fit is skipped and
        the next is tried. Layers in a row: the most that fit (the window with the highest score among those that fit).

        Args:
            budget: in parameters, of the whole adapter with what always stays.
        Raises:
            BudgetError: nothing fits.
        """
        left = budget - self.units.n_fixed_parameters
        if self.units.by in IN_A_ROW:
            rows = self.candidates if self.units.by == "prefix" else _windows(len(self.units.movable))
            fitting = [one for one in rows if self.n_parameters(one) <= left]
            worth = len if self.units.by == "prefix" else lambda one: self.scores[list(one)].sum()
            kept = max(fitting, key=worth, default=None)
        else:
            kept = self._greedy(left)
        if kept is None:
            raise BudgetError(
                f"A budget of {budget:,} parameters keeps nothing that is worth keeping. The smallest adapter by "
                f"{self.units.by} has {self.n_least:,}. Pass that or more."
            )
        return kept

    @property
    def n_least(self) -> int:
        """Numbers in A and B of the smallest adapter that `within` can return."""
        if self.units.by == "prefix":
            return self.units.n_fixed_parameters + self.n_parameters(self.candidates[0])
        worthy = [unit for unit in self.candidates[-1] if self.units.by in IN_A_ROW or self.scores[unit] > 0]
        return self.units.n_fixed_parameters + min(self.n_parameters((unit,)) for unit in worthy)

    def _greedy(self, left: int) -> Kept | None:
        kept: list[int] = []
        for unit in ranking(self.units, self.scores):
            cost = self.units.movable[unit].n_parameters
            if self.scores[unit] > 0 and cost <= left:
                kept.append(unit)
                left -= cost
        return tuple(sorted(kept)) or None


def ranking(units: Units, scores: NDArray[np.float64]) -> list[int]:
    """Units by score per parameter, the highest first; ties keep the earlier one."""
    sizes = np.array([unit.n_parameters for unit in units.movable], dtype=np.float64)
    return np.argsort(-scores / sizes, kind="stable").tolist()


def smallest_passing(
    n_candidates: int, passes: Callable[[Sequence[int]], Sequence[bool]], width: int = 1
) -> int | None:
    """The smallest candidate that passes, by bisection; the largest passes unasked.

    Candidates are told apart down to a 64th of all. Where passing is not monotone, a smaller one that passes may exist.

    Args:
        n_candidates: candidates, from the smallest to the largest.
        passes: whether each of the candidates asked about passes.
        width: how many to ask about at once: 1 halves what is left with each question, 3 quarters it.
    Returns:
        The index of the candidate; None where it is the largest, and nothing smaller passed.
    """
    failed, passed, resolution = -1, n_candidates - 1, max(1, n_candidates // 64)
    while passed - failed > resolution:
        places = {failed + round((passed - failed) * place / (width + 1)) for place in range(1, width + 1)}
        asked = sorted(places - {failed, passed})
        answers = list(passes(asked))
        good = answers.index(True) if True in answers else len(asked)  # all before it failed
        passed = asked[good] if good < len(asked) else passed
        failed = asked[good - 1] if good > 0 else failed
    return None if passed == n_candidates - 1 else passed


def _windows(n_layers: int) -> list[Kept]:
    return [tuple(range(start, stop)) for start in range(n_layers) for stop in range(start + 1, n_layers + 1)]


def _best_window(scores: NDArray[np.float64], size: int) -> Kept:
    """The neighbouring layers of highest sum; ties take the earlier ones."""
    start = int(np.argmax([scores[first : first + size].sum() for first in range(len(scores) - size + 1)]))
    return tuple(range(start, start + size))
