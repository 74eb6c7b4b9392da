"""What the decoder of an encoder-decoder reads when its answer is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorazor.errors import BaseModelError

_IGNORED = -100  # padding of labels, in every transformers model


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """The answer one step to the right, by the model's own rule: most begin with one token, mBART with the last one.

    Args:
        model: an encoder-decoder.
        labels: (rows, tokens), int64, padded on the right with -100. They are not changed.
    Returns:
        (rows, tokens), what the decoder reads to predict them.
    Raises:
        ValueError: the model's config does not say what the decoder begins with.
    """
    own: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels.clone())  # FSMT's writes into them
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError("there is no decoder_start_token_id")
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == _IGNORED, model.config.pad_token_id)


def prepare_decoder_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the decoder begin with one token wherever it is asked: in measuring, in training and in writing answers.

    T5 and others name the token in `generation_config` alone, where their own losses do not look; mBART and others name
    it nowhere, where writing answers does not find it.

    Args:
        model: an encoder-decoder; its config and generation_config are completed.
        tokenizer: its tokenizer, whose empty answer shows where an answer begins.
    Raises:
        BaseModelError: nothing says what the decoder begins with.
    """
    config, generation = model.config, model.generation_config
    assert generation is not None  # of every model that has a decoder
    if getattr(config, "decoder_start_token_id", None) is None and generation.decoder_start_token_id is not None:
        config.decoder_start_token_id = generation.decoder_start_token_id
    empty = list(tokenizer(text_target="", verbose=False)["input_ids"]) or [tokenizer.eos_token_id or 0]
    try:
        first = int(decoder_inputs(model, torch.tensor([empty]))[0, 0])
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise BaseModelError(
            f"{config.name_or_path!r} does not say which token its decoder begins with ({error}). Set "
            f"decoder_start_token_id in its config.json; T5 takes the pad token."
        ) from error
    if generation.decoder_start_token_id is None:
        generation.decoder_start_token_id = first
