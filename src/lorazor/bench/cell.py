"""One cell: read, train, load what was written, measure, and write the row."""

from __future__ import annotations

import dataclasses
import gc
import random
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from safetensors import safe_open

from lorazor.adapter.folder import read_adapter
from lorazor.adapter.load import Loaded, load
from lorazor.bench import methods
from lorazor.bench.copies import Copies
from lorazor.bench.experiment import Experiment
from lorazor.bench.places import appearing, finished_row
from lorazor.bench.recipes import example_settings, generation_settings, model_settings
from lorazor.bench.suite import Cell, names_of
from lorazor.data.examples import Example, asked
from lorazor.data.questions import Question
from lorazor.errors import BaseModelError, DataError, LorazorError
from lorazor.measure.metrics import metric_named
from lorazor.measure.peak import forget_peak, peak
from lorazor.measure.suite_rows import SCHEMA
from lorazor.runs import RunFolder, versions
from lorazor.settings import DataSettings
from lorazor.workflow.comparison import Compared, scores_of
from lorazor.workflow.reading import read_for
from lorazor.workflow.spending import COSTS_FILE, summary

Say = Callable[[str], None]


def run_cell(cell: Cell, out: Path, copies: Copies, device: str | None, say: Say) -> dict[str, Any]:
    """The row of a cell, which is a run folder in `out/cells`; of one that has finished, the row that is there.

    A folder is under its name when the cell has finished: one that was broken off begins anew, and of two processes
    that run the same cell, as after a network that was cut, the first to end is taken.

    Args:
        cell: what to run.
        out: folder of the suite.
        copies: of models and data.
        device: for the model; None for the default.
        say: receives messages for people.
    Raises:
        LorazorError: the cell cannot be run; PEFT, torch and transformers raise errors of their own.
    """
    place = out / "cells" / cell.folder
    if (row := finished_row(place)) is not None:
        return row
    shutil.rmtree(place, ignore_errors=True)  # of a version that began cells under their names
    with appearing(place) as beside:
        return _run(cell, beside, out / "shared", copies, device, say)


def attempt(cell: Cell, out: Path, copies: Copies, device: str | None, say: Say) -> dict[str, Any] | str:
    """The row of a cell, or what went wrong, for people; see `run_cell`."""
    try:
        return run_cell(cell, out, copies, device, say)
    except LorazorError as error:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of PEFT, torch, transformers: noted whole, the others go on
        return traceback.format_exc()


def _run(cell: Cell, place: Path, shared: Path, copies: Copies, device: str | None, say: Say) -> dict[str, Any]:
    run = RunFolder.start(place, "bench", dataclasses.asdict(cell), {}, resume=False)
    experiment, test = _experiment(cell, place / "work", shared, copies, device)
    run.write_json("run.json", run.document)
    forget_peak()
    start = time.perf_counter()
    try:
        folder = methods.method(cell.uses).train(experiment, **cell.options)
    except BaseModelError as error:
        if "hub" not in str(error):
            raise
        raise BaseModelError(f"{error} {copies.how(cell.spec.model)}.") from error
    seconds, n_bytes = time.perf_counter() - start + experiment.seconds_before, peak()
    n_bytes = None if n_bytes is None else max(n_bytes, experiment.peak_before)
    gc.collect()
    loaded, numbers = _opened(folder, experiment)
    row = {
        "schema": SCHEMA,
        "cell": cell.key,
        "task": cell.task,
        "method": cell.method,
        "budget": None if cell.budget is None else dataclasses.asdict(cell.budget),
        "seed": cell.seed,
        **numbers,
        **_measured(run, experiment, loaded, test, say),
        "seconds": round(seconds, 2),
        "steps": cell.recipe.steps,
        "peak_bytes": n_bytes,
        "cost": next((summary(path) for path in (place / "work").rglob(COSTS_FILE)), None),
        "device": str(next(loaded.model.parameters()).device.type),
        "versions": versions(),
    }
    shutil.rmtree(place / "work", ignore_errors=True)
    run.document["result"] = row
    run.finish()
    return row


def _experiment(
    cell: Cell, folder: Path, shared: Path, copies: Copies, device: str | None
) -> tuple[Experiment, list[Any]]:
    """The cell's model and data, and the test examples, which no method sees."""
    spec = cell.spec
    train = _examples(cell, copies, spec.train, limit=spec.n_train)
    test = _drawn(_examples(cell, copies, spec.test, names_of(spec.metrics)), spec.n_test)
    if spec.validation == spec.train:
        train, validation = _held_out(train, spec.n_validation)
    else:
        validation = _drawn(_examples(cell, copies, spec.validation), spec.n_validation)
    order = random.Random(cell.seed).sample(train, len(train))  # healing takes rows that training has not seen
    model = model_settings(cell, copies.model(spec.model), device)
    folder.mkdir(parents=True)
    return Experiment(cell, model, order, validation, folder, shared), test


def _examples(
    cell: Cell, copies: Copies, split: str, metrics: Sequence[str] = ("loss",), limit: int | None = None
) -> list[Any]:
    source, name = copies.data(cell.spec.data, split)
    try:
        return read_for({}, source, example_settings(cell, name, limit), metrics)
    except DataError as error:
        if name is None or "hub" not in str(error):
            raise
        raise DataError(f"{error} {copies.how(cell.spec.data)}/{split}.jsonl (.csv, .parquet, ...).") from error


def _drawn(examples: list[Any], n: int | None) -> list[Any]:
    """So many of them, the same for every seed."""
    return random.Random(0).sample(examples, len(examples) if n is None else min(n, len(examples)))


def _held_out(examples: list[Any], n: int) -> tuple[list[Any], list[Any]]:
    """Examples without those held out, which share no prompt with them, and these.

    Raises:
        DataError: none are left.
    """
    held = _drawn(examples, n)

    def prompt(one: Example | Question) -> Any:
        return asked(one) if isinstance(one, Example) else (one.text, one.context)

    prompts = {prompt(one) for one in held}
    rest = [one for one in examples if prompt(one) not in prompts]
    if not rest:
        raise DataError(f"n_validation={n} leaves none of {len(examples)} examples to train on. Pass fewer.")
    return rest, held


def _opened(folder: Path | None, experiment: Experiment) -> tuple[Loaded, dict[str, Any]]:
    """What a method wrote, loaded as PEFT and transformers load it, and its size."""
    base = experiment.start().base
    if folder is None:
        return base(), {"n_parameters": 0, "n_sites": 0, "ranks": []}
    if not (folder / "adapter_config.json").exists():
        loaded = base()
        whole = load(None, dataclasses.replace(experiment.model, model=str(folder), gguf_file=None), loaded.task)
        n_parameters = sum(one.numel() for one in whole.model.parameters())
        return whole, {"n_parameters": n_parameters, "n_sites": 0, "ranks": []}
    if PeftConfig.from_pretrained(str(folder)).peft_type in (PeftType.LORA, PeftType.ADALORA):
        sites = read_adapter(folder).sites
        ranks = sorted({site.rank for site in sites})
        n_parameters = sum(site.n_parameters for site in sites)
        loaded = load(folder, experiment.model)
        return loaded, {"n_parameters": n_parameters, "n_sites": len(sites), "ranks": ranks}
    loaded = base()
    model = PeftModel.from_pretrained(loaded.model, str(folder))
    prefix = getattr(model.base_model, "prefix")  # noqa: B009  # of the names of its parameters
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys() if prefix in key}  # noqa: SIM118
    n_sites = len({key.partition(prefix)[0] for key in shapes})
    n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return dataclasses.replace(loaded, peft_model=model.eval()), {
        "n_parameters": n_parameters, "n_sites": n_sites, "ranks": [],
    }  # fmt: skip


def _measured(run: RunFolder, experiment: Experiment, loaded: Loaded, test: list[Any], say: Say) -> dict[str, Any]:
    """Every metric of the task, those of texts on the first of the test examples, and how many these are."""
    spec, values = experiment.cell.spec, {}
    reading = DataSettings(max_length=spec.max_length)  # in batches of one size, whatever those of the training
    source = {"cell": Compared("cell", lambda task: loaded)}
    metrics = names_of(spec.metrics)
    is_text = {name: metric_named(name).needs_text and isinstance(test[0], Example) for name in metrics}
    for texts in (False, True):
        names = [name for name in metrics if is_text[name] == texts]
        some = test[: spec.n_text] if texts else test
        found = scores_of(run, reading, generation_settings(experiment.cell), some, names, source, say) if names else []
        values |= {name: float(own.values[0]) for name, own in zip(names, found, strict=True)}
    n_text = min(spec.n_text, len(test)) if any(is_text.values()) else 0
    return {"metrics": values, "n_test": len(test), "n_text": n_text}
