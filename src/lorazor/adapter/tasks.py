"""Tasks: what a model does, told from its base model and from its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from lorazor.errors import BaseModelError, UnsupportedAdapterError
from lorazor.settings import Task

AUTO_CLASSES: dict[Task, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}
# PEFT's names of the tasks
TASK_TYPES: dict[Task, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
}
_OTHER_HEADS = re.compile(
    r"For(MaskedLM|\w*Classification|QuestionAnswering(Simple)?|MultipleChoice|NextSentencePrediction)$"
)
_ADVICE = f"To use it as another model nonetheless, pass --task ({', '.join(get_args(Task))})."


def task_of_adapter(adapter: Mapping[str, Any], config: PreTrainedConfig) -> Task:
    """What an adapter on a base model is for.

    A base model that classifies decides. Other base models (causal, masked, encoder-decoder) are what heads are put on,
    so there the adapter says whether it has one.

    Args:
        adapter: the contents of its `adapter_config.json`.
        config: the base model's.
    Raises:
        UnsupportedAdapterError: the adapter is for a task that is not measured.
        BaseModelError: the base model is.
    """
    declared = adapter.get("task_type")
    if declared is not None and declared not in TASK_TYPES.values():
        raise UnsupportedAdapterError(
            f"The adapter has task_type={declared!r}; lorazor measures {', '.join(TASK_TYPES.values())}. {_ADVICE}"
        )
    return "classification" if declared == TASK_TYPES["classification"] else task_of_base(config)


def task_of_base(config: PreTrainedConfig) -> Task:
    """What a base model is for.

    Raises:
        BaseModelError: it has a head that is not measured, such as one for token classification.
    """
    if classifies(config):
        return "classification"
    architecture = _architecture(config)
    if _OTHER_HEADS.search(architecture):
        raise BaseModelError(f"The base model is a {architecture}, which is for none of lorazor's tasks. {_ADVICE}")
    return "seq2seq" if config.is_encoder_decoder else "causal"


def classifies(config: PreTrainedConfig) -> bool:
    """Whether a base model has a head of its own that classifies."""
    return _architecture(config).endswith("ForSequenceClassification")


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]
