"""The warm-up of WeightLoRA as a callback: gates on the sites, their update, and what each site earned meanwhile.

What is done with the choice at its end is for the two subclasses: `callback.WeightLora` cuts in place,
`choose.ChooseSites` writes the choice down and ends the run.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.errors import MeasureError, OutputError, SettingsError
from lorazor.files import write_text
from lorazor.runs import versions
from lorazor.select.scores import WarmupObserver, control_scores, learned_scores
from lorazor.select.weightlora import Gates, WeightLoraSettings
from lorazor.selection import SelectedSite, Selection
from lorazor.train.disconnect import shapes_of
from lorazor.train.gating import GatedSites
from lorazor.train.preconditions import check_arguments, check_optimizer, check_sites
from lorazor.train.resume import SELECTION_FILE, checkpoint_of, read_warmup, run_folder, save_warmup

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

    has_one_rank = False
    """Whether all sites that stay get one rank, also where ranks grow as in the paper."""

    def __init__(self, settings: WeightLoraSettings, seed: int) -> None:
        """Note the settings; they are checked against model and Trainer when the training begins."""
        self.settings = settings
        self.seed = seed
        self.forget()

    def forget(self) -> None:
        """Be as new, for another training."""
        self.selection: Selection | None = None
        self._model: weakref.ref[nn.Module] | None = None  # that of the training which began
        self._folder = Path()
        self._gated: GatedSites | None = None  # during the warm-up only
        self._observer: WarmupObserver | None = None
        self._before: list[list[Tensor]] = []  # A and B in front of the optimizer's step
        self._gates: Gates | None = None  # for the log: until the outcome has been logged

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
        model, is_over = kwargs["model"], state.global_step >= self.settings.select_steps
        if self._model is not None and self._model() is model and not (is_over and self._gated is None):
            self._refuse_model()
        self.forget()  # of an earlier training, of another model: hyperparameter_search begins one for every trial
        self._folder = run_folder(args, state)
        sites = find_sites(model)
        self.check(args, model, sites, kwargs["optimizer"])
        if is_over:
            self.go_on_after(args, state, sites)
            self._model = weakref.ref(model)
            return
        self.settings.check(len(sites), state.max_steps)
        check_optimizer(sites, kwargs["optimizer"])
        selection = self._folder / SELECTION_FILE
        if state.global_step == 0 and selection.exists():
            raise OutputError(
                f"{str(selection)!r} is the outcome of another training. Choose another output_dir, or remove it."
            )
        device = site_parameters(sites[0].module, sites[0].adapter)[0].device
        gated = GatedSites(sites, Gates(len(sites), self.settings, device))
        observer = WarmupObserver(len(sites), min(_N_PROBE_STEPS, self.settings.select_steps), device=device)
        if state.global_step > 0:
            saved = read_warmup(checkpoint_of(args, state), state.global_step, self.seed)
            gated.load_state_dict(saved)
            observer.load_state_dict(saved["observer"])
            state.best_model_checkpoint = None  # an evaluation of all sites says nothing of the survivors
        gated.attach_()
        self._gated, self._gates, self._observer, self._model = gated, gated.gates, observer, weakref.ref(model)
        _move_before_reporters(self)

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

    def choose(self, scores: Tensor, sites: Sequence[LiveSite]) -> Tensor:
        """The sites that stay, (n_sites,) bool."""
        return self.settings.choose(scores, [site.n_parameters for site in sites])

    @abstractmethod
    def finish(
        self, gated: GatedSites, ranks: Sequence[int], state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> list[LiveSite]:
        """Do with the choice what the subclass is for.

        Args:
            gated: all sites, with the gates on them as they were learned.
            ranks: of every site from here on, 0 for those that go.
            state: of the Trainer.
            control: of the Trainer.
            kwargs: what else it passes to callbacks.
        Returns:
            The sites that stay, as they are now.
        """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a callback that came too late.

        Raises:
            SettingsError: the callback was added after the training had begun.
        """
        if self._model is None:
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
        gates = self._gated.gates
        gradient: Any = reduce(self._gated.take_gradient(), "mean")  # over all processes, as DDP does with parameters
        try:
            gates.step(gradient)
        except MeasureError as error:
            moved = gates.values.detach() - gates.settings.gate_lr * gradient
            site = self._gated.sites[int((~torch.isfinite(moved)).nonzero()[0])]
            raise MeasureError(f"{site.name}: {error}") from error
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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Choose, when the warm-up is over: before this step's evaluation and checkpoint."""
        if self._gated is None or not self._gated.gates.is_finished:
            return
        assert self._observer is not None
        gated, self._gated = self._gated, None
        scores, gates = _scores(gated, self._observer, self.seed), gated.gates.trajectory.tolist()
        ranked = scores[self.settings.score]
        is_kept = self.choose(ranked, gated.sites)
        ranks = self.settings.ranks(ranked, is_kept, gated.gates.kept.cpu(), shapes_of(gated.sites), self.has_one_rank)
        survivors = self.finish(gated, ranks.tolist(), state, control, **kwargs)
        self.selection = self._selection(gated, survivors, ranked)
        if state.is_world_process_zero:
            rows = [
                site.to_row() | {name: float(values[index]) for name, values in scores.items()}
                for index, site in enumerate(gated.sites)
            ]
            steps = [{"step": step, "gates": values} for step, values in enumerate(gates, start=1)]
            folder = self._folder
            folder.mkdir(parents=True, exist_ok=True)  # of a trial: there with its first checkpoint only
            write_text(folder / SCORES_FILE, "".join(json.dumps(row) + "\n" for row in rows))
            write_text(folder / GATES_FILE, "".join(json.dumps(row) + "\n" for row in steps))
            self.selection.save(folder / SELECTION_FILE)

    def _selection(self, gated: GatedSites, survivors: Sequence[LiveSite], scores: Tensor) -> Selection:
        """All sites, each with its score; the survivors stay, with the rank that they have now."""
        ranks = {site.name: site.rank for site in survivors}
        sites = [
            SelectedSite(
                one.name, one.layer, one.stack, one.kind, ranks.get(one.name, one.rank), one.name in ranks, score=score
            )
            for one, score in zip(gated.sites, scores.tolist(), strict=True)
        ]
        method = "weightlora+" if self.settings.grow else "weightlora"
        provenance = {"seed": self.seed, "n_changes": gated.gates.n_changes, "versions": versions()}
        return Selection(tuple(sites), method, dataclasses.asdict(self.settings), provenance)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the checkpoint what going on from it takes."""
        checkpoint = self._folder / f"checkpoint-{state.global_step}"
        if self._gated is not None and self._observer is not None:
            state.best_model_checkpoint = None  # see on_train_begin
            if state.is_world_process_zero:
                warmup = {**self._gated.state_dict(), "observer": self._observer.state_dict()}
                save_warmup(warmup, self.seed, checkpoint)
        elif self.selection is not None and state.is_world_process_zero:
            self.selection.save(checkpoint / SELECTION_FILE)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates to what the Trainer logs in the warm-up, and their outcome to its first log after it."""
        logs = kwargs["logs"]
        if self._gates is None or "loss" not in logs:
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


def _scores(gated: GatedSites, observer: WarmupObserver, seed: int) -> dict[str, Tensor]:
    """Every score of a finished warm-up by name, (n_sites,) each on the CPU."""
    sites = gated.sites
    pairs = [site_parameters(site.module, site.adapter)[:2] for site in sites]
    A, B = ([pair[place].detach().flatten(1) for pair in pairs] for place in (0, 1))  # convolutions too
    learned = learned_scores(gated.gates.values, A, B, [site.scaling for site in sites])
    by_name = {**learned, **observer.scores(), **control_scores(sites, seed)}
    return {name: values.float().cpu() for name, values in by_name.items()}


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
