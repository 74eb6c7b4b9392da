"""A data set in three parts: to train on, to choose by, and to judge with. No prompt is in two of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from docstrings import stable_hash
from lorazor.data.examples import Example, asked
from lorazor.errors import DataError

_FEWEST_PROMPTS = 12  # leaves two for validation and two held out


def split_examples(examples: Sequence[Example], sizes: tuple[int, int, int]) -> list[list[Example]]:
    """Split examples 70 / 15 / 15 by a hash of their prompts, the same way every time.

    All examples of a prompt are in the same set. A set that is too large keeps one example of every prompt before it
    keeps a second one of any.

    Args:
        examples: prompts with answers, or conversations; doubles are dropped.
        sizes: the largest numbers of examples to train on, to choose by and to judge with.
    Raises:
        DataError: texts with labels, or fewer than 12 different prompts.
    """
    if examples[0].is_labelled:
        raise DataError("These are texts with labels. The demo trains on prompts with answers; pass such data.")
    answers: dict[str, dict[str, Example]] = {}
    for example in examples:
        answers.setdefault(repr(asked(example)), {}).setdefault(example.completion, example)
    if len(answers) < _FEWEST_PROMPTS:
        few = f"{len(answers)} different prompts are too few to train, choose and judge with."
        raise DataError(f"{few} Pass at least {_FEWEST_PROMPTS}.")
    prompts = sorted(answers, key=stable_hash)
    first, second = round(0.7 * len(prompts)), round(0.85 * len(prompts))
    sets = []
    for part, size in zip((prompts[:first], prompts[first:second], prompts[second:]), sizes, strict=True):
        rounds = zip_longest(*(answers[prompt].values() for prompt in part))
        sets.append([example for one_of_each in rounds for example in one_of_each if example is not None][:size])
    return sets


def as_row(example: Example) -> dict[str, Any]:
    """The example as a row of a file."""
    row: dict[str, Any] = {"prompt": example.prompt, "completion": example.completion}
    if example.is_conversational:
        row = {"prompt": list(example.prompt), "completion": [{"role": "assistant", "content": example.completion}]}
    return row if example.references == (example.completion,) else row | {"references": example.references}
