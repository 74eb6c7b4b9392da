"""The search for a subset: score, drop, refit, measure against the full adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lorazor.adapter.folder import AdapterFolder
from lorazor.data.examples import Example
from lorazor.measure.metrics import metric_named
from lorazor.select.projection import sites_for_parameters
from lorazor.select.ranks import mixed_ranks, uniform_rank
from lorazor.select.refit import GateFit, RefitStep, sparse_gates
from lorazor.select.subsets import (
    Divisor,
    Unit,
    eliminate,
    is_tolerable,
    make_units,
    nested,
    smallest_passing,
    spending,
    unit_scores,
    units_within,
    useful_units,
    within_budget,
)
from lorazor.select.trained import NEEDS_DATA, PartScores, divisor, score_without_data
from lorazor.select.verdict import in_words
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.workflow.refit import refit_parts, training_batches
from lorazor.workflow.score import score_examples
from lorazor.workflow.variants import FULL, Candidate, Variants

_N_STEPS = 64
"""A search for a tolerance tells sizes apart down to this part of all units: each question costs a measurement."""

BASELINES = ("random", "first-layers", "last-layers", "norm")


@dataclass
class Search(Variants):
    """The search among the parts of a loaded adapter.

    Attributes:
        folder: the adapter.
        train: examples to refit on, empty without a refit.
        first_scores: of all parts, from the first round.
    """

    folder: AdapterFolder
    train: Sequence[Example]
    first_scores: PartScores | None = field(default=None, kw_only=True)

    def choose(self) -> tuple[Candidate, Tensor]:
        """Find the subset that the settings ask for."""
        full = torch.ones(len(self.parts))
        best = self.measured(FULL, full), full
        searching, budget = self.settings.searching, self.settings.budget
        if self.settings.sparse.sparse:
            return self._sparse()
        for round_index in range(searching.rounds):
            is_kept = best[1] != 0
            scores = self.scores(is_kept)
            if budget.tolerance is not None:
                found = self._by_tolerance(scores, best, round_index)
                if found[0].n_parameters == best[0].n_parameters:
                    break
                best = found
            else:
                kept = self._by_budget(scores, is_kept, round_index)
                if round_index + 1 < searching.rounds:
                    best = best[0], kept
                    continue
                best = self._refitted_and_measured(kept)
        return best

    def scores(self, is_kept: Tensor) -> PartScores:
        """Score the parts that are left; the others are worth nothing."""
        scoring = self.settings.scoring
        if scoring.method in NEEDS_DATA:
            chosen = self.examples[: scoring.score_examples]
            reading = self.settings.reading
            found = score_examples(self.loaded, self.parts, chosen, scoring, reading, self.say, is_kept)
        else:
            found = score_without_data(scoring.method, self.folder, self.parts, scoring.seed)
        self.first_scores = self.first_scores or found
        return found

    def baselines(self, n_parameters: int) -> list[Candidate]:
        """The controls at the same number of parameters, not refitted; norm per parameter, where scores are."""
        found = []
        for method in BASELINES:
            scores = score_without_data(method, self.folder, self.parts, self.settings.scoring.seed)
            values = torch.tensor(scores.values)
            if divisor(method, self.settings.searching.raw) == "parameters":
                values = values / torch.tensor(self.parts.n_parameters)
            gates = sites_for_parameters(values, self.parts.n_parameters, n_parameters).float()
            found.append(dataclasses.replace(self.measured(method, gates), label=method))
        return found

    def _refitted_and_measured(self, gates: Tensor, round_index: int = 0) -> tuple[Candidate, Tensor]:
        """Learn the gates of the parts that stay, if there are examples to learn on, and measure."""
        losses: Sequence[RefitStep] = ()
        if self.train:
            options, scoring = self.settings.refitting, self.settings.scoring
            fit = GateFit(options.refit_steps, options.refit_lr, scoring.gradient_checkpointing)
            gates, losses = refit_parts(self.loaded, self.parts, gates, self._train_batches(), fit)
        label = self._label(gates, round_index)
        self._note_refit(label, losses)
        return self.measured(label, gates), gates

    def _note_refit(self, label: str, steps: Sequence[RefitStep]) -> None:
        if steps:
            self.run.append("refit.jsonl", [{"adapter": label, **dataclasses.asdict(step)} for step in steps])

    def _by_budget(self, scores: PartScores, is_kept: Tensor, round_index: int) -> Tensor:
        """The parts that stay within this round's share of the way from everything to the budget."""
        searching = self.settings.searching
        costs_of_parts, budget = self._costs_and_budget()
        now = sum(cost for cost, kept in zip(costs_of_parts, is_kept.tolist(), strict=True) if kept)
        n_left = searching.rounds - round_index
        target = math.ceil(now * (budget / now) ** (1 / n_left)) if n_left > 1 and now > budget else budget
        if searching.ranks != "keep":
            return self._ranks_within(scores, target)
        units = self._units(is_kept)
        costs = [sum(costs_of_parts[part] for part in unit.parts) for unit in units]
        values = unit_scores(scores.values, units, self._divisor).tolist()
        if searching.verify:
            kept = self._verified(units, values, costs, target)
        else:
            kept = units_within(scores.values, units, costs, target, searching.by, self._divisor)
            n_worthless = sum(value <= 0 for value in values)
            if n_worthless and searching.by != "window":
                self.say(f"{n_worthless} of {len(units)} units score 0 or less, and go whatever the budget.")
        return self._gates(units, kept)

    @property
    def _divisor(self) -> Divisor:
        return divisor(self.settings.scoring.method, self.settings.searching.raw)

    def _verified(self, units: list[Unit], values: list[float], costs: list[int], budget: int) -> Sequence[int]:
        within_budget(values, costs, budget)  # refuses a budget under one unit
        if sum(costs) <= budget:
            return useful_units(values)
        start = range(len(units))
        for kept in eliminate(start, values, self.settings.searching.verify, lambda kept: self._cost(units, kept)):
            if sum(costs[unit] for unit in kept) <= budget:
                return kept
        raise AssertionError("one unit fits into the budget")

    def _by_tolerance(
        self, scores: PartScores, best: tuple[Candidate, Tensor], round_index: int
    ) -> tuple[Candidate, Tensor]:
        """The smallest subset found of what is left that is no worse than the full adapter."""
        searching = self.settings.searching
        units = self._units(best[1] != 0)
        values = unit_scores(scores.values, units, "nothing" if searching.by == "window" else self._divisor).tolist()
        higher_is_better = metric_named(self.metric).higher_is_better
        passed = {len(units): best}

        def passes(kept: Sequence[int], n_units: int) -> bool:
            candidate, gates = self._refitted_and_measured(self._gates(units, kept), round_index)
            is_fine = is_tolerable(candidate.difference, higher_is_better, searching.rule)
            self.say(
                f"{candidate.label}: {self.metric} {candidate.value:.4g}, to the full adapter "
                f"{in_words(candidate.difference)}: {'no worse' if is_fine else 'worse'} by {searching.rule}"
            )
            if is_fine:
                passed[n_units] = candidate, gates
            return is_fine

        if searching.verify:
            start = range(len(units))
            for kept in eliminate(start, values, searching.verify, lambda kept: self._cost(units, kept)):
                if not passes(kept, len(kept)):
                    break
        else:
            keep = nested(values, searching.by == "window")
            smallest_passing(len(units), lambda n_units: passes(keep(n_units), n_units), max(1, len(units) // _N_STEPS))
        return passed[min(passed)]

    def _cost(self, units: list[Unit], kept: Sequence[int]) -> float:
        gates = self._gates(units, kept)
        value = self.measured(self._label(gates), gates).value
        return -value if metric_named(self.metric).higher_is_better else value

    def _ranks_within(self, scores: PartScores, budget: int) -> Tensor:
        """Components that stay, each site at a rank of its own or all at one rank."""
        sites = self.parts.sites
        own = torch.tensor(scores.values).split([site.rank for site in sites])
        of_sites = {site.name: values for site, values in zip(sites, own, strict=True)}
        sizes = {site.name: site.n_parameters // site.rank for site in sites}
        if self.settings.searching.ranks == "uniform":
            rank, kept = uniform_rank(of_sites, sizes, budget)
            self.say(f"One rank for all sites: {rank}.")
        else:
            kept = mixed_ranks(of_sites, sizes, budget)
        return torch.tensor([float(component in kept[site.name]) for site in sites for component in range(site.rank)])

    def _sparse(self) -> tuple[Candidate, Tensor]:
        """WeightLoRA's update on the trained adapter: sites and weights at once."""
        budget, options = self.settings.budget, self.settings.refitting
        costs, amount = self._costs_and_budget()
        by_sites = budget.keep is not None or budget.keep_fraction is not None
        settings = WeightLoraSettings(
            keep=amount if by_sites else None,
            n_parameters=None if by_sites else amount,
            warmup_steps=options.refit_steps,
            gate_lr=self.settings.sparse.gate_lr,
        )
        losses = []
        gates = sparse_gates(
            self.loaded.model, self._train_batches(), self.parts.gated, self.parts.n_parameters, settings, losses.append
        )
        self.first_scores = PartScores(self.parts.owners, np.abs(gates.double().numpy()))
        label = self._label(gates)
        self._note_refit(label, losses)
        return self.measured(label, gates), gates

    def _costs_and_budget(self) -> tuple[list[int], int]:
        sizes = self.parts.n_parameters
        return spending(self.settings.budget, sizes, len(self.parts.sites), sum(sizes))

    def _units(self, is_kept: Tensor) -> list[Unit]:
        """Units of the parts that are left."""
        parts = self.parts
        kept = is_kept.nonzero().flatten().tolist()
        units = make_units(
            parts.sites,
            [parts.site_of[part] for part in kept],
            [parts.n_parameters[part] for part in kept],
            self.settings.searching.by,
        )
        return [dataclasses.replace(unit, parts=tuple(kept[part] for part in unit.parts)) for unit in units]

    def _gates(self, units: Sequence[Unit], kept: Sequence[int]) -> Tensor:
        gates = torch.zeros(len(self.parts))
        for unit in kept:
            gates[list(units[unit].parts)] = 1
        return gates

    def _label(self, gates: Tensor, round_index: int = 0) -> str:
        """What people call a subset. What stands in brackets tells those of one size apart, on resume too."""
        kept = gates[gates != 0]
        what = "components" if self.parts.are_components else "sites"
        suffix = f", round {round_index + 1}" if round_index else ""
        suffix += ", refitted" if (kept != 1).any() else ""
        return f"{len(kept)} {what}{suffix} ({self.digest(gates)[:8]})"

    def _train_batches(self) -> list:
        return training_batches(self.loaded, self.train, self.settings.reading, self.settings.scoring.seed, self.say)
