"""Many adapters of one base model, for one server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.directions import energies
from lorazor.adapter.folder import AdapterFolder, check_is_finite
from lorazor.errors import OutputError, SettingsError
from lorazor.fields import with_fields
from lorazor.serve.base import BaseOutline, base_on_this_machine, check_fits, outline_base
from lorazor.serve.flags import Flags, flags_for, in_server
from lorazor.serve.fleet import (
    CommonForm,
    Fleet,
    base_of_all,
    check_base,
    check_within,
    common_forms,
    fleet_of,
    is_within,
    smaller,
)
from lorazor.serve.form import Form
from lorazor.serve.judging import Judgement, judge, server_named
from lorazor.serve.settings import FleetSettings
from lorazor.serve.shrinking import check_is_right_when_whole
from lorazor.serve.table import SERVERS, Server
from lorazor.settings import ModelSettings
from lorazor.workflow.inspect import known_base
from lorazor.workflow.opening import Adapter, opened


@dataclass(frozen=True)
class FleetMember:
    """One adapter of a fleet.

    Attributes:
        path: the adapter.
        n_sites: its sites.
        rank: the largest of its ranks.
        n_bytes: size of its weights on disk.
        slot_bytes: of a slot on a server for it alone; None where the base model is not known.
        fits: whether it fits the fleet; otherwise it is to be shrunk, with `fleet`.
        judgement: what the server makes of it.
    """

    path: str
    n_sites: int
    rank: int
    n_bytes: int
    slot_bytes: int | None
    fits: bool
    judgement: Judgement


@dataclass(frozen=True)
class FleetResult:
    """What a server has to be told for many adapters.

    Attributes:
        fleet: what it has room for.
        members: the adapters.
        flags: what to tell it, with the bytes of a slot that is told so, and of one that is not.
        slot_bytes_now: of a slot for the adapters as they are; None where the base model is not known.
        common: what one more common form would save of that; empty where the base model is not known.
    """

    fleet: Fleet
    members: tuple[FleetMember, ...]
    flags: Flags
    slot_bytes_now: int | None
    common: tuple[CommonForm, ...]

    def to_document(self) -> dict[str, Any]:
        """As plain JSON data."""
        members = [{**vars(one), "judgement": one.judgement.to_document()} for one in self.members]
        return {**vars(self), "members": members, "words": self.flags.words()}


def plan_fleet(
    adapters: Sequence[Adapter],
    server: str,
    *,
    out: str | Path | None = None,
    settings: FleetSettings | None = None,
    **fields: Any,
) -> FleetResult:
    """Find the flags with which a server has room for all of some adapters, and for nothing else.

    Args:
        adapters: adapter folders, hub ids, or PEFT models in memory.
        server: `vllm`, or with a version.
        out: a file to keep the fleet in, for `given`; it must not exist.
        settings: the fleet of a server that runs, which has to hold all of them; and the base model.
        fields: of `FleetSettings`, in place of those of `settings`.
    Raises:
        LorazorError: an adapter cannot be used, or is of another base model than the others, or does not fit the server
            that runs; or the server has no such flags.
    """
    settings, row = with_fields(FleetSettings, settings, fields), _with_flags(server)
    if not adapters:
        raise SettingsError("No adapters. Pass one or more folders or hub ids.")
    if out is not None and Path(out).exists():
        raise OutputError(f"The file {str(out)!r} exists. Choose another one.")
    given = _given(settings, row)
    with ExitStack() as stack:
        folders = [stack.enter_context(opened(adapter)).folder for adapter in adapters]
        for folder in folders:
            check_is_finite(folder)
        name = settings.model or base_of_all(folders)
        if given is not None and settings.given is not None and settings.model is None:
            check_base(given, settings.given, folders)
        base = _outlined(folders[0], settings)
        for folder in folders:
            if base is not None:
                check_fits(folder, base)
            if given is not None:
                check_within(given, folder, base)
        fleet = given or fleet_of(folders, row, name)
        now = flags_for(row, fleet.sites, fleet.max_rank, base)
        sizes = {str(folder.path): energies(folder) for folder in folders}
        common = () if base is None else tuple(common_forms(sizes, fleet, row, base))
        if settings.plans:
            fleet = smaller(fleet, sizes, row, base, settings.max_rank, settings.sites_fraction)
        flags = flags_for(row, fleet.sites, fleet.max_rank, base)
        assert flags is not None and now is not None
        result = FleetResult(
            fleet=fleet,
            members=tuple(_member(folder, row, base, fleet) for folder in folders),
            flags=flags,
            slot_bytes_now=now.slot_bytes,
            common=common,
        )
    if out is not None:
        fleet.save(Path(out))
    return result


@dataclass(frozen=True)
class Slot:
    """What a server that was told of a fleet has room for.

    Attributes:
        server: a row of the table.
        rank: of the slot.
        room: modules of the base model that it has room for.
    """

    server: Server
    rank: int
    room: frozenset[str]


def slot_of(path: Path, server: str | None, folder: AdapterFolder, model: ModelSettings) -> Slot:
    """What `lorazor fleet --out` wrote, for an adapter that is to be shrunk into it.

    Args:
        path: the file.
        server: whom the user names; it has to be the fleet's.
        folder: the adapter.
        model: its base model, where the user names one.
    Raises:
        SettingsError: no fleet, of another server, or of another base model.
        UnsupportedAdapterError: the server computes no adapter right that is made of this one by leaving something out.
    """
    fleet = Fleet.load(path)
    row = next((one for one in SERVERS if one.title == fleet.server), None)
    if row is None or (server is not None and server_named(server).title != fleet.server):
        raise SettingsError(f"{str(path)!r} is a fleet for {fleet.server}, not {server}. Leave --for out.")
    if model.model is None:
        check_base(fleet, path, [folder])
    base = known_base(folder, model)
    check_is_right_when_whole(row, Form(folder, base), has_rank=True)
    return Slot(row, fleet.max_rank, frozenset(in_server(fleet.sites, base)))


def _given(settings: FleetSettings, row: Server) -> Fleet | None:
    """The fleet of a server that runs, if there is one.

    Raises:
        SettingsError: it is of another server, or a smaller one is asked for.
    """
    if settings.given is None:
        return None
    if settings.plans:
        raise SettingsError("max_rank and sites_fraction plan a fleet, and 'given' is that of a server that runs.")
    given = Fleet.load(settings.given)
    if given.server != row.title:
        raise SettingsError(f"{str(settings.given)!r} is a fleet for {given.server}. Pass --for with that server.")
    return given


def _with_flags(server: str) -> Server:
    """A server that can be told something.

    Raises:
        SettingsError: it cannot, or is not known.
    """
    row = server_named(server)
    if not row.has_flags:
        listed = ", ".join(one.title for one in SERVERS if one.has_flags)
        raise SettingsError(
            f"{row.title} has no flags that make smaller adapters pay, so there is nothing to tell it. Those that "
            f"have: {listed}."
        )
    return row


def _outlined(folder: AdapterFolder, settings: FleetSettings) -> BaseOutline | None:
    """The base model, if it was given or is on this machine; without it, slots have no size."""
    place = settings.model or base_on_this_machine(folder)
    return None if place is None else outline_base(folder, ModelSettings(model=place))


def _member(folder: AdapterFolder, row: Server, base: BaseOutline | None, fleet: Fleet) -> FleetMember:
    rank = max(site.rank for site in folder.sites)
    alone = flags_for(row, [site.name for site in folder.sites], rank, base)
    return FleetMember(
        path=str(folder.path),
        n_sites=len(folder.sites),
        rank=rank,
        n_bytes=folder.weights.stat().st_size,
        slot_bytes=None if alone is None else alone.slot_bytes,
        fits=is_within(fleet, folder, base),
        judgement=judge(Form(folder, base), row),
    )
