"""Pruning from start to end: by a selection, a boundary or scores, with or without a refit."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult, check_fits_adapter, prune, select_boundary
from lorazor.data.examples import Example
from lorazor.errors import BudgetError, SettingsError
from lorazor.files import check_is_free
from lorazor.runs import RunFolder
from lorazor.select.refit import GateFit
from lorazor.select.subsets import check_budget, make_units, spending, units_within
from lorazor.select.trained import divisor
from lorazor.select.verdict import counted
from lorazor.selection import SelectedSite, Selection
from lorazor.settings import By, DataSettings, ModelSettings, RefitSettings, SubsetBudgetSettings
from lorazor.workflow.reading import check_fits, check_took_no_part, read
from lorazor.workflow.refit import refit_parts, training_batches
from lorazor.workflow.score import check_same_base, read_scores


@dataclass(frozen=True)
class Choice:
    """What says which sites stay: one of `selection`, `boundary` and `scores`.

    Attributes:
        selection: a selection.json.
        boundary: keep the sites of the first so many layers.
        stack: that `boundary` cuts.
        drop_outside: with `boundary`, also drop the sites outside every stack.
        scores: folder of a `lorazor score` run; needs a budget.
        budget: how much stays.
        by: what goes together.
        raw: rank by the score itself, else by score per parameter.
    """

    selection: Path | None = None
    boundary: int | None = None
    stack: str | None = None
    drop_outside: bool = False
    scores: Path | None = None
    budget: SubsetBudgetSettings = SubsetBudgetSettings()
    by: By = "site"
    raw: bool = False


def prune_adapter(
    adapter: str | Path,
    out: str | Path,
    choice: Choice,
    refitting: RefitSettings | None = None,
    model: ModelSettings | None = None,
    reading: DataSettings | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> tuple[PruneResult, Selection]:
    """Write a smaller adapter. The base model is loaded for a refit only.

    Args:
        adapter: adapter folder or hub id.
        out: new folder for the smaller adapter.
        choice: which sites stay.
        refitting: with `refit`, learn the gates of the survivors there and fold them.
        model: which base model, for a refit.
        reading: how to read the examples of a refit.
        say: receives messages for people.
    Returns:
        What pruning did, and the selection it followed.
    Raises:
        LorazorError: settings, adapter, selection, scores, data or output folder cannot be used; before any model is
            loaded.
    """
    refitting, reading = refitting or RefitSettings(), reading or DataSettings()
    _check(choice)
    folder = read_adapter(find_adapter(adapter))
    chosen, found_with = _select(folder, choice)
    n_worthless = sum(site.score is not None and site.score <= 0 for site in chosen.sites)
    if choice.scores is not None and choice.by == "site" and n_worthless:
        say(f"{n_worthless} of {len(chosen.sites)} sites score 0 or less, and go whatever the budget.")
    check_fits_adapter(folder, chosen)
    check_is_free(Path(out))
    note = None
    if refitting.refit is not None:
        chosen, note = _refit(folder, chosen, refitting, model or ModelSettings(), reading, choice, found_with, say)
    return prune(folder.path, chosen, out, note=note), chosen


def _check(choice: Choice) -> None:
    given = [name for name in ("selection", "boundary", "scores") if getattr(choice, name) is not None]
    if len(given) != 1:
        raise SettingsError("Pass one of --selection FILE, --boundary N and --scores RUN, and not several.")
    if choice.boundary is None and (choice.stack is not None or choice.drop_outside):
        raise SettingsError("--stack and --drop-outside belong to --boundary; a selection already names every site.")
    has_budget = choice.budget != SubsetBudgetSettings()
    if choice.scores is None and (has_budget or choice.by != "site" or choice.raw):
        raise SettingsError("A budget, --by and --raw belong to --scores. Leave them out, or pass --scores RUN.")
    if choice.scores is not None and not has_budget:
        raise BudgetError(
            "No budget: how much is to stay? Pass --keep K (sites), --keep-fraction F (of the sites), --params N or "
            "--params-fraction F (of the parameters)."
        )
    if choice.budget.tolerance is not None:
        raise SettingsError("--tolerance needs examples to measure on. Use 'lorazor subset ADAPTER --data VAL'.")


def _select(folder: AdapterFolder, choice: Choice) -> tuple[Selection, dict[str, Any]]:
    """The selection, and the run.json of the scores it rests on."""
    if choice.selection is not None:
        return Selection.load(choice.selection), {}
    if choice.boundary is not None:
        return select_boundary(folder.sites, choice.boundary, choice.stack, choice.drop_outside), {}
    assert choice.scores is not None
    scores, document = read_scores(choice.scores, folder)
    return select_by_scores(folder, scores, choice.budget, choice.by, choice.raw, document), document


def select_by_scores(
    folder: AdapterFolder,
    scores: Mapping[str, float],
    budget: SubsetBudgetSettings,
    by: By = "site",
    raw: bool = False,
    document: Mapping[str, Any] | None = None,
) -> Selection:
    """Keep what the scores say is worth most, within a budget.

    Args:
        folder: the adapter.
        scores: of each site by its name.
        budget: sites or parameters.
        by: what goes together.
        raw: rank by the score itself, else by score per parameter.
        document: the run.json of the scores, for the record.
    Raises:
        BudgetError: not exactly one budget, or one that keeps nothing.
        MeasureError: no site, or nothing of what goes together, has a score above 0.
    """
    sites, sizes = folder.sites, [site.n_parameters for site in folder.sites]
    check_budget(budget, len(sites), sum(sizes))
    units = make_units(sites, range(len(sites)), sizes, by)
    costs_of_sites, amount = spending(budget, sizes, len(sites), sum(sizes))
    costs = [sum(costs_of_sites[part] for part in unit.parts) for unit in units]
    method = str((document or {}).get("settings", {}).get("scoring", {}).get("method", "scores"))
    values = [scores[site.name] for site in sites]
    chosen = units_within(values, units, costs, amount, by, divisor(method, raw))
    kept = {sites[part].name for unit in chosen for part in units[unit].parts}
    entries = tuple(
        SelectedSite(
            site.name, site.layer, site.stack, site.kind, site.rank, site.name in kept, score=scores[site.name]
        )
        for site in sites
    )
    settings = {name: value for name, value in vars(budget).items() if value is not None}
    provenance = {name: (document or {})[name] for name in ("hashes", "versions", "base") if name in (document or {})}
    return Selection(entries, method, settings | {"by": by, "raw": raw}, provenance)


def _check_refit(
    refit: str,
    examples: Sequence[Example],
    choice: Choice,
    chosen: Selection,
    found_with: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Refuse to learn on what the choice was made or confirmed on; what a training chose on may be learned on."""
    run = found_with
    if choice.selection is not None and (choice.selection.parent / "run.json").exists():
        run = RunFolder.open(choice.selection.parent).document
    if run.get("command") in ("train", "select") or chosen.method.startswith("weightlora"):
        return
    check_took_no_part(examples, refit, "--refit", run.get("hashes", chosen.provenance.get("hashes", {})), run, say)


def _refit(
    folder: AdapterFolder,
    chosen: Selection,
    refitting: RefitSettings,
    model: ModelSettings,
    reading: DataSettings,
    choice: Choice,
    found_with: Mapping[str, Any],
    say: Callable[[str], None],
) -> tuple[Selection, str]:
    """The selection with learned weights, and what the refit did, in words."""
    assert refitting.refit is not None
    fit = GateFit(refitting.refit_steps, refitting.refit_lr)
    fit.check()
    examples = read(refitting.refit, reading)
    _check_refit(refitting.refit, examples, choice, chosen, found_with, say)
    loaded = load(folder.path, model)
    check_fits(loaded, examples, reading)
    if choice.scores is not None:
        check_same_base(found_with, loaded, choice.scores)
    has_components = any(site.components is not None for site in chosen.sites)
    parts = (Parts.components_of_ if has_components else Parts.sites_of)(loaded.sites)
    start = parts.gates_of(chosen)
    batches = training_batches(loaded, examples, reading, 0, say)
    gates, losses = refit_parts(loaded, parts, start, batches, fit)
    scores = {site.name: site.score for site in chosen.sites}
    fitted = parts.selection(gates, None, chosen.method, {**chosen.settings, "refit": dataclasses.asdict(refitting)})
    sites = tuple(dataclasses.replace(site, score=scores[site.name]) for site in fitted.sites)
    n_mean = max(1, fit.steps // 5)  # single batches differ by more than a refit gains
    first, last = (statistics.fmean(step.loss for step in part) for part in (losses[:n_mean], losses[-n_mean:]))
    note = (
        f"not measured on held-out data. The weights of the sites were refitted in {counted(fit.steps, 'step')} of "
        f"{counted(reading.batch_size, 'example')}; the mean loss of {counted(n_mean, 'batch', 'batches')} was "
        f"{first:.4g} at the start and {last:.4g} at the end, in nats per answer token."
    )
    say(f"Refit: {note}")
    return Selection(sites, fitted.method, fitted.settings, chosen.provenance), note
