"""Tasks: what a model does, told from its base model and from its adapter, with which head.

And what else a model has to know for it: what its tokenizer pads with, and what its decoder begins with.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorazor.adapter.folder import BASE_PREFIX, AdapterFolder
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
_IGNORED = -100  # padding of labels, in every transformers model
_HEADS_OF_PEFT = ("classifier", "score", "qa_outputs")
_ADVICE = f"To use it as another model nonetheless, pass --task ({', '.join(get_args(Task))})."


def class_for(task: Task, config: PreTrainedConfig, names: Collection[str]) -> Any:
    """What loads a base model for a task.

    A model that reads text and looks at images is loaded whole, since its adapters name its modules so; where the
    adapter names those of its text model alone, that one.

    Args:
        task: what it is for.
        config: of the base model.
        names: modules and parameters that an adapter has LoRA on; none without one.
    Raises:
        BaseModelError: it reads no text at all.
    """
    hears = type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    if task == "seq2seq" and hears and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise BaseModelError(
            f"The base model {config.name_or_path!r} is a {config.model_type}, which turns speech into text, and what "
            "is measured here reads text. What needs no data works: inspect, prune, and shrink without --data."
        )
    whole: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    text: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if task != "causal" or whole is None:
        return AUTO_CLASSES[task]
    if text in (None, whole):
        return AutoModelForImageTextToText
    kinds = [AutoModelForImageTextToText, AutoModelForCausalLM]
    if (config.architectures or [""])[0] == text.__name__:
        kinds.reverse()
    for kind in kinds if names else ():
        with torch.device("meta"):
            model = kind.from_config(config)
        places = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
        if places.issuperset(names):
            return kind
    return kinds[0]


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
    architecture = (config.architectures or [""])[0]
    if _OTHER_HEADS.search(architecture):
        raise BaseModelError(f"The base model is a {architecture}, which is for none of lorazor's tasks. {_ADVICE}")
    return "seq2seq" if config.is_encoder_decoder else "causal"


def own_task(config: PreTrainedConfig) -> Task | None:
    """The task that the head of a base model is for, None for the models that heads are put on."""
    architecture = (config.architectures or [""])[0]
    return next((task for pattern, task in _OWN_HEADS.items() if re.search(pattern, architecture)), None)


def classes_to_load(folder: AdapterFolder | None, config: PreTrainedConfig, n_labels: int | None) -> int | None:
    """Classes of the head to put on a base model, None to leave the head that it has.

    Args:
        folder: the adapter, whose own head comes first.
        config: of the base model.
        n_labels: classes in the data of a training, 1 for numbers to predict; a head of the base model that has room
            for them stays.
    Raises:
        BaseModelError: several labels, or several numbers, at once.
    """
    n_classes = None if folder is None else _count_classes(folder, config)
    n_own = config.num_labels or 2  # the default of transformers
    if folder is None and n_labels is not None:
        has_room = n_own == 1 if n_labels == 1 else n_own >= n_labels
        n_classes = None if own_task(config) == "classification" and has_room else n_labels
        if n_classes is not None:
            return n_classes  # a new head, for what the data says
    size = n_own if n_classes is None else n_classes
    if config.problem_type not in (None, "regression" if size == 1 else "single_label_classification"):
        raise BaseModelError(
            f"A head of size {size} for {config.problem_type} is not supported. lorazor measures the choice of one "
            f"class of two or more, and one number. Pass such an adapter, base model or data."
        )
    return n_classes


def _count_classes(folder: AdapterFolder, config: PreTrainedConfig) -> int | None:
    """Classes of the head that an adapter folder carries along (`modules_to_save`), None where it carries none.

    A head is what grows with the number of classes: the model is built twice, without memory, and the parameters whose
    shapes differ are looked up in the folder.
    """
    two, three = copy.deepcopy(config), copy.deepcopy(config)
    two.num_labels, three.num_labels = 2, 3
    with torch.device("meta"):
        models = [AutoModelForSequenceClassification.from_config(one) for one in (two, three)]
    for (name, small), (_, large) in zip(*(model.named_parameters() for model in models), strict=True):
        saved = folder.shapes.get(BASE_PREFIX + name)
        axes = [axis for axis in range(small.ndim) if small.shape[axis] != large.shape[axis]]
        if saved is not None and axes:
            return saved[axes[0]]
    return None


def check_is_trained(untrained: Collection[str], folder: AdapterFolder, base: str) -> None:
    """Refuse an adapter that leaves parameters as they were drawn: they would be others at every load.

    Args:
        untrained: names of the parameters that the base model's checkpoint does not have, at this size.
        folder: the adapter, which may have them.
        base: names the base model in the message.
    Raises:
        BaseModelError: neither of the two has them.
    """
    drawn = sorted(name for name in untrained if BASE_PREFIX + name not in folder.shapes)
    if drawn:
        raise BaseModelError(
            f"Neither the base model {base!r} nor the adapter {folder.name!r} has {', '.join(drawn)}: what no one "
            f"trained would be drawn at random. Save it with the adapter (modules_to_save), or pass a base model that "
            f"has it (--model)."
        )


def modules_to_train(model: PreTrainedModel, task: Task, untrained: Collection[str]) -> list[str]:
    """The modules that a fresh adapter has to train and to save whole, and that get no LoRA.

    They are the head, which is what a model has beside its backbone, and whatever else the checkpoint does not have.
    PEFT itself knows a head by three names alone.

    Args:
        model: the base model, without LoRA.
        task: what it does.
        untrained: names of the parameters that its checkpoint does not have.
    Raises:
        BaseModelError: a classifier or a model for questions that has no head of its own.
    """
    names: list[str] = []
    if task in ("classification", "question-answering"):
        backbone = model.base_model
        for name, module in model.named_children():
            is_beside = module is not backbone if backbone is not model else isinstance(module, nn.Linear)  # T5
            if not is_beside or next(module.parameters(), None) is None:
                continue
            # PEFT saves a module of its own names anyway, and one that is saved twice, inside another, breaks
            is_of_peft = any(inner.endswith(_HEADS_OF_PEFT) for inner, _ in module.named_modules())
            names += [f"{name}.{inner}" for inner, _ in module.named_children()] if is_of_peft else [name]
        if not names:
            raise BaseModelError(f"{type(model).__name__} has no head beside its layers. Pass another base model.")
    head = tuple(f"{name}." for name in names)
    return names + sorted({name.rpartition(".")[0] for name in untrained if not name.startswith(head)})


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


def prepare_(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Let a model pad and begin with the tokenizer's tokens wherever it is asked: in measuring, training and writing.

    A decoder that classifies looks for the token before the padding. T5 and others name the token that their decoder
    begins with in `generation_config` alone, where their own losses do not look; mBART and others name it nowhere,
    where writing answers does not find it.

    Args:
        model: its config and generation_config are completed.
        tokenizer: its tokenizer, whose empty answer shows where an answer begins.
        task: what the model does.
    Raises:
        BaseModelError: nothing says what the decoder begins with.
    """
    config, text_config = model.config, model.config.get_text_config()
    if task == "classification":
        config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
    if task == "classification" or text_config.pad_token_id is None:
        text_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if task != "seq2seq":
        return
    generation = model.generation_config
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
