"""Generation: answers of several variants of an adapter, decoded in one batch.

A variant is a vector of gates, one per part of the adapter: the base model (all 0), the full adapter (all 1), or
anything in between.
Every row of the batch carries the gates of its variant, so that the weights of the base model are read once per
token for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lorazor.adapter.gates import sequence_lengths
from lorazor.adapter.load import Loaded
from lorazor.adapter.offloading import device_of_inputs
from lorazor.adapter.parts import Parts
from lorazor.data.batches import Batch
from lorazor.errors import RowsUnclearError


@dataclass(frozen=True)
class Prediction:
    """A generated answer.

    Attributes:
        example: index of the example in its file.
        variant: row of the gates it was written with.
        text: the answer, without special tokens.
    """

    example: int
    variant: int
    text: str


@torch.no_grad()
def generate_batch(
    loaded: Loaded,
    parts: Parts,
    prompts: Batch,
    gates: Tensor,
    max_new_tokens: int,
    on_message: Callable[[str], None] = lambda message: None,
) -> list[Prediction]:
    """Write the answers of every variant to a batch of prompts, greedily.

    Args:
        loaded: model and tokenizer; causal or encoder-decoder.
        parts: of its adapter.
        prompts: from `make_prompt_batches`.
        gates: (n_variants, n_parts).
        max_new_tokens: longest answer, in tokens.
        on_message: receives, at most once, that the batch had to be taken apart.
    Returns:
        n_variants * rows predictions, variant by variant.
    """
    n_variants, n_rows, device = len(gates), len(prompts.indices), device_of_inputs(loaded.model)
    inputs = {  # (n_variants * rows, tokens)
        name: tensor.repeat(n_variants, *[1] * (tensor.ndim - 1)).to(device) for name, tensor in prompts.inputs.items()
    }
    row_gates = gates.repeat_interleave(n_rows, dim=0).T  # (n_parts, n_variants * rows)
    texts = _texts(loaded, parts, inputs, row_gates, max_new_tokens, on_message)
    pairs = [(variant, example) for variant in range(n_variants) for example in prompts.indices]
    return [Prediction(example, variant, text) for (variant, example), text in zip(pairs, texts, strict=True)]


def _texts(
    loaded: Loaded,
    parts: Parts,
    inputs: dict[str, Tensor],
    row_gates: Tensor,
    max_new_tokens: int,
    on_message: Callable[[str], None],
) -> list[str]:
    """The answer to each row, with its own gates; in halves where the model may mix rows, see `split_rows`."""
    try:
        with parts.gated(row_gates, sequence_lengths(inputs) | {1}):  # one more token at a time
            generate: Any = loaded.model.generate  # nn.Module types it as a tensor
            tokens = generate(**inputs, generation_config=_greedy(loaded, max_new_tokens))
    except RowsUnclearError:
        on_message("Answers are written in smaller batches, which is slower: it is not clear which row is whose.")
        middle = row_gates.shape[1] // 2
        texts = []
        for half in (slice(middle), slice(middle, None)):
            of_half = {name: tensor[half] for name, tensor in inputs.items()}
            texts += _texts(loaded, parts, of_half, row_gates[:, half], max_new_tokens, lambda message: None)
        return texts
    if loaded.task == "causal":
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)


def _greedy(loaded: Loaded, max_new_tokens: int) -> GenerationConfig:
    """The model's own end and start tokens, but greedy, whatever its config says about sampling."""
    own = loaded.model.generation_config
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else loaded.tokenizer.eos_token_id,
        pad_token_id=loaded.tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
        forced_eos_token_id=own.forced_eos_token_id,
    )
