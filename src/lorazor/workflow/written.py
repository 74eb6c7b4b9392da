"""The smaller adapter as a folder, and whether stock PEFT computes with it what was measured."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorazor.adapter.folder import WEIGHTS_FILE, AdapterFolder, load_tensors, lora_dtypes, read_adapter, split_key
from lorazor.adapter.load import Loaded, swap
from lorazor.adapter.prune import PruneResult, write_pruned
from lorazor.errors import MeasureError
from lorazor.measure.engines import on_model
from lorazor.measure.losses import row_losses
from lorazor.measure.meter import DATA, Meter, Variant
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.select.goal import Goal, dtype_named
from lorazor.settings import ShrinkSettings
from lorazor.workflow.basis import Basis
from lorazor.workflow.candidates import is_whole

FOLDER = "written"
"""Where a run keeps what it judges as it is written, until it has chosen."""

ROUNDING_NATS = 1e-3
"""What float32 may make of another order of the same arithmetic, per answer token."""


class Writer:
    """Writes variants of an adapter as folders.

    Attributes:
        run: the run.
        folder: the adapter on disk.
        basis: what gates are on.
        rounds: whether writing rounds the numbers of a basis, which are float32.
        in_dtype: the number format in words, where it is another one than the adapter's; else nothing.
    """

    def __init__(
        self, run: RunFolder, folder: AdapterFolder, basis: Basis, goal: Goal, settings: ShrinkSettings
    ) -> None:
        """The goal and the settings are what the selections tell of."""
        self.run, self.folder, self.basis, self._goal, self._by = run, folder, basis, goal, settings.by
        self._dtype, own = dtype_named(settings.weights_dtype), lora_dtypes(folder)
        written = own if self._dtype is None else {self._dtype}
        self.rounds = any(one.itemsize < torch.float32.itemsize for one in written)
        self.in_dtype = "" if self._dtype is None or own == written else f", in {_name(self._dtype)}"

    def is_same(self, variant: Variant) -> bool:
        """Whether what would be written is the adapter as it is."""
        return is_whole(variant) and not self.in_dtype

    def write(
        self, variant: Variant, out: Path, note: str = "", is_chosen: bool = False, healed: Path | None = None
    ) -> PruneResult:
        """Write a variant, in the main process, in the place of what a run that stopped left there.

        Args:
            variant: of the adapter in the basis.
            out: the folder.
            note: for the model card.
            is_chosen: keep its selection as that of the run.
            healed: folder of the same adapter after healing, for its weights.
        """
        keys = ("hashes", "versions", "bases")
        provenance = {key: self.run.document[key] for key in keys if key in self.run.document}
        basis, method = self.basis, f"shrink by {self._by}"
        settings = {"goal": str(self._goal), "score": basis.score, "basis": basis.name}
        scores = torch.as_tensor(basis.scores.values)
        selection = basis.scores.parts.selection(variant.gates, method, settings, scores, provenance)

        def make() -> PruneResult:
            if is_chosen:
                selection.save(self.run.path / "selection.json")
            shutil.rmtree(out, ignore_errors=True)
            pruned = write_pruned(
                self.folder, selection, out, note=note or None, factors=basis.factors, dtype=self._dtype
            )
            if healed is None:
                return pruned
            shutil.copyfile(healed / WEIGHTS_FILE, out / WEIGHTS_FILE)
            return dataclasses.replace(pruned, n_bytes=(out / WEIGHTS_FILE).stat().st_size)

        return from_main_process(make)


def as_written(writer: Writer, meter: Meter, variant: Variant) -> Variant:
    """A variant as it is written and PEFT loads it, where writing rounds; the variant itself elsewhere.

    A factor is folded into B before it is rounded, and it depends on how many directions of a site stay. So what is
    judged comes from a folder.

    Args:
        writer: of the run.
        meter: has what is written on its model afterwards.
        variant: of the adapter in the basis.
    """
    if not writer.rounds:
        return variant
    name, folder = f"written {variant.digest}", writer.run.path / FOLDER / variant.digest
    if meter.adapter != name:
        writer.write(variant, folder)
        loaded = swap(meter.loaded, read_adapter(folder))
        meter.use(loaded, name)
    formats = " and ".join(sorted(_name(one) for one in lora_dtypes(read_adapter(folder))))
    return dataclasses.replace(meter.full, label=f"{variant.label}, {formats}")


def narrow_(healed: Path, like: Path) -> None:
    """Give A and B of a healed adapter the number formats of the same adapter before healing; nothing is done twice.

    Raises:
        MeasureError: a number does not fit.
    """
    wanted = {key: tensor.dtype for key, tensor in load_tensors(read_adapter(like)).items() if split_key(key)}
    folder = read_adapter(healed)
    before = load_tensors(folder)
    after = {key: tensor.to(wanted.get(key, tensor.dtype)) for key, tensor in before.items()}
    if all(after[key].dtype == tensor.dtype for key, tensor in before.items()):
        return
    if not all(bool(torch.isfinite(tensor).all()) for tensor in after.values()):
        raise MeasureError("Healed numbers do not fit into the number format. Pass --weights-dtype bfloat16.")
    beside = healed / f".{WEIGHTS_FILE}"
    save_file(after, beside, metadata={"format": "pt"})
    shutil.copymode(folder.weights, beside)
    beside.replace(folder.weights)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def losses_of_some(meter: Meter, loaded: Loaded) -> torch.Tensor:
    """(rows,), nats per answer token of the shortest validation examples."""
    found = row_losses(loaded.model, on_model(loaded.model, meter.batches(DATA)[-1]))
    return (found.nll_nats / found.n_tokens.clamp(min=1)).double().cpu()


def difference_when_loaded(meter: Meter, written: Path, expected: torch.Tensor) -> tuple[float, Loaded]:
    """Load a written adapter in stock PEFT, and compare its losses with those that were measured.

    Args:
        meter: the model and the examples.
        written: the folder.
        expected: from `losses_of_some`.
    Returns:
        The largest difference of an example, in nats per answer token; and the model with the written adapter on it.
    Raises:
        MeasureError: it is more than the rounding of float32, in which the model computes.
    """
    folder = read_adapter(written)
    loaded = swap(meter.loaded, folder)
    difference = float((losses_of_some(meter, loaded) - expected).abs().max())
    if not difference <= ROUNDING_NATS and loaded.model.dtype == torch.float32:
        raise MeasureError(
            f"The adapter in {str(written)!r} has other losses in PEFT than were measured, by up to {difference:.3g} "
            "nats per answer token. Do not use it, and report this."
        )
    return difference, loaded
