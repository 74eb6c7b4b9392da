"""transformers' Trainer on the loss that is measured: nats per answer token, over all answer tokens of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer

from lorazor.data.batches import Batch
from lorazor.measure.losses import answer_logits
from lorazor.train.rows import TARGETS


class AnswerTrainer(Trainer):
    """A Trainer that trains on what is measured, at the same tokens, for every model alike.

    The losses that models compute themselves differ: in whether they shift the labels, in what they divide by where
    several processes share a step, and in whether a question's answer may begin in the padding. TRL's multiplies the
    last hidden states by the weight of the output layer: what some models do in between is lost, and LoRA there too.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss in nats of the rows of all processes, which DDP averages over: per answer token, or per text.

            - sum_t log softmax(logits_t)[y_t] / n,  t over the answer tokens here, n their mean number in a process

        Of questions: per end of the span that answers, of which every window has two.
        """
        if TARGETS not in inputs:
            return _span_loss(model, inputs)
        batch = Batch((), inputs, inputs.pop(TARGETS))
        answers = answer_logits(self.model, batch, wrapper=model)  # pyright: ignore[reportArgumentType]
        here = torch.tensor(float(len(answers.targets)), device=answers.logits.device)
        n_tokens: Any = self.accelerator.reduce(here, "mean")
        return cross_entropy(answers.logits.float(), answers.targets, reduction="sum") / n_tokens


def _span_loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Mean over windows and over both ends of - log softmax(logits)[position], over the tokens without the padding."""
    positions = (inputs.pop("start_positions"), inputs.pop("end_positions"))  # (windows,) each
    output, losses = model(**inputs), []
    for logits, position in zip((output.start_logits, output.end_logits), positions, strict=True):
        is_padding = (inputs["attention_mask"] == 0).to(logits.device)
        losses.append(cross_entropy(logits.float().masked_fill(is_padding, -torch.inf), position.to(logits.device)))
    return (losses[0] + losses[1]) / 2
