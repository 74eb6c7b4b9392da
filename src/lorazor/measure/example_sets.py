"""Sets of examples, tokenised once for whatever is measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from lorazor.adapter.load import Loaded
from lorazor.data.batches import Encoding, Task, make_batches, make_prompt_batches
from lorazor.data.examples import Example
from lorazor.errors import DataError
from lorazor.settings import DataSettings, GenerationSettings


@dataclass(eq=False)
class ExampleSet:
    """Examples, as they are measured.

    Attributes:
        prefix: what the names of its files begin with.
        examples: in the order of the results.
        digest: of examples and settings, as part of the keys of what is measured.
        reading: how examples become tokens.
        generation: how long answers are.
        say: receives messages.
    """

    prefix: str
    examples: Sequence[Example]
    reading: DataSettings
    generation: GenerationSettings
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        texts = [(one.index, one.prompt, one.completion, one.label) for one in self.examples]
        everything = repr((texts, self.reading.max_length, self.generation.max_new_tokens))
        self.digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
        self.forget()

    def forget(self) -> None:
        """Make tokens anew, for another tokenizer."""
        self._answers: Encoding | None = None
        self._prompts: Encoding | None = None

    def answers(self, loaded: Loaded) -> Encoding:
        """Prompts with answers, for losses.

        Raises:
            DataError: an example that cannot be used with this model.
        """
        if self._answers is None:
            size, limit = self.reading.batch_size, self.reading.max_length
            task = cast(Task, loaded.task)
            self._answers = make_batches(self.examples, loaded.tokenizer, task, size, limit, loaded.decoder_inputs)
            if n_lost := self._answers.n_truncated:
                self.say(f"{n_lost} of {len(self.examples)} prompts lost their start to fit into the context.")
        return self._answers

    def prompts(self, loaded: Loaded) -> Encoding:
        """Prompts alone, to write answers to."""
        if self._prompts is None:
            size, limit, room = self.reading.batch_size, self.reading.max_length, self.generation.max_new_tokens
            task = cast(Task, loaded.task)
            self._prompts = make_prompt_batches(self.examples, loaded.tokenizer, task, size, limit, room)
            if n_lost := self._prompts.n_truncated:
                self.say(f"{n_lost} of {len(self.examples)} prompts lost their start to make room.")
        return self._prompts


def check_labels(loaded: Loaded, examples: Sequence[Example]) -> None:
    """Refuse labels that the model's head does not have.

    Raises:
        DataError: such a label.
    """
    for example in examples:
        if example.label is not None and not 0 <= example.label < loaded.n_classes:
            raise DataError(
                f"Example {example.index} has the label {example.label}, but the model's head has {loaded.n_classes} "
                f"classes, 0..{loaded.n_classes - 1}. Correct the label, or pass the adapter of these labels."
            )
