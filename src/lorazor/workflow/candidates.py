"""The candidates of a shrink: smaller adapters of every size, measured and judged against the full one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorazor.adapter.parts import Parts
from lorazor.errors import BudgetError
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.measure.metrics import metric_named
from lorazor.measure.results import Candidate
from lorazor.select.goal import Goal
from lorazor.select.scoring import PartScores
from lorazor.select.search import Family, Kept, Units, is_worth_keeping, smallest_passing
from lorazor.select.verdict import Margin, Verdict, last_shown
from lorazor.workflow.verdicts import judged

HEALED = "healed"
"""What the names of healed adapters begin with, where a meter tells its adapters apart."""

_MOST_BEFORE = 3
"""Adapters that a fixed sequence tests before the proposal, at most."""


class Candidates:
    """Smaller adapters of a loaded one.

    Attributes:
        meter: measures them.
        metric: what they are compared by.
        scores: of all parts.
        units: what stays or goes together.
        seed: of the bootstrap.
        as_written: a variant as it is written, on the model afterwards; itself where writing rounds nothing.
        family: the candidates, lined up by size.
        full: the adapter that they are compared with, and its base, whatever is on the model later.
        base: see `full`.
        measured: what was measured on the validation examples, by digest; the full adapter first.
        passed: what these showed to be within a margin, and which one.
    """

    def __init__(
        self,
        meter: Meter,
        metric: str,
        scores: PartScores,
        units: Units,
        seed: int,
        as_written: Callable[[Variant], Variant],
    ) -> None:
        """The adapter that is on the model of the meter is the full one."""
        self.meter, self.metric, self.scores, self.units, self.seed = meter, metric, scores, units, seed
        self.as_written, self.family = as_written, Family.of(units, scores.values)
        self.full, self.base = meter.full, meter.base
        self.measured: dict[str, Candidate] = {}
        self.passed: list[tuple[Variant, Margin]] = []

    @property
    def parts(self) -> Parts:
        """What the gates are on."""
        return self.scores.parts

    def variant(self, kept: Kept) -> Variant:
        """The adapter that keeps some units."""
        gates, by = torch.zeros(len(self.parts)), self.units.by
        gates[self.units.parts_of(kept)] = 1
        what = (
            "directions" if by == "direction" else f"of {len(self.units.movable)} {by}{'es' if by[-1] == 'x' else 's'}"
        )
        return Variant(f"{len(kept)} {what}", gates)

    def propose(self, goal: Goal) -> Variant:
        """What is to stay, by the validation examples: the full adapter where nothing smaller passes."""
        if goal.margin is not None:
            return self.within(goal.margin)
        found = Variant("chosen", gates_for(goal, self.family, self.scores))
        self.note([found])
        return found

    def within(self, margin: Margin) -> Variant:
        """The smallest that the validation examples show to be within a margin, or the full adapter."""
        candidates = self.family.candidates

        def passes(asked: Sequence[int]) -> list[bool]:
            return [one.outcome == "shown" for one in self.judge([self.variant(candidates[i]) for i in asked], margin)]

        width = 3 if metric_named(self.metric).needs_text else 1  # answers of several are written in one go
        index = smallest_passing(len(candidates), passes, width)  # the largest of them is the full adapter
        return self.full if index is None else self.variant(candidates[index])

    def judge(self, variants: Sequence[Variant], margin: Margin) -> list[Verdict]:
        """Verdicts on the validation examples, which rest on the choice and so prove nothing; noted and said."""
        verdicts = judged(self.meter, variants, margin, DATA, self.seed, self.full, self.base)
        self.note(variants, verdicts)
        shown = [one for one, verdict in zip(variants, verdicts, strict=True) if verdict.outcome == "shown"]
        self.passed += [(one, margin) for one in shown]
        for variant, verdict in zip(variants, verdicts, strict=True):
            self.meter.say(
                f"{variant.label}: {self.metric} worse by {verdict.lost:.3g}, at most {verdict.lost_at_most:.3g} "
                f"(margin {verdict.margin:.3g})"
            )
        return verdicts

    def within_as_written(self, proposal: Variant, margin: Margin | None) -> Variant | None:
        """The smallest from the proposal on that the validation examples show to be within a margin as it is written.

        Returns:
            None where not even all of the adapter is, in its new number format. Without a margin, the proposal.
        """
        if margin is None:
            self.note([self.as_written(proposal)])
            return proposal
        sizes = self.passed_within(margin) | {int(one.gates.sum()): one for one in (proposal, self.full)}
        for size in sorted(sizes):
            is_shown = size >= int(proposal.gates.sum()) and self.judge([self.as_written(sizes[size])], margin)
            if is_shown and is_shown[0].outcome == "shown":
                return sizes[size]
        return None

    def passed_within(self, margin: Margin) -> dict[int, Variant]:
        """Variants in the basis that the validation examples showed to be within a margin, by number of parts."""
        own = (one for one, by in self.passed if one.adapter == self.full.adapter and by == margin)
        return {int(one.gates.sum()): one for one in own}

    def measure_others(self, margin: Margin | None) -> None:
        """Measure what smaller adapters are compared with, while the adapter is on the model."""
        for name in (DATA, CONFIRM):
            if self.meter.examples(name):
                self.meter.scores(self.metric, [self.full], name)
                if margin is not None:
                    others = [self.full] if margin.share is None else [self.full, self.base]
                    self.meter.scores(margin.metric, others, name)

    def certify(self, proposal: Variant, margin: Margin) -> tuple[Variant | None, Verdict]:
        """The verdict on held-out examples, of a fixed sequence that ends in the proposal.

        It begins with the largest adapter that the validation examples showed to be within the margin, and stops at the
        first that is not shown here, so that asking several times takes no correction.

        Returns:
            The smallest that is shown and its verdict; or None, and the verdict on the first of them.
        """
        n_kept = int(proposal.gates.sum())
        others = self.passed_within(margin)
        sizes = [size for size in sorted(others, reverse=True) if n_kept < size < len(self.parts)]
        sequence = [others[size] for size in sizes[:: max(1, math.ceil(len(sizes) / _MOST_BEFORE))]]
        return last_shown([*sequence, proposal], lambda one: self.on_held_out(self.as_written(one), margin))

    def on_held_out(self, variant: Variant, margin: Margin) -> Verdict:
        """The verdict on one adapter, said."""
        verdict = judged(self.meter, [variant], margin, CONFIRM, self.seed, self.full, self.base)[0]
        self.meter.say(f"{variant.label}: {verdict.sentence}")
        return verdict

    def allowed(self, margin: Margin | None) -> float | None:
        """How much worse an adapter may be on the validation examples, in the unit of the metric."""
        if margin is None or margin.share is None:
            return margin and margin.amount
        full, base = self.meter.scores(self.metric, [self.full, self.base], DATA).values  # measured before
        return float(margin.share * (base - full))

    def note(self, variants: Sequence[Variant], verdicts: Sequence[Verdict] = ()) -> None:
        """Keep what was measured on the validation examples.

        Args:
            variants: of the parts that are gated, or of the adapter that is on the model now.
            verdicts: on them, if there are.
        """
        everything = list(variants) if self.measured else [self.full, *variants]
        values = self.meter.scores(self.metric, everything, DATA).values.tolist()
        by_digest = {one.digest: verdict for one, verdict in zip(variants, verdicts, strict=False)}
        for variant, value in zip(everything, values, strict=True):
            before = self.measured.get(variant.digest)
            if before is not None and before.lost_at_most is not None:
                continue  # judged already, by the margin that is asked for: wider ones are tried after it
            parts = self.parts if variant.adapter == self.full.adapter else self.meter.parts
            size = parts.n_sites_kept(variant.gates), parts.n_parameters_kept(variant.gates)
            verdict = by_digest.get(variant.digest)
            lost = (verdict.lost, verdict.lost_at_most) if verdict else (None, None)
            self.measured[variant.digest] = Candidate(
                variant.label, *size, value, *lost, variant.adapter.startswith(HEALED)
            )


def gates_for(goal: Goal, family: Family, scores: PartScores) -> Tensor:
    """(n_parts,), 1 for what stays under a goal that is a size: a budget, a rank or a share of the energy.

    Raises:
        BudgetError: nothing fits.
    """
    parts, units, gates = scores.parts, family.units, torch.zeros(len(scores.parts))
    if goal.rank is not None:
        return _at_rank(parts, torch.as_tensor(scores.values), goal)
    if goal.parameters is not None:
        gates[units.parts_of(family.within(goal.parameters))] = 1
        return gates
    assert goal.energy is not None
    fixed = scores.values[list(units.fixed)].sum()
    wanted = goal.energy * scores.values.sum() * (1 - 1e-12) - fixed
    kept = next((one for one in family.candidates if family.scores[list(one)].sum() >= wanted), None)
    if kept is None:
        raise BudgetError(f"energy={goal.energy} is not reached by {units.by}s. Pass less, or leave --by out.")
    gates[units.parts_of(kept)] = 1
    return gates


def _at_rank(parts: Parts, values: Tensor, goal: Goal) -> Tensor:
    """1 for the best directions of every site that may stay, at most `goal.rank`; exactly so many where uniform."""
    gates = {}
    for name, own in parts.by_site(values).items():
        rank = goal.rank if goal.sites is None or name in goal.sites else 0
        best = torch.argsort(own, descending=True, stable=True)[:rank]
        gates[name] = torch.zeros(len(own)).index_fill(0, best, 1.0)
    found = parts.from_sites(gates)
    return found if goal.is_uniform else found * torch.as_tensor(is_worth_keeping(values.numpy()))


def is_whole(variant: Variant) -> bool:
    """Whether nothing is dropped."""
    return bool((variant.gates == 1).all())


def scaled(margin: Margin, factor: float) -> Margin:
    """A margin so many times as wide."""
    share, amount = ((one and factor * one) for one in (margin.share, margin.amount))
    return dataclasses.replace(margin, share=share, amount=amount)
