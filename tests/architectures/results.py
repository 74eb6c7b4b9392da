"""One family through all checks, and what came of it in words."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorazor.errors import LorazorError
from tests.architectures import checks
from tests.architectures.overrides import NOT_BUILT
from tests.architectures.subjects import in_words, losses_by_hand, make_subject, tiny_batch
from tests.architectures.tiny_configs import tiny_model

COLUMNS = ("sites", "sweep", "directions", "prune", "reload")
SECONDS = 120


@dataclass
class Result:
    """What came of one family.

    Attributes:
        task: a key of `TASKS`.
        family: transformers' name of the model type.
        cells: of each column `ok`, `refused: why`, `not built: why`, `PEFT: why`, or `FAILED: why`; the sweep names
            its engine instead of `ok`.
        remarks: what had to be done differently.
    """

    task: str
    family: str
    cells: dict[str, str]
    remarks: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """The cells that nobody meant."""
        return [f"{column} {cell}" for column, cell in self.cells.items() if cell.startswith("FAILED")]


def try_family(task: str, family: str, folder: Path) -> Result:
    """Put one family through all checks, whatever happens."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _time_limit(SECONDS):
        warnings.simplefilter("ignore")
        try:
            _check_that_it_runs(task, family)
        except Exception as error:
            why = f"not built: {NOT_BUILT[family]}" if family in NOT_BUILT else f"FAILED: {in_words(error)}"
            return Result(task, family, dict.fromkeys(COLUMNS, why))
        try:
            subject = make_subject(task, family, folder)
        except Exception as error:
            return Result(task, family, dict.fromkeys(COLUMNS, f"PEFT: {in_words(error)}"))
        cells = {
            "sites": _cell(lambda: checks.check_sites(subject)),
            "sweep": _cell(lambda: checks.check_sweep(subject)),
            "reload": _cell(lambda: checks.check_reload(subject, folder / "run")),
            # these rewrite A and B to their singular form
            "prune": _cell(lambda: checks.check_prune(subject, folder / "pruned")),
            "directions": _cell(lambda: checks.check_directions(subject)),
        }
        return Result(task, family, {column: cells[column] for column in COLUMNS}, subject.remarks)


def _check_that_it_runs(task: str, family: str) -> None:
    model = tiny_model(task, family)
    with torch.no_grad():
        losses = losses_by_hand(model, tiny_batch(task, model))
    if not torch.isfinite(losses).all():
        raise ValueError("its losses are not finite")


def _cell(check: Callable[[], str | None]) -> str:
    try:
        return check() or "ok"
    except LorazorError as error:
        return f"refused: {in_words(error)}"
    except checks.StockFails as error:
        return f"PEFT: {in_words(error)}"
    except Exception as error:
        name = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return f"FAILED: {name}{in_words(error)}"


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raise inside the block when it takes too long; pytest runs tests in the main thread, as signals need."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
