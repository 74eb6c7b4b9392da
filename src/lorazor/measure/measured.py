"""What is measured: variants of an adapter, sets of examples, and the rows that came of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from lorazor.adapter.load import Loaded
from lorazor.data.batches import Encoding, Task, make_batches, make_prompt_batches, what_was_cut
from lorazor.data.examples import Example
from lorazor.data.labels import numbered
from lorazor.measure.sharding import from_main_process
from lorazor.runs import RunFolder
from lorazor.settings import DataSettings, GenerationSettings

Rows = dict[int, dict[str, Any]]
"""Rows of a file by example."""


@dataclass(frozen=True, eq=False)
class Variant:
    """Some parts of an adapter, with weights.

    Attributes:
        label: what people call it.
        gates: (n_parts,) on the CPU.
        adapter: which adapter it is of, where a meter measures several.
    """

    label: str
    gates: Tensor
    adapter: str = ""

    @cached_property
    def digest(self) -> str:
        """What tells it from other variants, whatever it is called."""
        numbers = self.gates.detach().float().contiguous() + 0.0  # so that -0 and 0 are the same gate
        return hashlib.sha256(self.adapter.encode() + numbers.numpy().tobytes()).hexdigest()[:16]


def for_head(loaded: Loaded, examples: Sequence[Example]) -> list[Example]:
    """Examples with labels as the model's head numbers them, see `numbered`.

    Raises:
        DataError: a label that the head does not have.
    """
    return numbered(examples, loaded.class_names, loaded.n_classes, type(loaded.model).__name__)


class Measured:
    """Rows of a file of a run, of the examples of one set; a key says what was measured, never what people call it."""

    def __init__(self, run: RunFolder, file: str, examples: Iterable[int], settings: str) -> None:
        """Begin with what the run has.

        Args:
            run: its folder.
            file: its name.
            examples: all of the set.
            settings: digest of all that rows depend on beside the variant.
        """
        self.file, self._run, self._examples, self._settings = file, run, set(examples), settings
        self._found: dict[str, Rows] = {}  # key -> example -> row
        for row in from_main_process(lambda: run.rows(file)):
            self._found.setdefault(row["key"], {})[row["example"]] = row

    def rows(self, variant: Variant) -> Rows:
        """What is known of a variant, by example."""
        return self._found.get(f"{variant.digest}-{self._settings}", {})

    def keep(self, rows: Iterable[dict[str, Any]]) -> None:
        """Remember rows, with the digest of the variant as `key`, and append to the file those that are new."""
        new = []
        for row in rows:
            key = f"{row['key']}-{self._settings}"
            known = self._found.setdefault(key, {})
            if row["example"] not in known:
                known[row["example"]] = row | {"key": key}
                new.append(known[row["example"]])
        if new:
            self._run.append(self.file, new)

    def lacking(self, variants: Sequence[Variant]) -> tuple[list[Variant], set[int]]:
        """What is not measured: the variants that lack some of the examples, each once, and the examples."""
        missing = {one.digest: (one, self._examples - self.rows(one).keys()) for one in variants}
        lacking = [(one, lost) for one, lost in missing.values() if lost]
        return [one for one, _ in lacking], set().union(*(lost for _, lost in lacking))


class ExampleSet:
    """Examples, tokenised once for whatever is measured on them.

    Attributes:
        examples: in the order of the results.
        losses: what was measured on the answers given.
        predictions: answers that were written.
    """

    def __init__(
        self,
        run: RunFolder,
        prefix: str,
        examples: Sequence[Example],
        reading: DataSettings,
        generation: GenerationSettings,
        say: Callable[[str], None],
    ) -> None:
        """Take up what was measured on the examples; the names of its files begin with the prefix."""
        self.examples, self._reading, self._generation, self._say = examples, reading, generation, say
        texts = [(one.index, one.prompt, one.completion, one.label, one.pair) for one in examples]
        everything = repr((texts, reading.max_length, generation.max_new_tokens))
        digest = hashlib.sha256(everything.encode()).hexdigest()[:16]
        indices = [one.index for one in examples]
        self.losses = Measured(run, f"{prefix}losses.jsonl", indices, digest)
        self.predictions = Measured(run, f"{prefix}predictions.jsonl", indices, digest)
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
            size, limit, task = self._reading.batch_size, self._reading.max_length, cast(Task, loaded.task)
            self._answers = make_batches(
                self.examples, loaded.tokenizer, task, size, limit, loaded.decoder_inputs, loaded.has_types
            )
            if n_lost := self._answers.n_truncated:
                self._say(f"{what_was_cut(n_lost, len(self.examples), task)} to fit into the context.")
        return self._answers

    def prompts(self, loaded: Loaded) -> Encoding:
        """Prompts alone, to write answers to."""
        if self._prompts is None:
            size, limit, task = self._reading.batch_size, self._reading.max_length, cast(Task, loaded.task)
            room = self._generation.max_new_tokens
            self._prompts = make_prompt_batches(self.examples, loaded.tokenizer, task, size, limit, room)
            if n_lost := self._prompts.n_truncated:
                self._say(f"{what_was_cut(n_lost, len(self.examples), task)} to make room.")
        return self._prompts
