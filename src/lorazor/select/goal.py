"""The goal of a search: a budget of parameters, a rank, or a margin. Checked once, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from lorazor.adapter.folder import AdapterFolder, load_tensors, lora_dtypes, split_key
from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import AS_PLAIN_LORA, Site
from lorazor.errors import BudgetError, SettingsError
from lorazor.fields import UNITS, n_bytes
from lorazor.select.search import Units
from lorazor.select.verdict import Margin
from lorazor.settings import By, Score, ShrinkSettings

DEFAULT_MARGIN = "2%"
_HEADER_BYTES = 100
"""Most that the header of a safetensors file says of a tensor, but for its name: data type, shape, where it begins."""


@dataclass(frozen=True)
class Goal:
    """What is asked for: a margin or a size.

    Attributes:
        margin: the smallest adapter that is no worse by more.
        parameters: the best adapter of at most so many numbers in A and B.
        rank: the best directions of every site, at most so many.
        energy: the least directions that carry this share of all squared singular values.
        is_uniform: one rank for all sites that stay.
        sites: names of the only sites that may stay under a rank; None for all.
        judged_by: what the verdict on a size is by.
    """

    margin: Margin | None = None
    parameters: int | None = None
    rank: int | None = None
    energy: float | None = None
    is_uniform: bool = False
    sites: frozenset[str] | None = None
    judged_by: Margin | None = None

    @property
    def verdict_margin(self) -> Margin:
        """The margin of the verdict on held-out examples."""
        return self.margin or self.judged_by or Margin.parse(DEFAULT_MARGIN)

    def __str__(self) -> str:
        if self.margin is not None:
            return f"a margin of {self.margin}"
        if self.parameters is not None:
            return f"at most {self.parameters:,} parameters"
        if self.energy is not None:
            return f"{self.energy:g} of the energy"
        if self.sites is not None:
            return f"rank {self.rank} at most, on sites of the fleet"
        return f"rank {self.rank} at every site" if self.is_uniform else f"rank {self.rank} at most"

    @classmethod
    def of(cls, settings: ShrinkSettings, folder: AdapterFolder, has_data: bool) -> Goal:
        """Read the goal off the settings.

        Args:
            settings: of the run.
            folder: the adapter.
            has_data: whether there are validation examples.
        Raises:
            SettingsError: goals that contradict each other or the other settings.
            BudgetError: a budget out of range.
        """
        names = ("margin", "params_fraction", "params", "size", "max_rank", "energy")
        given = [f"{name}={getattr(settings, name)}" for name in names if getattr(settings, name) is not None]
        if len(given) > 1:
            raise SettingsError(
                f"{' and '.join(given)}: pass one goal. A size is met as well as it can be; a margin finds the size."
            )
        if settings.uniform and settings.max_rank is None:
            raise SettingsError("uniform goes with max_rank: --max-rank R --uniform gives every site exactly rank R.")
        if not has_data and (settings.margin is not None or not given):
            raise SettingsError(
                "A margin is measured on examples. Pass --data, or a size: --energy 0.99, --max-rank 8, "
                "--params-fraction 0.25."
            )
        if not has_data and settings.score not in (None, "energy", "random", "first-layers", "last-layers"):
            raise SettingsError(f"score={settings.score!r} looks at examples. Pass --data, or score by energy.")
        _check_dora(settings, folder.sites, has_data)
        unseen = [site.name for site in folder.sites if site.is_on_parameter or not site.has_directions]
        if settings.score == "balanced" and unseen:
            raise SettingsError(
                f"score='balanced' knows nothing of {unseen[0]}: LoRA on parameters (experts) sees no tokens, and "
                "embeddings and convolutions cannot be taken apart. Score by fisher or credit."
            )
        if settings.energy is not None:
            if has_data:
                raise SettingsError("energy is a share of the weights alone. Leave --data out, or pass --margin.")
            if not 0 < settings.energy <= 1:
                raise BudgetError(
                    f"energy={settings.energy} is no share. Pass more than 0 and at most 1, such as 0.99."
                )
            return cls(energy=settings.energy)
        if settings.max_rank is not None:
            _check_rank(settings, folder.sites)
            return cls(rank=settings.max_rank, is_uniform=settings.uniform)
        if settings.margin is not None or not given:
            return cls(margin=Margin.parse(DEFAULT_MARGIN if settings.margin is None else settings.margin))
        return cls(parameters=_parameters(settings, folder, given[0]))

    @classmethod
    def in_fleet(cls, settings: ShrinkSettings, folder: AdapterFolder, rank: int, room: Collection[str]) -> Goal:
        """The best that a slot of a fleet holds.

        Args:
            settings: of the run; a margin is that of the verdict.
            folder: the adapter.
            rank: of the slots.
            room: modules that they have room for.
        Raises:
            SettingsError: another size is asked for, or the sites cannot be taken apart.
            BudgetError: the adapter has no site there.
        """
        sizes = ("params_fraction", "params", "size", "max_rank", "energy")
        given = [f"{name}={getattr(settings, name)}" for name in sizes if getattr(settings, name) is not None]
        if given or settings.uniform:
            raise SettingsError(f"{(given or ['uniform'])[0]}, but the fleet says the size. Pass one of the two.")
        own = {site.name: site for site in folder.sites if site.name in room}
        if not own:
            raise BudgetError(
                f"{folder.name!r} has none of its {len(folder.sites)} sites on a module of the fleet. Make a fleet of "
                "it and the others: lorazor fleet."
            )
        highest = min(rank, max(site.rank for site in own.values()))
        _check_rank(dataclasses.replace(settings, max_rank=highest), list(own.values()))
        _check_dora(settings, folder.sites, has_data=True)
        judged_by = None if settings.margin is None else Margin.parse(settings.margin)
        return cls(rank=highest, sites=frozenset(own), judged_by=judged_by)


def dtype_named(name: str) -> torch.dtype | None:
    """The number format that A and B are written in; None for "keep"."""
    return None if name == "keep" else getattr(torch, name)


def default_score(by: By, sites: Sequence[Site], has_data: bool) -> Score:
    """What parts are ranked by where the settings name no score: the one place that says it.

    Args:
        by: what stays or goes together.
        sites: of the adapter; one that cannot be taken apart has no directions to compare with.
        has_data: whether there are examples to score on.
    """
    if not has_data:
        return "energy"
    return "fisher" if by == "direction" and all(site.has_directions for site in sites) else "credit"


def _check_dora(settings: ShrinkSettings, sites: Sequence[Site], has_data: bool) -> None:
    """Refuse what DoRA has not: directions, and an energy that says how large the update is."""
    name = next((site.name for site in sites if site.is_dora), None)
    if name is not None and settings.by == "direction":
        raise SettingsError(
            f"{name} is DoRA, which divides by the norm of all of W + s B A: it has no directions, and sites stay or "
            f"go whole. Pass --by site, group, kind, layer, prefix or window. {AS_PLAIN_LORA}"
        )
    if name is not None and (settings.score or default_score(settings.by, sites, has_data)) == "energy":
        raise SettingsError(
            f"The energy of A and B does not say what DoRA does to {name}. Pass --data, which scores by credit."
        )


def _check_rank(settings: ShrinkSettings, sites: Sequence[Site]) -> None:
    """Refuse a rank that the sites do not have, or that one of them cannot be lowered to."""
    rank, ranks = settings.max_rank, [site.rank for site in sites]
    assert rank is not None
    if settings.by != "direction":
        raise SettingsError(f"max_rank={rank} lowers ranks, but by={settings.by!r} keeps them. Leave one of them out.")
    if not 1 <= rank <= max(ranks):
        raise BudgetError(f"max_rank={rank}, but the sites have ranks up to {max(ranks)}. Pass 1..{max(ranks)}.")
    if settings.uniform and rank > min(ranks):
        raise BudgetError(f"max_rank={rank} for all sites, but one has rank {min(ranks)}. Pass 1..{min(ranks)}.")
    whole = next((site for site in sites if not site.has_directions and site.rank > rank), None)
    if whole is not None:
        raise BudgetError(
            f"max_rank={rank}, but {whole.name} has rank {whole.rank} and cannot be taken apart. Pass a budget "
            "instead, such as --params-fraction 0.25."
        )


def _parameters(settings: ShrinkSettings, folder: AdapterFolder, given: str) -> int:
    """The budget in parameters; `given` is what was passed."""
    total, budget = sum(site.n_parameters for site in folder.sites), settings.params
    if settings.params_fraction is not None:
        if not 0 < settings.params_fraction <= 1:
            raise BudgetError(
                f"params_fraction={settings.params_fraction} is no share. Pass more than 0 and at most 1."
            )
        budget = int(settings.params_fraction * total)
    if settings.size is not None:
        budget = min(total, _parameters_in(settings.size, folder, dtype_named(settings.weights_dtype)))
    assert budget is not None
    least = Units.of(Parts(folder.sites), settings.by, settings.stack).smallest
    if not least <= budget <= total:
        unit = "direction" if settings.by == "direction" else f"choice by {settings.by}"
        raise BudgetError(
            f"{given} leaves room for {max(budget, 0):,} parameters, but the adapter has {total:,}, and the smallest "
            f"{unit} {least:,}. Pass something in between."
        )
    return budget


def _parameters_in(size: str, folder: AdapterFolder, dtype: torch.dtype | None) -> int:
    """How many of the adapter's numbers in A and B fit in a file of a size, beside what else it holds."""
    if (room := n_bytes(size)) is None:
        raise BudgetError(f"size={size!r} is no size. Pass {UNITS}.")
    tensors = load_tensors(folder)
    dtypes = lora_dtypes(folder) if dtype is None else {dtype}
    width = max(one.itemsize for one in dtypes)
    others = sum(one.nbytes for key, one in tensors.items() if split_key(key) is None)
    header = _HEADER_BYTES + sum(len(key.encode()) + _HEADER_BYTES for key in tensors)
    return (room - others - header) // width
