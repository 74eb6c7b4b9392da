"""Tasks: what a model does, told from its base model and from its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from lorazor.errors import BaseModelError, UnsupportedAdapterError

Task = Literal["causal", "seq2seq", "classification", "question-answering"]

AUTO_CLASSES: dict[Task, Any] = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
}
# PEFT's names of the tasks
TASK_TYPES: dict[Task, str] = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}
_TASKS: dict[str, Task] = {name: task for task, name in TASK_TYPES.items()}
_OWN_HEADS: dict[str, Task] = {
    r"ForSequenceClassification$": "classification",
    r"ForQuestionAnswering(Simple)?$": "question-answering",
}
_OTHER_HEADS = re.compile(r"For(MaskedLM|\w*Classification|MultipleChoice|NextSentencePrediction)$")
_ADVICE = f"To use it as another model nonetheless, pass --task ({', '.join(get_args(Task))})."


def task_of_adapter(adapter: Mapping[str, Any], config: PreTrainedConfig) -> Task:
    """What an adapter on a base model is for.

    A base model with the head of a task decides. Other base models (causal, masked, encoder-decoder) are what heads
    are put on, so there the adapter says whether it has one.

    Args:
        adapter: the contents of its `adapter_config.json`.
        config: the base model's.
    Raises:
        UnsupportedAdapterError: the adapter is for a task that is not measured.
        BaseModelError: the base model is.
    """
    declared = adapter.get("task_type")
    if declared is not None and declared not in _TASKS:
        raise UnsupportedAdapterError(
            f"The adapter has task_type={declared!r}; lorazor measures {', '.join(TASK_TYPES.values())}. {_ADVICE}"
        )
    with_head = ("classification", "question-answering")
    if declared is not None and _TASKS[declared] in with_head and own_task(config) is None:
        return _TASKS[declared]
    return task_of_base(config)


def task_of_base(config: PreTrainedConfig) -> Task:
    """What a base model is for.

    Raises:
        BaseModelError: it has a head that is not measured, such as one for token classification.
    """
    if own := own_task(config):
        return own
    architecture = _architecture(config)
    if _OTHER_HEADS.search(architecture):
        raise BaseModelError(f"The base model is a {architecture}, which is for none of lorazor's tasks. {_ADVICE}")
    return "seq2seq" if config.is_encoder_decoder else "causal"


def own_task(config: PreTrainedConfig) -> Task | None:
    """The task that the head of a base model is for, None for the models that heads are put on."""
    architecture = _architecture(config)
    return next((task for pattern, task in _OWN_HEADS.items() if re.search(pattern, architecture)), None)


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [""])[0]
