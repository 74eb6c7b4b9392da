"""What cells cost, before they run: seconds of those that have finished, else operations and the device's speed.

    operations of a token   2 P forward; 2 P back through frozen weights, 4 P where all are trained; 2 P to recompute
    memory                  weights, what is trained with its gradients and Adam's two moments, activations, logits

P are the parameters that a token is multiplied with. Activations are those of Korthikanti et al., arXiv:2205.05198:
34 bytes per layer, token and unit of width in 16 bits, 2 of them with checkpointing. Seconds leave out what a method
does besides its steps, and memory what the process holds anyway. A training that methods share counts once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lorazor.bench import methods
from lorazor.bench.copies import Copies
from lorazor.bench.suite import Cell, Task, names_of
from lorazor.measure.metrics import METRICS

TRAINING_SHARE = 0.4
"""Of the speed of a matrix product, what trainings reach."""
WRITING_SHARE = 0.04
"""The same of writing answers, which waits for memory."""
N_TEST = 1000
"""Test examples of a task that does not say how many."""
_ACTIVATIONS, _KEPT = 34, 2
_SHAPE = ("parameters", "layers", "hidden", "vocabulary")


@dataclass(frozen=True)
class Cost:
    """What one cell is estimated to take.

    Attributes:
        seconds: of training and choosing, as rows have them; None where the shape of the model is not known.
        test_seconds: of the test examples and of answers.
        peak_bytes: of memory in training.
    """

    seconds: float | None
    test_seconds: float
    peak_bytes: float | None


@dataclass(frozen=True)
class Line:
    """What the cells of a task and a method that are left cost together; None where it is not known."""

    task: str
    method: str
    n_cells: int
    seconds: float | None
    peak_bytes: float | None


def estimate(cell: Cell, teraflops: float | None) -> Cost:
    """What a cell takes by its recipe and the shape of its model.

    Args:
        cell: with a task whose shape is known, see `with_shapes`.
        teraflops: 10^12 operations a second of a matrix product on the device; None where that is not known.
    """
    spec, own = cell.spec, cell.recipe
    if any(getattr(spec, name) is None for name in (*_SHAPE, "tokens")):
        return Cost(None, 0.0, None)
    parameters, layers, hidden, vocabulary, tokens = (float(getattr(spec, name)) for name in (*_SHAPE, "tokens"))
    multiplied = parameters if _writes(spec) else parameters - vocabulary * hidden
    passes = 2 + (4 if cell.uses == "full-finetuning" else 2) + (2 if own.gradient_checkpointing else 0)
    steps = 0 if cell.uses == "base" else own.steps
    peak_bytes = _peak_bytes(cell, parameters, layers, hidden, vocabulary, tokens) if steps else None
    if teraflops is None:
        return Cost(None, 0.0, peak_bytes)
    speed = teraflops * 1e12
    seconds = passes * multiplied * steps * own.batch_size * tokens / (speed * TRAINING_SHARE)
    n_test = spec.n_test or N_TEST
    test = 2 * multiplied * n_test * tokens / (speed * TRAINING_SHARE)
    if _writes(spec):
        written = min(spec.n_text, n_test) * spec.max_new_tokens
        test += 2 * multiplied * written / (speed * WRITING_SHARE)
    return Cost(seconds, test, peak_bytes)


def _peak_bytes(cell: Cell, parameters: float, layers: float, hidden: float, vocabulary: float, tokens: float) -> float:
    """Weights and optimizer, and what a forward pass leaves for the backward one."""
    own, is_full = cell.recipe, cell.uses == "full-finetuning"
    on_gpu = torch.cuda.is_available()
    weight = 4 if is_full else {"float32": 4, "auto": 2 if on_gpu else 4}.get(own.dtype, 2)
    arithmetic = {"float32": 4, "auto": 2 if on_gpu else 4}.get(own.precision, 2)
    trained = parameters * 3 * weight if is_full else 16 * _of_lora(own.rank, own.target_modules, layers, hidden)
    at_once = own.batch_size / own.accumulation * tokens
    inside = at_once * hidden * arithmetic / 2
    kept = _KEPT * layers + _ACTIVATIONS if own.gradient_checkpointing else _ACTIVATIONS * layers
    logits = 8 * at_once * vocabulary if _writes(cell.spec) else 0  # they and their gradients, in float32
    return weight * parameters + trained + inside * kept + logits


def _of_lora(rank: int, targets: str, layers: float, hidden: float) -> float:
    """Numbers in A and B: four maps of attention and three of four times the width, or those that are named."""
    n_maps = 4 + 3 * 2.5 if targets == "all-linear" else len(targets.split(","))
    return layers * rank * 2 * hidden * n_maps


def _writes(spec: Task) -> bool:
    """Whether the model is one of language, whose last layer is the vocabulary."""
    if spec.task != "auto":
        return spec.task in ("causal", "seq2seq")
    return any(METRICS[name].of in ("text", "tokens") for name in names_of(spec.metrics))


def with_shapes(cells: Iterable[Cell], copies: Copies) -> list[Cell]:
    """Cells whose tasks have the shapes of their models: of the suite, or else of the `config.json` of a copy."""
    known: dict[str, Mapping[str, Any]] = {}
    found = []
    for cell in cells:
        spec = cell.spec
        if any(getattr(spec, name) is None for name in _SHAPE):
            if spec.model not in known:
                known[spec.model] = _shape(copies.model(spec.model))
            own = known[spec.model]
            spec = dataclasses.replace(spec, **{name: own[name] for name in own if getattr(spec, name) is None})
        found.append(dataclasses.replace(cell, spec=spec))
    return found


def _shape(folder: str) -> dict[str, Any]:
    """Of a model in a folder; nothing of one on the hub, or of a class that transformers does not know."""
    from transformers import AutoConfig, AutoModel

    if not (Path(folder) / "config.json").is_file():
        return {}
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (ValueError, OSError):
        return {}
    text = config.get_text_config()
    stacks = [getattr(text, name, 0) for name in ("encoder_layers", "decoder_layers")]
    return {
        "parameters": float(sum(one.numel() for one in model.parameters())),
        "layers": sum(stacks) or text.num_hidden_layers,
        "hidden": text.hidden_size,
        "vocabulary": text.vocab_size,
    }


class Costs:
    """Costs of a suite's cells, from rows that have finished where there are any.

    Args:
        cells: all of the suite.
        copies: of models, for shapes that the suite does not say.
        teraflops: of the device, or None: nothing is estimated then, rows alone tell.
    """

    def __init__(self, cells: Sequence[Cell], copies: Copies, teraflops: float | None) -> None:
        """Estimate every cell once."""
        shaped = with_shapes(cells, copies)
        self.estimates = {cell.key: estimate(own, teraflops) for cell, own in zip(cells, shaped, strict=True)}
        self.cells = {cell.key: cell for cell in cells}

    def scale(self, cell: Cell, rows: Iterable[Mapping[str, Any]]) -> float:
        """By how much what was measured differs from what was estimated: a median; 1 where nothing was.

        It is that of the cell's task, else of its model, else of all: a small model is further from the device's speed.
        """
        measured = [(self.cells[row["cell"]], row["seconds"]) for row in rows if row["cell"] in self.cells]
        ratios = [(own, seconds / guess) for own, seconds in measured if (guess := self.estimates[own.key].seconds)]
        of_task = [ratio for own, ratio in ratios if own.task == cell.task]
        of_model = [ratio for own, ratio in ratios if own.spec.model == cell.spec.model]
        of_all = [ratio for _, ratio in ratios]
        return median(of_task or of_model or of_all or [1.0])

    def seconds(self, left: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
        """Of each cell that is left, test examples included; None where nothing tells.

        They are the median of rows of the same task and method, else of the same task, else estimated, in proportion to
        how rows differ from their estimates.
        """
        trained = {(row["task"], row["seed"]) for row in rows if self._shares(self.cells.get(row["cell"]))}
        found: list[float | None] = []
        for cell in left:
            own, seconds, scale = self.estimates[cell.key], self._of_rows(cell, rows), self.scale(cell, rows)
            if seconds is None and own.seconds is not None:
                seconds = own.seconds * scale
            if seconds is not None and self._shares(cell):
                if (cell.task, cell.seed) in trained:
                    seconds = max(0.0, seconds - self._of_training(cell, rows, scale))
                trained.add((cell.task, cell.seed))
            found.append(None if seconds is None else seconds + own.test_seconds * scale)
        return found

    def _of_rows(self, cell: Cell, rows: Iterable[Mapping[str, Any]]) -> float | None:
        """The median of the same method, else of the task."""
        of_task = [row for row in rows if row["task"] == cell.task]
        same = [row["seconds"] for row in of_task if row["method"] == cell.method]
        others = (
            [row["seconds"] for row in of_task if row["seconds"]] if cell.uses != "base" else []
        )  # base trains nothing
        return median(same or others) if same or others else None

    def _of_training(self, cell: Cell, rows: Iterable[Mapping[str, Any]], scale: float) -> float:
        """Of the training that is shared, which is there already."""
        of = [row["seconds"] for row in rows if (row["task"], self._uses(row)) == (cell.task, "lora")]
        return median(of) if of else (self.estimates[cell.key].seconds or 0.0) * scale

    def _uses(self, row: Mapping[str, Any]) -> str | None:
        cell = self.cells.get(row["cell"])
        return cell and cell.uses

    def time_left(self, left: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> str:
        """Of the cells that are left, one after the other, in words."""
        seconds = self.seconds(left, rows)
        unknown = sum(one is None for one in seconds)
        beside = f", {unknown} of them unknown" if unknown else ""
        return f"{len(left)} cells left: {_hours(sum(one or 0.0 for one in seconds))} h{beside}."

    def lines(self, left: Sequence[Cell], rows: Sequence[Mapping[str, Any]]) -> list[Line]:
        """One for each task and method of the cells that are left, in their order."""
        groups: dict[tuple[str, str], list[tuple[Cell, float | None]]] = {}
        for cell, seconds in zip(left, self.seconds(left, rows), strict=True):
            groups.setdefault((cell.task, cell.method), []).append((cell, seconds))
        measured: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            if row["peak_bytes"]:
                measured.setdefault((row["task"], row["method"]), []).append(row["peak_bytes"])
        found = []
        for (task, method), own in groups.items():
            peaks = measured.get((task, method)) or [
                peak for cell, _ in own if (peak := self.estimates[cell.key].peak_bytes) is not None
            ]
            known = [seconds for _, seconds in own if seconds is not None]
            seconds = sum(known) if len(known) == len(own) else None
            found.append(Line(task, method, len(own), seconds, max(peaks, default=None)))
        return found

    @staticmethod
    def _shares(cell: Cell | None) -> bool:
        """Whether it is, or begins with, the training that methods share."""
        return cell is not None and methods.is_shared(cell.uses)


COLUMNS = ("task", "method", "cells", "hours", "GB")
"""Of the table that `in_words` makes."""


def in_words(lines: Sequence[Line]) -> list[tuple[str, ...]]:
    """Rows of a table for people, the last one the total."""
    rows = [(one.task, one.method, str(one.n_cells), _hours(one.seconds), _gigabytes(one.peak_bytes)) for one in lines]
    known = [one.seconds for one in lines if one.seconds is not None]
    most = max((one.peak_bytes for one in lines if one.peak_bytes), default=None)
    return [*rows, ("all", "", str(sum(one.n_cells for one in lines)), _hours(sum(known)), _gigabytes(most))]


def n_unknown(lines: Sequence[Line]) -> int:
    """Cells that no hours are known of."""
    return sum(one.n_cells for one in lines if one.seconds is None)


def _hours(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 3600:.2f}" if seconds < 36000 else f"{seconds / 3600:,.0f}"


def _gigabytes(n_bytes: float | None) -> str:
    return "?" if n_bytes is None else f"{n_bytes / 1e9:.1f}"


def measure_teraflops(size: int | None = None, clock: Callable[[], float] = time.perf_counter) -> float:
    """10^12 operations a second of a matrix product: bfloat16 on a GPU, float32 on a CPU; the best of a few."""
    on_gpu = torch.cuda.is_available()
    size = size or (8192 if on_gpu else 512)  # short enough to find a moment in which nothing else runs
    one = torch.randn(size, size, device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16 if on_gpu else torch.float32)

    def once() -> float:
        start = clock()
        product = one @ one
        float(product[0, 0])  # waits for the GPU
        return clock() - start

    once()
    return 2 * size**3 / min(once() for _ in range(20)) / 1e12
