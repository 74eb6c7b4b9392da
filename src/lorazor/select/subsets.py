"""Subsets: which parts of an adapter stay, for a budget or for a tolerance.

Parts are dropped in *units* that go together: a site (or a component of one), a group of sites that a serving stack
loads as one, all sites of a projection kind, a layer. Everything here is a pure function of scores and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lorazor.adapter.sites import Site
from lorazor.errors import BudgetError, MeasureError, SettingsError
from lorazor.measure.stats import Interval
from lorazor.select.projection import budget_for_fraction
from lorazor.settings import By, SubsetBudgetSettings, ToleranceRule

_GROUPS = (
    re.compile(r"(q|k|v)(_proj|_lin)?|(query|key|value)(_proj)?"),
    re.compile(r"(gate|up)_proj|wi_[01]"),
)
"""Last parts of the names of sites that serving stacks merge into one matrix (qkv_proj, gate_up_proj)."""

Divisor = Literal["parameters", "parts", "nothing"]
"""What the score of a unit is divided by."""


@dataclass(frozen=True)
class Unit:
    """Parts that stay or go together.

    Attributes:
        label: what people call it.
        parts: indices of its parts.
        n_parameters: numbers in A and B of all of them.
    """

    label: str
    parts: tuple[int, ...]
    n_parameters: int


def check_budget(budget: SubsetBudgetSettings, n_sites: int, n_parameters: int) -> None:
    """Refuse none or several budgets, or one that is out of range.

    Raises:
        BudgetError: not exactly one, or one that keeps nothing or more than there is.
    """
    given = {name: value for name, value in vars(budget).items() if value is not None}
    if len(given) != 1:
        what = " and ".join(f"{name}={value}" for name, value in given.items()) or "None"
        raise BudgetError(
            f"{what} given as the budget. Pass one of --keep K (sites), --keep-fraction F (of the sites), --params N, "
            "--params-fraction F (of the parameters) or --tolerance METRIC."
        )
    limits = {"keep": n_sites, "params": n_parameters, "keep_fraction": 1, "params_fraction": 1}
    for name, value in given.items():
        if name != "tolerance" and not 0 < value <= limits[name]:
            least = "1" if name in ("keep", "params") else "more than 0"
            raise BudgetError(
                f"{name}={value}, but the adapter has {n_sites} sites with {n_parameters} parameters. "
                f"Pass {least} to {limits[name]}."
            )


def spending(
    budget: SubsetBudgetSettings, n_parameters: Sequence[int], n_sites: int, n_parameters_in_all: int
) -> tuple[list[int], int]:
    """What each part costs, and how much may be spent: sites, or parameters.

    Args:
        budget: one of its four amounts is given; see `check_budget`.
        n_parameters: of each part.
        n_sites: of the whole adapter.
        n_parameters_in_all: of the whole adapter.
    """
    if budget.keep is not None:
        return [1] * len(n_parameters), budget.keep
    if budget.keep_fraction is not None:
        return [1] * len(n_parameters), budget_for_fraction(budget.keep_fraction, n_sites)
    share = 1.0 if budget.params_fraction is None else budget.params_fraction
    return list(n_parameters), int(share * n_parameters_in_all) if budget.params is None else budget.params


def make_units(sites: Sequence[Site], site_of: Sequence[int], n_parameters: Sequence[int], by: By) -> list[Unit]:
    """Gather parts into units, in the order of the sites.

    Args:
        sites: all sites, in the order of `in_order`.
        site_of: index of the site of each part.
        n_parameters: of each part.
        by: "site" (every part by itself), "group" (q, k, v and gate, up of a block), "kind", "layer" or "window"
            (layers, of which neighbours will stay).
    Raises:
        SettingsError: `by` is unknown.
    """
    if by not in get_args(By):
        raise SettingsError(f"by={by!r} is unknown. Pass one of {', '.join(get_args(By))}.")
    members: dict[str, list[int]] = {}
    for part, site_index in enumerate(site_of):
        label = f"{sites[site_index].name}#{part}" if by == "site" else _unit_of(sites[site_index], by)
        members.setdefault(label, []).append(part)
    return [
        Unit(label.partition("#")[0], tuple(parts), sum(n_parameters[part] for part in parts))
        for label, parts in members.items()
    ]


def unit_scores(
    scores: Sequence[float] | NDArray[np.float64], units: Sequence[Unit], divided_by: Divisor
) -> NDArray[np.float64]:
    """The score of every unit: the sum over its parts, divided by the number of its parameters, of its parts, or not.

    Raises:
        MeasureError: a score is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        part = int(np.argmin(np.isfinite(values)))
        raise MeasureError(f"The score of part {part} is {values[part]}, so parts cannot be ranked. Check the data.")
    sums = np.array([values[list(unit.parts)].sum() for unit in units])
    divisors = {"parameters": [unit.n_parameters for unit in units], "parts": [len(unit.parts) for unit in units]}
    return sums / divisors.get(divided_by, [1] * len(units))


def within_budget(scores: Sequence[float], costs: Sequence[int], budget: int) -> list[int]:
    """Units in order of score until the budget is used up; a unit that does not fit is skipped and the next is tried.

    Args:
        scores: of each unit; higher is more worth keeping, ties keep the earlier unit.
        costs: of each unit, in parameters or in sites.
        budget: in the same.
    Returns:
        Indices of the units that stay, rising.
    Raises:
        BudgetError: not one unit fits.
    """
    _check_fits(costs, budget)
    kept, left = [], budget
    for unit in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable").tolist():
        if costs[unit] <= left:
            kept.append(unit)
            left -= costs[unit]
    return sorted(kept)


def best_window(
    scores: Sequence[float], costs: Sequence[int], budget: int, n_layers: int | None = None
) -> tuple[int, int]:
    """The window [a, b) of neighbouring layers with the highest sum of scores, among those within the budget.

    Args:
        scores: of each layer, as they run; sums, not per parameter.
        costs: of each layer.
        budget: what the window may cost.
        n_layers: length of the window; any length if left out.
    Returns:
        (a, b); ties take the earlier and the shorter window.
    Raises:
        BudgetError: no window fits.
    """
    _check_fits(costs, budget)
    sums, spent = (np.concatenate([[0], np.cumsum(numbers)]) for numbers in (scores, costs))
    windows = [
        (start, stop)
        for start in range(len(costs))
        for stop in range(start + 1, len(costs) + 1)
        if spent[stop] - spent[start] <= budget and n_layers in (None, stop - start)
    ]
    if not windows:
        raise BudgetError(f"No {n_layers} neighbouring layers fit into a budget of {budget}. Pass more.")
    return max(windows, key=lambda window: sums[window[1]] - sums[window[0]])


def units_within(
    scores: Sequence[float] | NDArray[np.float64],
    units: Sequence[Unit],
    costs: Sequence[int],
    budget: int,
    by: By,
    divided_by: Divisor,
) -> list[int]:
    """The units that stay within a budget: `best_window` for "window", else `within_budget`.

    A unit whose score is not above 0 never stays, even where there is room: without it, the adapter is no worse. A
    window stays whole, for the sum of its layers.

    Args:
        scores: of every part.
        units: from `make_units`.
        costs: of each unit, in parameters or in sites.
        budget: in the same.
        by: how the units were made.
        divided_by: what the score of a unit is divided by before units are compared; windows are compared undivided.
    Returns:
        Indices of the units that stay, rising.
    Raises:
        BudgetError: not one unit fits.
        MeasureError: a score is not finite, or none is above 0.
    """
    values = unit_scores(scores, units, "nothing" if by == "window" else divided_by).tolist()
    useful = useful_units(values)
    if by == "window":
        return list(range(*best_window(values, costs, budget)))
    kept = within_budget([values[unit] for unit in useful], [costs[unit] for unit in useful], budget)
    return [useful[index] for index in kept]


def useful_units(scores: Sequence[float]) -> list[int]:
    """Indices of the units whose score is above 0, rising: those that a budget may be spent on.

    Raises:
        MeasureError: there are none.
    """
    useful = [unit for unit, score in enumerate(scores) if score > 0]
    if not useful:
        raise MeasureError("Nothing has a score above 0: the adapter is no better than its base. Keep none of it.")
    return useful


def nested(scores: Sequence[float], is_window: bool = False) -> Callable[[int], list[int]]:
    """The units that stay when `n` of them may: those of highest score, or the best window of that length.

    Args:
        scores: of each unit.
        is_window: units are layers as they run, and neighbours stay.
    Returns:
        n in 1..n_units -> indices of the units that stay, rising.
    """
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values, kind="stable").tolist()

    def keep(n_units: int) -> list[int]:
        if not is_window:
            return sorted(order[:n_units])
        return list(range(*best_window(values.tolist(), [1] * len(values), n_units, n_units)))

    return keep


def is_tolerable(difference: Interval, higher_is_better: bool, rule: ToleranceRule) -> bool:
    """Whether a selection is no worse than the full adapter.

    Args:
        difference: of the selection to the full adapter, paired.
        higher_is_better: the direction of the metric.
        rule: "one-se": worse by at most one standard error of the difference; "no-worse": its 95 % interval reaches
            zero. The fewer the examples, the wider the interval, and the more passes by "no-worse".
    """
    if rule == "no-worse":
        return not difference.is_worse(higher_is_better)
    shortfall = -difference.estimate if higher_is_better else difference.estimate
    return shortfall <= difference.standard_error


def smallest_passing(n_units: int, passes: Callable[[int], bool], resolution: int = 1) -> int:
    """The smallest number of units that passes, by bisection; `n_units`, the full adapter, passes unasked.

    About log2(n_units / resolution) questions. A number smaller by at most `resolution` was asked and failed (or it
    is 0); where passing is not monotone, a smaller one that passes may exist.
    """
    failed, passed = 0, n_units
    while passed - failed > resolution:
        middle = (failed + passed) // 2
        if passes(middle):
            passed = middle
        else:
            failed = middle
    return passed


def eliminate(
    units: Sequence[int], scores: Sequence[float], n_tried: int, cost_of: Callable[[tuple[int, ...]], float]
) -> Iterator[tuple[int, ...]]:
    """Backward elimination with verification: drop one unit after the other, each time the one that is missed least.

    Of the units that are left, the `n_tried` of lowest score are taken out one at a time, and measured; the one
    without which the cost is lowest goes. Costs n_tried measurements per unit dropped.

    Args:
        units: indices of the units to start from.
        scores: of all units, by index.
        n_tried: how many removals to measure each time, at least 1.
        cost_of: what the kept units cost, lower is better (a loss, or a negated metric).
    Yields:
        The units that are left after each removal, rising, down to one.
    Raises:
        SettingsError: `n_tried` is less than 1.
    """
    if n_tried < 1:
        raise SettingsError(f"Backward elimination over {n_tried} candidates. Pass 1 or more, such as 4.")
    kept = tuple(sorted(units))
    while len(kept) > 1:
        tried = sorted(kept, key=lambda unit: scores[unit])[:n_tried]
        options = [tuple(unit for unit in kept if unit != gone) for gone in tried]
        kept = options[0] if len(options) == 1 else min(options, key=cost_of)
        yield kept


def _check_fits(costs: Sequence[int], budget: int) -> None:
    if budget < min(costs):
        raise BudgetError(f"A budget of {budget} keeps nothing: the smallest unit needs {min(costs)}. Pass more.")


def _unit_of(site: Site, by: By) -> str:
    if by == "kind":
        return site.kind
    if by == "group":
        parent, _, last = site.name.rpartition(".")
        number = next((index for index, pattern in enumerate(_GROUPS) if pattern.fullmatch(last)), None)
        return site.name if number is None else f"{parent}.{('q/k/v', 'gate/up')[number]}"
    return site.name if site.layer is None else f"{site.stack}.{site.layer}"
