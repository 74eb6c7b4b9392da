"""The settings of what has to do with serving."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorazor.fields import MORE, AtLeast, Settings
from lorazor.settings import ModelSettings


@dataclass(frozen=True)
class InspectSettings(Settings):
    """What to compare an adapter with."""

    model: Annotated[
        str | None,
        "Base model: hub id or folder, of which the config is read. Default: the one that the adapter names, if it is "
        "on this machine.",
    ] = None


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What an adapter may lose on its way to a server, and how to verify it."""

    max_rank: Annotated[
        int | None,
        "Cut sites of a higher rank down to this one: their largest singular directions stay. Default: nothing is cut.",
        AtLeast(1),
    ] = None
    drop_modules_to_save: Annotated[
        bool, "Leave out what the adapter has beside LoRA, where the server has no place for it."
    ] = False
    verify: Annotated[
        bool, "Load what was written in stock PEFT, and compare its logits with the adapter's: needs the base model."
    ] = True
    model: Annotated[ModelSettings, "model"] = ModelSettings()


@dataclass(frozen=True)
class FleetSettings(Settings):
    """What many adapters are compared with."""

    given: Annotated[
        Path | None, "A fleet.json of a server that runs: refuse adapters that it would cut without a word."
    ] = None
    max_rank: Annotated[
        int | None,
        "Rank of the slots that the adapters are to be shrunk to, with 'lorazor shrink --fleet'.",
        AtLeast(1),
    ] = None
    sites_fraction: Annotated[float | None, "The same for sites: a share of them, 0..1, those with most energy."] = None
    model: Annotated[str | None, "Base model: hub id or folder. Default: the one that the adapters name.", MORE] = None

    @property
    def plans(self) -> bool:
        """Whether smaller slots than the adapters need are asked for."""
        return self.max_rank is not None or self.sites_fraction is not None
