"""Generation: answers of several variants of an adapter, decoded in one batch.

A variant is a vector of gates, one per site: a boundary, a subset, the base model (all 0) or the full adapter (all 1).
Every row of the batch carries the gates of its variant, so that the weights of the base model are read once per
token for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lorazor.adapter.gates import row_gated
from lorazor.adapter.load import Loaded
from lorazor.adapter.rows import sequence_lengths
from lorazor.adapter.sites import LiveSite, is_kept
from lorazor.data.batches import PromptBatch
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


def boundary_gates(sites: Sequence[LiveSite], stack: str, boundaries: Sequence[int]) -> Tensor:
    """Gates of boundaries: 1 where the boundary keeps the site, else 0; shape (n_boundaries, n_sites)."""
    return torch.tensor([[float(is_kept(site, stack, boundary)) for site in sites] for boundary in boundaries])


@torch.no_grad()
def generate_batch(
    loaded: Loaded,
    prompts: PromptBatch,
    gates: Tensor,
    max_new_tokens: int,
    on_message: Callable[[str], None] = lambda message: None,
) -> list[Prediction]:
    """Write the answers of every variant to a batch of prompts, greedily.

    Args:
        loaded: model, tokenizer and sites; causal or encoder-decoder.
        prompts: from `make_prompt_batches`.
        gates: shape (n_variants, n_sites), in the order of `loaded.sites`.
        max_new_tokens: longest answer, in tokens.
        on_message: receives, at most once, that the batch had to be taken apart.
    Returns:
        n_variants * rows predictions, variant by variant.
    """
    n_variants, n_rows = len(gates), len(prompts.indices)
    inputs = {  # (n_variants * rows, tokens)
        name: tensor.repeat(n_variants, *[1] * (tensor.ndim - 1)).to(loaded.model.device)
        for name, tensor in prompts.inputs.items()
    }
    row_gates = gates.repeat_interleave(n_rows, dim=0).T  # (n_sites, n_variants * rows)
    texts = _texts(loaded, inputs, row_gates, max_new_tokens, on_message)
    pairs = [(variant, example) for variant in range(n_variants) for example in prompts.indices]
    return [Prediction(example, variant, text) for (variant, example), text in zip(pairs, texts, strict=True)]


def _texts(
    loaded: Loaded,
    inputs: dict[str, Tensor],
    row_gates: Tensor,
    max_new_tokens: int,
    on_message: Callable[[str], None],
) -> list[str]:
    """The answer to each row, with its own gates; in halves where the model mixes rows, see `split_rows`."""
    try:
        with row_gated(loaded.sites, row_gates, sequence_lengths(inputs) | {1}):  # one more token at a time
            generate: Any = loaded.model.generate  # nn.Module types it as a tensor
            tokens = generate(**inputs, generation_config=_greedy(loaded, max_new_tokens))
    except RowsUnclearError:
        on_message("This model mixes the rows of a batch. Its answers are written in smaller batches: slower.")
        middle = row_gates.shape[1] // 2
        texts = []
        for half in (slice(middle), slice(middle, None)):
            of_half = {name: tensor[half] for name, tensor in inputs.items()}
            texts += _texts(loaded, of_half, row_gates[:, half], max_new_tokens, lambda message: None)
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
