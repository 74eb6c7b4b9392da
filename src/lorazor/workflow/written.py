"""The smaller adapter as a folder, and whether stock PEFT computes with it what was measured."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorazor.adapter.folder import AdapterFolder, load_tensors, read_adapter
from lorazor.adapter.load import Loaded, swap
from lorazor.adapter.prune import PruneResult, write_pruned
from lorazor.errors import MeasureError
from lorazor.measure.engines import on_model
from lorazor.measure.losses import row_losses
from lorazor.measure.meter import DATA, Meter, Variant
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.workflow.basis import Basis

ROUNDING_NATS = 1e-3
"""What float32 may make of another order of the same arithmetic, per answer token."""


@dataclass(frozen=True)
class Writer:
    """Writes variants of an adapter as folders.

    Attributes:
        run: the run.
        folder: the adapter on disk.
        basis: what gates are on.
        method: what chooses, for the selection.
        settings: of the method, likewise.
    """

    run: RunFolder
    folder: AdapterFolder
    basis: Basis
    method: str
    settings: Mapping[str, Any]

    def write(self, variant: Variant, out: Path, note: str = "", is_chosen: bool = False) -> PruneResult:
        """Write a variant, in the main process, in the place of what a run that stopped left there.

        Args:
            variant: of the adapter in the basis.
            out: the folder.
            note: for the model card.
            is_chosen: keep its selection as that of the run.
        """
        keys = ("hashes", "versions", "base")
        provenance = {key: self.run.document[key] for key in keys if key in self.run.document}
        scores, settings = torch.as_tensor(self.basis.scores.values), dict(self.settings)
        selection = self.basis.parts.selection(variant.gates, self.method, settings, scores, provenance)

        def make() -> PruneResult:
            if is_chosen:
                selection.save(self.run.path / "selection.json")
            shutil.rmtree(out, ignore_errors=True)
            return write_pruned(self.folder.path, selection, out, note=note or None, factors=self.basis.factors)

        return from_main_process(make)


def with_weights_of(pruned: PruneResult, healed: Path) -> PruneResult:
    """Put the weights of a healed adapter into the folder of the same adapter before healing."""
    name = "adapter_model.safetensors"

    def copy() -> int:
        shutil.copyfile(healed / name, pruned.path / name)
        return (pruned.path / name).stat().st_size

    return dataclasses.replace(pruned, n_bytes=from_main_process(copy))


def losses_of_some(meter: Meter, variant: Variant) -> torch.Tensor:
    """(rows,), nats per answer token of the shortest validation examples, by a variant of the adapter on the model."""
    with meter.parts.gated(variant.gates):
        return _losses(meter, meter.loaded)


def difference_when_loaded(meter: Meter, written: Path, expected: torch.Tensor) -> float:
    """Load a written adapter in stock PEFT, and compare its losses with those that were measured.

    The model of the meter has the written adapter on it afterwards.

    Args:
        meter: the model and the examples.
        written: the folder.
        expected: from `losses_of_some`.
    Returns:
        The largest difference of an example, in nats per answer token.
    Raises:
        MeasureError: in float32, it is more than rounding.
    """
    folder = read_adapter(written)
    loaded = swap(meter.loaded, folder)
    difference = float((_losses(meter, loaded) - expected).abs().max())
    dtypes = {loaded.model.dtype, *(tensor.dtype for tensor in load_tensors(folder).values())}
    is_exact = dtypes == {torch.float32}
    if not difference <= ROUNDING_NATS and is_exact:
        raise MeasureError(
            f"The adapter in {str(written)!r} has other losses in PEFT than were measured, by up to {difference:.3g} "
            "nats per answer token. Do not use it, and report this."
        )
    return difference


def _losses(meter: Meter, loaded: Loaded) -> torch.Tensor:
    found = row_losses(loaded.model, on_model(loaded.model, meter.batches(DATA)[-1]))
    return (found.nll_nats / found.n_tokens.clamp(min=1)).double().cpu()
