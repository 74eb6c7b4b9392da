"""What is in an adapter, what is wrong with it, and what servers make of it. No base model is loaded."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.beside import bytes_beside
from lorazor.adapter.directions import SiteNorm, site_norms
from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.rows import changed_rows
from lorazor.adapter.sites import stack_sizes
from lorazor.errors import AdapterError, SettingsError
from lorazor.fields import with_fields
from lorazor.serve.base import BaseOutline, base_on_this_machine, outline_base, strangers
from lorazor.serve.form import Form
from lorazor.serve.judging import Judgement, judge_all, server_named
from lorazor.serve.settings import InspectSettings
from lorazor.settings import ModelSettings
from lorazor.workflow.opening import Adapter, opened


@dataclass(frozen=True)
class InspectResult:
    """What is in an adapter.

    Attributes:
        path: the adapter folder; of a model in memory, one that is gone.
        base_model: as the adapter's config names it; None where it names none.
        task_type: PEFT's name of the task; None where the config names none.
        n_bytes: size of the weights file.
        n_bytes_unchanged: bytes of embeddings that `prune --changed-rows-only` leaves out; None where it is not exact,
            or the base model is not at hand.
        n_bytes_beside: what the file has beside LoRA (embeddings, heads), in bytes by the module that it is for.
        stacks: the number of layers that LoRA reaches over, by name of the stack.
        sites: every site, with the norm of its update.
        judgements: what each server of the table makes of it.
        base: what the base model consists of; None where its config is not on this machine.
        strangers: names of the sites that the base model has no module for, or one of another shape.
    """

    path: Path
    base_model: str | None
    task_type: str | None
    n_bytes: int
    n_bytes_beside: dict[str, int]
    n_bytes_unchanged: int | None
    stacks: dict[str, int]
    sites: tuple[SiteNorm, ...]
    judgements: tuple[Judgement, ...]
    base: BaseOutline | None
    strangers: tuple[str, ...]

    @property
    def dead(self) -> tuple[str, ...]:
        """Sites that change nothing: B A = 0."""
        return tuple(one.site.name for one in self.sites if one.is_dead)

    @property
    def broken(self) -> tuple[str, ...]:
        """Sites with NaN or infinite numbers."""
        return tuple(one.site.name for one in self.sites if not math.isfinite(one.norm))

    def judgement(self, server: str) -> Judgement:
        """What one server makes of it.

        Args:
            server: `vllm`, or with a version, `vllm==0.28.1`.
        Raises:
            SettingsError: no such server.
        """
        row = server_named(server)
        return next(one for one in self.judgements if one.server is row)

    @property
    def n_parameters(self) -> int:
        """Numbers in A and B of all sites."""
        return sum(one.site.n_parameters for one in self.sites)

    def to_document(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "adapter": str(self.path),
            "base_model": self.base_model,
            "n_parameters": self.n_parameters,
            "n_bytes": self.n_bytes,
            "n_bytes_beside": self.n_bytes_beside,
            "n_bytes_unchanged": self.n_bytes_unchanged,
            "stacks": self.stacks,
            "dead": list(self.dead),
            "broken": list(self.broken),
            "base_is_known": self.base is not None,
            "strangers": list(self.strangers),
            "servers": [one.to_document() for one in self.judgements],
            "sites": [dataclasses.asdict(one.site) | {"norm": one.norm, "is_dead": one.is_dead} for one in self.sites],
        }


def inspect(adapter: Adapter, *, settings: InspectSettings | None = None, **fields: Any) -> InspectResult:
    """Look at an adapter: layers, kinds, ranks, norms, sites that are dead or broken, and what servers make of it.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory.
        settings: the base model.
        fields: of `InspectSettings`, in place of those of `settings`: `model="org/base"`.
    Raises:
        AdapterError: it cannot be used.
        BaseModelError: the base model in the settings has no config.
    """
    settings = with_fields(InspectSettings, settings, fields)
    with opened(adapter, translate=False) as source:
        folder = source.folder
        base = known_base(folder, ModelSettings(model=settings.model))
        return InspectResult(
            path=folder.path,
            base_model=folder.config.get("base_model_name_or_path"),
            task_type=folder.config.get("task_type"),
            n_bytes=folder.weights.stat().st_size,
            n_bytes_beside=bytes_beside(folder),
            n_bytes_unchanged=_bytes_unchanged(folder),
            stacks=stack_sizes(folder.sites),
            sites=tuple(site_norms(folder)),
            judgements=tuple(judge_all(Form(folder, base))),
            base=base,
            strangers=() if base is None else tuple(site.name for site in strangers(folder, base)),
        )


def _bytes_unchanged(folder: AdapterFolder) -> int | None:
    """What `prune --changed-rows-only` saves, where the base model is on this machine."""
    if not bytes_beside(folder):
        return None
    try:
        return changed_rows(folder, base_of(folder, ModelSettings()), local_only=True).n_bytes
    except (AdapterError, SettingsError):  # it is a hint, and nobody asked for it
        return None


def not_right(path: Path) -> list[Judgement]:
    """The servers that do not compute a written adapter as PEFT does, as far as that is known on this machine.

    Args:
        path: the adapter folder.
    """
    folder = read_adapter(path)
    return [one for one in judge_all(Form(folder, known_base(folder, ModelSettings()))) if not one.is_right]


def known_base(folder: AdapterFolder, settings: ModelSettings) -> BaseOutline | None:
    """The base model, if it was given or is here: nothing is downloaded for a look at an adapter.

    Args:
        folder: the adapter.
        settings: another base model than the one it names.
    Raises:
        BaseModelError: the one in the settings has no config.
    """
    if settings.model is not None:
        return outline_base(folder, settings)
    place = base_on_this_machine(folder)
    if place is None:
        return None
    try:
        return outline_base(folder, ModelSettings(model=place))
    except AdapterError:  # a task or an architecture that is not measured here; a look at the adapter needs neither
        return None
