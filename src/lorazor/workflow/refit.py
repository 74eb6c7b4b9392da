"""A refit of an adapter on a loaded model: examples to batches in a drawn order, and the gates of the survivors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from torch import Tensor

from lorazor.adapter.load import Loaded
from lorazor.adapter.parts import Parts
from lorazor.data.batches import Batch
from lorazor.data.examples import Example
from lorazor.select.refit import GateFit, RefitStep, refit_gates
from lorazor.settings import DataSettings
from lorazor.workflow.losses import encode


def training_batches(
    loaded: Loaded, examples: Sequence[Example], reading: DataSettings, seed: int, say: Callable[[str], None]
) -> list[Batch]:
    """Examples as batches of similar length, in an order drawn by the seed."""
    batches = encode(loaded, examples, reading, say)
    random.Random(seed).shuffle(batches)
    return batches


def refit_parts(
    loaded: Loaded, parts: Parts, gates: Tensor, batches: Sequence[Batch], fit: GateFit
) -> tuple[Tensor, list[RefitStep]]:
    """Learn the gates that are not 0; sites without one are not computed.

    Args:
        loaded: the model.
        parts: of its adapter.
        gates: (n_parts,), where they start.
        batches: from `training_batches`.
        fit: steps and step size.
    Returns:
        The learned gates, (n_parts,), and the steps.
    """
    steps: list[RefitStep] = []

    def gating(learned: Tensor):
        return parts.gated(learned, gates != 0)

    return refit_gates(loaded.model, batches, gating, gates, fit, steps.append), steps
