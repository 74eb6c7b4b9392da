"""Training on what is measured: examples as rows, their order and batches, and a Trainer on nats per answer token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from lorazor.adapter.load import Loaded
from lorazor.data.batches import IGNORED, Batch, make_batches
from lorazor.data.examples import Example
from lorazor.data.questions import Question, encode_questions
from lorazor.errors import DataError
from lorazor.measure.engines import on_model
from lorazor.measure.losses import answer_logits
from lorazor.measure.measured import for_head

TARGETS = "targets"
"""The column of what is to be predicted, as `Batch.targets` has it; the others are the model's keyword arguments."""

N_ITEMS = "lorazor_n_items"
"""Attribute of the Trainer's state: by what a step's loss is divided, see `AnswerTrainer.get_batch_samples`."""

TrainingRow = dict[str, list[int] | int]


def make_rows(
    loaded: Loaded, examples: Sequence[Example] | Sequence[Question], max_length: int | None = None
) -> tuple[list[TrainingRow], int]:
    """Encode examples exactly as they are measured later.

    Args:
        loaded: model and tokenizer.
        examples: of the model's task.
        max_length: tokens, see `make_batches`.
    Returns:
        One row per example, in the order of the examples: the model's keyword arguments, and `TARGETS`. A question
        whose context is too long has one per window; positions stand in it in the place of targets. And how many
        examples lost tokens to fit the limit.
    Raises:
        DataError: an example that cannot be encoded, such as an answer that does not fit; a label outside the head.
    """
    if loaded.task == "question-answering":
        questions = [one for one in examples if isinstance(one, Question)]
        windows = encode_questions(questions, loaded.tokenizer, max_length)
        return [window.features for window in windows], 0
    texts = for_head(loaded, [one for one in examples if isinstance(one, Example)])
    encoding = make_batches(
        texts, loaded.tokenizer, loaded.task, 1, max_length, loaded.decoder_inputs, loaded.has_types
    )
    places = {example.index: place for place, example in enumerate(texts)}
    rows: list[TrainingRow] = [{} for _ in texts]
    for batch in encoding.batches:
        columns = {**batch.inputs, TARGETS: batch.targets}
        rows[places[batch.indices[0]]] = {name: values[0].tolist() for name, values in columns.items()}
    return rows, encoding.n_truncated


def training_order(n_rows: int, n_needed: int, seed: int) -> list[int]:
    """Which row comes when: every epoch is a permutation of its own.

    Args:
        n_rows: rows there are.
        n_needed: rows that the training reads.
        seed: of the permutations.
    Returns:
        `n_needed` places in the rows. A longer training begins like a shorter one, so that runs of one seed see the
        same batches, in one run or in two.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < n_needed:
        order += torch.randperm(n_rows, generator=generator).tolist()
    return order[:n_needed]


class PadRight:
    """Makes batches of rows, padded on the right whatever the tokenizer's side, so that positions stay what they are.

    Padding is masked and has no target.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Note what to pad with.

        Raises:
            DataError: the tokenizer has no padding token.
        """
        padding = tokenizer.pad_token_id
        if not isinstance(padding, int):
            raise DataError("The tokenizer has no pad token. Set tokenizer.pad_token.")
        self.values = {"input_ids": padding, "decoder_input_ids": padding, "attention_mask": 0, TARGETS: IGNORED}
        self.values["token_type_ids"] = tokenizer.pad_token_type_id

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Tensor]:
        """(rows, tokens of the longest) of what is a list in a row, (rows,) of what is a number; int64."""
        batch = {}
        for name in rows[0]:
            values = [torch.tensor(row[name]) for row in rows]
            is_list = values[0].ndim == 1
            batch[name] = pad_sequence(values, True, self.values[name]) if is_list else torch.stack(values)
        return batch


class AnswerTrainer(Trainer):
    """A Trainer that trains on what is measured, at the same tokens, for every model alike.

    The losses that models compute themselves differ: in whether they shift the labels, in what they divide by where
    several processes share a step, and in whether a question's answer may begin in the padding. TRL's multiplies the
    last hidden states by the weight of the output layer: what some models do in between is lost, and LoRA there too.
    """

    teacher: PreTrainedModel | None = None
    """In evaluation mode; where there is one, its distribution at the answer tokens is learned, not the answers."""

    has_dropout: bool = True
    """Whether the model drops out: if not, it is trained in evaluation mode."""

    loss_is_scaled_for_ga = True
    """The passes of a step divide by the answer tokens of all of them: their losses add up to that of the step."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of a step, and how many answer tokens (or texts, or windows) a process has of it on average."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        n_here = torch.tensor(float(sum(_n_targets(batch) for batch in batches)), device=device)
        n_items: Any = self.accelerator.reduce(n_here, "mean")
        setattr(self.state, N_ITEMS, n_items)  # callbacks see the state, and not what a loss is divided by
        return batches, n_items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss in nats of the rows here, as a share of that of the step: per answer token, or per text.

            - sum_t log softmax(logits_t)[y_t] / n,  t over the answer tokens here, n their mean number in a process

        The passes of a step add up, and DDP averages over processes: what comes out is the mean over all tokens.

        Of numbers to predict it is the squared error, as in transformers; a teacher's number takes the place of the
        label. With a teacher's distribution P, Kullback-Leibler divergences at the same tokens, or of the same texts:

            sum_t sum_v P_t(v) (log P_t(v) - log softmax(logits_t)[v]) / n

        Of questions: per end of the span that answers, of which every window has two; without a teacher.
        """
        if not self.has_dropout:
            model.eval()  # the Trainer sets the mode before every step
        n_items = _n_targets(inputs) if num_items_in_batch is None else num_items_in_batch
        if TARGETS not in inputs:
            return _span_loss(model, inputs) / n_items
        batch = Batch((), inputs, inputs.pop(TARGETS))
        answers = answer_logits(self.model, batch, wrapper=model)  # pyright: ignore[reportArgumentType]
        logits = answers.logits.float()
        wanted: Tensor = answers.targets
        if self.teacher is not None:
            with torch.no_grad():
                says = answer_logits(self.teacher, on_model(self.teacher, batch)).logits
                wanted = says.float().to(logits.device)
        if answers.targets.is_floating_point():
            return mse_loss(logits.view(-1), wanted.view(-1), reduction="sum") / n_items
        if self.teacher is None:
            return cross_entropy(logits, wanted, reduction="sum") / n_items
        log_wanted = wanted.log_softmax(dim=-1)
        return kl_div(logits.log_softmax(dim=-1), log_wanted, reduction="sum", log_target=True) / n_items


def _n_targets(batch: Mapping[str, Tensor]) -> int:
    """Answer tokens of a batch, or its texts or windows."""
    if TARGETS not in batch:
        return len(batch["start_positions"])
    targets = batch[TARGETS]
    return len(targets) if targets.ndim == 1 else int((targets != IGNORED).sum())


def _span_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Sum over windows, mean over both ends of - log softmax(logits)[position], over the tokens without the padding."""
    positions = (inputs.pop("start_positions"), inputs.pop("end_positions"))  # (windows,) each
    output, losses = model(**inputs), []
    for logits, position in zip((output.start_logits, output.end_logits), positions, strict=True):
        is_padding = (inputs["attention_mask"] == 0).to(logits.device)
        unpadded = logits.float().masked_fill(is_padding, -torch.inf)
        losses.append(cross_entropy(unpadded, position.to(logits.device), reduction="sum"))
    return (losses[0] + losses[1]) / 2
