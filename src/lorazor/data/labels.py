"""Labels: names of classes become the numbers that a model's head has for them. This module never imports torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from lorazor.data.examples import Example
from lorazor.errors import DataError


def class_names(examples: Sequence[Example]) -> dict[int, str]:
    """The names of the classes of training data by their numbers: its own, or else the place in alphabetical order.

    Args:
        examples: labelled or not.
    Raises:
        DataError: names for some of the rows alone, or two names for one number.
    Source: `run_glue.py` of transformers, which sorts names in the same way.
    """
    named = [one for one in examples if one.label_name is not None]
    if not named:
        return {}
    alone = [one.label is None for one in examples if one.is_labelled]
    if any(alone) and not all(alone):
        raise DataError("Some labels are names and some are numbers. Pass one of the two throughout.")
    if all(alone):
        return dict(enumerate(sorted({str(one.label_name) for one in named})))
    names: dict[int, str] = {}
    for one in named:
        known = names.setdefault(_whole(one.label), str(one.label_name))
        if known != one.label_name:
            raise DataError(
                f"Example {one.index}: label {one.label} is named {one.label_name!r}, and before {known!r}. Correct it."
            )
    return names


def numbered(examples: Sequence[Example], names: Mapping[int, str], n_classes: int, model: str) -> list[Example]:
    """Give labels the numbers that a head has for their names, and refuse what it has no place for.

    Where the head has no names, or others than the data altogether, the numbers of the data count. Letter case does
    not.

    Args:
        examples: labelled or not.
        names: of the classes of the head; those that transformers makes up, LABEL_0, are none.
        n_classes: outputs of the head; 1 is for numbers.
        model: what has the head, for messages.
    Returns:
        The examples, with a label where they have a name.
    Raises:
        DataError: a label that the head has not, or one of another kind.
    """
    numbers = {name.lower(): number for number, name in names.items() if not re.fullmatch(r"LABEL_\d+", name)}
    if not numbers.keys() & {one.label_name.lower() for one in examples if one.label_name is not None}:
        numbers = {}
    return [_numbered(one, numbers, n_classes, model) for one in examples]


def _numbered(example: Example, numbers: Mapping[str, int], n_classes: int, model: str) -> Example:
    if not example.is_labelled:
        return example
    what = f"Example {example.index} has the label "
    if n_classes == 1 or isinstance(example.label, float):
        if n_classes == 1 and not isinstance(example.label, float):
            raise DataError(
                f"{what}{example.label_name or example.label!r}, a class, but the head of {model} has one output, "
                "which is for numbers. Pass --labels numbers if the labels are numbers to predict, or a model for "
                "classes."
            )
        if n_classes > 1:
            raise DataError(
                f"{what}{example.label!r}, a number to predict, but the head of {model} has {n_classes} classes. Pass "
                "a model with one output, or whole numbers."
            )
        return example
    label, name = example.label, example.label_name
    if name is not None and (numbers or label is None):
        if name.lower() not in numbers:
            known = ", ".join(map(repr, sorted(numbers, key=lambda one: numbers[one])))
            raise DataError(
                f"{what}{name!r}, but the head of {model} "
                + (f"has the classes {known}. Correct the label." if known else f"has {n_classes} classes without a ")
                + ("" if known else "name that the data has. Write labels as numbers, in the order of its training.")
            )
        label = numbers[name.lower()]
    if not 0 <= _whole(label) < n_classes:
        raise DataError(
            f"{what}{label}, but the head of {model} has {n_classes} classes, 0..{n_classes - 1}. Correct the label, "
            "or pass the adapter of these labels."
        )
    return example if label is example.label else dataclasses.replace(example, label=label)


def _whole(label: int | float | None) -> int:
    assert type(label) is int
    return label
