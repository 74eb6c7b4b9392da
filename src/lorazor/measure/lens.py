"""The logit lens: what a model makes of the hidden state in front of each of its layers.

    logits_l = W_U norm_f(h_l)         h_0: what the first layer is given, h_L: what the last one returns

The final norm, the head and whatever a model does to its logits (soft caps, scales, pooling for a label) are the
model's own, under whatever names: it runs once more for every layer, with all its layers standing aside and h_l in
their place. Source: nostalgebraist, *interpreting GPT: the logit lens* (2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import MeasureError
from lorazor.measure.engines import NotForkable, hidden_state_of, replaced_forwards
from lorazor.measure.losses import AnswerLogits, answer_logits

_TOLERANCE = 1e-3
"""A model whose last layer, put back, changes the truth's log-probability by more does not end as assumed here."""


def layers_of(model: PreTrainedModel, stack: str) -> list[nn.Module]:
    """The layers of a stack, in execution order; with or without LoRA."""
    return list(model.get_submodule(stack).children())


def layerwise_logits(model: PreTrainedModel, batch: Batch, stack: str) -> Iterator[AnswerLogits]:
    """The logits of the answer tokens after 0, 1, ..., L layers; the last are the model's own.

    One forward pass, and one per layer in which no layer runs. In memory at a time: the logits at one layer, and the
    hidden states of the answer tokens at all layers (of labelled texts: of all tokens).

    Args:
        model: the base model, with the sites inside, in evaluation mode.
        batch: from `on_model`.
        stack: name of the stack, `model.layers`.
    Raises:
        MeasureError: a model into which one cannot look this way; it is tried with h_L, which must give its own logits.
    """
    layers = layers_of(model, stack)
    answer_at = batch.targets != IGNORED if batch.targets.ndim == 2 else None
    passing = _Passing(answer_at)
    try:
        with passing.watched(layers):
            own = answer_logits(model, batch)
    except NotForkable as reason:
        raise MeasureError(f"No curves of {type(model).__name__}: {reason}.") from reason
    if len(passing.hidden) != len(layers) + 1:
        n_runs = len(passing.hidden) - 1
        raise MeasureError(f"No curves of {type(model).__name__}: its {len(layers)} layers run {n_runs} times in all.")
    again = own
    for index, hidden in enumerate(passing.hidden):
        with passing.standing_aside(layers, hidden):
            again = answer_logits(model, batch)
        if index < len(layers):
            yield again
    truths = [cross_entropy(one.logits.float(), one.targets, reduction="none") for one in (own, again)]
    difference = (truths[0] - truths[1]).abs().max()
    if difference > _TOLERANCE:
        raise MeasureError(
            f"No curves of {type(model).__name__}: what its last layer returns, put back without the layers below, "
            f"changes the log-probability of a true token by {float(difference):.2g}. Its layers share state."
        )
    yield own


class _Passing:
    """What passes from layer to layer in a forward pass, and a way to pass it on without the layers.

    Attributes:
        hidden: what each layer was given, and what the last one returned: (answer tokens, hidden) where the answer
            positions are known, else (rows, tokens, hidden).
    """

    def __init__(self, answer_at: Tensor | None) -> None:
        """Keep the hidden states at these positions, (rows, tokens) bool, or at all."""
        self.answer_at = answer_at
        self.hidden: list[Tensor] = []
        self._shape = torch.Size()
        self._others: list[tuple | None] = []  # what each layer returned besides (T5 hands its position bias on)

    @contextmanager
    def watched(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Note what passes through the layers inside the block."""

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._keep(hidden_state_of(args, kwargs))

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            is_tuple = isinstance(output, tuple)
            self._others.append(output[1:] if is_tuple else None)
            if len(self._others) == len(layers):
                self._keep(hidden_state_of(output if is_tuple else (output,), {}))

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            yield

    @contextmanager
    def standing_aside(self, layers: Sequence[nn.Module], kept: Tensor) -> Iterator[None]:
        """Let every layer return a kept hidden state at once, zero where it was not kept, and the rest as it was."""
        hidden = kept
        if kept.shape != self._shape:
            assert self.answer_at is not None
            hidden = kept.new_zeros(self._shape)
            hidden[self.answer_at.to(kept.device)] = kept
        returned = [hidden if others is None else (hidden, *others) for others in self._others]
        with replaced_forwards(layers, [lambda *_, _value=value, **__: _value for value in returned]):
            yield

    def _keep(self, hidden: Tensor) -> None:
        self._shape = hidden.shape
        if self.answer_at is not None and hidden.shape[:2] == self.answer_at.shape:
            self.hidden.append(hidden[self.answer_at.to(hidden.device)])
        else:
            self.hidden.append(hidden.clone())  # the layer may change it in place
