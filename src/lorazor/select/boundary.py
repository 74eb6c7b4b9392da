"""The boundary: choose it from scores, or read it off the curves, and say why in a sentence.

Boundary b keeps the LoRA sites of the first b layers. Everything here is a pure function of `Scores`, whatever the
metric, or of the curves of the true token's probability: where they part, and where they settle. Chen et al.
(arXiv:2503.23360) read their manual boundary off such curves by eye; the rule here is our reading of it. This module
never imports torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lorazor.errors import BoundaryError, MeasureError, SettingsError
from lorazor.measure.stats import Interval, Scores, paired_differences

Rule = Literal["best", "one-se", "manual"]

_CLEAR = 2.0
"""Standard errors by which the curves must differ to have parted: about 95 % of a normal distribution."""


@dataclasses.dataclass(frozen=True)
class BoundaryCandidate:
    """A boundary that was measured.

    Attributes:
        boundary: layers that keep LoRA.
        value: the metric at this boundary.
        difference: `value` minus that of the full adapter, with a 95 % interval.
    """

    boundary: int
    value: float
    difference: Interval


@dataclasses.dataclass(frozen=True)
class BoundaryChoice:
    """A boundary chosen by a rule, and everything it was chosen from.

    Attributes:
        rule: the rule.
        metric: name of the metric.
        higher_is_better: its direction.
        boundary: the boundary chosen.
        full: the boundary of the full adapter, to which all were compared.
        candidates: the boundaries measured, ascending.
        n_examples: examples that the choice rests on.
        reason: one plain sentence.
    """

    rule: Rule
    metric: str
    higher_is_better: bool
    boundary: int
    full: int
    candidates: tuple[BoundaryCandidate, ...]
    n_examples: int
    reason: str

    @property
    def chosen(self) -> BoundaryCandidate:
        """The candidate at the chosen boundary."""
        return next(candidate for candidate in self.candidates if candidate.boundary == self.boundary)

    def to_document(self) -> dict[str, Any]:
        """The choice as plain JSON data."""
        return {**dataclasses.asdict(self), "candidates": [dataclasses.asdict(item) for item in self.candidates]}


def choose_boundary(
    scores: Scores,
    boundaries: Sequence[int],
    rule: Rule = "one-se",
    *,
    boundary: int | None = None,
    seed: int = 0,
) -> BoundaryChoice:
    """Choose a boundary from the scores of several.

    `best`: the best value; ties go to the smaller boundary.
    `one-se`: the smallest whose paired difference to the best is within one standard error of it.
    `manual`: `boundary`.

    Args:
        scores: one variant per boundary, the full adapter last; at least 2 examples.
        boundaries: strictly ascending; the last is the full adapter, the reference.
        rule: how to choose.
        boundary: the choice of `manual`, one of `boundaries`; for no other rule.
        seed: of the bootstrap.
    Raises:
        SettingsError: unknown rule, or settings that contradict it.
        BoundaryError: boundaries not ascending, or `boundary` is none of them.
        MeasureError: scores that do not fit `boundaries`, or fewer than 2 examples.
    Source: paired bootstrap as in `paired_differences`; one-standard-error rule of
        Breiman et al., Classification and Regression Trees (1984), here with paired errors.
    """
    boundaries = [int(item) for item in boundaries]
    check_rule(rule, boundary)
    if not boundaries or any(below >= above for below, above in zip(boundaries, boundaries[1:], strict=False)):
        raise BoundaryError(f"boundaries {boundaries} do not ascend. Pass each once, the full adapter last.")
    if len(boundaries) != scores.n_variants:
        raise MeasureError(f"{len(boundaries)} boundaries for {scores.n_variants} scored variants. Pass one for each.")
    if boundary is not None and boundary not in boundaries:
        raise BoundaryError(f"boundary={boundary} was not measured. Pass one of {', '.join(map(str, boundaries))}.")
    differences = paired_differences(scores, len(boundaries) - 1, seed=seed)
    candidates = tuple(
        BoundaryCandidate(item, float(value), difference)
        for item, value, difference in zip(boundaries, scores.values, differences, strict=True)
    )
    index, why = _apply_rule(rule, scores, candidates, boundary, seed)
    return BoundaryChoice(
        rule=rule,
        metric=scores.metric,
        higher_is_better=scores.higher_is_better,
        boundary=boundaries[index],
        full=boundaries[-1],
        candidates=candidates,
        n_examples=scores.n_examples,
        reason=_reason(why, candidates[index], candidates[-1], scores.n_examples),
    )


def parse_boundaries(text: str | None, n_layers: int) -> list[int]:
    """Read a list of boundaries such as `0,8,16,24:30`; `24:30` holds both ends.

    Args:
        text: the list; None stands for every boundary.
        n_layers: L; the full adapter, always part of the result.
    Returns:
        Ascending, without duplicates, ending in `n_layers`.
    Raises:
        BoundaryError: something that is no number or range, or a number outside 0..L.
    """
    if text is None:
        return list(range(n_layers + 1))
    found = {n_layers}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?[0-9]+)\s*(?::\s*(-?[0-9]+)\s*)?", part)
        if match is None:
            raise BoundaryError(f"boundaries={text!r}: {part!r} is no boundary. Pass numbers and ranges, as 0,8,24:30.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= first <= last <= n_layers:
            raise BoundaryError(
                f"boundaries={text!r}: {part.strip()!r} is not an ascending part of 0..{n_layers}. "
                f"The model has {n_layers} layers."
            )
        found.update(range(first, last + 1))
    return sorted(found)


def shortlist(
    losses: Scores, boundaries: Sequence[int], n_boundaries: int, allowed: Sequence[int] | None = None
) -> list[int]:
    """The boundaries worth generating text for: evenly spaced over those that keep half of the adapter's gain in loss.

    Args:
        losses: the loss of every boundary that was measured, boundary 0 first, the full adapter last.
        boundaries: those that were measured, ascending; the gain is that of the last over boundary 0.
        n_boundaries: how many to return at most, at least 2.
        allowed: which of them may be chosen; all if left out.
    Returns:
        Ascending, the full adapter last: those allowed that keep half of the gain, or else the one of lowest loss.
    Raises:
        SettingsError: fewer than 2 boundaries wanted.
        MeasureError: boundary 0 was not measured, or none is allowed.
    """
    if n_boundaries < 2:
        raise SettingsError(
            f"shortlist={n_boundaries} leaves nothing to compare with the full adapter. Pass at least 2."
        )
    loss_at = dict(zip(boundaries, losses.values.tolist(), strict=True))
    candidates = sorted(set(boundaries if allowed is None else allowed) & loss_at.keys())
    if 0 not in loss_at or not candidates:
        raise MeasureError(
            f"A shortlist of boundaries {', '.join(map(str, candidates))} from losses at "
            f"{', '.join(map(str, boundaries))}. Measure boundary 0, over which the gain is, and one or more that may "
            "be chosen."
        )
    halfway = (loss_at[0] + loss_at[boundaries[-1]]) / 2
    worthwhile = [one for one in candidates if loss_at[one] <= halfway] or [min(candidates, key=loss_at.__getitem__)]
    listed = sorted({*worthwhile, boundaries[-1]})
    spread = np.linspace(0, len(listed) - 1, min(n_boundaries, len(listed)))
    return [listed[round(position)] for position in spread]


def _apply_rule(
    rule: Rule, scores: Scores, candidates: Sequence[BoundaryCandidate], boundary: int | None, seed: int
) -> tuple[int, str]:
    """The index a rule chooses, and why."""
    if rule == "manual":
        return [candidate.boundary for candidate in candidates].index(boundary or 0), "was given"
    metric = scores.metric
    cost = -scores.values if scores.higher_is_better else scores.values
    best = int(np.argmin(cost))  # the first of equals: the smaller boundary
    if rule == "best":
        return best, f"has the best {metric}"
    to_best = paired_differences(scores, best, seed=seed)
    index = next(i for i, one in enumerate(to_best) if abs(one.estimate) <= one.standard_error)
    if index == best:
        return best, f"has the best {metric}, and no smaller one is within one paired standard error of it"
    return index, (
        f"is the smallest whose {metric} is within one paired standard error "
        f"({to_best[index].standard_error:.3g}) of the best, that of boundary {candidates[best].boundary}"
    )


def _reason(why: str, chosen: BoundaryCandidate, full: BoundaryCandidate, n_examples: int) -> str:
    head = f"Boundary {chosen.boundary} {why}: {chosen.value:.4g} on {n_examples} examples"
    if chosen.boundary == full.boundary:
        return f"{head}; it is the full adapter."
    return f"{head}, against {full.value:.4g} for the full adapter (difference {in_words(chosen.difference)})."


def in_words(difference: Interval) -> str:
    """A difference and its interval, to three digits."""
    return f"{difference.estimate:+.3g}, 95 % interval {difference.low:+.3g} to {difference.high:+.3g}"


def check_rule(rule: str, boundary: int | None) -> None:
    """Raise SettingsError for an unknown rule, or for settings that contradict it."""
    if rule not in get_args(Rule):
        raise SettingsError(f"rule={rule!r} is unknown. Pass one of {', '.join(get_args(Rule))}.")
    if boundary is None and rule == "manual":
        raise SettingsError("rule='manual' needs boundary, a number of layers. Pass it, or choose another rule.")
    if boundary is not None and rule != "manual":
        raise SettingsError(f"boundary={boundary} contradicts rule={rule!r}. Leave it out, or pass rule='manual'.")


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What the curves propose.

    Attributes:
        boundary: layers that keep LoRA; None where the curves do not part.
        parted_at: first layer from which the curves stay clearly apart, None likewise.
        reason: one plain sentence.
    """

    boundary: int | None
    parted_at: int | None
    reason: str


def propose_boundary(
    gap: NDArray[np.float64],
    standard_error: NDArray[np.float64],
    n_adapted: int | None = None,
    settled_within: float = 0.1,
) -> Proposal:
    """Read the boundary off the gap between the two curves.

        parted:   g_m > 2 se_m                   for all m >= layer
        settled:  |g_m - g_L| <= tolerance g_L   for all m >= boundary,   boundary >= parted

    The boundary is the first layer from which the gap stays close to what it is in the end: what the LoRA of later
    layers adds to it, or takes from it, is small. h_l depends on the LoRA of the first l layers only, so the point at
    layer l speaks for boundary l.

    Args:
        gap: g, probability of the true token with the adapter minus that of the base, after 0..L layers, (L + 1,).
        standard_error: of each, paired, (L + 1,).
        n_adapted: layers up to the highest with LoRA; the boundary is not above. L if left out.
        settled_within: tolerance, share of the final gap, above 0 and below 1.
    Raises:
        SettingsError: `settled_within` is outside its range.
    """
    check_settled_within(settled_within)
    n_layers = len(gap) - 1
    final = f"{gap[-1]:+.4f} ± {standard_error[-1]:.4f}"
    if not gap[-1] > _CLEAR * standard_error[-1]:
        does = "lowers" if gap[-1] < -_CLEAR * standard_error[-1] else "does not clearly change"
        return Proposal(
            None,
            None,
            f"No boundary: in the end the adapter {does} the probability of the true token ({final} against the base).",
        )
    parted_at = _first_lasting(gap > _CLEAR * standard_error)
    is_close = np.abs(gap - gap[-1]) <= settled_within * gap[-1]
    settled_at = max(parted_at, _first_lasting(is_close))
    boundary = min(settled_at, n_layers if n_adapted is None else n_adapted)
    reason = (
        f"Boundary {boundary} of {n_layers}: the curves part for good after layer {parted_at}, and from layer "
        f"{settled_at} on the gap stays within {settled_within:.0%} of what it is in the end ({final})."
    )
    if boundary == n_layers:
        reason += " They settle in the last layer only, so no layer can be dropped by this rule."
    return Proposal(boundary, parted_at, reason)


def check_settled_within(settled_within: float) -> None:
    """Raise SettingsError unless it is above 0 and below 1."""
    if not 0 < settled_within < 1:
        raise SettingsError(f"settled_within={settled_within} is not a share of the gap. Pass one between 0 and 1.")


def _first_lasting(is_true: NDArray[np.bool_]) -> int:
    """The first index from which on everything is true; the last one is."""
    false = np.flatnonzero(~is_true)
    return int(false[-1]) + 1 if len(false) else 0
