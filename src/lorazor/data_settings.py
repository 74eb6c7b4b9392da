"""The settings of data: how examples are read, and how answers are written; groups inside those of the commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lorazor.errors import SettingsError
from lorazor.fields import AtLeast, Settings


@dataclass(frozen=True)
class ExampleSettings(Settings):
    """How to read the examples."""

    prompt_column: Annotated[
        str | None, "Column with the prompt (or text). Default: prompt, messages, text, sentence."
    ] = None
    completion_column: Annotated[str | None, "Column with the answer (or label). Default: completion, label."] = None
    pair_column: Annotated[str | None, "Column with the second text of a pair. Default: that of the GLUE tasks."] = None
    labels: Annotated[
        Literal["auto", "classes", "numbers"],
        "What labels are: classes, or numbers to predict (regression); auto takes numbers with a point for these.",
    ] = "auto"
    split: Annotated[str | None, "Split of a dataset folder or hub dataset."] = None
    limit: Annotated[int | None, "Read only the first N examples.", AtLeast(1)] = None
    max_length: Annotated[
        int | None, "Tokens of prompt and answer; longer prompts lose their start. Default: the tokenizer's limit."
    ] = None


@dataclass(frozen=True)
class DataSettings(ExampleSettings):
    """How to read the examples and cut them into batches."""

    batch_size: Annotated[int, "Examples per forward pass.", AtLeast(1)] = 8


@dataclass(frozen=True)
class GenerationSettings(Settings):
    """How to write answers, for metrics of text."""

    max_new_tokens: Annotated[int, "Longest answer to write, in tokens.", AtLeast(1)] = 64
    shortlist: Annotated[
        int, "Of 'lorazor boundary': how many to write answers for when choosing by a text metric."
    ] = 6
    bleu_tokenizer: Annotated[
        Literal["13a", "intl", "char", "none", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200"],
        "How BLEU takes texts apart, as in sacrebleu; ja-mecab and ko-mecab need sacrebleu[ja] and [ko], and flores "
        "loads a model from the net once.",
    ] = "13a"

    def __post_init__(self) -> None:
        """Refuse a tokenizer that cannot be had here.

        Raises:
            SettingsError: see `Settings`; or what it needs is not installed, or cannot be loaded.
        """
        super().__post_init__()
        if self.bleu_tokenizer in ("13a", "intl", "char", "none", "zh"):
            return
        from sacrebleu.metrics.bleu import BLEU

        try:
            BLEU(tokenize=self.bleu_tokenizer)
        except Exception as error:  # of the net, of archives and of missing packages
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SettingsError(
                f"bleu_tokenizer={self.bleu_tokenizer!r} cannot be had ({reason:.200}). Install what it needs, or fill "
                "~/.sacrebleu on a machine with a net and copy it."
            ) from error
