"""Examples read as the settings say."""

from __future__ import annotations

from lorazor.data.examples import Columns, Example, read_examples
from lorazor.settings import DataSettings


def read(source: str, reading: DataSettings) -> list[Example]:
    """Read a data set; see `read_examples` for the formats and errors."""
    columns = Columns(reading.prompt_column, reading.completion_column)
    return read_examples(source, columns, reading.split, reading.limit)
