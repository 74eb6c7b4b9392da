"""Heads of classifiers: how many classes they have, and whether anyone trained them."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from lorazor.adapter.folder import BASE_PREFIX, AdapterFolder
from lorazor.adapter.tasks import Task, own_task
from lorazor.errors import BaseModelError

_HEADS_OF_PEFT = ("classifier", "score", "qa_outputs")


def count_classes(folder: AdapterFolder, config: PreTrainedConfig) -> int | None:
    """Classes of the head that an adapter folder carries along (`modules_to_save`), None where it carries none.

    A head is what grows with the number of classes: the model is built twice, without memory, and the parameters whose
    shapes differ are looked up in the folder.

    Args:
        folder: the adapter.
        config: of its base model.
    """
    two, three = (_shapes_with(config, n_classes) for n_classes in (2, 3))
    for name, shape in two.items():
        saved = folder.shapes.get(BASE_PREFIX + name)
        axes = [axis for axis, (size, larger) in enumerate(zip(shape, three[name], strict=True)) if size != larger]
        if saved is not None and axes:
            return saved[axes[0]]
    return None


def _shapes_with(config: PreTrainedConfig, n_classes: int) -> dict[str, tuple[int, ...]]:
    config = copy.deepcopy(config)
    config.num_labels = n_classes
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def classes_to_load(folder: AdapterFolder | None, config: PreTrainedConfig, n_labels: int | None) -> int | None:
    """Classes of the head to put on a base model, None to leave the head that it has.

    Args:
        folder: the adapter, whose own head comes first.
        config: of the base model.
        n_labels: classes in the data of a training; a head of the base model that has room for them stays.
    Raises:
        BaseModelError: a regression, or several labels at once.
    """
    n_classes = None if folder is None else count_classes(folder, config)
    n_own = config.num_labels or 2  # the default of transformers
    if folder is None and n_labels is not None:
        n_classes = None if own_task(config) == "classification" and n_own >= n_labels else n_labels
    _check_classifies(config, n_own if n_classes is None else n_classes)
    return n_classes


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
            f"Neither the base model {base!r} nor the adapter {str(folder.path)!r} has {', '.join(drawn)}: what no one "
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
            if is_beside and any(True for _ in module.parameters()):
                names += _parts_for_peft(name, module)
        if not names:
            raise BaseModelError(f"{type(model).__name__} has no head beside its layers. Pass another base model.")
    head = tuple(f"{name}." for name in names)
    return names + sorted({name.rpartition(".")[0] for name in untrained if not name.startswith(head)})


def _parts_for_peft(name: str, module: nn.Module) -> list[str]:
    """PEFT saves a module of its own names anyway, and one that is saved twice, inside another, breaks."""
    if any(inner.endswith(_HEADS_OF_PEFT) for inner, _ in module.named_modules()):
        return [f"{name}.{inner}" for inner, _ in module.named_children()]
    return [name]


def _check_classifies(config: PreTrainedConfig, n_classes: int) -> None:
    """Refuse what is called sequence classification, but is not a choice of one class."""
    if n_classes < 2 or config.problem_type not in (None, "single_label_classification"):
        raise BaseModelError(
            f"A head of size {n_classes} for {config.problem_type or 'regression'} is not supported. lorazor "
            f"measures the choice of one class of two or more. Pass such an adapter, base model or data."
        )
