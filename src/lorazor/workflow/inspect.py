"""What is in an adapter. No base model is loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.beside import bytes_beside
from lorazor.adapter.directions import SiteNorm, site_norms
from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.rows import changed_rows
from lorazor.adapter.sites import stack_sizes
from lorazor.errors import AdapterError, SettingsError
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
    """

    path: Path
    base_model: str | None
    task_type: str | None
    n_bytes: int
    n_bytes_beside: dict[str, int]
    n_bytes_unchanged: int | None
    stacks: dict[str, int]
    sites: tuple[SiteNorm, ...]

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
            "sites": [dataclasses.asdict(one.site) | {"norm": one.norm, "is_dead": one.is_dead} for one in self.sites],
        }


def inspect(adapter: Adapter) -> InspectResult:
    """Look at the sites of an adapter: layers, kinds, ranks, norms, dead sites.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory.
    Raises:
        AdapterError: it cannot be used.
    """
    with opened(adapter, translate=False) as source:
        folder = source.folder
        return InspectResult(
            path=folder.path,
            base_model=folder.config.get("base_model_name_or_path"),
            task_type=folder.config.get("task_type"),
            n_bytes=folder.weights.stat().st_size,
            n_bytes_beside=bytes_beside(folder),
            n_bytes_unchanged=_bytes_unchanged(folder),
            stacks=stack_sizes(folder.sites),
            sites=tuple(site_norms(folder)),
        )


def _bytes_unchanged(folder: AdapterFolder) -> int | None:
    """What `prune --changed-rows-only` saves, where the base model is on this machine."""
    if not bytes_beside(folder):
        return None
    try:
        return changed_rows(folder, base_of(folder, ModelSettings()), local_only=True).n_bytes
    except (AdapterError, SettingsError):  # it is a hint, and nobody asked for it
        return None
