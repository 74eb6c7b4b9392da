"""WeightLoRA in a user's own training script: a callback for transformers' Trainer and its relatives.

    trainer = Trainer(..., callbacks=[WeightLora(keep=20, warmup_steps=200)])

The callback owns the gates. Everything else (batches, optimizer, schedule, clipping, saving) stays the Trainer's.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.errors import MeasureError, OutputError, SettingsError
from lorazor.runs import versions
from lorazor.select.weightlora import Gates, Schedule, WeightLoraSettings
from lorazor.selection import SelectedSite, Selection
from lorazor.train.disconnect import disconnect_, grow_survivors_, rescale_state_
from lorazor.train.gating import GatedSites
from lorazor.train.preconditions import check_arguments, check_optimizer, check_sites
from lorazor.train.resume import SELECTION_FILE, checkpoint_of, output_folder, read_choice, read_warmup, save_warmup


class WeightLora(TrainerCallback):
    """Learn in a warm-up which LoRA sites a model needs, keep these, and take the others out.

    For transformers' Trainer and Seq2SeqTrainer and TRL's SFTTrainer, in one process or under DDP. Each optimizer step
    of the warm-up is followed by a step on the gates, from the same backward passes:

        w <- H_k(w - eta * grad_w)       k: what the schedule keeps after this step

    After the warm-up the sites with w = 0 go back to their base layers, and the gates of the others are multiplied
    into B. Whatever the Trainer saves, at any time, is an ordinary PEFT adapter that computes what the model computes.

    Attributes:
        settings: how sites are chosen.
        seed: of the new directions, where ranks grow.
        selection: the choice, over all sites; None until the warm-up is over. Its weights are 1: gates are folded.

    Source: Veprikov et al., arXiv:2506.02724 (WeightLoRA, WeightLoRA+); docs/methods/weightlora.md.
    """

    def __init__(
        self,
        keep: int,
        warmup_steps: int,
        schedule: Schedule = "progressive",
        grow: bool = False,
        gate_lr: float = 5.0,
        dense_steps: int = 10,
        seed: int = 0,
    ) -> None:
        """Note the settings; they are checked against model and Trainer when the training begins.

        Args:
            keep: K, sites that stay, 1..n_sites.
            warmup_steps: T, optimizer steps in which gates are learned, at most those of the training.
            schedule: "progressive" or "every-step", see `WeightLoraSettings`.
            grow: WeightLoRA+: the survivors' rank grows by what the removed sites free.
            gate_lr: eta, in gate per (loss per gate).
            dense_steps: steps at the start that keep every site, 0..warmup_steps - 1.
            seed: of the new directions, where ranks grow.
        """
        self.settings = WeightLoraSettings(keep, warmup_steps, schedule, gate_lr, dense_steps, grow)
        self.seed = seed
        self.selection: Selection | None = None
        self._began = False
        self._gated: GatedSites | None = None  # during the warm-up only
        self._gates: Gates | None = None  # for the log: until the outcome has been logged

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Check everything, then put gates on the sites, or go on where a checkpoint left off.

        Raises:
            BudgetError: `keep` is not in 1..n_sites.
            SettingsError: the warm-up does not fit, or a way of training that is not supported, or another checkpoint.
            AdapterError: no LoRA sites, or sites that cannot be gated or taken out.
            OutputError: the output folder holds a selection already.
        """
        assert model is not None and optimizer is not None  # the Trainer passes them
        if self._began:
            raise SettingsError(
                "This WeightLora has begun a training already. Add it once; make a new one for another training."
            )
        sites = find_sites(model)
        check_arguments(args, model, self.settings)
        check_sites(model, sites, self.settings)
        if state.global_step >= self.settings.warmup_steps:
            self.selection = read_choice(checkpoint_of(args, state), sites, self.settings)
            self._began = True
            return
        self.settings.check(len(sites), state.max_steps)
        check_optimizer(sites, optimizer)
        if state.global_step == 0:
            _check_is_free(output_folder(args) / SELECTION_FILE)
        device = site_parameters(sites[0].module, sites[0].adapter)[0].device
        gated = GatedSites(sites, Gates(len(sites), self.settings, device))
        if state.global_step > 0:
            gated.load_state_dict(read_warmup(checkpoint_of(args, state), state.global_step, self.seed))
            state.best_model_checkpoint = None  # see on_step_end
        gated.attach_()
        self._gated, self._gates, self._began = gated, gated.gates, True
        _move_before_reporters(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a callback that came too late.

        Raises:
            SettingsError: the callback was added after the training had begun.
        """
        if not self._began:
            raise SettingsError(
                "WeightLora was added after the training had begun. Pass it to the Trainer: callbacks=[WeightLora(...)]"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take a step on the gates, before the optimizer takes its own from the same backward passes.

        The gates are no parameters of the model, so clipping has neither counted nor changed their gradient.

        Raises:
            MeasureError: a gate would become NaN or infinite (which site), or no gate got a gradient.
        """
        if self._gated is None:
            return
        gradient = _averaged(self._gated.take_gradient())
        try:
            self._gated.gates.step(gradient)
        except MeasureError as error:
            raise _named(error, gradient, self._gated) from error
        self._gated.update_()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Cut, when the warm-up is over: before this step's evaluation and checkpoint."""
        if self._gated is None or not self._gated.gates.is_finished:
            return
        assert model is not None and optimizer is not None
        gated, self._gated = self._gated, None
        gates = gated.fold_()
        for site, gate in zip(gated.sites, gates, strict=True):
            for parameter in site_parameters(site.module, site.adapter)[1:]:
                rescale_state_(optimizer, parameter, gate)
        survivors = disconnect_(model, gated.sites, [gate != 0 for gate in gates], optimizer)
        if self.settings.grow:
            generator = torch.Generator().manual_seed(self.seed)
            survivors = grow_survivors_(model, survivors, len(gates), generator, optimizer)
        self.selection = _selection(self, gated, gates, survivors)
        if state.is_world_process_zero:
            self.selection.save(output_folder(args) / SELECTION_FILE)
        # An evaluation of all sites says nothing of the survivors, and its checkpoint does not fit them.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the checkpoint what going on from it takes."""
        checkpoint = output_folder(args) / f"checkpoint-{state.global_step}"
        if self._gated is not None:
            state.best_model_checkpoint = None  # see on_step_end
            if state.is_world_process_zero:
                save_warmup(self._gated.state_dict(), self.seed, checkpoint)
        elif self.selection is not None and state.is_world_process_zero:
            self.selection.save(checkpoint / SELECTION_FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the gates to what the Trainer logs in the warm-up, and their outcome to its first log after it."""
        if self._gates is None or logs is None or "loss" not in logs:
            return
        values = self._gates.values.detach()
        kept = values[values != 0]
        new = {
            "lorazor/gates_kept": len(kept),
            "lorazor/gate_min": float(kept.min()),
            "lorazor/gate_max": float(kept.max()),
            "lorazor/changes": self._gates.n_changes,
        }
        logs.update(new)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(new)  # the Trainer has put a copy of its logs there
        if self._gates.is_finished:
            self._gates = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a training that ended within the warm-up with an ordinary adapter on all sites."""
        if self._gated is None:
            return
        gated, self._gated = self._gated, None
        gated.fold_()
        warnings.warn(
            f"The training ended in step {state.global_step} of a warm-up of {self.settings.warmup_steps}: no site was "
            f"taken out; the gates are multiplied into B.",
            stacklevel=2,
        )


def _averaged(gradient: Tensor) -> Tensor:
    """The mean over all processes, as DDP does with the gradients of parameters."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


def _named(error: MeasureError, gradient: Tensor, gated: GatedSites) -> MeasureError:
    """The error with the site's name, where it is about one site."""
    moved = gated.gates.values.detach() - gated.gates.settings.gate_lr * gradient
    broken = (~torch.isfinite(moved)).nonzero().flatten().tolist()
    return MeasureError(f"{gated.sites[broken[0]].name}: {error}") if broken else error


def _selection(callback: WeightLora, gated: GatedSites, gates: list[float], survivors: list[LiveSite]) -> Selection:
    """All sites, each with its learned |w|; kept ones with the rank that they have now."""
    ranks = {site.name: site.rank for site in survivors}
    return Selection(
        sites=tuple(
            SelectedSite(
                name=site.name,
                layer=site.layer,
                stack=site.stack,
                kind=site.kind,
                rank=ranks.get(site.name, site.rank),
                keep=site.name in ranks,
                score=abs(gate),
            )
            for site, gate in zip(gated.sites, gates, strict=True)
        ),
        method="weightlora+" if callback.settings.grow else "weightlora",
        settings=dataclasses.asdict(callback.settings),
        provenance={"seed": callback.seed, "n_changes": gated.gates.n_changes, "versions": versions()},
    )


def _move_before_reporters(callback: TrainerCallback) -> None:
    """Let the callback see each log before TensorBoard, Trackio, W&B and the like, so that it can add to it.

    The Trainer puts a user's callbacks after the reporters and hands no callback a reference to itself or to the list:
    the list is found in the frames that called.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            flows = [isinstance(other, DefaultFlowCallback) for other in handler.callbacks]
            handler.callbacks.insert(flows.index(True) + 1 if True in flows else 0, callback)
            return
        frame = frame.f_back
    warnings.warn("No Trainer called WeightLora: reporters will not see the gates.", stacklevel=2)


def _check_is_free(path: Path) -> None:
    if path.exists():
        raise OutputError(f"{str(path)!r} is the outcome of another training. Choose another output_dir, or remove it.")
