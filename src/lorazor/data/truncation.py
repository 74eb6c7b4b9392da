"""Truncation by a tokenizer, which leaves its settings in what `save_pretrained` would write to tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def untouched(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Leave a tokenizer as it was before the block; slow ones keep no such settings."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    before = None if backend is None else backend.truncation
    try:
        yield
    finally:
        if backend is not None:
            backend.no_truncation()
            if before is not None:
                backend.enable_truncation(**before)
