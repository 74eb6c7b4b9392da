"""`lorazor shrink` from start to end: read, check, load, choose, write. What is chosen, and how, is in `choosing`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorazor.adapter.folder import AdapterFolder, check_is_finite, read_adapter
from lorazor.adapter.live import base_fingerprint, load_beside, save_live
from lorazor.adapter.load import Loaded, find_adapter, load
from lorazor.adapter.parts import Parts
from lorazor.adapter.prune import PruneResult
from lorazor.data.examples import Example
from lorazor.errors import SettingsError
from lorazor.measure.meter import CONFIRM, DATA, Meter
from lorazor.measure.results import Candidate
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.goal import DEFAULT_MARGIN, Goal
from lorazor.select.search import Units
from lorazor.select.verdict import Margin, Verdict
from lorazor.settings import ModelSettings, ShrinkSettings
from lorazor.workflow.by_weights import shrink_by_weights
from lorazor.workflow.choosing import Work
from lorazor.workflow.cost import Cost
from lorazor.workflow.heal import check_healing
from lorazor.workflow.reading import Source, read_sets, source_name, write_examples
from lorazor.workflow.starting import start_run
from lorazor.workflow.verdicts import check_can_decide, check_gains, what_can_be_decided


@dataclass(frozen=True)
class ShrinkResult:
    """What a run came to.

    Attributes:
        out: the run folder.
        goal: what was asked for, in words.
        metric: what adapters were compared by; None where nothing was measured.
        reason: why this adapter, in a sentence.
        candidates: what was measured on the validation examples, the full adapter first.
        verdict: on held-out examples; None without them, without a margin, or where nothing was dropped.
        pruned: the smaller adapter; None where nothing was dropped.
        loaded_differs_by: the largest difference of an example's loss between what was measured and what was written,
            as stock PEFT loads it, in nats per answer token; None where nothing was measured or dropped.
        cost: forward passes and seconds; None where nothing was measured.
        model: an ordinary PEFT model with the smaller adapter, in evaluation mode: on the same base weights as the
            model that was given, if one was; None where nothing was dropped, or no base model was loaded.
    """

    out: Path
    goal: str
    metric: str | None
    reason: str
    candidates: tuple[Candidate, ...]
    verdict: Verdict | None
    pruned: PruneResult | None
    loaded_differs_by: float | None = None
    cost: Cost | None = None
    model: PeftModel | None = field(default=None, repr=False, compare=False, metadata={"json": False})


def shrink(
    adapter: str | Path | PeftModel,
    data: Source | None = None,
    *,
    out: str | Path | None = None,
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
        confirm: examples that take no part in the choice, for the verdict.
        heal: examples to train what stays on, in place of `settings.heal`.
        tokenizer: of a model in memory; if left out, that of the base model that its adapter names.
        settings: everything else.
        resume: go on with an interrupted run in `out`; what was measured is not measured again.
        say: receives messages for people.
        fields: of `ShrinkSettings`, in place of those of `settings`: `margin="2%"`, `weights_dtype="bfloat16"`.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    settings = _with(settings or ShrinkSettings(), fields)
    sources = {"--data": data, "--confirm": confirm, "--heal": settings.heal if heal is None else heal}
    settings = dataclasses.replace(settings, heal=source_name(sources["--heal"]))
    with _opened(adapter, tokenizer, settings.model) as source:
        plan = _Plan.make(source, sources, settings)
        place = Path(from_main_process(lambda: tempfile.mkdtemp(prefix="lorazor-")) if out is None else out)
        run = plan.start(place, sources, resume)
        if data is None:
            reason, pruned = shrink_by_weights(run, source.folder, plan.goal, settings)
            run.finish()
            return ShrinkResult(place, str(plan.goal), None, reason, (), None, pruned)
        result = plan.carry_out(run, say)
    run.finish()
    return result


def note_base(run: RunFolder, folder: AdapterFolder, loaded: Loaded) -> None:
    """Keep in run.json which base model was used."""
    name = loaded.model.config.name_or_path or folder.config.get("base_model_name_or_path")
    run.document["base"] = {"name": name, "fingerprint": base_fingerprint(loaded.model)}


def _with(settings: ShrinkSettings, fields: Mapping[str, Any]) -> ShrinkSettings:
    names = {one.name for one in dataclasses.fields(ShrinkSettings)}
    if unknown := sorted(fields.keys() - names):
        raise SettingsError(f"{unknown[0]!r} is no setting of shrink. Pass some of {', '.join(sorted(names))}.")
    return dataclasses.replace(settings, **fields)


@dataclass(frozen=True)
class _Opened:
    """An adapter that can be read, and a way to load it: its name for run.json, its folder, its base model."""

    name: str
    folder: AdapterFolder
    load: Callable[[], Loaded]


@contextmanager
def _opened(
    adapter: str | Path | PeftModel, tokenizer: PreTrainedTokenizerBase | None, settings: ModelSettings
) -> Iterator[_Opened]:
    """Find an adapter; one that is in memory is a folder inside the block."""
    if not isinstance(adapter, PeftModel):
        if not isinstance(adapter, str | Path):
            raise SettingsError(
                f"{type(adapter).__name__} is no adapter. Pass a folder, a hub id, or a PeftModel (unwrapped)."
            )
        if tokenizer is not None:
            raise SettingsError("tokenizer goes with a model in memory; a folder or a hub id has its own.")
        folder = read_adapter(find_adapter(adapter))
        yield _Opened(str(folder.path), folder, lambda: load(folder.path, settings))
        return
    if dataclasses.replace(settings, task="auto") != ModelSettings():
        raise SettingsError("A model in memory has its base already. Of the model settings, pass task alone.")
    with tempfile.TemporaryDirectory(prefix="lorazor-adapter-") as place:
        folder = save_live(adapter, Path(place), tokenizer)
        yield _Opened("a model in memory", folder, lambda: load_beside(adapter, folder, tokenizer, settings))


@dataclass(frozen=True)
class _Plan:
    """A run that has passed every check which needs no model."""

    source: _Opened
    settings: ShrinkSettings
    goal: Goal
    examples: list[Example]
    held_out: list[Example]
    train: list[Example]

    @classmethod
    def make(cls, source: _Opened, sources: Mapping[str, Source | None], settings: ShrinkSettings) -> _Plan:
        """Read the data, and refuse what cannot work."""
        check_is_finite(source.folder)
        goal = Goal.of(settings, source.folder, sources["--data"] is not None)
        _check_needs_data(sources)
        Units.of(Parts(source.folder.sites), settings.by, settings.stack)  # refuses what cannot be gathered
        metrics = [goal.margin.metric] if goal.margin is not None else []
        alone = ["--heal"] if settings.heal_from == "full" else []
        examples, held_out, train = read_sets(settings.reading, metrics, sources, alone)
        check_can_decide(goal.margin, examples, "--data")
        check_can_decide(goal.margin, held_out)
        check_healing(settings, train)
        return cls(source, settings, goal, examples, held_out, train)

    def start(self, out: Path, sources: Mapping[str, Source | None], resume: bool) -> RunFolder:
        """Begin the run folder, or go on with it."""
        names = {option[2:]: source_name(one) for option, one in sources.items()}
        paths = {option[2:]: Path(one) for option, one in sources.items() if isinstance(one, str | Path)}
        everything = dataclasses.asdict(self.settings) | names | {"adapter": self.source.name}
        return start_run(out, "shrink", everything, {"adapter": self.source.folder.path} | paths, resume)

    def carry_out(self, run: RunFolder, say: Callable[[str], None]) -> ShrinkResult:
        """Load, choose, and write."""
        goal, settings, folder = self.goal, self.settings, self.source.folder
        margin = goal.margin or (Margin.parse(DEFAULT_MARGIN) if self.held_out else None)
        sets = {"validation": self.examples, "held-out": self.held_out}
        if margin is not None and (sentence := what_can_be_decided(margin, sets)):
            run.noting(say)(sentence)
        loaded = self.source.load()
        note_base(run, folder, loaded)
        meter = Meter(loaded, Parts(tuple(loaded.sites)), run, settings.reading, settings.generation, run.noting(say))
        meter.add(DATA, self.examples)
        meter.add(CONFIRM, self.held_out, "confirm-")
        write_examples(run, self.held_out or self.examples)
        check_gains(meter, goal.margin, [DATA])
        check_gains(meter, margin, [CONFIRM])
        work = Work.begin(run, folder, meter, goal, settings)
        found = work.finish(self.train)
        return ShrinkResult(
            run.path, str(goal), work.candidates.metric, found.reason, tuple(work.candidates.measured.values()),
            found.choice.verdict, found.pruned, found.differs_by, found.cost, found.loaded and found.loaded.peft_model,
        )  # fmt: skip


def _check_needs_data(sources: Mapping[str, Source | None]) -> None:
    given = next((name for name, source in sources.items() if source is not None and name != "--data"), None)
    if sources["--data"] is None and given is not None:
        raise SettingsError(f"{given} without --data: choices are made on validation examples first. Pass --data.")
