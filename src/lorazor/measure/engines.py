"""Two engines that measure the losses of every boundary, and the choice between them.

`naive` runs the model once per boundary: L (L + 1) layer evaluations. `one-pass` uses that the streams of all
boundaries share their first layers: it runs the full adapter once and *forks* the forward pass in front of layer b
for boundary b, so that only the layers from b on run again: L + L (L + 1) / 2 layer evaluations, in the memory of
one forward pass and one hidden state. Both run the same operations on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorazor.adapter.gates import silenced
from lorazor.adapter.offloading import device_of_inputs
from lorazor.adapter.sites import LiveSite, is_kept, stack_sizes
from lorazor.data.batches import Batch
from lorazor.measure.losses import RowLosses, row_losses
from lorazor.measure.sharding import is_out_of_memory

# A model on which the engines differ by more than this carries something from layer to layer that a fork does not see.
_TOLERANCE = 1e-3


def choose_engine(
    model: PreTrainedModel, sites: Sequence[LiveSite], batch: Batch, stack: str, boundaries: Sequence[int]
) -> tuple[Literal["one-pass", "naive"], str]:
    """Try both engines on one batch and take `one-pass` where it agrees with `naive`.

    The trial costs three naive forward passes, at the lowest, the middle and the highest boundary below L.

    Args:
        model: the base model that carries the sites, in evaluation mode.
        sites: all sites of the adapter.
        batch: from `on_model`.
        stack: name of the stack.
        boundaries: what is to be measured.
    Returns:
        The engine, and the reason in words. Whatever goes wrong in `one-pass` speaks for `naive`.
    """
    n_layers = stack_sizes(sites)[stack]
    below = [boundary for boundary in boundaries if boundary < n_layers]
    if not below:
        return "naive", "only the full adapter is measured"
    trial = sorted({below[0], below[len(below) // 2], below[-1]})
    slow = naive_losses(model, sites, batch, stack, trial)
    try:
        fast = one_pass_losses(model, sites, batch, stack, trial)
    except Exception as error:  # a model's own code, run as it was not meant to be, may raise anything
        if is_out_of_memory(error):
            raise
        return "naive", failure(error)
    for boundary in trial:
        if not torch.allclose(slow[boundary].nll_nats, fast[boundary].nll_nats, rtol=_TOLERANCE, atol=_TOLERANCE):
            return "naive", f"one-pass differs from naive at boundary {boundary}: this model's layers share state"
    return "one-pass", f"agrees with naive on the first batch at boundaries {', '.join(map(str, trial))}"


def naive_losses(
    model: PreTrainedModel, sites: Sequence[LiveSite], batch: Batch, stack: str, boundaries: Sequence[int]
) -> dict[int, RowLosses]:
    """The reference engine: silence the sites beyond each boundary and run the whole model."""
    losses = {}
    for boundary in boundaries:
        with silenced(site for site in sites if not is_kept(site, stack, boundary)):
            losses[boundary] = row_losses(model, batch)
    return losses


def one_pass_losses(
    model: PreTrainedModel, sites: Sequence[LiveSite], batch: Batch, stack: str, boundaries: Sequence[int]
) -> dict[int, RowLosses]:
    """The fast engine: run the full adapter once, and fork off boundary b in front of layer b.

    Boundaries in front of layers that the model does not call (Mllama's for pictures, where there are none) are
    measured as `naive_losses` does it.

    Raises:
        NotForkable: the model cannot be run this way. It may also raise anything else then.
    """
    n_layers = stack_sizes(sites)[stack]
    losses: dict[int, RowLosses] = {}

    def measure_fork(boundary: int) -> None:
        losses.update(naive_losses(model, sites, batch, stack, [boundary]))

    layers = list(model.get_submodule(stack).children())
    below = {boundary for boundary in boundaries if boundary < n_layers}
    with _forking(layers, below, measure_fork):
        losses[n_layers] = row_losses(model, batch)
    if below and not below & set(losses):
        raise NotForkable("this model calls none of the layers in front of which one-pass would fork")
    losses |= naive_losses(model, sites, batch, stack, sorted(below - set(losses)))
    return {boundary: losses[boundary] for boundary in boundaries}


class NotForkable(Exception):
    """A model whose forward pass cannot be forked, and why."""


def failure(error: Exception) -> str:
    """Why the fast engine fails, on one line."""
    if isinstance(error, NotForkable):
        return str(error)
    first_line = (str(error).splitlines() or [""])[0][:200]
    return f"one-pass fails on this model ({type(error).__name__}: {first_line})"


@contextmanager
def _forking(layers: Sequence[nn.Module], at: set[int], on_fork: Callable[[int], None]) -> Iterator[None]:
    """Call `on_fork(b)` in the middle of a forward pass, when it stands in front of layer b.

    A forward pass that runs inside `on_fork(b)` skips the layers below b and enters layer b with the hidden state
    of the outer pass. What else the skipped layers return (T5 hands its position bias from layer to layer) is
    repeated from the outer pass.

    Raises:
        NotForkable: from the model inside the block: its layers do not run once each, in order.
    """
    fork: tuple[int, Tensor] | None = None  # (first layer that runs, its hidden state), while a fork runs
    others: dict[int, Any] = {}  # what each layer returned besides its hidden state

    def forward_of(index: int, forward: Callable) -> Callable:
        def forking_forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal fork
            hidden = hidden_state_of(args, kwargs)
            if fork is not None:
                first, entry = fork
                if index < first:
                    return hidden if others[index] is None else (hidden, *others[index])
                if index == first and args:
                    args = entry, *args[1:]
                elif index == first:
                    kwargs["hidden_states"] = entry
                return forward(*args, **kwargs)
            if others and index <= max(others):
                raise NotForkable(f"layer {index} of this model runs again, or after a later one")
            if index in at:
                fork = index, hidden
                try:
                    on_fork(index)
                finally:
                    fork = None
            output = forward(*args, **kwargs)
            others[index] = output[1:] if isinstance(output, tuple) else None
            return output

        return forking_forward

    with replaced_forwards(layers, [forward_of(index, layer.forward) for index, layer in enumerate(layers)]):
        yield


@contextmanager
def replaced_forwards(layers: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """Let every layer run another function inside the block."""
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:  # accelerate puts its device hooks here
                layer.forward = forward


def hidden_state_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a layer is given to work on, from the arguments of its call.

    Raises:
        NotForkable: it is neither the first argument nor named `hidden_states`.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise NotForkable("the layers of this model do not take their hidden state first")
    return hidden


@torch.no_grad()
def on_model(model: PreTrainedModel, batch: Batch, stack: str | None = None) -> Batch:
    """Move a batch to the model's device; run the encoder here, once, if only the decoder's boundaries move.

    The encoder's tokens stay beside its outputs: classifiers make the decoder's tokens of them, and without them FSMT
    looks ahead.
    """
    device = device_of_inputs(model)
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder" in (stack or "").split("."):
        encoder_names = {"input_ids", "attention_mask", "input_features", "inputs_embeds"} & set(inputs)
        inputs["encoder_outputs"] = model.get_encoder()(**{name: inputs[name] for name in encoder_names})
    return replace(batch, inputs=inputs, targets=batch.targets.to(device))
