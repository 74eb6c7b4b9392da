"""A subset of the sites from start to end: score, search, confirm, prune."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from lorazor.adapter.folder import AdapterFolder, read_adapter
from lorazor.adapter.load import find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult, prune
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process, is_main_process
from lorazor.runs import RunFolder
from lorazor.select.refit import GateFit
from lorazor.select.subsets import check_budget, make_units, spending, within_budget
from lorazor.select.trained import PartScores, divisor
from lorazor.select.verdict import Confirmation, confirm, in_words
from lorazor.selection import Selection
from lorazor.settings import SearchSettings, ToleranceRule, Tracker
from lorazor.tracking import check_tracker, track
from lorazor.workflow.reading import check_fits, check_held_out, read, write_examples
from lorazor.workflow.score import SCORES_FILE, check_scoring, note_base, score_document, site_scores
from lorazor.workflow.search import Search
from lorazor.workflow.starting import start_run
from lorazor.workflow.variants import FULL, Candidate, SubsetSettings

PRUNED = "pruned"


@dataclass(frozen=True)
class SubsetResult:
    """What a subset run came to.

    Attributes:
        out: the run folder.
        metric: what subsets were compared by.
        chosen: the subset that stays, on the validation examples.
        candidates: all subsets that were measured, the full adapter first.
        baselines: the controls at the same size, where asked for.
        reason: why this subset, in a sentence.
        confirmation: the comparison on held-out examples, None without them and for the full adapter.
        pruned: the smaller adapter.
        is_full: whether nothing was dropped or changed.
    """

    out: Path
    metric: str
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    baselines: tuple[Candidate, ...]
    reason: str
    confirmation: Confirmation | None
    pruned: PruneResult
    is_full: bool


def find_subset(
    adapter: str | Path,
    data: str,
    out: str | Path,
    confirm_on: str | None = None,
    settings: SubsetSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    tracker: Tracker = "none",
) -> SubsetResult:
    """Find the sites of an adapter that earn their place, confirm the choice on other data, and prune.

    Args:
        adapter: adapter folder or hub id.
        data: validation examples.
        out: the run folder; new, unless `resume`.
        confirm_on: examples that take no part in the choice.
        settings: everything else.
        resume: go on with an interrupted run in `out`; measured losses and answers are not measured again.
        say: receives messages for people.
        tracker: where to log the headline numbers.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    settings, out = settings or SubsetSettings(), Path(out)
    folder = read_adapter(find_adapter(adapter))
    _check(settings, folder, data)
    check_tracker(tracker)
    metrics = [name for name in (settings.budget.tolerance, settings.searching.metric) if name]
    examples, held_out, train = _read(settings, data, confirm_on, metrics)
    metric = metrics[0] if metrics else "accuracy" if examples[0].is_labelled else "loss"
    run = _start(out, folder, data, confirm_on, settings, resume)
    loaded = load(folder.path, settings.model)
    check_fits(loaded, [*examples, *held_out, *train], settings.reading)
    note_base(run, folder, loaded)
    write_examples(run, held_out or examples)
    by_components = settings.searching.ranks != "keep"
    parts = (Parts.components_of_ if by_components else Parts.sites_of)(loaded.sites)
    say = say if is_main_process() else lambda _: None
    search = Search(run, loaded, parts, settings, metric, examples, say, folder, train)
    chosen, gates = search.choose()
    candidates = search.candidates
    baselines = tuple(search.baselines(chosen.n_parameters)) if settings.searching.baselines else ()
    is_full = bool((gates == 1).all())
    confirmation = _confirm(search, gates, held_out) if held_out and not is_full else None
    if confirmation is None:
        write_examples(run, examples)
    reason = _reason(settings, search, chosen)
    assert search.first_scores is not None
    _write_scores(run, search, folder, search.first_scores)
    document = _document(search, chosen, candidates, baselines, reason, confirmation)
    run.write_json("subset.json", document)
    pruned = from_main_process(lambda: _prune(run, search, gates, reason, confirmation))
    track(run, tracker, [(one.n_parameters, {f"subset/{metric}": one.value}) for one in candidates])
    run.finish()
    return SubsetResult(out, metric, chosen, candidates, baselines, reason, confirmation, pruned, is_full)


def _check(settings: SubsetSettings, folder: AdapterFolder, data: str) -> None:
    check_scoring(settings.scoring, data)
    check_budget(settings.budget, len(folder.sites), sum(site.n_parameters for site in folder.sites))
    searching, tolerance = settings.searching, settings.budget.tolerance
    for metric in (tolerance, searching.metric):
        if metric is not None:
            metric_named(metric)
    if tolerance is not None and searching.metric not in (None, tolerance):
        raise SettingsError(f"metric={searching.metric!r} contradicts tolerance={tolerance!r}. Leave --metric out.")
    if searching.rule not in get_args(ToleranceRule):
        raise SettingsError(f"rule={searching.rule!r} is unknown. Pass one of {', '.join(get_args(ToleranceRule))}.")
    if searching.rounds < 1 or searching.verify < 0:
        raise SettingsError(f"rounds={searching.rounds}, verify={searching.verify}. Pass 1 or more, and 0 or more.")
    by_sites = settings.budget.keep is not None or settings.budget.keep_fraction is not None
    _refuse_contradictions(searching, by_sites, tolerance is not None)
    GateFit(settings.refitting.refit_steps, settings.refitting.refit_lr).check()
    is_searching = tolerance is not None or searching != SearchSettings(metric=searching.metric)
    if settings.sparse.sparse and (settings.refitting.refit is None or is_searching):
        raise SettingsError(
            "--sparse learns which sites stay on the --refit examples, for a budget: pass --refit TRAIN and --keep or "
            "--params, and none of the settings of the search."
        )
    if tolerance is None:
        _check_holds_a_unit(settings, folder)


def _check_holds_a_unit(settings: SubsetSettings, folder: AdapterFolder) -> None:
    by_components = settings.searching.ranks != "keep"
    sizes = [site.n_parameters // (site.rank if by_components else 1) for site in folder.sites]
    costs, amount = spending(settings.budget, sizes, len(sizes), sum(site.n_parameters for site in folder.sites))
    units = make_units(folder.sites, range(len(sizes)), sizes, settings.searching.by)
    within_budget([0.0] * len(units), [sum(costs[part] for part in unit.parts) for unit in units], amount)


def _refuse_contradictions(searching: SearchSettings, by_sites: bool, is_tolerance: bool) -> None:
    others = searching.by != "site" or searching.verify or searching.raw
    if searching.ranks != "keep" and others:
        raise SettingsError(
            f"ranks={searching.ranks!r} chooses among the components of single sites, by score per parameter. "
            "Leave out --by, --verify and --raw."
        )
    if searching.ranks != "keep" and by_sites:
        raise SettingsError(f"ranks={searching.ranks!r} needs a budget of parameters. Pass --params-fraction.")
    if searching.ranks == "uniform" and (is_tolerance or searching.rounds > 1):
        raise SettingsError("ranks='uniform' is for a budget of parameters, in one round. Pass ranks='mixed'.")
    if searching.by == "window" and searching.verify:
        raise SettingsError("by='window' compares windows by their scores. Leave out --verify.")


def _read(
    settings: SubsetSettings, data: str, confirm_on: str | None, metrics: Sequence[str]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Validation, held-out and training examples; the held-out ones must take no part in anything else."""
    reading, refit = settings.reading, settings.refitting.refit
    examples = read(data, reading, metrics)
    train = read(refit, dataclasses.replace(reading, limit=None)) if refit is not None else []
    held_out = read(confirm_on, reading, metrics) if confirm_on is not None else []
    check_held_out({"--confirm": (confirm_on, held_out), "--refit": (refit, train), "--data": (data, examples)})
    return examples, held_out, train


def _start(
    out: Path, folder: AdapterFolder, data: str, confirm_on: str | None, settings: SubsetSettings, resume: bool
) -> RunFolder:
    refit = settings.refitting.refit
    inputs = {
        "adapter": folder.path,
        "data": Path(data),
        "confirm": Path(confirm_on) if confirm_on else None,
        "refit": Path(refit) if refit else None,
    }
    everything = dataclasses.asdict(settings) | {"adapter": folder.path, "data": data, "confirm": confirm_on}
    return start_run(out, "subset", everything, inputs, resume)


def _confirm(search: Search, gates: Tensor, held_out: Sequence[Example]) -> Confirmation:
    search.say(f"Confirming on {len(held_out)} held-out examples.")
    full = torch.ones(len(search.parts))
    search.measure(FULL, full, held_out, "confirm-")
    search.measure(PRUNED, gates, held_out, "confirm-")
    scores = search.compare([gates, full], held_out, "confirm-")
    return confirm(scores, "of the smaller adapter", search.settings.scoring.seed)


_NO_WORSE = {
    "one-se": "whose {metric} is within one paired standard error of that of the full adapter",
    "no-worse": "whose {metric} is not significantly worse than that of the full adapter",
}


def _reason(settings: SubsetSettings, search: Search, chosen: Candidate) -> str:
    total, n_sites = sum(search.parts.n_parameters), len(search.parts.sites)
    metric, full = search.metric, search.candidates[0]
    is_tolerance = settings.budget.tolerance is not None
    passing = _NO_WORSE[settings.searching.rule].format(metric=metric)
    if chosen.n_parameters == total and is_tolerance:
        return (
            f"No smaller selection was found {passing} ({full.value:.4g} on {len(search.examples)} examples): it stays "
            "as it is."
        )
    holds = "what the budget holds" + ("" if settings.sparse.sparse else " of what scores above 0")
    why = f"the smallest selection found {passing}" if is_tolerance else holds
    return (
        f"{chosen.n_sites} of {n_sites} sites with {chosen.n_parameters / total:.1%} of the parameters, {why}: "
        f"{chosen.value:.4g} on {len(search.examples)} validation examples, against {full.value:.4g} for the full "
        f"adapter (difference {in_words(chosen.difference)})."
    )


def _write_scores(run: RunFolder, search: Search, folder: AdapterFolder, found: PartScores) -> None:
    """The scores of all sites, before anything was dropped; of components, their sum."""
    run.write_rows(SCORES_FILE, [dataclasses.asdict(row) for row in site_scores(folder.sites, found)])
    scoring = search.settings.scoring
    n_examples = len(search.examples[: scoring.score_examples]) if found.n_passes else 0
    run.write_json("score.json", score_document(scoring, found, n_examples))


def _document(
    search: Search,
    chosen: Candidate,
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    reason: str,
    confirmation: Confirmation | None,
) -> dict:
    plain = dataclasses.asdict
    return {
        "strategy": _strategy(search.settings),
        "metric": search.metric,
        "higher_is_better": metric_named(search.metric).higher_is_better,
        "n_examples": len(search.examples),
        "n_sites": len(search.parts.sites),
        "n_parameters": sum(search.parts.n_parameters),
        "full": {"value": candidates[0].value},
        "chosen": plain(chosen),
        "reason": reason,
        "candidates": [plain(one) for one in candidates],
        "baselines": [plain(one) for one in baselines],
        "confirmation": confirmation.to_document() if confirmation else None,
    }


def _strategy(settings: SubsetSettings) -> str:
    """The method in a few words, for tables."""
    if settings.sparse.sparse:
        return "sparse gates"
    searching = settings.searching
    method = settings.scoring.method
    words = [f"{method} per parameter" if divisor(method, searching.raw) == "parameters" else method]
    words += [f"by {searching.by}"] if searching.by != "site" else []
    words += [f"{searching.ranks} ranks"] if searching.ranks != "keep" else []
    words += [f"{searching.rounds} rounds"] if searching.rounds > 1 else []
    words += [f"verified among {searching.verify}"] if searching.verify else []
    words += ["refitted"] if settings.refitting.refit else []
    return ", ".join(words)


def _prune(
    run: RunFolder, search: Search, gates: Tensor, reason: str, confirmation: Confirmation | None
) -> PruneResult:
    settings = search.settings
    assert search.first_scores is not None
    chosen = search.parts.selection(
        gates,
        search.first_scores.of_sites(),
        "subset",
        {"strategy": _strategy(settings), **{k: v for k, v in vars(settings.budget).items() if v is not None}},
    )
    provenance = {name: run.document[name] for name in ("hashes", "versions", "base")}
    selection = Selection(chosen.sites, chosen.method, chosen.settings, provenance)
    selection.save(run.path / "selection.json")
    if (run.path / "adapter").exists():  # a run that stopped between here and the end
        shutil.rmtree(run.path / "adapter")
    note = f"{reason} {confirmation.sentence}\n\n{confirmation.table}" if confirmation else reason
    return prune(search.folder.path, selection, run.path / "adapter", note=note)
