"""The boundary from start to end: measure every prefix of layers, choose, judge, prune."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.prune import PruneResult, select_boundary, without_sites, write_pruned
from lorazor.adapter.sites import choose_stack, stack_sizes
from lorazor.errors import BoundaryError, SettingsError
from lorazor.fields import with_fields
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant, boundary_gates
from lorazor.measure.metrics import metric_named
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.boundary import BoundaryChoice, check_rule, choose_boundary, parse_boundaries, shortlist
from lorazor.select.goal import DEFAULT_MARGIN
from lorazor.select.verdict import Margin, Verdict
from lorazor.selection import Selection
from lorazor.settings import BoundarySettings
from lorazor.workflow.opening import Adapter, opened
from lorazor.workflow.reading import Source, read_sets, source_name, start_run, write_examples
from lorazor.workflow.verdicts import check_can_decide, check_gains, judged

SITES_FILE = "sites.jsonl"


@dataclass(frozen=True)
class BoundaryResult:
    """What a boundary run came to.

    Attributes:
        out: the run folder.
        stack: the stack that the boundary cuts.
        choice: the boundary and why.
        verdict: on held-out examples, None without them, or where nothing was dropped.
        pruned: the smaller adapter, None where the boundary keeps no site at all, or all of them.
        nothing_left: what an adapter without sites still is, in words; None where a site is left.
    """

    out: Path
    stack: str
    choice: BoundaryChoice
    verdict: Verdict | None
    pruned: PruneResult | None
    nothing_left: str | None


def find_boundary(
    adapter: Adapter,
    data: Source,
    *,
    out: str | Path | None = None,
    confirm: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: BoundarySettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> BoundaryResult:
    """Find the boundary of an adapter on validation data, judge it on other data, and prune.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory, which stays as it is.
        data: validation examples: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder; new, unless `resume`. If left out, a temporary one, which the result names and which stays.
        confirm: examples that take no part in the choice.
        tokenizer: of a model in memory; if left out, that of the base model that its adapter names.
        settings: everything else.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        fields: of `BoundarySettings`, in place of those of `settings`.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    settings = with_fields(BoundarySettings, settings, fields)
    with opened(adapter, settings.model, tokenizer) as source:
        folder = source.folder
        stack, boundaries = _check(folder, settings)
        margin = _margin(settings, confirm is not None)
        examples, held_out = read_sets(settings.reading, [settings.select_by], {"--data": data, "--confirm": confirm})
        check_can_decide(margin, held_out)
        names = {"adapter": source.name, "data": source_name(data), "confirm": source_name(confirm)}
        inputs = {"adapter": source.folder.place, "data": data, "confirm": confirm}
        run = start_run(out, "boundary", dataclasses.asdict(settings) | names, inputs, resume)
        meter = Meter(source.load(), run, settings.reading, settings.generation, run.noting(say))
        meter.add(DATA, examples)
        meter.add(CONFIRM, held_out, "confirm-")
        run.write_rows(SITES_FILE, [site.to_row() for site in folder.sites])
        write_examples(run, held_out or examples)
        check_gains(meter, margin, CONFIRM)
        choice = _choose(meter, settings, stack, boundaries)
        is_smaller, verdict = choice.boundary < choice.full, None
        if is_smaller and margin is not None and held_out:
            meter.say(f"Judging boundary {choice.boundary} on {len(held_out)} held-out examples.")
            (verdict,) = judged(meter, [_variant(meter, stack, choice.boundary)], margin, CONFIRM, settings.seed)
        document = {"stack": stack, "verdict": verdict.to_document() if verdict else None}
        run.write_json("choice.json", choice.to_document() | document)
        pruned = from_main_process(lambda: _prune(run, folder, stack, choice, verdict))
        nothing_left = without_sites(folder) if pruned is None and is_smaller else None
    run.finish()
    return BoundaryResult(run.path, stack, choice, verdict, pruned, nothing_left)


def _check(folder: AdapterFolder, settings: BoundarySettings) -> tuple[str, list[int]]:
    """Settle the stack and the boundaries to measure, the last of which is the full adapter."""
    metric_named(settings.select_by)
    check_rule(settings.rule, settings.boundary)
    stack = choose_stack(folder.sites, settings.stack)
    n_layers = stack_sizes(folder.sites)[stack]
    if settings.boundary is not None and not 0 <= settings.boundary <= n_layers:
        raise BoundaryError(
            f"boundary={settings.boundary}, but LoRA reaches over {n_layers} layers of {stack}. Pass 0..{n_layers}."
        )
    boundaries = parse_boundaries(settings.boundaries, n_layers)
    if settings.boundary is not None and settings.boundary not in boundaries:
        raise BoundaryError(
            f"boundary={settings.boundary} is not among boundaries={settings.boundaries!r}. Add it there."
        )
    return stack, boundaries


def _margin(settings: BoundarySettings, has_held_out: bool) -> Margin | None:
    """How much worse the boundary may be, for the verdict; None without held-out examples."""
    if settings.margin is None and (not has_held_out or settings.select_by == "loss"):
        return Margin.parse(DEFAULT_MARGIN) if has_held_out else None
    if settings.margin is None:
        raise SettingsError(
            f"A verdict by {settings.select_by} needs a margin: pass --margin {settings.select_by}=AMOUNT, or leave "
            "--confirm out."
        )
    margin = Margin.parse(settings.margin)
    if margin.metric != settings.select_by:
        raise SettingsError(f"margin={settings.margin!r} is of {margin.metric}, but select_by={settings.select_by!r}.")
    return margin


def _choose(meter: Meter, settings: BoundarySettings, stack: str, boundaries: list[int]) -> BoundaryChoice:
    """Measure, and choose."""
    needs_text = metric_named(settings.select_by).needs_text
    # the shortlist is of those that keep half of the gain over boundary 0, which may not be one to choose
    swept = sorted({0, *boundaries}) if needs_text else boundaries
    variants = {one: _variant(meter, stack, one) for one in swept}
    meter.prefixes(variants, DATA, stack, settings.engine)
    if needs_text:
        losses = meter.scores("loss", list(variants.values()), DATA)
        boundaries = shortlist(losses, swept, settings.generation.shortlist, boundaries)
        if settings.boundary is not None:
            boundaries = sorted({*boundaries, settings.boundary})
        meter.say(f"Writing answers at boundaries {', '.join(map(str, boundaries))}.")
    scores = meter.scores(settings.select_by, [variants[one] for one in boundaries], DATA)
    return choose_boundary(scores, boundaries, settings.rule, boundary=settings.boundary, seed=settings.seed)


def _variant(meter: Meter, stack: str, boundary: int) -> Variant:
    """The adapter at a boundary."""
    gates = boundary_gates(meter.parts, stack, boundary)
    return Variant("full" if bool(gates.all()) else f"boundary {boundary}", gates)


def _prune(
    run: RunFolder, folder: AdapterFolder, stack: str, choice: BoundaryChoice, verdict: Verdict | None
) -> PruneResult | None:
    selection = select_boundary(folder.sites, choice.boundary, stack)
    provenance = {"hashes": run.document["hashes"], "versions": run.document["versions"]}
    settings = {**selection.settings, "rule": choice.rule, "metric": choice.metric}
    selection = Selection(selection.sites, selection.method, settings, provenance)
    selection.save(run.path / "selection.json")
    if not selection.kept or not selection.dropped:
        return None
    note = f"{choice.reason} {verdict.sentence}\n\n{verdict.table}" if verdict else choice.reason
    shutil.rmtree(run.path / "adapter", ignore_errors=True)  # of a run that stopped between here and the end
    return write_pruned(folder, selection, run.path / "adapter", note=note)
