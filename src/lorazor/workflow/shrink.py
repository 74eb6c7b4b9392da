"""`lorazor shrink` from start to end: read, check, load, choose, write. What is chosen, and how, is in `choosing`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorazor.adapter.folder import AdapterFolder, check_is_finite
from lorazor.adapter.parts import Parts
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.fields import with_fields
from lorazor.measure.meter import CONFIRM, DATA, Meter, Variant
from lorazor.runs import RunFolder
from lorazor.select.goal import Goal, default_score
from lorazor.select.scoring import Scoring, score_named
from lorazor.select.search import Family, Units
from lorazor.serve.form import Form
from lorazor.serve.judging import server_named
from lorazor.serve.shrinking import settings_for, what_is_chosen_among
from lorazor.serve.table import Server
from lorazor.settings import ShrinkSettings
from lorazor.train.evidence import SCORES_FILE
from lorazor.workflow.basis import Basis
from lorazor.workflow.candidates import gates_for
from lorazor.workflow.choosing import ShrinkResult, Work
from lorazor.workflow.fleet import Slot, slot_of
from lorazor.workflow.heal import check_healing, rows_of
from lorazor.workflow.inspect import known_base
from lorazor.workflow.opening import Adapter, Opened, opened
from lorazor.workflow.reading import Source, read_sets, source_name, start_run, write_examples
from lorazor.workflow.served import served
from lorazor.workflow.verdicts import check_can_decide, check_gains, what_can_be_decided
from lorazor.workflow.written import Writer


def shrink(
    adapter: Adapter,
    data: Source | None = None,
    *,
    out: str | Path | None = None,
    server: str | None = None,
    fleet: str | Path | None = None,
    confirm: Source | None = None,
    heal: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: ShrinkSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> ShrinkResult:
    """Make an adapter as small as it can be, within a margin or for a size, and write it.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory, which stays as it is.
        data: validation examples: a file, a dataset folder, a hub name, or the examples themselves; without them the
            weights alone decide, and nothing is measured.
        out: the run folder; new, unless `resume`. If left out, a temporary one, which the result names and which stays.
        server: whom it is for, such as `sglang`, or with a version, `vllm==0.28.1`: what is chosen is computed right
            there as it is written, and pays.
        fleet: what `lorazor fleet --out` wrote, in place of a size: the best that a slot of that server holds; a margin
            is that of the verdict.
        confirm: examples that take no part in the choice, for the verdict.
        heal: examples to train what stays on, in place of `settings.heal`.
        tokenizer: of a model in memory; if left out, that of the base model that its adapter names.
        settings: everything else.
        resume: go on with an interrupted run in `out`; what was measured is not measured again.
        say: receives messages for people.
        fields: of `ShrinkSettings`, in place of those of `settings`: `margin="2%"`, `weights_dtype="bfloat16"`.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used, or the server computes nothing right that
            they could give; before the model is loaded.
    """
    settings = with_fields(ShrinkSettings, settings, fields)
    sources = {"--data": data, "--confirm": confirm, "--heal": settings.heal if heal is None else heal}
    settings = dataclasses.replace(settings, heal=source_name(sources["--heal"]))
    with opened(adapter, settings.model, tokenizer) as source:
        folder = source.folder
        slot = None if fleet is None else slot_of(Path(fleet), server, folder, settings.model)
        row, settings = (slot.server, settings) if slot else _for_server(server, folder, settings, say)
        goal, sets = _checked(folder, sources, settings, slot)
        inputs = {option[2:]: one for option, one in sources.items()} | {"fleet": fleet}
        everything = dataclasses.asdict(settings) | {name: source_name(one) for name, one in inputs.items()}
        everything |= {"adapter": source.name} | ({"for": row.title} if row else {})
        run = start_run(out, "shrink", everything, inputs | {"adapter": folder.place}, resume)
        with run.explaining():
            if data is None:
                result = _by_weights(run, folder, goal, settings)
            else:
                result = _by_examples(run, source, goal, settings, sets, run.noting(say))
            if row is not None and result.pruned is not None:
                result = dataclasses.replace(result, server=row.title, flags=served(result.pruned.path, row, settings))
    run.finish()
    return result


def _for_server(
    name: str | None, folder: AdapterFolder, settings: ShrinkSettings, say: Callable[[str], None]
) -> tuple[Server | None, ShrinkSettings]:
    """Whom the adapter is for, and the settings for it."""
    if name is None:
        return None, settings
    row = server_named(name)
    settings = settings_for(row, Form(folder, known_base(folder, settings.model)), settings)
    say(f"For {row.title}: {what_is_chosen_among(settings)}.")
    return row, settings


def _checked(
    folder: AdapterFolder, sources: Mapping[str, Source | None], settings: ShrinkSettings, slot: Slot | None
) -> tuple[Goal, tuple[list[Example], ...]]:
    """Read the data, validation, held-out and healing, and refuse what cannot work before a model is loaded."""
    check_is_finite(folder)
    has_data = sources["--data"] is not None
    if slot is None:
        goal = Goal.of(settings, folder, has_data)
    else:
        goal = Goal.in_fleet(settings, folder, slot.rank, slot.room)
    given = next((name for name, source in sources.items() if source is not None and name != "--data"), None)
    if sources["--data"] is None and given is not None:
        raise SettingsError(f"{given} without --data: choices are made on validation examples first. Pass --data.")
    Units.of(Parts(folder.sites), settings.by, settings.stack)  # refuses what cannot be gathered
    asked = goal.margin or goal.judged_by
    metrics = [asked.metric] if asked is not None else []
    alone = ["--heal"] if settings.heal_from == "full" else []
    examples, held_out, train = sets = read_sets(settings.reading, metrics, sources, alone)
    check_can_decide(goal.margin, examples, "--data")
    check_can_decide(asked, held_out)
    check_healing(settings, train)
    return goal, sets


def _by_weights(run: RunFolder, folder: AdapterFolder, goal: Goal, settings: ShrinkSettings) -> ShrinkResult:
    """A smaller adapter from the weights alone: no base model, no examples, nothing measured."""
    parts, score = Parts(folder.sites), settings.score or default_score(settings.by, folder.sites, has_data=False)
    scores = score_named(score)(Scoring(parts, folder, seed=settings.seed))
    units = Units.of(parts, settings.by, settings.stack)
    chosen = Variant("chosen", gates_for(goal, Family.of(units, scores.values), scores))
    share = parts.n_parameters_kept(chosen.gates) / sum(parts.n_parameters)
    writer = Writer(run, folder, Basis("singular", score, scores, {}), goal, settings)
    reason = (
        f"{parts.n_sites_kept(chosen.gates)} of {len(parts.sites)} sites with {share:.1%} of the parameters"
        f"{writer.in_dtype}, by {score}. Nothing was measured: pass --data to know what it costs."
    )
    run.write_rows(SCORES_FILE, scores.by_site())
    is_same = writer.is_same(chosen)
    pruned = None if is_same else writer.write(chosen, run.path / "adapter", reason, is_chosen=True)
    return ShrinkResult(run.path, str(goal), None, reason, (), None, pruned)


def _by_examples(
    run: RunFolder,
    source: Opened,
    goal: Goal,
    settings: ShrinkSettings,
    sets: tuple[list[Example], ...],
    say: Callable[[str], None],
) -> ShrinkResult:
    """Load the model, and choose on examples."""
    examples, held_out, train = sets
    margin = goal.verdict_margin if held_out else goal.margin
    if margin is not None and (sentence := what_can_be_decided(margin, {"validation": examples, "held-out": held_out})):
        say(sentence)
    meter = Meter(source.load(), run, settings.reading, settings.generation, say)
    meter.add(DATA, examples)
    meter.add(CONFIRM, held_out, "confirm-")
    rows = rows_of(meter.loaded, train, settings)  # refuses what cannot be healed on, before anything is measured
    write_examples(run, held_out or examples)
    check_gains(meter, goal.margin, DATA)
    check_gains(meter, margin, CONFIRM)
    return Work(run, source.folder, meter, goal, settings).finish(train, rows)
