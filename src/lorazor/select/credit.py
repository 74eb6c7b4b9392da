"""Path credit: what each part of a trained adapter earns on data.

    c_i = - integral over a in 0..1 of  d Loss / d w_i  at w = a * end

All parts get their credit from the same passes, and no gradient but that of the gates is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.gates import sequence_lengths
from lorazor.adapter.offloading import device_of_inputs
from lorazor.data.batches import Batch
from lorazor.errors import MeasureError, RowsUnclearError, SettingsError
from lorazor.measure.engines import on_model
from lorazor.measure.gradients import checkpointed, frozen
from lorazor.measure.losses import differentiable_row_losses, row_losses
from lorazor.measure.sharding import measure_sharded
from lorazor.measure.stats import token_mean

RowGating = Callable[[Tensor, Collection[int]], AbstractContextManager[None]]
"""Gives every row of the batch gates of its own inside a block: (n_parts, rows), and the tokens that a row may have."""


@dataclass(frozen=True, eq=False)
class Credits:
    """What each part earned on each example along the path.

    Attributes:
        examples: indices of the examples, length n_examples.
        n_tokens: answer tokens, (n_examples,).
        credits: (n_examples, n_parts), decrease of the loss in nats, summed over the answer tokens of the example.
        base_nats: (n_examples,), negative log-likelihood with all gates 0.
        full_nats: (n_examples,), with all gates at the end of the path.
    """

    examples: tuple[int, ...]
    n_tokens: NDArray[np.float64]
    credits: NDArray[np.float64]
    base_nats: NDArray[np.float64]
    full_nats: NDArray[np.float64]

    @property
    def values(self) -> NDArray[np.float64]:
        """(n_parts,), the decrease of the loss that is owed to each part, in nats per answer token."""
        return self.credits.sum(axis=0) / self.n_tokens.sum()

    @property
    def completeness(self) -> Completeness:
        """The sum of all credits against the measured gain; with infinitely many points they are equal."""
        n_tokens = self.n_tokens.sum()
        residuals = self.credits.sum(axis=1) - (self.base_nats - self.full_nats)
        return Completeness(
            credit_sum=float(self.credits.sum() / n_tokens),
            loss_base=float(self.base_nats.sum() / n_tokens),
            loss_full=float(self.full_nats.sum() / n_tokens),
            standard_error=float(ratio_errors(residuals[:, None], self.n_tokens)[0]),
        )


@dataclass(frozen=True)
class Completeness:
    """How well the credits add up, all in nats per answer token.

    Attributes:
        credit_sum: sum of the credits of all parts.
        loss_base: loss with all gates 0.
        loss_full: loss with all gates at the end of the path.
        standard_error: of `credit_sum - gain`, over examples.
    """

    credit_sum: float
    loss_base: float
    loss_full: float
    standard_error: float

    @property
    def gain(self) -> float:
        """What the adapter gains: `loss_base - loss_full`."""
        return self.loss_base - self.loss_full

    @property
    def error(self) -> float:
        """|credit_sum - gain| / |gain|; infinite where there is no gain."""
        return abs(self.credit_sum - self.gain) / abs(self.gain) if self.gain else float("inf")


def path_credit(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    row_gating: RowGating,
    end: Tensor,
    n_points: int = 8,
    *,
    gradient_checkpointing: bool = False,
    label: str | None = None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Credits:
    """Share the gain of an adapter out between its parts, shared between the processes of `accelerate launch`.

        c_i = - end_i * sum_k v_k  d Loss / d w_i  at w = a_k * end

    with the nodes a_k and weights v_k of Gauss-Legendre quadrature on 0..1, exact for losses that are polynomials of
    degree 2 n_points in a. The path opens all gates together, so the credits add up to the whole gain, and parts
    that can replace each other share what they earn together.

    Args:
        model: in evaluation mode; what is not gated stays as it is.
        batches: from `make_batches`.
        row_gating: puts gates on the parts.
        end: (n_parts,), where the path ends; 1 everywhere for a trained adapter, 0 for parts that are dropped already.
        n_points: P; the cost is P forward-backward passes over the examples, and two forward passes.
        gradient_checkpointing: recompute activations in the backward pass.
        label: text of a progress bar on stderr; none if left out.
        on_message: receives why a batch had to be taken apart: a module that mixes its rows (`split_rows`).
    Raises:
        SettingsError: `n_points` is less than 1.
        MeasureError: a loss or a gradient is not a number.
    Source: Aumann & Shapley, Values of Non-Atomic Games (1974); Sundararajan et al., arXiv:1703.01365 (integrated
        gradients), here on the gates.
    """
    if n_points < 1:
        raise SettingsError(f"n_points={n_points}. Pass 1 or more; 8 are exact to a per cent or so.")
    nodes, weights = np.polynomial.legendre.leggauss(n_points)
    points = list(zip((nodes + 1) / 2, weights / 2, strict=True))

    def measure(batch: Batch) -> list[tuple]:
        return _measured(model, batch, row_gating, end, points)

    rows = _by_row(model, batches, measure, gradient_checkpointing, label, on_message)
    examples, *columns = zip(*rows, strict=True)
    n_tokens, earned, base, full = (np.array(column, dtype=np.float64) for column in columns)
    return Credits(examples, n_tokens, earned, base, full)


def gate_slopes(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    row_gating: RowGating,
    gates: Tensor,
    *,
    gradient_checkpointing: bool = False,
    label: str | None = None,
    on_message: Callable[[str], None] = lambda message: None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The derivative of every example's loss with respect to every gate, shared between processes.

    Args:
        model: in evaluation mode; what is not gated stays as it is.
        batches: from `make_batches`.
        row_gating: puts gates on the parts.
        gates: (n_parts,), where the derivative is taken.
        gradient_checkpointing: recompute activations in the backward pass.
        label: text of a progress bar on stderr; none if left out.
        on_message: see `path_credit`.
    Returns:
        (n_examples, n_parts), in nats summed over the answer tokens of the example; and answer tokens, (n_examples,).
        One forward-backward pass over the examples.
    Raises:
        MeasureError: a gradient is not a number.
    """

    def measure(batch: Batch) -> list[tuple]:
        of_rows = gates.float().to(device_of_inputs(model))[:, None].expand(-1, len(batch.indices))
        slopes, n_tokens = _slopes(model, batch, row_gating, of_rows)
        _check_finite(batch, slopes.sum(dim=0))
        return list(zip(batch.indices, n_tokens.tolist(), slopes.T.tolist(), strict=True))

    rows = _by_row(model, batches, measure, gradient_checkpointing, label, on_message)
    _, n_tokens, slopes = zip(*rows, strict=True)
    return np.array(slopes, dtype=np.float64), np.array(n_tokens, dtype=np.float64)


def _by_row(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    measure: Callable[[Batch], list[tuple]],
    gradient_checkpointing: bool,
    label: str | None,
    on_message: Callable[[str], None],
) -> list[tuple]:
    """What is measured of every example, in their order; batches whose rows are not known to be apart are halved."""
    taken_apart: list[int] = []  # rows of the batches that could not be measured together

    def measured(batch: Batch) -> list[tuple]:
        try:
            return measure(on_model(model, batch))
        except RowsUnclearError as reason:
            if not taken_apart:
                on_message(f"Batches are taken apart, which is slower: {reason}")
            taken_apart.append(len(batch.indices))
        return [row for half in _halves(batch) for row in measured(half)]

    with frozen(model), checkpointed(model, gradient_checkpointing):
        return sorted(measure_sharded(batches, measured, lambda rows: None, label))


def ratio_errors(sums: NDArray[np.float64], n_tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard errors of `sums.sum(0) / n_tokens.sum()` over examples that differ in length, see `token_mean`.

    Args:
        sums: x, (n_examples, n_parts).
        n_tokens: t, (n_examples,).
    Returns:
        (n_parts,); NaN for a single example.
    """
    if len(n_tokens) < 2:
        return np.full(sums.shape[1], np.nan)
    return token_mean((sums / n_tokens[:, None]).T, n_tokens)[1]


def _measured(
    model: PreTrainedModel, batch: Batch, row_gating: RowGating, end: Tensor, points: Sequence[tuple[float, float]]
) -> list[tuple]:
    """Example, answer tokens, credits of all parts, and the losses at both ends of the path, of each row of a batch."""
    gates = end.float().to(device_of_inputs(model))[:, None].expand(-1, len(batch.indices))  # (n_parts, rows)
    ends = []
    for position in (0.0, 1.0):
        with row_gating(gates * position, sequence_lengths(batch.inputs)):
            ends.append(row_losses(model, batch))
    earned = _earned(model, batch, row_gating, gates, points)
    losses = [one.nll_nats for one in ends]
    for values in (*losses, earned.sum(dim=0)):
        _check_finite(batch, values)
    columns = (ends[0].n_tokens, earned.T, *losses)
    return list(zip(batch.indices, *(column.tolist() for column in columns), strict=True))


def _check_finite(batch: Batch, values: Tensor) -> None:
    """Refuse a number per row that is none."""
    if not torch.isfinite(values).all():
        example = batch.indices[int((~torch.isfinite(values)).nonzero()[0])]
        raise MeasureError(
            f"The loss of example {example}, or its gradient, is not a number. Check the adapter for NaN weights, "
            "or measure in float32 (--dtype float32)."
        )


def _halves(batch: Batch) -> list[Batch]:
    """A batch of several rows as two."""
    middle = len(batch.indices) // 2
    return [
        replace(
            batch,
            indices=batch.indices[half],
            inputs={name: tensor[half] for name, tensor in batch.inputs.items()},
            targets=batch.targets[half],
        )
        for half in (slice(middle), slice(middle, None))
    ]


def _earned(
    model: PreTrainedModel, batch: Batch, row_gating: RowGating, end: Tensor, points: Sequence[tuple[float, float]]
) -> Tensor:
    """The quadrature on one batch, (n_parts, rows) float64 on the CPU.

    Rows are examples, and a row's loss depends on its own gates only: one pass scores all of them.
    """
    total = torch.zeros(end.shape, dtype=torch.float64)
    for position, weight in points:
        slopes, _ = _slopes(model, batch, row_gating, position * end)
        total -= weight * slopes * end.double().cpu()
    return total


def _slopes(model: PreTrainedModel, batch: Batch, row_gating: RowGating, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes of the rows' losses, (n_parts, rows) float64 on the CPU, in nats; and their answer tokens, (rows,)."""
    gates = gates.detach().requires_grad_()
    with row_gating(gates, sequence_lengths(batch.inputs)):
        losses = differentiable_row_losses(model, batch)
        if not losses.nll_nats.requires_grad:
            raise MeasureError(
                f"{type(model).__name__} hides its layers from autograd, as Reformer does, so gates get no "
                "gradients. Score without data (--score energy)."
            )
        (gradient,) = torch.autograd.grad(losses.nll_nats.sum(), gates)
    return gradient.double().cpu(), losses.n_tokens
