"""Many adapters of one base model on one server: what they need together, and what a more common form would save."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorazor.adapter.folder import AdapterFolder
from lorazor.errors import AdapterError, SettingsError
from lorazor.files import json_text, write_text
from lorazor.serve.base import BaseOutline
from lorazor.serve.flags import in_server, size_of_rank, slot_bytes
from lorazor.serve.table import Server

FORMAT = "lorazor.fleet/1"
Energies = Mapping[str, Tensor]
"""Of the directions of each site, see `energies`."""
_SHARES = (0.5, 0.25, 0.1)
"""Of the sites, for which `common_forms` says what they save."""


@dataclass(frozen=True)
class Fleet:
    """What a server is told to have room for.

    Attributes:
        server: its title, `vllm >= 0.32`.
        base_model: of all adapters.
        max_rank: of the slots.
        sites: modules of the base model that have one.
    """

    server: str
    base_model: str
    max_rank: int
    sites: tuple[str, ...]

    def save(self, path: Path) -> None:
        """Write it to a file, whole or not at all."""
        write_text(path, json_text({"format": FORMAT, **vars(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Fleet:
        """Read what `save` wrote.

        Raises:
            SettingsError: no such file, or another kind of file.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"Cannot read {str(path)!r}: {error}. Pass what 'lorazor fleet --out' wrote."
            ) from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise SettingsError(f"{str(path)!r} is no fleet. Pass what 'lorazor fleet --out' wrote.")
        if sorted(document) != sorted(cls.__annotations__) or not isinstance(document["sites"], list):
            raise SettingsError(f"{str(path)!r} is no fleet of this version of lorazor. Write it anew.")
        return cls(**{**document, "sites": tuple(document["sites"])})


@dataclass(frozen=True)
class CommonForm:
    """What would be if every adapter had one form more in common.

    Attributes:
        what: which form, in words.
        max_rank: of the slots.
        n_sites: modules with a slot.
        slot_bytes: of a slot.
        energy_lost: share of the squared norm of its updates that the adapter loses that loses most, if it is cut by
            its weights alone. `lorazor shrink` does better, and says what that costs on data.
        of: that adapter.
    """

    what: str
    max_rank: int
    n_sites: int
    slot_bytes: int
    energy_lost: float
    of: str


def base_of_all(folders: Sequence[AdapterFolder]) -> str:
    """The one base model that adapters name.

    Raises:
        SettingsError: they name several, or none.
    """
    named: dict[str, list[str]] = {}
    for folder in folders:
        name = str(folder.config.get("base_model_name_or_path") or "")
        beside = folder.path / name
        named.setdefault(str(beside.resolve()) if name and beside.is_dir() else name, []).append(str(folder.path))
    if len(named) > 1:
        listed = "; ".join(f"{base or 'none'}: {', '.join(paths)}" for base, paths in named.items())
        raise SettingsError(
            f"The adapters are of {len(named)} base models, and a server has one: {listed}. Make a fleet of each; if "
            "they are one, pass it (--model)."
        )
    return next(iter(named))


def check_base(fleet: Fleet, path: Path, folders: Sequence[AdapterFolder]) -> None:
    """Refuse adapters of another base model than a fleet's.

    Args:
        fleet: the fleet.
        path: its file, for the message.
        folders: the adapters.
    Raises:
        SettingsError: they name another one.
    """
    if fleet.base_model != (name := base_of_all(folders)):
        raise SettingsError(
            f"{str(path)!r} is a fleet of {fleet.base_model!r}, and {folders[0].name!r} is of {name!r}. If they are "
            "one, pass it (--model)."
        )


def check_within(fleet: Fleet, folder: AdapterFolder, base: BaseOutline | None) -> None:
    """Refuse an adapter that a running server would cut.

    Raises:
        AdapterError: it has sites on modules that the server was not told of, or a rank above its slots.
    """
    outside, above = _beyond(fleet, folder, base)
    advice = "Shrink it, or start the server with the flags of a fleet that has it."
    if outside:
        raise AdapterError(
            f"{folder.name!r} has {len(outside)} of its {len(folder.sites)} sites, such as {outside[0]!r}, on "
            f"modules that the server was not told of: it leaves them out without a word. {advice}"
        )
    if above:
        raise AdapterError(
            f"{folder.name!r} has rank {max(site.rank for site in folder.sites)}, and slots have rank "
            f"{fleet.max_rank}. {advice}"
        )


def is_within(fleet: Fleet, folder: AdapterFolder, base: BaseOutline | None) -> bool:
    """Whether a slot has room for all of an adapter."""
    return not any(_beyond(fleet, folder, base))


def _beyond(fleet: Fleet, folder: AdapterFolder, base: BaseOutline | None) -> tuple[list[str], list[str]]:
    """Sites on modules without room, and sites of too high a rank."""
    room = in_server(fleet.sites, base)
    outside = [site.name for site in folder.sites if site.name not in room]
    return outside, [site.name for site in folder.sites if site.rank > fleet.max_rank]


def smaller(
    fleet: Fleet,
    sizes: Mapping[str, Energies],
    server: Server,
    base: BaseOutline | None,
    max_rank: int | None,
    sites_fraction: float | None,
) -> Fleet:
    """What the adapters of a fleet are to be shrunk to.

    Args:
        fleet: what they need as they are.
        sizes: the energies of each, by its path.
        server: a row of the table.
        base: their base model.
        max_rank: of the slots.
        sites_fraction: share of the sites; those stay that hold most of the energy.
    Raises:
        SettingsError: out of range, or no rank of a slot.
    """
    rank = fleet.max_rank if max_rank is None else max_rank
    if rank > fleet.max_rank or rank not in server.ranks:
        ranks = ", ".join(str(one) for one in server.ranks if one <= fleet.max_rank)
        raise SettingsError(f"max_rank={rank}, and slots of {server.title} for these adapters can have {ranks}.")
    if sites_fraction is None:
        return dataclasses.replace(fleet, max_rank=rank)
    if not 0 < sites_fraction <= 1:
        raise SettingsError(f"sites_fraction={sites_fraction} is no share. Pass more than 0 and at most 1.")
    groups = _groups_by_energy(fleet, [*sizes.values()], base, rank)
    return dataclasses.replace(fleet, max_rank=rank, sites=_first_of(groups, fleet, sites_fraction))


def _groups_by_energy(
    fleet: Fleet, sizes: Sequence[Energies], base: BaseOutline | None, rank: int
) -> list[frozenset[str]]:
    """Sites that the server puts into one matrix, such as q, k and v, in order of the energy that adapters have there.

    By weights alone, the mean over the sites of a group; each adapter counts alike.
    """
    groups = {frozenset(in_server([name], base) & {*fleet.sites}): None for name in fleet.sites}
    totals = [sum(float(one.sum()) for one in own.values()) for own in sizes]

    def worth(group: frozenset[str]) -> float:
        owned = (
            sum(float(own[name][:rank].sum()) for name in group if name in own) / total
            for own, total in zip(sizes, totals, strict=True)
            if total
        )
        return sum(owned) / len(group)

    return sorted(groups, key=worth, reverse=True)


def _first_of(groups: Sequence[frozenset[str]], fleet: Fleet, share: float) -> tuple[str, ...]:
    """A share of the sites, at least one group: the first groups that fit."""
    room, kept = max(1, round(share * len(fleet.sites))), set[str]()
    for group in groups:
        if not kept or len(kept) + len(group) <= room:
            kept |= group
    return tuple(name for name in fleet.sites if name in kept)


def common_forms(sizes: Mapping[str, Energies], fleet: Fleet, server: Server, base: BaseOutline) -> list[CommonForm]:
    """What one more common form would save: lower ranks that slots can have, the sites that all adapters have, fewer.

    Args:
        sizes: the energies of each adapter, by its path.
        fleet: what they need as they are.
        server: a row of the table.
        base: their base model.
    """
    everywhere = set.intersection(*({*one} for one in sizes.values()))
    ranks = [rank for rank in server.ranks if rank < fleet.max_rank]
    forms = [(f"rank {rank}", rank, set(fleet.sites)) for rank in ranks]
    if everywhere and everywhere != set(fleet.sites):
        forms += [("the sites that all of them have", fleet.max_rank, everywhere)]
        forms += [(f"these sites, rank {rank}", rank, everywhere) for rank in ranks]
    groups = _groups_by_energy(fleet, [*sizes.values()], base, fleet.max_rank)
    forms += [(f"{share:.0%} of the sites", fleet.max_rank, {*_first_of(groups, fleet, share)}) for share in _SHARES]
    found = []
    for what, rank, sites in forms:
        lost, of = max((_lost(own, sites, rank), path) for path, own in sizes.items())
        wrapped = in_server(sites, base)
        found.append(CommonForm(what, rank, len(sites), slot_bytes(base, rank, wrapped), lost, of))
    return found


def fleet_of(folders: Sequence[AdapterFolder], server: Server, base_model: str) -> Fleet:
    """What adapters need together: the union of their sites, and slots for the largest rank."""
    sites = tuple(dict.fromkeys(site.name for folder in folders for site in folder.sites))
    rank = max(site.rank for folder in folders for site in folder.sites)
    return Fleet(server.title, base_model, size_of_rank(server, rank), sites)


def _lost(energy: Energies, sites: set[str], rank: int) -> float:
    """Share of an adapter's squared norms that cutting it by its weights loses."""
    total = sum(float(one.sum()) for one in energy.values())
    kept = sum(float(one[:rank].sum()) for name, one in energy.items() if name in sites)
    return 1 - kept / total if total else 0.0
