"""Going on from a checkpoint of WeightLoRA.

The Trainer saves the adapter with the gates multiplied into B. Within the warm-up, a file beside it holds what that
loses; after the warm-up nothing is lost, and the selection is written there.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorazor.adapter.sites import Site
from lorazor.errors import SelectionError, SettingsError
from lorazor.files import explained, json_text, write_text
from lorazor.measure.sharding import this_process
from lorazor.select.weightlora import WeightLoraSettings
from lorazor.selection import Selection

SELECTION_FILE = "selection.json"
WARMUP_FILE = "lorazor_warmup.pt"
COMPLETE_FILE = "lorazor_complete"


class MarkComplete(TrainerCallback):
    """Marks a checkpoint when all of it is there, with the sizes of its files; the last of the callbacks.

    The Trainer writes a checkpoint in place, file by file: one without the mark may have been cut short by a kill, and
    with it files may be shorter than they were where the power failed.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for the files of all processes, then write the mark."""
        this_process().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = output_folder(args) / f"checkpoint-{state.global_step}"
            write_text(checkpoint / COMPLETE_FILE, json_text(_sizes(checkpoint)))


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder that is marked as complete, and still is; None without one.

    Warns of each newer one that is not as it was marked.
    """
    checkpoints = [mark.parent for mark in folder.glob(f"checkpoint-*/{COMPLETE_FILE}")]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            marked = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
        except ValueError:
            marked = {COMPLETE_FILE: "damaged"}
        sizes = _sizes(checkpoint)
        damaged = [name for name, size in marked.items() if sizes.get(name) != size]
        if not damaged:
            return str(checkpoint)
        warnings.warn(f"{str(checkpoint)!r} is passed over: {damaged[0]!r} is not as it was written.", stacklevel=2)
    return None


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file but the mark, by its path in the folder."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_FILE)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def output_folder(args: TrainingArguments) -> Path:
    """Where the Trainer writes."""
    return Path(cast(str, args.output_dir))  # None only until the arguments are complete


def run_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer puts the checkpoints of this training: `output_folder`, or a trial's folder in it.

    Trials of `Trainer.hyperparameter_search` have a folder each. Callbacks are told that there is one but not which:
    the Trainer that knows is found in the frames that called.
    """
    trainer = next((own["self"] for own in _frames_of_trainer()), None) if state.is_hyper_param_search else None
    return output_folder(args) if trainer is None else Path(trainer._get_output_dir(trainer._trial))


def checkpoint_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the Trainer resumed from; it tells its callbacks the step only, and knows it itself."""
    for trainer_frame in _frames_of_trainer():
        if isinstance(named := trainer_frame.get("resume_from_checkpoint"), str):
            return Path(named)
    return output_folder(args) / f"checkpoint-{state.global_step}"


def _frames_of_trainer() -> Iterator[dict[str, Any]]:
    """The local variables of the Trainer's methods that called, the last one first."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer):
            yield frame.f_locals
        frame = frame.f_back


def save_warmup(state: Mapping[str, Any], seed: int, checkpoint: Path) -> None:
    """Write the state of a warm-up into a checkpoint, whole or not at all.

    Args:
        state: `Evidence.state_dict`, and `n_steps`.
        seed: of the callback.
        checkpoint: the folder.
    Raises:
        OutputError: the folder cannot be written to, or the disk is full.
    """
    path = checkpoint / WARMUP_FILE
    partial = path.with_suffix(".partial")
    with explained(path):
        try:
            with partial.open("wb") as file:
                torch.save({**state, "seed": seed}, file)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def read_warmup(checkpoint: Path, step: int, seed: int) -> dict[str, Any]:
    """Read what `save_warmup` wrote.

    Args:
        checkpoint: the folder.
        step: optimizer steps that the checkpoint's training had taken.
        seed: of the callback.
    Returns:
        For `Evidence.load_state_dict`.
    Raises:
        SettingsError: the file is missing, damaged, or of another step or seed.
    """
    path = checkpoint / WARMUP_FILE
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        n_steps, saved_seed, _ = saved["n_steps"], saved["seed"], saved["settings"]
    except FileNotFoundError as error:
        raise SettingsError(
            f"Cannot go on with the warm-up: {str(path)!r} is missing. Resume from a complete checkpoint of it."
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise SettingsError(f"Cannot read {str(path)!r} ({error}). Resume from an earlier checkpoint.") from error
    if n_steps != step:
        raise SettingsError(
            f"{str(path)!r} is of step {n_steps}, but the checkpoint of step {step}. Resume from an earlier checkpoint."
        )
    if saved_seed != seed:
        raise SettingsError(f"seed={seed}, but the run to resume had seed={saved_seed}. Pass the same.")
    return saved


def read_choice(checkpoint: Path, sites: Sequence[Site], settings: WeightLoraSettings) -> Selection:
    """Read the selection of a checkpoint after the warm-up.

    Args:
        checkpoint: the folder.
        sites: of the model; after the warm-up, these must be the survivors.
        settings: of the callback.
    Raises:
        SettingsError: no selection there, one of other settings, or a model with other sites than the survivors.
    """
    try:
        selection = Selection.load(checkpoint / SELECTION_FILE)
    except SelectionError as error:
        raise SettingsError(f"{str(checkpoint)!r} is no checkpoint of a finished warm-up. {error}") from error
    chosen_with = {name: value for name, value in selection.settings.items() if name != "basis"}
    if chosen_with != dataclasses.asdict(settings):
        raise SettingsError(f"The sites of {str(checkpoint)!r} were chosen with {chosen_with}. Pass the same settings.")
    if {(site.name, site.rank) for site in sites} != {(site.name, site.kept_rank) for site in selection.kept}:
        raise SettingsError(
            f"The model has {len(sites)} LoRA sites, but the checkpoint {len(selection.kept)}. To go on after the "
            f"warm-up, give the Trainer PeftModel.from_pretrained(base, {str(checkpoint)!r}, is_trainable=True)."
        )
    return selection
