"""The search: units of parts, and which of them stay, for a budget or within a margin.

Pure functions of units, scores and a measurement. Units are ranked by score per parameter, and the candidates are the
first so many of them: a *nested* family that ends in the full adapter. Of layers in a row ("prefix", "window") the
candidates are the first n, or the best n neighbours. Under a budget, a unit whose score is not above 0 never stays;
under a margin the measurement decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site, choose_stack
from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.settings import By

_GROUPS = (
    re.compile(r"(q|k|v)(_proj|_lin)?|(query|key|value)(_proj)?"),
    re.compile(r"(gate|up)_proj|wi_[01]"),
)
"""Last parts of the names of sites that serving stacks merge into one matrix (qkv_proj, gate_up_proj)."""

IN_A_ROW: tuple[By, ...] = ("prefix", "window")
"""Units that are layers, of which neighbours stay."""

_NOTHING = 1e-10
"""Share of the best score below which a score is rounding: scores are squares of float32 numbers, or sums of these."""

Kept = tuple[int, ...]
"""Indices of the units that stay, rising."""


@dataclass(frozen=True)
class Unit:
    """Parts that stay or go together.

    Attributes:
        label: what people call it.
        parts: indices of its parts, rising.
        n_parameters: numbers in A and B of all of them.
    """

    label: str
    parts: tuple[int, ...]
    n_parameters: int


@dataclass(frozen=True)
class Units:
    """All parts of an adapter, gathered into units.

    Attributes:
        by: what goes together.
        movable: units that may be dropped: layers in execution order for "prefix" and "window", else in the order of
            the sites.
        fixed: parts that always stay: with "prefix" and "window", those outside the stack that is cut.
        n_fixed_parameters: numbers in A and B of those.
    """

    by: By
    movable: tuple[Unit, ...]
    fixed: tuple[int, ...] = ()
    n_fixed_parameters: int = 0

    @classmethod
    def of(cls, parts: Parts, by: By, stack: str | None = None) -> Units:
        """Gather parts into units.

        Args:
            parts: all parts of an adapter.
            by: "direction" (every part by itself), "site", "group" (q, k, v and gate, up of a block), "kind", "layer",
                "prefix" (layers, of which the first stay: the boundary) or "window" (layers, of which neighbours stay).
            stack: the stack that "prefix" and "window" run through; the only one, or the decoder, if left out.
        Raises:
            SettingsError: `by` is unknown, or a stack is named for other units.
            AdapterError: no such stack, or several to choose from.
        """
        if by not in get_args(By):
            raise SettingsError(f"by={by!r} is unknown. Pass one of {', '.join(get_args(By))}.")
        if stack is not None and by not in IN_A_ROW:
            raise SettingsError(f"stack={stack!r} belongs to --by prefix and --by window. Leave it out.")
        cut = choose_stack(parts.sites, stack) if by in IN_A_ROW else None
        members: dict[tuple[str, int], list[int]] = {}
        fixed = []
        for part, site_index in enumerate(parts.site_of):
            site = parts.sites[site_index]
            if cut is not None and site.stack != cut:
                fixed.append(part)
            else:
                members.setdefault(_key(site, part, by), []).append(part)
        keys = sorted(members, key=lambda key: key[1]) if cut is not None else list(members)
        movable = tuple(
            Unit(key[0], tuple(members[key]), sum(parts.n_parameters[part] for part in members[key])) for key in keys
        )
        return cls(by, movable, tuple(fixed), sum(parts.n_parameters[part] for part in fixed))

    @property
    def smallest(self) -> int:
        """Numbers in A and B of the smallest adapter: one unit, or of a prefix none where something always stays."""
        if self.by == "prefix" and self.fixed:
            return self.n_fixed_parameters
        return self.n_fixed_parameters + min(unit.n_parameters for unit in self.movable)

    def scores(self, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """(n_units,), the sum of the scores of the parts of every unit.

        Raises:
            MeasureError: a score is not finite.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if not np.isfinite(numbers).all():
            part = int(np.argmin(np.isfinite(numbers)))
            raise MeasureError(
                f"The score of part {part} is {numbers[part]}, so parts cannot be ranked. Check the data."
            )
        return np.array([numbers[list(unit.parts)].sum() for unit in self.movable])

    def parts_of(self, kept: Sequence[int]) -> list[int]:
        """The parts that stay with the units `kept`, rising."""
        return sorted([*self.fixed, *(part for unit in kept for part in self.movable[unit].parts)])


def is_worth_keeping(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,), whether a score is above 0 by more than rounding."""
    return scores > _NOTHING * max(float(scores.max()), 0.0)


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
            rising = sorted(_windows(n_units), key=lambda one: (scores[list(one)].sum(), -one[0]))
            best = {len(one): one for one in rising}  # the last of a size is the best, and the earlier of equals
            candidates = [best[size] for size in range(1, n_units + 1)]
        else:
            order = _ranking(units, scores)
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
        n_fixed = self.units.n_fixed_parameters
        left = budget - n_fixed
        if self.units.by in IN_A_ROW:
            rows = self.candidates if self.units.by == "prefix" else _windows(len(self.units.movable))
            fitting = [one for one in rows if self.n_parameters(one) <= left]
            worth = len if self.units.by == "prefix" else lambda one: self.scores[list(one)].sum()
            kept = max(fitting, key=worth, default=None)
        else:
            is_worth = is_worth_keeping(self.scores)
            rows = [(unit,) for unit in _ranking(self.units, self.scores) if is_worth[unit]]
            chosen: list[int] = []
            for row in rows:
                if self.n_parameters(row) <= left:
                    chosen += row
                    left -= self.n_parameters(row)
            kept = tuple(sorted(chosen)) or None
        if kept is None:
            raise BudgetError(
                f"A budget of {budget:,} parameters keeps nothing that is worth keeping. The smallest adapter by "
                f"{self.units.by} has {n_fixed + min(map(self.n_parameters, rows)):,}. Pass that or more."
            )
        return kept


def directions_within(
    parts: Parts, values: NDArray[np.float64], keep: int | None, n_parameters: int | None
) -> list[int]:
    """The directions that stay, in order of score per parameter, rising.

    Args:
        parts: all directions.
        values: (n_parts,), their scores.
        keep: K, how many stay at most: one whose score is not above 0 never does.
        n_parameters: instead of K, numbers in A and B.
    Raises:
        BudgetError, MeasureError: see `Family.within` and `Family.of`.
    """
    family = Family.of(Units.of(parts, "direction"), values)
    if n_parameters is not None:
        return family.units.parts_of(family.within(n_parameters))
    assert keep is not None
    is_worth = is_worth_keeping(family.scores)
    return family.units.parts_of([unit for unit in family.candidates[keep - 1] if is_worth[unit]])


def _ranking(units: Units, scores: NDArray[np.float64]) -> list[int]:
    """Units by score per parameter, the highest first; ties keep the earlier one."""
    sizes = np.array([unit.n_parameters for unit in units.movable], dtype=np.float64)
    return np.argsort(-scores / sizes, kind="stable").tolist()


def _windows(n_layers: int) -> list[Kept]:
    return [tuple(range(start, stop)) for start in range(n_layers) for stop in range(start + 1, n_layers + 1)]


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


def _key(site: Site, part: int, by: By) -> tuple[str, int]:
    if by == "direction":
        return site.name, part
    if by == "kind":
        return site.kind, 0
    if by == "group":
        parent, _, last = site.name.rpartition(".")
        number = next((index for index, pattern in enumerate(_GROUPS) if pattern.fullmatch(last)), None)
        return (site.name if number is None else f"{parent}.{('q/k/v', 'gate/up')[number]}"), 0
    if by == "site" or site.layer is None:
        return site.name, 0
    return f"{site.stack}.{site.layer}", site.layer
