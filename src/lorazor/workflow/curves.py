"""The curves from start to end: what each layer knows of the answer, and the boundary that this proposes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorazor.adapter.folder import AdapterFolder
from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import choose_stack, stack_sizes
from lorazor.adapter.tasks import TASK_TYPES
from lorazor.data.batches import make_batches, what_was_cut
from lorazor.data.examples import Example
from lorazor.data.questions import COLUMNS
from lorazor.errors import DataError, SettingsError
from lorazor.fields import with_fields
from lorazor.measure.curves import VARIANTS, CurveRow, MeasuredCurves, check_stack, collect_curves, curve_batch
from lorazor.measure.lens import layers_of
from lorazor.measure.measured import for_head
from lorazor.measure.meter import note_base
from lorazor.measure.results import CurvePoint
from lorazor.measure.sharding import from_main_process, is_main_process, measure_sharded
from lorazor.runs import RunFolder
from lorazor.select.boundary import Proposal, check_settled_within, propose_boundary
from lorazor.settings import CurvesSettings, DataSettings
from lorazor.workflow.opening import Adapter, opened
from lorazor.workflow.reading import Source, read, source_name, start_run

ROWS_FILE = "curves.jsonl"


@dataclass(frozen=True)
class CurvesResult:
    """What a run of curves came to.

    Attributes:
        out: the run folder.
        n_examples: examples.
        n_tokens: answer tokens of all of them.
        stack: name of the stack, `model.layers`.
        n_layers: L, its layers, with or without LoRA.
        proposal: the boundary read off the curves, by our rule.
        gap: one entry per layer: `layer`, `gap` (probability with the adapter minus the base), `standard_error`.
        curves: every variant at every layer.
    """

    out: Path
    n_examples: int
    n_tokens: int
    stack: str
    n_layers: int
    proposal: Proposal
    gap: list[dict[str, Any]]
    curves: list[CurvePoint]

    def to_document(self) -> dict[str, Any]:
        """The contents of `curves.json`."""
        everything = dataclasses.asdict(self)
        del everything["out"]
        return {**everything.pop("proposal"), **everything}


def measure_curves(
    adapter: Adapter,
    data: Source,
    *,
    out: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: CurvesSettings | None = None,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    **fields: Any,
) -> CurvesResult:
    """Measure the probability of the true token after every layer, with the adapter and without.

    Args:
        adapter: adapter folder, hub id, or a PEFT model in memory, which stays as it is.
        data: validation examples: a file, a dataset folder, a hub name, or the examples themselves.
        out: the run folder; new, unless `resume`. If left out, a temporary one, which the result names and which stays.
            It receives `curves.jsonl` and `curves.json`.
        tokenizer: of a model in memory; if left out, that of the base model that its adapter names.
        settings: everything else.
        resume: go on with an interrupted run in `out`.
        say: receives messages for people.
        fields: of `CurvesSettings`, in place of those of `settings`.
    Raises:
        LorazorError: settings, adapter, data or output folder cannot be used; before the model is loaded.
    """
    settings = with_fields(CurvesSettings, settings, fields)
    reading, tell = settings.reading, say if is_main_process() else lambda message: None
    with opened(adapter, settings.model, tokenizer) as source:
        folder = source.folder
        stack, examples = _check(folder, settings), read(data, reading)
        if len(examples) < 2:
            raise DataError(
                f"{source_name(data)!r} has {len(examples)} example. Pass at least 2: the curves have standard errors."
            )
        everything = dataclasses.asdict(settings) | {"adapter": source.name, "data": source_name(data)}
        run = start_run(out, "curves", everything, {"adapter": source.folder.place, "data": data}, resume)
        measured = _measured(run, source.load(), examples, stack, reading, tell)
    gap, error = measured.gap()
    result = CurvesResult(
        out=run.path,
        n_examples=len(measured.examples),
        n_tokens=int(measured.n_tokens.sum()),
        stack=stack,
        n_layers=measured.n_layers,
        proposal=propose_boundary(gap, error, stack_sizes(folder.sites)[stack], settings.settled_within),
        gap=[
            {"layer": layer, "gap": float(gap[layer]), "standard_error": float(error[layer])}
            for layer in range(len(gap))
        ],
        curves=measured.points(),
    )
    run.write_json("curves.json", result.to_document())
    run.finish()
    return result


def _check(folder: AdapterFolder, settings: CurvesSettings) -> str:
    """Refuse what can be refused before the data is read, and name the stack."""
    check_settled_within(settings.settled_within)
    task = folder.config.get("task_type")
    if task == TASK_TYPES["question-answering"]:
        raise SettingsError(
            f"{folder.name!r} is an adapter for questions: an answer is a span, so there is no true token to "
            f"follow. Pass an adapter for text or labels."
        )
    stack = choose_stack(folder.sites, settings.stack)
    check_stack(stack, is_encoder_decoder=task == TASK_TYPES["seq2seq"])
    return stack


def _measured(
    run: RunFolder,
    loaded: Loaded,
    examples: Sequence[Example],
    stack: str,
    reading: DataSettings,
    say: Callable[[str], None],
) -> MeasuredCurves:
    """Measure what the run lacks, shared between the processes of `accelerate launch`."""
    if loaded.task == "question-answering":
        raise DataError(f"The model answers questions, which needs the columns {', '.join(COLUMNS)} in the data.")
    note_base(run, loaded, say)
    check_stack(stack, is_encoder_decoder=bool(loaded.model.config.is_encoder_decoder))
    size, limit, task = reading.batch_size, reading.max_length, loaded.task
    if isinstance(examples[0].label, float):
        raise DataError("The labels are numbers to predict, so there is no true class to follow. Pass data of classes.")
    examples = for_head(loaded, examples)
    encoding = make_batches(examples, loaded.tokenizer, task, size, limit, loaded.decoder_inputs, loaded.has_types)
    known = [CurveRow(**row) for row in from_main_process(lambda: run.rows(ROWS_FILE))]
    n_rows, n_layers = Counter(row.example for row in known), len(layers_of(loaded.model, stack))
    missing = {one.index for one in examples if n_rows[one.index] < len(VARIANTS) * (n_layers + 1)}
    if encoding.n_truncated and missing:
        say(f"{what_was_cut(encoding.n_truncated, len(examples), task)} to fit into the context.")
    new = measure_sharded(
        encoding.of_size(size, missing),
        lambda batch: curve_batch(loaded.model, loaded.sites, batch, stack),
        lambda rows: run.append(ROWS_FILE, [dataclasses.asdict(row) for row in rows]),
        f"measuring {ROWS_FILE}",
    )
    return collect_curves([*known, *new])
