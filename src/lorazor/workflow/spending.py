"""Budgets of a training step: its cost is measured before the selection run, and that of the choice after it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from lorazor.errors import BudgetError
from lorazor.measure.peak import check_has_peak
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.cost import Costs, Part
from lorazor.select.scores import CONTROLS
from lorazor.train.choose import CostLimit
from lorazor.train.probing import Probing, Unit

COSTS_FILE = "costs.json"


@dataclass
class Spending:
    """A limit on the cost of a step, and what every choice of sites costs.

    Attributes:
        limit: as it was asked for.
        names: of all sites.
        score: that sites are ranked by.
        probing: measures steps.
        run: keeps what was measured, in `costs.json`.
        costs: of every choice, from a few that were measured.
        all_sites: the cost of LoRA on all sites, as measured.
        recomputed: the peak of the same with activations recomputed, which costs time; None of time, where that is how
            it is trained, and where the model cannot.
    """

    limit: CostLimit
    names: list[str]
    score: str
    probing: Probing
    run: RunFolder
    costs: Costs
    all_sites: float
    recomputed: float | None

    @classmethod
    def begin(cls, limit: CostLimit, names: list[str], score: str, probing: Probing, run: RunFolder) -> Spending:
        """Measure a few choices of sites, or read what an interrupted run has measured.

        Raises:
            SettingsError: a peak of memory that cannot be measured, or a way of training in which no sites are chosen.
            BudgetError: a limit that no site fits under.
        """
        path = run.path / COSTS_FILE
        if (document := from_main_process(lambda: read_costs(path))) is not None:
            known = _costs_of(document), document["all_sites"], document.get("recomputed")
            return cls(limit, names, score, probing, run, *known)
        unit = unit_of(limit)
        if unit == "bytes":
            check_has_peak(probing.model)
        costs, probes, measured = probing.costs(unit)
        recomputed = probing.recomputed(len(names)) if unit == "bytes" else None
        spending = cls(limit, names, score, probing, run, costs, measured[0], recomputed)
        spending._check()
        rows = [
            {"n_sites": sum(probe), "measured": value, "predicted": costs.of(probe)}
            for probe, value in zip(probes, measured, strict=True)
        ]
        document = {"budget": str(limit), "unit": unit, "limit": spending.most, "all_sites": measured[0]}
        document |= {
            "recomputed": recomputed,
            "predicted": None,
            "measured": None,
            "probes": rows,
            "costs": dataclasses.asdict(costs),
        }
        run.write_json(COSTS_FILE, document)
        return spending

    @property
    def most(self) -> float:
        """The limit, in seconds or bytes."""
        return self.limit.n_bytes if self.limit.share is None else self.limit.share * self.all_sites  # pyright: ignore

    @property
    def has_room_for_all(self) -> bool:
        """Whether there is nothing to choose."""
        return self.most >= self.all_sites

    def choose(self, scores: Tensor) -> Tensor:
        """The sites to keep, (n_sites,) bool: all that there are where the limit has room for them; see `Costs`."""
        if self.has_room_for_all:
            return torch.ones(len(self.names), dtype=torch.bool)
        return (self.costs.in_order if self.score in CONTROLS else self.costs.choose)(scores, self.most)

    def end(self, model: PeftModel, kept: list[str]) -> str:
        """Measure a step with the sites that were chosen, in turn with all sites, and keep it.

        Args:
            model: with LoRA on all sites.
            kept: names of those that stay.
        Returns:
            A sentence: predicted against measured.
        """
        unit, probing = unit_of(self.limit), dataclasses.replace(self.probing, model=model)
        choice = [name in kept for name in self.names]
        everything, measured = probing.measure(unit, [[True] * len(choice), choice])
        predicted = self.costs.of(choice)
        document = from_main_process(lambda: read_costs(self.run.path / COSTS_FILE))
        assert document is not None
        found = {"predicted": predicted, "measured": measured * self.all_sites / everything}
        self.run.write_json(COSTS_FILE, document | found)
        missed = " That is more than the limit." if found["measured"] > self.most else ""
        return (
            f"{_WORDS[unit]} is predicted at {predicted / self.all_sites:.3f} of that of LoRA on all sites, "
            f"{amount(predicted, unit)}; measured in turn with it: {measured / everything:.3f}.{missed}"
        )

    def __str__(self) -> str:
        unit, least = unit_of(self.limit), self.costs.least / self.all_sites
        return (
            f"{_WORDS[unit]} with LoRA on all {len(self.names)} sites: {amount(self.all_sites, unit)}; with the "
            f"cheapest site alone {least:.3f} of it; the limit {self.most / self.all_sites:.3f}."
            + (f" {_NOTHING_TO_CHOOSE}" if self.has_room_for_all else self._another_way)
        )

    @property
    def _another_way(self) -> str:
        """What drops no site and may fit as well."""
        if self.recomputed is None:
            return ""
        what = f"{amount(self.recomputed, 'bytes')}, {self.recomputed / self.all_sites:.3f}"
        return f" With --gradient-checkpointing and more time, LoRA on all sites takes {what}."

    def _check(self) -> None:
        unit, least = unit_of(self.limit), self.costs.least
        if not least <= self.most:
            what = f"{amount(least, unit)}, {least / self.all_sites:.3f} of LoRA on all sites"
            raise BudgetError(
                f"{self.limit} leaves no room for a site: on the frozen model, the cheapest one alone takes {what}. "
                f"Pass more.{self._another_way}"
            )


_NOTHING_TO_CHOOSE = (
    "It has room for all sites, and all are kept; 'lorazor train --method lora' trains them without a choice."
)

_WORDS: dict[Unit, str] = {"seconds": "The time of a step", "bytes": "The peak of memory"}


def unit_of(limit: CostLimit) -> Unit:
    """What a limit counts."""
    return "seconds" if limit.name == "step_time" else "bytes"


def amount(value: float, unit: Unit) -> str:
    """A cost for people."""
    if unit == "seconds":
        return f"{value:.3g} s"
    return f"{value / 10**6:,.0f} MB" if value >= 10**8 else f"{value / 10**6:.3g} MB"


def read_costs(path: Path) -> dict[str, Any] | None:
    """What is in a `costs.json`; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def summary(path: Path) -> dict[str, Any] | None:
    """Of a `costs.json`: the budget, its limit, the cost of all sites, and of the choice, predicted and measured."""
    document = from_main_process(lambda: read_costs(path))
    names = ("budget", "unit", "limit", "all_sites", "predicted", "measured")
    return None if document is None else {name: document[name] for name in names}


def _costs_of(document: dict[str, Any]) -> Costs:
    costs = document["costs"]
    parts = tuple(Part(part["amount"], tuple(part["sites"]), part["time"]) for part in costs["parts"])
    return Costs(costs["constant"], tuple(costs["times"]), parts)
