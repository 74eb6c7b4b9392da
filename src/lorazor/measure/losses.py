"""Teacher-forced losses of the answer tokens, one number per example."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import PreTrainedModel

from lorazor.data.batches import IGNORED, Batch
from lorazor.errors import MeasureError


@dataclass(frozen=True)
class RowLosses:
    """What a model makes of each row of a batch.

    Attributes:
        nll_nats: sum of the negative log-likelihood of the answer tokens, shape (rows,), float64; the squared error of
            numbers to predict.
        n_tokens: answer tokens, shape (rows,).
        n_correct: answer tokens that the model would choose, the first of those with the highest logit; shape (rows,).
        predicted: the class chosen, or the number predicted, shape (rows,), float64; None of texts.
    """

    nll_nats: Tensor
    n_tokens: Tensor
    n_correct: Tensor
    predicted: Tensor | None = None


@dataclass(frozen=True)
class AnswerLogits:
    """What a model says at every answer token of a batch, row after row.

    Attributes:
        logits: (answer tokens, vocabulary), or (rows, classes), as the model gives them.
        targets: the true token or class of each, (answer tokens,) int64, or the number, float32; on the device of the
            logits.
        rows: the row of the batch each belongs to, ascending, (answer tokens,) int64, on the device of the logits.
    """

    logits: Tensor
    targets: Tensor
    rows: Tensor


@torch.no_grad()
def row_losses(model: PreTrainedModel, batch: Batch) -> RowLosses:
    """Run the model on a batch and score its answer tokens, without gradients; see `differentiable_row_losses`."""
    return differentiable_row_losses(model, batch)


def differentiable_row_losses(model: PreTrainedModel, batch: Batch) -> RowLosses:
    """Run the model on a batch and score its answer tokens.

        nll_i = - sum_t log softmax(logits_it)[y_it],  t over the answer tokens of row i
        nll_i = (logit_i - y_i)^2,  of numbers to predict, as in transformers

    Args:
        model: a transformers model (inside PEFT or not) in evaluation mode; batch on its device.
        batch: inputs and targets; for classification the target is the class and counts as one token.
    """
    answers = answer_logits(model, batch)
    logits, targets, rows = answers.logits.float(), answers.targets, answers.rows
    if targets.is_floating_point():
        chosen = logits[:, 0]
        nll = mse_loss(chosen, targets, reduction="none")
    else:
        chosen = logits.argmax(dim=-1)  # in bfloat16 many tokens share the highest logit: only one is chosen
        nll = cross_entropy(logits, targets, reduction="none")
    zeros = torch.zeros(len(batch.indices), dtype=torch.float64, device=rows.device)
    columns = (nll, torch.ones_like(nll), chosen == targets)
    losses, n_tokens, n_correct = (zeros.index_add(0, rows, column.double()).cpu() for column in columns)
    predicted = chosen.detach().double().cpu() if batch.targets.ndim == 1 else None
    return RowLosses(losses, n_tokens, n_correct, predicted)


def answer_logits(model: PreTrainedModel, batch: Batch, wrapper: nn.Module | None = None) -> AnswerLogits:
    """Run the model on a batch and take the logits of its answer tokens.

    Only the answer positions reach the unembedding: the vocabulary is often a hundred times wider than the hidden
    state. They are picked in front of the output layer, so that everything a model does to its logits
    (soft caps, scales, biases) still happens.

    Args:
        model: a transformers model (inside PEFT or not) in evaluation mode; batch on its device.
        batch: inputs and targets; for classification the target is the class and counts as one token.
        wrapper: what is called in the model's place, such as DDP's wrapper around it.
    """
    targets, run = batch.targets, wrapper or model
    if targets.ndim == 1:
        logits = run(**batch.inputs).logits  # (rows, classes)
        rows = torch.arange(len(targets), device=logits.device)
        return AnswerLogits(logits, targets.to(logits.device), rows)
    is_answer = targets != IGNORED  # (rows, tokens)
    head = model.get_output_embeddings()
    rows, columns, is_real = _places(is_answer, by_row=hasattr(head, "lora_A"))
    pick = partial(_pick, is_answer.shape, (rows, columns))
    with nullcontext() if head is None or is_answer.all() else head.register_forward_pre_hook(pick):
        logits = run(**batch.inputs, use_cache=False).logits
    if logits.shape[:2] == targets.shape:  # a model without a separate output layer
        is_real = is_answer
    elif logits.shape[:2] != rows.shape:
        raise MeasureError(
            f"{type(model).__name__} gives logits of shape {tuple(logits.shape)} for {tuple(targets.shape)} tokens, so "
            "it is not known whose they are. Report this model."
        )
    logits = logits.flatten(0, 1)
    if not is_real.all():  # a copy, and another in the backward pass, of what is the largest tensor of most models
        logits = logits.index_select(0, is_real.flatten().nonzero()[:, 0].to(logits.device))
    return AnswerLogits(logits, targets[is_answer].to(logits.device), is_answer.nonzero()[:, 0].to(logits.device))


def _places(is_answer: Tensor, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of the answer tokens, and which of them are no padding.

    Each is (1, answer tokens), the least work; or (rows, longest answer), for LoRA on the output layer, whose gates may
    be those of rows.
    """
    if not by_row:
        rows, columns = is_answer.nonzero(as_tuple=True)
        return rows[None], columns[None], torch.ones_like(rows[None], dtype=torch.bool)
    width = int(is_answer.sum(dim=1).max())
    columns = (~is_answer).int().argsort(dim=1, stable=True)[:, :width]  # those of the answer first
    is_real = is_answer.gather(1, columns)
    rows = torch.arange(len(is_answer), device=is_answer.device)[:, None].expand_as(columns)
    return rows, torch.where(is_real, columns, columns[:, :1]), is_real


def _pick(shape: torch.Size, places: tuple[Tensor, Tensor], module: nn.Module, inputs: tuple) -> tuple:
    """Let only some places of the hidden states (rows, tokens, hidden) into the output layer."""
    hidden = inputs[0]
    if hidden.ndim != 3 or hidden.shape[:2] != shape:  # or the embedding of the tokens (rows, tokens), in FSMT
        return inputs
    rows, columns = (one.to(hidden.device) for one in places)
    return hidden[rows, columns], *inputs[1:]
