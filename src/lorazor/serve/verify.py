"""Whether a written adapter computes in stock PEFT what the one it is made of computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorazor.adapter.folder import lora_dtypes, read_adapter
from lorazor.adapter.gates import silenced
from lorazor.adapter.load import Loaded, swap
from lorazor.errors import MeasureError

TOLERANCE = 1e-5
"""Of logits in float32, as a share of the largest: another order of the same sums."""

_ROWS, _TOKENS = 2, 16


@dataclass(frozen=True)
class Probe:
    """What an adapter makes of some tokens.

    Attributes:
        logits: (rows, tokens, vocabulary), or (rows, classes); float64, on the CPU.
        share: the largest difference that the adapter makes to a logit of its base model.
    """

    logits: Tensor
    share: float

    @property
    def largest(self) -> float:
        """The largest logit."""
        return float(self.logits.abs().max())


def probe(loaded: Loaded) -> Probe:
    """Run an adapter, and its base model, on tokens that are the same for every adapter."""
    logits = probed_logits(loaded)
    with silenced(loaded.sites):
        without = probed_logits(loaded)
    return Probe(logits, float((logits - without).abs().max()))


@torch.no_grad()
def probed_logits(loaded: Loaded) -> Tensor:
    """What a model computes on the tokens."""
    n_tokens = loaded.n_tokens or len(loaded.tokenizer)
    ids = (torch.arange(_ROWS * _TOKENS).reshape(_ROWS, _TOKENS) * 7919 + 3) % n_tokens
    ids = ids.to(loaded.model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if loaded.task == "seq2seq":
        inputs["decoder_input_ids"] = ids.flip(0)
    return loaded.model(**inputs)[0].double().cpu()


def compare(loaded: Loaded, written: Path, expected: Probe, is_same: bool, is_exact: bool) -> tuple[float, Loaded]:
    """Load a written adapter on the model, in the place of the one that is on it, and compare the logits.

    Args:
        loaded: the model; of no use afterwards.
        written: the folder.
        expected: of the adapter that it is made of.
        is_same: whether it must compute the same; what was cut is only measured.
        is_exact: whether no number of the adapter was rounded.
    Returns:
        The largest difference of a logit; and the model with the written adapter on it.
    Raises:
        MeasureError: it does not compute the same.
    """
    folder = read_adapter(written)
    loaded = swap(loaded, folder)
    difference = float((probed_logits(loaded) - expected.logits).abs().max())
    allowed = max(TOLERANCE, 4 * torch.finfo(loaded.model.dtype).eps) * max(1.0, expected.largest)
    if not is_exact:  # B was multiplied by a factor, and rounded to the adapter's own number format
        allowed += 4 * max(torch.finfo(dtype).eps for dtype in lora_dtypes(folder)) * expected.share
    if is_same and not difference <= allowed:
        raise MeasureError(
            f"The exported adapter has other logits in PEFT than the adapter itself, by up to {difference:.3g}, where "
            f"{allowed:.3g} is rounding. Nothing was written; report this."
        )
    return difference, loaded
