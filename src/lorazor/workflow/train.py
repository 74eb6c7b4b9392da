"""Training from start to end: a plain LoRA, a selection run, or both, the one on the sites that the other chose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lorazor.adapter.sites import find_sites
from lorazor.errors import SettingsError
from lorazor.fields import with_fields
from lorazor.measure.sharding import from_main_process
from lorazor.select.scores import DIRECTION_SCORES, default_warmup_score
from lorazor.selection import Selection
from lorazor.settings import BudgetSettings, ChoosingSettings, SelectSettings, TrainSettings
from lorazor.train.choose import CostLimit, steps_of_selection
from lorazor.workflow.reading import Source
from lorazor.workflow.spending import COSTS_FILE, summary
from lorazor.workflow.training import LOG_FILE, SELECT, TRAIN, Say, Training, check_settings


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        out: the run folder, which is the adapter folder.
        n_sites: LoRA sites of the adapter.
        n_parameters: trainable parameters at the end, a trained head included.
        loss: mean loss of the last logged steps: nats per answer token, per text or per question.
        seconds: time in the trainers, the selection run included.
        log: what the trainers logged, one entry per logging step.
        cost: where the cost of a step was the budget: the `budget`, its `unit` (seconds or bytes), and in it the
            `limit`, the cost of `all_sites`, and that of the choice: `predicted`, `measured` in turn with all sites,
            and `in_training` (the median of the steps; the peak, null on the CPU).
    """

    out: Path
    n_sites: int
    n_parameters: int
    loss: float
    seconds: float
    log: list[dict[str, Any]]
    cost: dict[str, Any] | None = None


@dataclass(frozen=True)
class SelectResult:
    """What a selection run came to.

    Attributes:
        out: the run folder, with `selection.json`, `scores.jsonl` and `gates.jsonl`.
        selection: every site, and whether it stays.
        cost: see `TrainResult`, but for `in_training`.
    """

    out: Path
    selection: Selection
    cost: dict[str, Any] | None = None


def train_adapter(
    data: Source,
    *,
    out: str | Path,
    settings: TrainSettings | None = None,
    resume: bool = False,
    say: Say = lambda message: None,
    **fields: Any,
) -> TrainResult:
    """Train a LoRA adapter: on every site, on those of a selection, or on those that a selection run chooses.

    Args:
        data: examples to train on: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder, which becomes the adapter folder; new, unless `resume`.
        settings: everything else; `settings.model.model` names the base model.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        fields: of the settings, in place of those of `settings`.
    Raises:
        LorazorError: settings, model, data or output folder cannot be used; before the training begins.
    """
    settings = with_defaults(with_fields(TrainSettings, settings, fields))
    fit, chooses = settings.fit, settings.method != "lora" and settings.selection is None
    check_settings(settings, chooses)
    _check_method(settings)
    work = Training("train", data, Path(out), settings, resume, say)
    if work.run.document["finished"]:
        say(f"{str(out)!r} has finished; there is nothing to go on with.")
        return TrainResult(Path(out), **work.run.document["result"], log=work.run.rows(LOG_FILE))
    start = 0
    if settings.selection is not None:
        loaded, model = work.start.on_chosen(selection := Selection.load(settings.selection))
        _note_scale(work, selection)
    elif not chooses:
        loaded, model = work.start.on_all()
    else:
        selection, start = work.choose(settings.method == "weightlora+"), steps_of_selection(settings.choosing, fit)
        if settings.start == "fresh" or start == 0:
            loaded, model = work.start.on_chosen(selection)
        else:
            loaded, model = work.start.from_adapter(work.run.path / SELECT / "kept", selection)
    n_sites = len(find_sites(model))
    work.say(f"Training {n_sites} sites, steps {start + 1} to {fit.steps} of {settings.batch_size} rows.")
    fitted = work.fit(model, loaded, work.run.path / TRAIN, range(start, fit.steps), [], work.run.path)
    numbers: dict[str, Any] = {
        "n_sites": n_sites,
        "n_parameters": fitted.n_parameters,
        "loss": fitted.loss,
        "seconds": work.seconds,
    }
    if (cost := summary(work.run.path / COSTS_FILE)) is not None:
        cost["in_training"] = fitted.step_seconds if cost["unit"] == "seconds" else fitted.peak_bytes
        numbers["cost"] = cost
    work.run.document["result"] = numbers
    log = from_main_process(lambda: work.run.rows(LOG_FILE))
    work.finish()
    return TrainResult(work.run.path, **numbers, log=log)


def select_sites(
    data: Source,
    *,
    out: str | Path,
    settings: SelectSettings | None = None,
    resume: bool = False,
    say: Say = lambda message: None,
    **fields: Any,
) -> SelectResult:
    """Choose the sites to train, in the first steps of a training that goes no further.

    Args:
        data: examples to train on: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder; new, unless `resume`.
        settings: everything else; `settings.model.model` names the base model.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        fields: of the settings, in place of those of `settings`.
    Raises:
        LorazorError: settings, model, data or output folder cannot be used; before the training begins.
    """
    settings = with_defaults(with_fields(SelectSettings, settings, fields))
    check_settings(settings, chooses=True)
    work = Training("select", data, Path(out), settings, resume, say)
    selection = work.choose(settings.grow)
    work.finish()
    return SelectResult(work.run.path, selection, summary(work.run.path / COSTS_FILE))


S = TypeVar("S", TrainSettings, SelectSettings)


def with_defaults(settings: S) -> S:
    """The settings with what is kept and by which score, where they leave that open.

    Nothing after this has to know the defaults.

    Directions, where a training has a budget of parameters: docs/decisions/0035-parameters-go-to-directions.md. Sites
    where the budget counts sites or limits a step, or where something else that was asked for is a matter of sites. By
    no evidence where it limits a step, unless steps of a selection run were asked for:
    docs/decisions/0037-a-limit-on-a-step-needs-no-evidence.md.
    """
    choosing, budget = settings.choosing, settings.budget
    by = choosing.by or "site"
    goes_on = isinstance(settings, TrainSettings) and settings.method == "weightlora" and settings.start == "warm"
    if choosing.by is None and goes_on:
        counts_parameters = budget.params is not None or budget.params_fraction is not None
        is_of_sites = choosing.schedule != "one-cut" or choosing.score not in (None, *DIRECTION_SCORES)
        by = "direction" if counts_parameters and not is_of_sites else "site"
    limit = CostLimit.of(budget) if choosing.select_steps is None else None
    score = choosing.score or default_warmup_score(by, limit and limit.name)
    return replace(settings, choosing=replace(choosing, by=by, score=score))


def _note_scale(work: Training, selection: Selection) -> None:
    """Say what a rank in the settings is for, where the selection has others."""
    rank, alpha = work.settings.lora.rank, work.settings.lora.alpha
    if {site.kept_rank for site in selection.kept} != {rank}:
        work.note(f"Ranks are the selection's: --rank {rank} and --alpha {alpha:g} say the scale, {alpha / rank:g}.")


def _check_method(settings: TrainSettings) -> None:
    """Refuse settings of which one says that another is not needed."""
    if settings.selection is not None and settings.method != "lora":
        raise SettingsError(
            f"method={settings.method!r} chooses sites, but a selection was given as well. Pass one of the two."
        )
    if settings.choosing.by == "direction" and settings.start == "fresh":
        raise SettingsError(
            "start='fresh' would keep the ranks of the chosen directions and nothing of the directions themselves. "
            "Leave it out; or choose ranks with 'lorazor select --by direction', and train them with --selection."
        )
    if settings.method == "lora":
        unasked = with_defaults(replace(settings, budget=BudgetSettings(), choosing=ChoosingSettings()))
        usual = {**vars(unasked.budget), **vars(unasked.choosing)}
        asked = {**vars(settings.budget), **vars(settings.choosing)}
        given = [f"{name}={value!r}" for name, value in asked.items() if value != usual[name]]
        why = "a selection names its sites already" if settings.selection else "method='lora' trains every site"
        advice = "Leave it out." if settings.selection else "Pass --method weightlora as well, or leave it out."
        if given:
            raise SettingsError(f"{given[0]} says what is chosen, but {why}. {advice}")
