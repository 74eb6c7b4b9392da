"""What a step of a training costs with LoRA on some of its sites: measured on a few steps of a twin of the model.

The twin has the model's own base weights, and A and B of its own; its steps are those of the Trainer, with the batches,
optimizer, arithmetic and checkpointing of the training. Nothing that the training reads is changed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lorazor.adapter.live import twin_of
from lorazor.adapter.load import Loaded
from lorazor.adapter.sites import LiveSite, find_sites, site_parameters
from lorazor.measure.peak import counting_peak
from lorazor.measure.sharding import from_main_process
from lorazor.select.cost import Costs, fit_costs
from lorazor.settings import FitSettings
from lorazor.train.anatomy import Anatomy, Unit, n_bytes_of_site
from lorazor.train.answers import AnswerTrainer, PadRight, TrainingRow, training_order
from lorazor.train.fit import training_arguments
from lorazor.train.preconditions import check_arguments

N_ROUNDS = 3
"""Timed steps of each choice, after one that warms up."""


@dataclasses.dataclass(frozen=True)
class Probing:
    """Measures steps of a training that has not begun, or has ended.

    Attributes:
        model: with LoRA on all sites; it stays as it is.
        loaded: its tokenizer and task.
        rows: all rows of the data.
        folder: for the Trainer, which writes nothing there.
        training: of the whole training.
        batch_size: rows of an optimizer step, over all processes.
        clock: what seconds are told by.
    """

    model: PeftModel
    loaded: Loaded
    rows: Sequence[TrainingRow]
    folder: Path
    training: FitSettings
    batch_size: int
    clock: Callable[[], float] = time.perf_counter

    def costs(self, unit: Unit) -> tuple[Costs, list[list[bool]], list[float]]:
        """The cost of a step for every choice of sites, from a few of them.

        Returns:
            The model of the cost; the choices that were measured, the first of which is all sites; and their costs.
        """
        with self._trainer(N_ROUNDS) as trainer:
            twin = cast(PeftModel, trainer.model)
            batch = next(iter(trainer.get_train_dataloader()))
            if self.training.gradient_checkpointing:  # one row: without recomputation, all of them may not fit
                batch = {name: values[:1] for name, values in batch.items()}
            with trainer.accelerator.autocast():
                anatomy = Anatomy.of(twin, lambda: trainer.compute_loss(twin, dict(batch)))
        probes = choices_to_probe(anatomy.times, anatomy.widths)
        measured = self.measure(unit, probes)
        return fit_costs(anatomy.features(unit), probes, measured), probes, measured

    def measure(self, unit: Unit, choices: Sequence[Sequence[bool]]) -> list[float]:
        """The cost of a step with each of some choices of sites; in every process what the main process measured.

        Seconds are those of a step whose batch is of median size: the median of the ratio to the first choice within a
        round of all choices, so that disturbances hit all alike, times the median of the first. Bytes are the peak of
        the step with the largest batch, as if there were no other adapters and state than those of the choice.

        Args:
            unit: what to measure.
            choices: (n_sites,) bool each.
        """
        n_rounds = N_ROUNDS + 1 if unit == "seconds" else 2
        with self._trainer(n_rounds * len(choices), unit == "bytes") as trainer:
            meter = StepMeter(find_sites(cast(nn.Module, trainer.model)), choices, unit, n_rounds, self.clock)
            trainer.add_callback(meter)
            trainer.train()
        rounds = meter.rounds[1:]  # the first one warms up: caches, and the optimizer's state
        first = median(one[0] for one in rounds)
        return from_main_process(
            lambda: [first * median(one[index] / one[0] for one in rounds) for index in range(len(choices))]
        )

    def recomputed(self, n_sites: int) -> float | None:
        """The peak of a step with LoRA on all sites whose activations are recomputed, in bytes.

        None where the training recomputes them already, or the model cannot.
        """
        can = getattr(self.model.get_base_model(), "supports_gradient_checkpointing", False)
        if self.training.gradient_checkpointing or not can:
            return None
        training = dataclasses.replace(self.training, gradient_checkpointing=True)
        return dataclasses.replace(self, training=training).measure("bytes", [[True] * n_sites])[0]

    @contextmanager
    def _trainer(self, n_steps: int, is_largest: bool = False) -> Iterator[AnswerTrainer]:
        """A Trainer on a twin of the model, and on one batch over and over."""
        twin: Any = twin_of(cast(nn.Module, self.model)).train()
        settings = dataclasses.replace(self.training, steps=n_steps, rise_steps=0, save_steps=n_steps + 1)
        args = training_arguments(self.folder, settings, self.batch_size, range(n_steps), [])
        rows = self._batch(args.per_device_train_batch_size, is_largest)
        trainer = AnswerTrainer(
            twin,
            args,
            PadRight(self.loaded.tokenizer),
            rows * n_steps,  # pyright: ignore[reportArgumentType]
            processing_class=self.loaded.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        try:
            yield trainer
        finally:
            del trainer, twin
            clear_device_cache(garbage_collection=True)

    def _batch(self, n_rows_of_pass: int, is_largest: bool) -> list[TrainingRow]:
        """The rows of the step with the largest forward pass, or of one of median size, counted with its padding."""
        order = training_order(len(self.rows), self.training.steps * self.batch_size, self.training.seed)
        lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in self.rows]
        steps = _in_pieces(order, self.batch_size)

        def sizes(step: Sequence[int]) -> list[int]:
            return [len(one) * max(lengths[row] for row in one) for one in _in_pieces(step, n_rows_of_pass)]

        if is_largest:
            return [self.rows[row] for row in max(steps, key=lambda step: max(sizes(step)))]
        by_size = sorted(steps, key=lambda step: sum(sizes(step)))
        return [self.rows[row] for row in by_size[len(by_size) // 2]]


class StepMeter(TrainerCallback):
    """Trains other sites in every step, and measures the step; ends the training after some rounds of all choices.

    Attributes:
        sites: of the model in training.
        choices: (n_sites,) bool each, in turn.
        unit: what is measured.
        n_rounds: rounds to take.
        rounds: the cost of each choice, by round; of bytes as if there were no A, B and state but those of the choice.
    """

    def __init__(
        self,
        sites: Sequence[LiveSite],
        choices: Sequence[Sequence[bool]],
        unit: Unit,
        n_rounds: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Note what to measure; the Trainer's `max_steps` is `n_rounds` times the number of choices."""
        self.sites, self.choices, self.unit, self.n_rounds = list(sites), list(choices), unit, n_rounds
        self.rounds: list[list[float]] = []
        self._clock, self._measuring = clock, ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse ways of training in which no sites are chosen."""
        check_arguments(args, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Train the sites of the next choice only, and start the clock."""
        choice = self.choices[state.global_step % len(self.choices)]
        train_only_(self.sites, choice)
        self._read = self._measuring.enter_context(self._meter(choice, kwargs["model"], kwargs["optimizer"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the clock."""
        value = self._read()
        self._measuring.close()
        index = (state.global_step - 1) % len(self.choices)
        self.rounds += [[]] if index == 0 else []
        self.rounds[-1].append(value)
        control.should_save = control.should_evaluate = control.should_log = False
        control.should_training_stop = len(self.rounds) == self.n_rounds and index == len(self.choices) - 1

    @contextmanager
    def _meter(self, choice: Sequence[bool], model: nn.Module, optimizer: Any) -> Iterator[Callable[[], float]]:
        if self.unit == "seconds":
            _wait_for_device()
            start = self._clock()

            def seconds() -> float:
                _wait_for_device()
                return self._clock() - start

            yield seconds
            return
        with counting_peak(model) as peak:

            def n_bytes() -> float:
                others = [site for site, stays in zip(self.sites, choice, strict=True) if not stays]
                n_own, n_others = (sum(map(n_bytes_of_site, sites)) for sites in (self.sites, others))
                everything, of_others = _bytes_of_state(optimizer), _bytes_of_state(optimizer, others)
                if next(model.parameters()).is_cuda:  # its counter sees the model's own A and B, and all state
                    return peak() - n_own - n_others - of_others
                return peak() - n_others + everything - of_others

            yield n_bytes


def train_only_(sites: Sequence[LiveSite], is_kept: Sequence[bool]) -> None:
    """Switch LoRA off on all other sites: they compute, save and learn what their base layers do."""
    for site, stays in zip(sites, is_kept, strict=True):
        site.module.enable_adapters(stays)


def _bytes_of_state(optimizer: Any, sites: Sequence[LiveSite] | None = None) -> int:
    """Bytes of the optimizer's state: all of it, or that of some sites."""
    of_sites = {one for site in sites or () for one in site_parameters(site.module, site.adapter)}
    states = [values for key, values in optimizer.state.items() if sites is None or key in of_sites]
    return sum(one.nbytes for values in states for one in values.values() if isinstance(one, Tensor))


def choices_to_probe(times: Sequence[int], widths: Sequence[float]) -> list[list[bool]]:
    """The choices of sites that tell the parts of a cost apart.

    All sites; the last to run; the first, alone under a whole backward pass; the later half; the narrower half and the
    wider one.

    Args:
        times: when each site runs.
        widths: numbers that go into and come out of each.
    """
    n_sites = len(times)
    order = sorted(range(n_sites), key=lambda site: times[site])
    narrow = sorted(range(n_sites), key=lambda site: widths[site])
    half = (n_sites + 1) // 2
    sets = [order, order[-1:], order[:1], order[-half:], narrow[:half], narrow[-half:]]
    choices = [[site in chosen for site in range(n_sites)] for chosen in map(set, sets)]
    return [choice for place, choice in enumerate(choices) if choice not in choices[:place]]


def _in_pieces(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _wait_for_device() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
