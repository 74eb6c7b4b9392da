"""The warm-up of WeightLoRA as a callback: it learns from the steps of a Trainer which parts of an adapter to keep.

What there is to learn from is in `evidence`, of sites, and in `direction_evidence`. What is done with the choice at the
end is for the two subclasses: `callback.WeightLora` cuts in place, `choose.ChooseSites` writes it down and stops.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from lorazor.adapter.parts import Parts
from lorazor.adapter.sites import LiveSite, find_sites
from lorazor.errors import BudgetError, OutputError, SettingsError
from lorazor.files import write_text
from lorazor.select.weightlora import WeightLoraSettings, check_same
from lorazor.selection import Selection
from lorazor.train.answers import N_ITEMS
from lorazor.train.direction_evidence import DirectionEvidence
from lorazor.train.evidence import Evidence, SiteEvidence
from lorazor.train.preconditions import check_arguments, check_optimizer, check_sites
from lorazor.train.resume import SELECTION_FILE, checkpoint_of, read_warmup, run_folder, save_warmup


class Warmup(TrainerCallback, ABC):
    """Watch `select_steps` steps, then choose; see the subclasses.

    Attributes:
        settings: how sites are chosen.
        seed: of the score "random", and of new directions where ranks grow.
        selection: the choice, over all sites; None until the warm-up is over. Its weights are 1: gates are folded.
        ranks: the rank from then on of each site that stays, by its name.
    """

    has_one_rank = False
    """Whether all sites that stay get one rank, also where ranks grow as in the paper."""

    spend: Callable[[Tensor], Tensor] | None = None
    """The sites to keep, (n_sites,) bool, by their scores; where `settings.cost` is the budget."""

    def __init__(self, settings: WeightLoraSettings, seed: int) -> None:
        """Note the settings; they are checked against model and Trainer when the training begins."""
        self.settings = settings
        self.seed = seed
        self.forget()

    def forget(self) -> None:
        """Be as new, for another training."""
        self.selection: Selection | None = None
        self.ranks: dict[str, int] = {}
        self._model: weakref.ref[nn.Module] | None = None  # that of the training which began
        self._folder = Path()
        self._evidence: Evidence | None = None  # during the warm-up only
        self._logged: Evidence | None = None  # until the outcome has been logged

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, then put gates on the sites, or go on where a checkpoint left off.

        Raises:
            BudgetError: the budget does not fit the model.
            SettingsError: the warm-up does not fit, or a way of training that is not supported, or another checkpoint.
            AdapterError: no LoRA sites, or sites that cannot be gated.
            OutputError: the output folder holds a selection already.
        """
        self.settings.check_steps(state.max_steps)
        model, is_over = kwargs["model"], state.global_step >= self.settings.select_steps
        if self._model is not None and self._model() is model and not (is_over and self._evidence is None):
            self._refuse_model()
        self.forget()  # of an earlier training, of another model: hyperparameter_search begins one for every trial
        self._folder = run_folder(args, state)
        sites = find_sites(model)
        self.check(args, model, sites, kwargs["optimizer"])
        if is_over:
            self.go_on_after(args, state, sites)
            self._model = weakref.ref(model)
            return
        self.settings.check(n_choices(sites, self.settings.by), state.max_steps)
        check_fits(self.settings, sites)
        check_optimizer(sites, kwargs["optimizer"])
        selection = self._folder / SELECTION_FILE
        if state.global_step == 0 and selection.exists():
            raise OutputError(
                f"{str(selection)!r} is the outcome of another training. Choose another output_dir, or remove it."
            )
        evidence = self._begin(args, sites)
        if state.global_step > 0:
            saved = read_warmup(checkpoint_of(args, state), state.global_step, self.seed)
            check_same(self.settings, saved["settings"])
            evidence.load_state_dict(saved)
            state.best_model_checkpoint = None  # an evaluation of all sites says nothing of the survivors
        evidence.attach_(model)
        self._evidence, self._logged, self._model = evidence, evidence, weakref.ref(model)
        _move_before_reporters(self)

    def _begin(self, args: TrainingArguments, sites: Sequence[LiveSite]) -> Evidence:
        if self.settings.by == "site":
            return SiteEvidence(sites, self.settings, self.seed, self.spend)
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return DirectionEvidence(sites, self.settings, self.seed, rows_per_step)

    def _refuse_model(self) -> NoReturn:
        """Say why a training of this model cannot begin with this callback."""
        name = type(self).__name__
        if self.selection is None:
            raise SettingsError(
                f"This {name} has begun a training of this model already, and not ended it. Add it once; after a "
                f"training that broke off, begin with a freshly loaded model and a new {name}."
            )
        raise SettingsError(
            f"This {name} has chosen the sites of this model already: {len(self.selection.kept)} of "
            f"{len(self.selection.sites)}. To train on, take it out (trainer.remove_callback({name})); to choose anew, "
            f"give the Trainer model_init, which makes a fresh model for every training."
        )

    def check(
        self, args: TrainingArguments, model: nn.Module, sites: Sequence[LiveSite], optimizer: torch.optim.Optimizer
    ) -> None:
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
    def finish(self, evidence: Evidence, state: TrainerState, control: TrainerControl, **kwargs: Any) -> list[LiveSite]:
        """Do with the choice what the subclass is for.

        Args:
            evidence: has chosen.
            state: of the Trainer.
            control: of the Trainer.
            kwargs: what else it passes to callbacks.
        Returns:
            The sites that stay, as they are now.
        """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say by what the losses of the step are divided, and notice a callback that came too late.

        Raises:
            SettingsError: the callback was added after the training had begun.
        """
        if self._model is None:
            name = type(self).__name__
            raise SettingsError(
                f"{name} was added after the training had begun. Pass it to the Trainer: callbacks=[{name}(...)]"
            )
        if self._evidence is not None:
            self._evidence.begin_step(getattr(state, N_ITEMS, 1.0))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn from the backward passes of the step, before the optimizer does.

        Raises:
            MeasureError: see the evidence.
        """
        if self._evidence is not None:
            self._evidence.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn from the step that the optimizer has just taken."""
        if self._evidence is not None:
            self._evidence.after_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Choose, when the warm-up is over: before this step's evaluation and checkpoint."""
        if self._evidence is None or not self._evidence.is_finished:
            return
        evidence, self._evidence = self._evidence, None
        ranks = evidence.choose(self.has_one_rank)
        self.ranks = {site.name: rank for site, rank in zip(evidence.sites, ranks, strict=True) if rank}
        self.selection = evidence.selection(self.finish(evidence, state, control, **kwargs))
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)  # of a trial: there with its first checkpoint only
            for name, rows in evidence.rows().items():
                write_text(self._folder / name, "".join(json.dumps(row) + "\n" for row in rows))
            self.selection.save(self._folder / SELECTION_FILE)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the checkpoint what going on from it takes."""
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        if self._evidence is not None:
            state.best_model_checkpoint = None  # see on_train_begin
            warmup = self._evidence.state_dict()  # of all processes
            if state.is_world_process_zero:
                common = {"n_steps": self._evidence.n_steps, "settings": dataclasses.asdict(self.settings)}
                save_warmup({**warmup, **common}, self.seed, checkpoint)
        elif self.selection is not None and state.is_world_process_zero:
            self.selection.save(checkpoint / SELECTION_FILE)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates to what the Trainer logs in the warm-up, and their outcome to its first log after it."""
        logs = kwargs["logs"]
        if self._logged is None or "loss" not in logs:
            return
        new = self._logged.log()
        logs.update(new)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(new)  # the Trainer has put a copy of its logs there
        if self._logged.is_finished:
            self._logged = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave a training that ended within the warm-up with an ordinary adapter on all sites."""
        if self._evidence is None:
            return
        evidence, self._evidence = self._evidence, None
        evidence.fold_()
        warnings.warn(
            f"The training ended in step {state.global_step} of a warm-up of {self.settings.select_steps}: no "
            f"{self.settings.by} was taken out; gates, where there are any, are multiplied into B.",
            stacklevel=2,
        )


def n_choices(sites: Sequence[LiveSite], by: str) -> int:
    """How many sites, or directions, there are to choose from."""
    return len(sites) if by == "site" else len(Parts(tuple(sites)))


def check_fits(settings: WeightLoraSettings, sites: Sequence[LiveSite]) -> None:
    """Notice now, and not after the selection run, a budget that holds no site, or no direction.

    Raises:
        BudgetError: it does not.
    """
    if settings.cost is not None:
        return  # the least that a step can cost is measured
    if settings.by == "site":
        settings.choose(torch.zeros(len(sites)), [site.n_parameters for site in sites])
    elif settings.n_parameters is not None:
        smallest = min(Parts(tuple(sites)).n_parameters)
        if settings.n_parameters < smallest:
            raise BudgetError(
                f"A budget of {settings.n_parameters} parameters holds no direction: the smallest has {smallest}. Pass "
                "that or more."
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
    warnings.warn(f"No Trainer called {type(callback).__name__}: reporters will not see the gates.", stacklevel=2)
