"""Gradients of a model that is measured, not trained: weights frozen, dropout off, memory bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorazor.errors import SettingsError
from lorazor.measure.engines import replaced_forwards


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

    transformers itself checkpoints layers in training mode only, and a layer in training mode drops out (BART hands
    `self.training` to `F.dropout`). So the layers that it would recompute are recomputed here, and no mode is touched.

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
    with replaced_forwards(layers, [_recomputed(layer.forward) for layer in layers]):
        yield


def _recomputed(forward: Callable) -> Callable:
    """The forward pass of a layer, which runs again in the backward pass."""

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        # a cache would be filled twice; whole sequences need none
        args = tuple(None if isinstance(one, Cache) else one for one in args)
        kwargs = {name: None if isinstance(one, Cache) else one for name, one in kwargs.items()}
        # the inputs of the first layer need no gradient, which the reentrant form could not do with
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False)

    return recomputing_forward
