"""transformers' Trainer on the loss that is measured: nats per answer token, over all answer tokens of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel, Trainer

from lorazor.data.batches import IGNORED, Batch
from lorazor.measure.engines import on_model
from lorazor.measure.losses import answer_logits
from lorazor.train.rows import TARGETS


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

        With a teacher's distribution P, Kullback-Leibler divergences at the same tokens, or of the same texts:

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
        if self.teacher is None:
            return cross_entropy(logits, answers.targets, reduction="sum") / n_items
        with torch.no_grad():
            says = answer_logits(self.teacher, on_model(self.teacher, batch)).logits.to(logits.device)
            wanted = says.float().log_softmax(dim=-1)
        return kl_div(logits.log_softmax(dim=-1), wanted, reduction="sum", log_target=True) / n_items


def _n_targets(batch: Mapping[str, Tensor]) -> int:
    """Answer tokens of a batch, or its texts or windows."""
    if TARGETS not in batch:
        return len(batch["start_positions"])
    return int((batch[TARGETS] != IGNORED).sum())


def _span_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Sum over windows, mean over both ends of - log softmax(logits)[position], over the tokens without the padding."""
    positions = (inputs.pop("start_positions"), inputs.pop("end_positions"))  # (windows,) each
    output, losses = model(**inputs), []
    for logits, position in zip((output.start_logits, output.end_logits), positions, strict=True):
        is_padding = (inputs["attention_mask"] == 0).to(logits.device)
        unpadded = logits.float().masked_fill(is_padding, -torch.inf)
        losses.append(cross_entropy(unpadded, position.to(logits.device), reduction="sum"))
    return (losses[0] + losses[1]) / 2
