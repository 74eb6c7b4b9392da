"""`lorazor prune`: a selection, or a boundary, applied to an adapter folder. No base model is loaded."""

from __future__ import annotations

from pathlib import Path

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import find_adapter
from lorazor.adapter.prune import PruneResult, check_fits_adapter, prune, select_boundary, without_sites
from lorazor.errors import SettingsError
from lorazor.files import check_is_free
from lorazor.selection import Selection
from lorazor.workflow.basis import read_factors


def prune_adapter(
    adapter: str | Path,
    *,
    out: str | Path,
    selection: str | Path | None = None,
    boundary: int | None = None,
    stack: str | None = None,
    drop_outside: bool = False,
) -> tuple[PruneResult, Selection]:
    """Write a smaller adapter.

    Args:
        adapter: adapter folder or hub id.
        out: new folder for the smaller adapter.
        selection: path of a selection file; or `boundary`.
        boundary: keep the sites of the first so many layers.
        stack: the stack that `boundary` cuts.
        drop_outside: with `boundary`, also drop the sites outside every stack.
    Returns:
        What was written, and the selection that was applied.
    Raises:
        LorazorError: settings, adapter, selection or output folder cannot be used.
    """
    if (selection is None) == (boundary is None):
        raise SettingsError("Pass one of --selection FILE and --boundary N. 'lorazor shrink' finds a smaller adapter.")
    if boundary is None and (stack is not None or drop_outside):
        raise SettingsError("--stack and --drop-outside belong to --boundary; a selection already names every site.")
    folder = read_adapter(find_adapter(adapter))
    chosen = _chosen(folder, selection, boundary, stack, drop_outside)
    if not chosen.kept:
        raise SettingsError(without_sites(folder))
    check_fits_adapter(folder, chosen)
    check_is_free(Path(out))
    factors = read_factors(Path(selection).parent) if selection is not None else {}
    return prune(folder.path, chosen, out, factors=factors), chosen


def _chosen(
    folder: AdapterFolder, selection: str | Path | None, boundary: int | None, stack: str | None, drop_outside: bool
) -> Selection:
    if selection is not None:
        return Selection.load(selection)
    assert boundary is not None
    return select_boundary(folder.sites, boundary, stack, drop_outside)
