"""Logits of answer tokens: the largest tensor of most models is there once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import log_softmax

from lorazor.data.batches import IGNORED, Batch
from lorazor.measure.losses import answer_logits
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("padded", [False, True], ids=["as they come", "row by row"])
def test_logits_of_answers_are_those_of_a_whole_pass_and_not_a_copy(padded):
    model = tiny_model("llama", 2).eval()
    tokens = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(tokens, IGNORED)
    for row, start in enumerate((2, 4, 3)):
        targets[row, start:6] = tokens[row, start + 1 :]
    head = model.get_output_embeddings()
    if padded:  # as with LoRA on the output layer
        head.lora_A = torch.nn.ModuleDict()
    given = []
    handle = head.register_forward_hook(lambda module, inputs, output: given.append(output))
    answers = answer_logits(model, Batch((0, 1, 2), {"input_ids": tokens}, targets))
    handle.remove()
    whole = model(input_ids=tokens).logits[targets != IGNORED]
    torch.testing.assert_close(answers.logits, whole)
    assert answers.targets.tolist() == targets[targets != IGNORED].tolist()
    assert answers.rows.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert (answers.logits.data_ptr() == given[0].data_ptr()) is not padded
    loss = -log_softmax(answers.logits, dim=-1).gather(1, answers.targets[:, None]).sum()
    expected = -log_softmax(whole, dim=-1).gather(1, answers.targets[:, None]).sum()
    torch.testing.assert_close(loss, expected)
