"""Gradients of a model that is measured, not trained: weights frozen, dropout off, memory bounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorazor.errors import SettingsError


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of the model requires gradients inside the block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def checkpointed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Recompute activations in the backward pass inside the block: less memory, more time, the same gradients.

    transformers checkpoints in training mode only, which would also switch dropout on. So the mode is set on the
    layers that checkpoint and not on what is inside them.

    Args:
        model: in evaluation mode.
        wanted: False does nothing.
    Raises:
        SettingsError: the model has no layer that can be checkpointed.
    """
    if not wanted:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or not layers:
        raise SettingsError(
            f"{type(model).__name__} cannot recompute its activations. Leave gradient checkpointing off, or lower "
            "the batch size."
        )
    was_on: Any = model.is_activation_checkpointing
    # the inputs of the first layer need no gradient, which the reentrant form could not do with
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
        if not was_on:
            model.activation_checkpointing_disable()
