"""Units: parts of an adapter that stay or go together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import Site, choose_stack
from lorazor.errors import MeasureError, SettingsError
from lorazor.settings import By

_GROUPS = (
    re.compile(r"(q|k|v)(_proj|_lin)?|(query|key|value)(_proj)?"),
    re.compile(r"(gate|up)_proj|wi_[01]"),
)
"""Last parts of the names of sites that serving stacks merge into one matrix (qkv_proj, gate_up_proj)."""

IN_A_ROW: tuple[By, ...] = ("prefix", "window")
"""Units that are layers, of which neighbours stay."""


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
