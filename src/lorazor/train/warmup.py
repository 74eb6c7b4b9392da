"""The warm-up of WeightLoRA as a callback: gates on the sites, their update, and what each site earned meanwhile.

What is done with the choice at its end is for the two subclasses: `callback.WeightLora` cuts in place,
`choose.ChooseSites` writes the choice down and ends the run.
"""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.errors import MeasureError, OutputError, SettingsError
from lorazor.files import write_text
from lorazor.select.scores import WarmupObserver
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.selection import Selection
from lorazor.train.gating import GatedSites
from lorazor.train.outcome import WarmupOutcome, settle
from lorazor.train.preconditions import check_arguments, check_optimizer, check_sites
from lorazor.train.resume import SELECTION_FILE, checkpoint_of, output_folder, read_warmup, save_warmup

SCORES_FILE = "scores.jsonl"
GATES_FILE = "gates.jsonl"
_N_PROBE_STEPS = 2  # what the published code's choice rests on


class Warmup(TrainerCallback, ABC):
    """Learn gates and observe scores for `select_steps`, then choose; see the subclasses.

    Attributes:
        settings: how sites are chosen.
        seed: of the score "random", and of new directions where ranks grow.
        selection: the choice, over all sites; None until the warm-up is over. Its weights are 1: gates are folded.
    """

    def __init__(self, settings: WeightLoraSettings, seed: int) -> None:
        """Note the settings; they are checked against model and Trainer when the training begins."""
        self.settings = settings
        self.seed = seed
        self.selection: Selection | None = None
        self._began = False
        self._gated: GatedSites | None = None  # during the warm-up only
        self._observer: WarmupObserver | None = None
        self._before: list[list[Tensor]] = []  # A and B in front of the optimizer's step
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
            BudgetError: the budget does not fit the model.
            SettingsError: the warm-up does not fit, or a way of training that is not supported, or another checkpoint.
            AdapterError: no LoRA sites, or sites that cannot be gated.
            OutputError: the output folder holds a selection already.
        """
        assert model is not None and optimizer is not None  # the Trainer passes them
        if self._began:
            raise SettingsError(
                f"This {type(self).__name__} has begun a training already. Add it once; make a new one for another "
                f"training."
            )
        sites = find_sites(model)
        self.check(args, model, sites)
        if state.global_step >= self.settings.select_steps:
            self.go_on_after(args, state, sites)
            self._began = True
            return
        self.settings.check(len(sites), state.max_steps)
        check_optimizer(sites, optimizer)
        if state.global_step == 0:
            _check_is_free(output_folder(args) / SELECTION_FILE)
        device = site_parameters(sites[0].module, sites[0].adapter)[0].device
        gated = GatedSites(sites, Gates(len(sites), self.settings, device))
        observer = WarmupObserver(len(sites), min(_N_PROBE_STEPS, self.settings.select_steps), device=device)
        if state.global_step > 0:
            saved = read_warmup(checkpoint_of(args, state), state.global_step, self.seed)
            gated.load_state_dict(saved)
            observer.load_state_dict(saved["observer"])
            state.best_model_checkpoint = None  # an evaluation of all sites says nothing of the survivors
        gated.attach_()
        self._gated, self._gates, self._observer, self._began = gated, gated.gates, observer, True
        _move_before_reporters(self)

    def check(self, args: TrainingArguments, model: nn.Module, sites: Sequence[LiveSite]) -> None:
        """Refuse what would go wrong silently."""
        check_arguments(args, model)
        check_sites(model, sites, self.settings)

    def go_on_after(self, args: TrainingArguments, state: TrainerState, sites: Sequence[LiveSite]) -> None:
        """Go on from a checkpoint of a finished warm-up."""
        raise SettingsError(
            f"The checkpoint is of step {state.global_step}, but the warm-up ends with step "
            f"{self.settings.select_steps}. Resume from an earlier checkpoint."
        )

    @abstractmethod
    def finish(
        self,
        outcome: WarmupOutcome,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Do with the choice what the subclass is for, and set `selection`."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a callback that came too late.

        Raises:
            SettingsError: the callback was added after the training had begun.
        """
        if not self._began:
            name = type(self).__name__
            raise SettingsError(
                f"{name} was added after the training had begun. Pass it to the Trainer: callbacks=[{name}(...)]"
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
        self._before = [[factor.detach().clone() for factor in _factors(site)] for site in self._gated.sites]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what each site earned in the step that the optimizer has just taken."""
        if self._gated is None or self._observer is None:
            return
        factors = [_factors(site) for site in self._gated.sites]
        self._observer.add_step(
            self._before,
            [[factor.detach() for factor in site] for site in factors],
            [[factor.grad for factor in site] for site in factors],
        )
        self._before = []

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Choose, when the warm-up is over: before this step's evaluation and checkpoint."""
        if self._gated is None or not self._gated.gates.is_finished:
            return
        assert model is not None and optimizer is not None and self._observer is not None
        gated, self._gated = self._gated, None
        outcome = settle(gated, self._observer, self.seed)
        self.finish(outcome, model, optimizer, state, control)
        if state.is_world_process_zero:
            assert self.selection is not None
            write_text(output_folder(args) / SCORES_FILE, outcome.scores_text)
            write_text(output_folder(args) / GATES_FILE, outcome.gates_text)
            self.selection.save(output_folder(args) / SELECTION_FILE)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the checkpoint what going on from it takes."""
        checkpoint = output_folder(args) / f"checkpoint-{state.global_step}"
        if self._gated is not None and self._observer is not None:
            state.best_model_checkpoint = None  # see on_train_begin
            if state.is_world_process_zero:
                warmup = {**self._gated.state_dict(), "observer": self._observer.state_dict()}
                save_warmup(warmup, self.seed, checkpoint)
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
            f"The training ended in step {state.global_step} of a warm-up of {self.settings.select_steps}: no site was "
            f"taken out; the gates are multiplied into B.",
            stacklevel=2,
        )


def _factors(site: LiveSite) -> list[nn.Parameter]:
    """The factor that starts at random, then the one that starts at zero (and its bias)."""
    parameters = site_parameters(site.module, site.adapter)
    is_embedding = site.adapter in site.module.lora_embedding_A  # there A starts at zero
    return parameters[::-1] if is_embedding else parameters


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
    warnings.warn(f"No Trainer called {type(callback).__name__}: reporters will not see the gates.", stacklevel=2)


def _check_is_free(path: Path) -> None:
    if path.exists():
        raise OutputError(f"{str(path)!r} is the outcome of another training. Choose another output_dir, or remove it.")
