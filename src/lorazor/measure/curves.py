"""What a model would answer if it stopped after each layer, with the adapter and without.

    p_l(t) = softmax(W_U norm_f(h_l))[y_t],   mean over the answer tokens t

Beside the probability of the true token: the entropy of the distribution, and the rank of the true token in it. How
h_l comes to a distribution: `measure/lens.py`. Source: Chen et al., arXiv:2503.23360, as we read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorazor.adapter.gates import silenced
from lorazor.adapter.sites import LiveSite
from lorazor.data.batches import Batch
from lorazor.errors import MeasureError, SettingsError
from lorazor.measure.engines import on_model
from lorazor.measure.lens import layerwise_logits
from lorazor.measure.losses import AnswerLogits
from lorazor.measure.results import CurvePoint
from lorazor.measure.stats import token_mean

CurveVariant = Literal["adapter", "base"]
VARIANTS: tuple[CurveVariant, ...] = get_args(CurveVariant)

_TOKENS_AT_A_TIME = 256
"""Answer tokens whose probabilities over the whole vocabulary are in memory together, in float32."""


@dataclass(frozen=True)
class CurveRow:
    """One line of `curves.jsonl`: one example at one layer.

    Attributes:
        example: index of the example in its file.
        variant: `adapter`, or `base`: all sites silenced.
        layer: layers that have run; 0 is what the first one is given.
        n_tokens: answer tokens; 1 for a label.
        probability: of the true token, mean over the answer tokens.
        entropy_nats: of the whole distribution, mean over the answer tokens.
        ranks: of the true token at every answer token; 1 where no other token has a higher logit.
    """

    example: int
    variant: CurveVariant
    layer: int
    n_tokens: int
    probability: float
    entropy_nats: float
    ranks: list[int]


@dataclass(frozen=True)
class MeasuredCurves:
    """The curves as arrays; the first axis is `VARIANTS`.

    Attributes:
        examples: indices of the examples, ascending, length n_examples.
        n_tokens: answer tokens, (n_examples,) int64.
        probability: (2, L + 1, n_examples), mean over the answer tokens of each example.
        entropy_nats: (2, L + 1, n_examples), the same of the entropy.
        median_rank: (2, L + 1), over all answer tokens.
    """

    examples: tuple[int, ...]
    n_tokens: np.ndarray
    probability: np.ndarray
    entropy_nats: np.ndarray
    median_rank: np.ndarray

    @property
    def n_layers(self) -> int:
        """L, layers of the stack."""
        return self.probability.shape[1] - 1

    def points(self) -> list[CurvePoint]:
        """Every variant at every layer.

        Raises:
            MeasureError: fewer than 2 examples.
        """
        probability, probability_error = token_mean(self.probability, self.n_tokens)
        entropy, entropy_error = token_mean(self.entropy_nats, self.n_tokens)
        columns = (probability, probability_error, entropy, entropy_error, self.median_rank)
        return [
            CurvePoint(variant, layer, *(float(column[index, layer]) for column in columns))
            for index, variant in enumerate(VARIANTS)
            for layer in range(self.n_layers + 1)
        ]

    def gap(self) -> tuple[np.ndarray, np.ndarray]:
        """Probability with the adapter minus that of the base, and its standard error: (L + 1,) each, paired.

        Raises:
            MeasureError: fewer than 2 examples.
        """
        return token_mean(self.probability[0] - self.probability[1], self.n_tokens)


def check_stack(stack: str, is_encoder_decoder: bool) -> None:
    """Raise SettingsError for the encoder of an encoder-decoder, whose layers do not lead to an answer token."""
    if is_encoder_decoder and "decoder" not in stack.split("."):
        raise SettingsError(
            f"stack={stack!r} is the encoder of an encoder-decoder: the truth can be read off the decoder's layers "
            f"only. Pass stack='decoder' (--stack) and an adapter with sites there."
        )


@torch.no_grad()
def curve_batch(model: PreTrainedModel, sites: Sequence[LiveSite], batch: Batch, stack: str) -> list[CurveRow]:
    """Measure one batch at every layer, with the adapter and without.

    One forward pass per variant, and one per layer in which no layer runs. In memory at a time: the logits of the
    answer tokens at one layer, and their hidden states at all layers (of labelled texts: those of all tokens).

    Args:
        model: the base model that carries the sites, in evaluation mode.
        sites: all sites of the adapter.
        batch: from `make_batches`.
        stack: name of the stack, `model.layers`.
    Raises:
        MeasureError: a model into which one cannot look this way, or a probability that is not a number.
    """
    rows: list[CurveRow] = []
    for variant in VARIANTS:
        with silenced(sites if variant == "base" else ()):
            there = on_model(model, batch, stack)  # runs the encoder of an encoder-decoder, here with its adapters off
            for layer, answers in enumerate(layerwise_logits(model, there, stack)):
                rows.extend(_rows(answers, batch.indices, variant, layer))
    return rows


def _rows(answers: AnswerLogits, indices: Sequence[int], variant: CurveVariant, layer: int) -> Iterator[CurveRow]:
    columns: list[tuple[Tensor, ...]] = []
    chunks = (values.split(_TOKENS_AT_A_TIME) for values in (answers.logits, answers.targets))
    for logits, targets in zip(*chunks, strict=True):
        logits = logits.float()
        truth = logits.gather(1, targets[:, None])  # (tokens, 1)
        probabilities = logits.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum(dim=-1)  # - p log p, 0 where p is 0
        columns.append((probabilities.gather(1, targets[:, None])[:, 0], entropy, (logits > truth).sum(dim=-1) + 1))
    probability, entropy, rank = (torch.cat(parts).cpu().numpy() for parts in zip(*columns, strict=True))
    row_of = answers.rows.cpu().numpy()
    for row, example in enumerate(indices):
        mine = row_of == row
        p, h = probability[mine].mean(dtype=np.float64), entropy[mine].mean(dtype=np.float64)
        if not np.isfinite([p, h]).all():
            raise MeasureError(
                f"The probability of example {example} after layer {layer} ({variant}) is {p}, its entropy {h}. "
                "Check the adapter for NaN weights, or measure in float32 (--dtype float32)."
            )
        yield CurveRow(example, variant, layer, int(mine.sum()), float(p), float(h), rank[mine].tolist())


def collect_curves(rows: Iterable[CurveRow]) -> MeasuredCurves:
    """Arrange rows, in any order, as arrays.

    Raises:
        MeasureError: an example lacks a layer or variant that another has.
    """
    table = {(row.variant, row.layer, row.example): row for row in rows}
    layers = range(max(layer for _, layer, _ in table) + 1)
    examples = sorted({example for *_, example in table})
    for variant in VARIANTS:
        for layer in layers:
            for example in examples:
                if (variant, layer, example) not in table:
                    raise MeasureError(f"No row for example {example}, layer {layer}, {variant}. Measure again.")

    def arrange(field: str) -> np.ndarray:
        return np.array([[[getattr(table[v, n, e], field) for e in examples] for n in layers] for v in VARIANTS])

    ranks = [[np.concatenate([table[v, n, e].ranks for e in examples]) for n in layers] for v in VARIANTS]
    return MeasuredCurves(
        examples=tuple(examples),
        n_tokens=arrange("n_tokens")[0, 0],
        probability=arrange("probability"),
        entropy_nats=arrange("entropy_nats"),
        median_rank=np.median(np.array(ranks), axis=-1),
    )
