"""A selection, or a boundary, applied to an adapter folder; embeddings cut down to changed rows. No model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorazor.adapter.find import base_of
from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.prune import PruneResult, check_fits_adapter, select_boundary, without_sites, write_pruned
from lorazor.adapter.rows import changed_rows
from lorazor.errors import SettingsError
from lorazor.fields import with_fields
from lorazor.files import check_is_free
from lorazor.selection import Selection
from lorazor.settings import ModelSettings, PruneSettings
from lorazor.workflow.basis import read_factors
from lorazor.workflow.opening import Adapter, opened


def prune(
    adapter: Adapter,
    selection: Selection | str | Path | None = None,
    *,
    out: str | Path,
    settings: PruneSettings | None = None,
    **fields: Any,
) -> PruneResult:
    """Write a smaller adapter.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory.
        selection: which sites stay, or the file that says it; of the file of a shrink run, the directions are those of
            that run. Without it `settings.boundary` says what stays; all of it with `changed_rows_only` alone.
        out: new folder for the smaller adapter.
        settings: the boundary to keep, and whether of whole embeddings the changed rows alone are stored.
        fields: of `PruneSettings`, in place of those of `settings`: `boundary=12`.
    Raises:
        LorazorError: settings, adapter, selection or output folder cannot be used.
    """
    settings = with_fields(PruneSettings, settings, fields)
    n_given = (selection is not None) + (settings.boundary is not None)
    if n_given != 1 and not (n_given == 0 and settings.changed_rows_only):
        raise SettingsError("Pass one of --selection FILE and --boundary N. 'lorazor shrink' finds a smaller adapter.")
    if settings.model is not None and not settings.changed_rows_only:
        raise SettingsError("--model belongs to --changed-rows-only; nothing else here looks at a base model.")
    if settings.boundary is None and (settings.stack is not None or settings.drop_outside):
        raise SettingsError("--stack and --drop-outside belong to --boundary; a selection already names every site.")
    with opened(adapter) as source:
        folder = source.folder
        if settings.boundary is not None:
            chosen = boundary_of(folder, settings)
        elif selection is None:
            chosen = Selection(tuple(site.entry(True) for site in folder.sites), "all sites", {})
        else:
            chosen = selection if isinstance(selection, Selection) else Selection.load(selection)
        if not chosen.kept:
            raise SettingsError(without_sites(folder))
        check_fits_adapter(folder, chosen)
        check_is_free(Path(out))
        factors = read_factors(Path(selection).parent) if isinstance(selection, str | Path) else {}
        rows = None
        if settings.changed_rows_only:
            rows = changed_rows(folder, base_of(folder, ModelSettings(model=settings.model)))
        return write_pruned(folder, chosen, out, factors=factors, rows=rows)


def boundary_of(folder: AdapterFolder, settings: PruneSettings) -> Selection:
    """The sites that the boundary in the settings keeps."""
    assert settings.boundary is not None
    return select_boundary(folder.sites, settings.boundary, settings.stack, settings.drop_outside)
