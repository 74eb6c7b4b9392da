"""Per-row gates in generation: k boundaries in one batch give the tokens of k separate runs."""

from __future__ import annotations

import pytest
import torch

from lorazor.adapter.load import Loaded, load
from lorazor.adapter.parts import Parts
from lorazor.data.batches import make_prompt_batches
from lorazor.data.examples import read_examples
from lorazor.measure.generation import generate_batch
from lorazor.measure.meter import boundary_gates


def gates_at(loaded: Loaded, boundaries: list[int]) -> tuple[Parts, torch.Tensor]:
    """Parts, and (n_boundaries, n_parts)."""
    parts = Parts(tuple(loaded.sites))
    return parts, torch.stack([boundary_gates(parts, "model.layers", one) for one in boundaries])


@pytest.mark.slow
def test_one_batch_equals_separate_runs_with_zeroed_weights(tiny):
    loaded = load(tiny.adapter)
    examples = read_examples(tiny.validation)
    (prompts,) = make_prompt_batches(examples, loaded.tokenizer, "causal", batch_size=6).batches
    boundaries = [0, 1, 3, 4]
    parts, gates = gates_at(loaded, boundaries)
    together = generate_batch(loaded, parts, prompts, gates, 12)
    texts = {(boundaries[one.variant], one.example): one.text for one in together}
    assert len(texts) == len(boundaries) * len(examples)
    for boundary in boundaries:
        alone = load(tiny.adapter)
        for name, parameter in alone.model.named_parameters():
            if "lora_B" in name and any(f"layers.{layer}." in name for layer in range(boundary, 4)):
                parameter.data.zero_()
        for row, example in enumerate(prompts.indices):
            tokens = alone.model.generate(
                input_ids=prompts.inputs["input_ids"][row : row + 1],
                attention_mask=prompts.inputs["attention_mask"][row : row + 1],
                max_new_tokens=12,
                do_sample=False,
            )[0, prompts.inputs["input_ids"].shape[1] :]
            assert texts[boundary, example] == alone.tokenizer.decode(tokens, skip_special_tokens=True)
    assert len({texts[boundary, 0] for boundary in boundaries}) > 1  # the gates matter


def test_a_sampling_model_still_decodes_greedily(tiny):
    loaded = load(tiny.adapter)
    loaded.model.generation_config.do_sample = True
    loaded.model.generation_config.temperature = 2.0
    (prompts,) = make_prompt_batches(read_examples(tiny.validation), loaded.tokenizer, "causal").batches
    parts, gates = gates_at(loaded, [4])
    first, second = (generate_batch(loaded, parts, prompts, gates, 8) for _ in range(2))
    assert first == second


def test_a_model_that_mixes_the_rows_of_a_batch_writes_the_same(tiny):
    """An MLP that puts time before the rows, as XLNet does, computes the same and has its rows elsewhere."""
    loaded = load(tiny.adapter)
    (prompts,) = make_prompt_batches(read_examples(tiny.validation), loaded.tokenizer, "causal", batch_size=6).batches
    parts, gates = gates_at(loaded, [0, 1, 3])
    messages = []
    expected = generate_batch(loaded, parts, prompts, gates, 8, messages.append)
    assert messages == []
    for layer in loaded.model.model.layers:
        forward = layer.mlp.forward
        layer.mlp.forward = lambda hidden, forward=forward: forward(hidden.transpose(0, 1)).transpose(0, 1)
    assert generate_batch(loaded, parts, prompts, gates, 8, messages.append) == expected
    assert messages == ["Answers are written in smaller batches, which is slower: it is not clear which row is whose."]
    assert len({one.text for one in expected if one.example == 0}) > 1  # the gates matter
