"""Refit: learn the gates of the parts that stay, and nothing else, so that they make up for those that went.

A and B stay as they were trained; only one number per part moves, in a few steps, and is folded into B afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from lorazor.data.batches import Batch
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.engines import on_model
from lorazor.measure.gradients import checkpointed, frozen
from lorazor.measure.losses import differentiable_row_losses
from lorazor.measure.sharding import this_process
from lorazor.select.weightlora import Gates, WeightLoraSettings

Gating = Callable[[Tensor], AbstractContextManager[None]]
"""Puts one gate on each part inside a block; the tensor has shape (n_parts,)."""


@dataclasses.dataclass(frozen=True)
class GateFit:
    """How gates are learned on a trained adapter.

    Attributes:
        steps: optimizer steps.
        learning_rate: of Adam, in gate per step; falls linearly to 0.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    steps: int = 30
    learning_rate: float = 0.05
    gradient_checkpointing: bool = False

    def check(self) -> None:
        """Raise SettingsError for a setting that cannot work."""
        if self.steps < 1:
            raise SettingsError(f"A refit of {self.steps} steps. Pass 1 or more, such as 30.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise SettingsError(f"A refit with step size {self.learning_rate}. Pass a positive number, such as 0.05.")


@dataclasses.dataclass(frozen=True)
class RefitStep:
    """One step of a refit.

    Attributes:
        step: counted from 1.
        loss: before the step, in nats per answer token of its batch.
        learning_rate: of the step.
    """

    step: int
    loss: float
    learning_rate: float


def refit_gates(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    gating: Gating,
    start: Tensor,
    settings: GateFit | None = None,
    on_step: Callable[[RefitStep], None] = lambda step: None,
) -> Tensor:
    """Learn the gates of the parts that stay, with Adam and a linearly falling step size.

    Args:
        model: in evaluation mode (no dropout).
        batches: one per step, from the training data; used again from the first where there are too few. Several
            processes take turns, and average their gradients.
        gating: puts gates on the parts.
        start: (n_parts,), where the gates start; a gate of 0 is a part that was dropped, and stays 0.
        settings: steps and step size.
        on_step: receives each step.
    Returns:
        (n_parts,) float32 on the CPU.
    Raises:
        SettingsError: settings that cannot work, or no batch.
        MeasureError: a loss or gate is not a number.
    """
    settings = settings or GateFit()
    settings.check()
    is_kept = (start != 0).to(model.device)
    gates = start.detach().float().to(model.device, copy=True).requires_grad_()
    optimizer = torch.optim.Adam([gates], lr=settings.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, settings.steps)
    with frozen(model), checkpointed(model, settings.gradient_checkpointing):
        for step in range(settings.steps):
            loss, gradient = _loss_and_gradient(model, batches, step, gating, gates)
            gates.grad = gradient * is_kept
            rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            on_step(RefitStep(step + 1, loss, rate))
    return gates.detach().cpu()


def sparse_gates(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    gating: Gating,
    n_parameters: Sequence[int],
    settings: WeightLoraSettings,
    on_step: Callable[[RefitStep], None] = lambda step: None,
) -> Tensor:
    """WeightLoRA's update on a trained adapter, with A and B frozen: the gates are chosen and fitted at once.

        w <- H_K(w - eta * grad)

    Args:
        model: in evaluation mode.
        batches: one per step, see `refit_gates`.
        gating: puts gates on the parts.
        n_parameters: (n_parts,), numbers in A and B of each part; the budget may be in them.
        settings: K, steps, schedule and step size. With "one-cut" the K largest stay after the last step.
        on_step: receives each step.
    Returns:
        (n_parts,) float32 on the CPU; those that stay are not 0.
    Raises:
        BudgetError: K is not in 1..n.
        SettingsError: settings that cannot work, or no batch.
        MeasureError: a loss or gate is not a number.
    Source: the update of Veprikov et al., arXiv:2506.02724, where Chen et al., arXiv:2503.23360, prune.
    """
    learned = Gates(len(n_parameters), settings, model.device)
    with frozen(model):
        for step in range(settings.warmup_steps):
            loss, gradient = _loss_and_gradient(model, batches, step, gating, learned.values)
            learned.step(gradient)
            on_step(RefitStep(step + 1, loss, settings.gate_lr))
    if settings.schedule == "one-cut":
        learned.keep_only(settings.choose(learned.values.detach().abs(), n_parameters))
    return learned.values.detach().cpu()


def _loss_and_gradient(
    model: PreTrainedModel, batches: Sequence[Batch], step: int, gating: Gating, gates: Tensor
) -> tuple[float, Tensor]:
    """Loss and its gradient with respect to the gates on the step's batch of this process, averaged over all."""
    if not batches:
        raise SettingsError("No examples to learn gates on.")
    state = this_process()
    batch = on_model(model, batches[(step * state.num_processes + state.process_index) % len(batches)])
    with gating(gates):
        losses = differentiable_row_losses(model, batch)
        loss = losses.nll_nats.sum() / losses.n_tokens.sum()
        (gradient,) = torch.autograd.grad(loss, gates)
    both = torch.cat([gradient, loss.detach().to(gradient)[None]])
    if state.num_processes > 1:
        both = cast(Tensor, reduce(both, "mean"))
    if not torch.isfinite(both).all():
        raise MeasureError(
            f"The loss of step {step + 1}, or its gradient, is not a number. Check the adapter for NaN weights, or "
            "lower the step size."
        )
    return float(both[-1]), both[:-1]
