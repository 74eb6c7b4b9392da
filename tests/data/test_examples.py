"""Every source gives the same examples; every broken one an error that says where and why."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lorazor.data.examples import Columns, Example, read_examples
from lorazor.errors import DataError, SettingsError

ROWS = [
    {"prompt": "2 + 2 =", "completion": " 4", "references": ["4", "four"]},
    {"prompt": "Wie heißt du?\n", "completion": ' "Jörg", I\nthink', "references": None},
    {"prompt": "", "completion": "NA", "references": ["NA"]},
]
EXAMPLES = [
    Example(0, "2 + 2 =", " 4", ("4", "four")),
    Example(1, "Wie heißt du?\n", ' "Jörg", I\nthink', (' "Jörg", I\nthink',)),
    Example(2, "", "NA", ("NA",)),
]
USER = {"role": "user", "content": "2 + 2 ="}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "4"}


def jsonl_bytes(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl_bytes(list(rows)))
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def dataset_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `load_dataset` prepares data, instead of the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


# Sources


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.xz", "rows.jsonl.gz", "ROWS.JSONL"])
def test_json_lines(name: str, tmp_path: Path) -> None:
    compress = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(jsonl_bytes(ROWS)))
    assert read_examples(tmp_path / name) == EXAMPLES
    assert read_examples(str(tmp_path / name), limit=2) == EXAMPLES[:2]


def test_csv_with_references_as_json(tmp_path: Path) -> None:
    rows = [{**row, "references": json.dumps(row["references"]) if row["references"] else ""} for row in ROWS]
    assert read_examples(write_csv(tmp_path / "rows.csv", rows)) == EXAMPLES


def test_csv_with_labels(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [{"sentence": "good", "label": 1}, {"sentence": "7", "label": 0}])
    assert read_examples(path) == [Example(0, "good", "", (), 1), Example(1, "7", "", (), 0)]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    assert read_examples(path) == EXAMPLES
    assert read_examples(path, limit=1) == EXAMPLES[:1]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(tmp_path / "one")
    assert read_examples(tmp_path / "one") == EXAMPLES
    with pytest.raises(SettingsError, match="split='dev'.*single set"):
        read_examples(tmp_path / "one", split="dev")


def test_splits_of_a_saved_folder(tmp_path: Path) -> None:
    parts = {"train": datasets.Dataset.from_list(ROWS[:2]), "dev": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    assert read_examples(tmp_path / "two", split="dev", limit=2) == EXAMPLES[:2]
    assert read_examples(tmp_path / "two", split="dev") == EXAMPLES
    for split in (None, "test"):
        with pytest.raises(DataError, match="one of its splits: 'train', 'dev'"):
            read_examples(tmp_path / "two", split=split)


@pytest.mark.usefixtures("dataset_cache")
def test_folder_that_load_dataset_accepts(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rows")  # `tmp_path` has "test" in it, which would be taken for the split
    write_jsonl(folder, *ROWS).rename(folder / "validation.jsonl")
    assert read_examples(folder) == EXAMPLES
    assert read_examples(str(folder), split="validation") == EXAMPLES
    with pytest.raises(DataError, match="is no folder of data.*Unknown split"):
        read_examples(folder, split="dev")


def test_chats_in_arrow_lose_the_fields_that_arrow_filled_in(tmp_path: Path) -> None:
    named = {**USER, "name": "Ada"}
    datasets.Dataset.from_list([{"messages": [SYSTEM, named, ASSISTANT]}]).save_to_disk(tmp_path / "chat")
    assert read_examples(tmp_path / "chat") == [Example(0, (SYSTEM, named), "4", ("4",))]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl_bytes(ROWS[:1]) + b"\r\n  \n" + jsonl_bytes(ROWS[1:]) + b"\n")
    assert read_examples(path) == EXAMPLES


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text().filter(str.strip)), min_size=1, max_size=4))
def test_no_text_is_changed_on_the_way(tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    for path in (write_jsonl(tmp_path, *rows), write_csv(tmp_path / "rows.csv", rows)):
        assert [(example.prompt, example.completion) for example in read_examples(path)] == pairs


def test_long_cells_are_read_and_the_limit_of_the_csv_module_is_put_back(tmp_path: Path) -> None:
    usual = 131_072
    csv.field_size_limit(usual)
    path = write_csv(tmp_path / "rows.csv", [{"prompt": "x" * 200_000, "completion": "y"}])
    assert len(read_examples(path)[0].prompt) == 200_000
    assert csv.field_size_limit() == usual


def test_the_limit_leaves_the_rest_unread(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, *ROWS, "not a row")
    assert read_examples(path, limit=3) == EXAMPLES
    with pytest.raises(SettingsError, match="limit=0"):
        read_examples(path, limit=0)


# Formats of a row


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, Example(0, (SYSTEM, USER), "4", ("4",))),
        ({"messages": [USER, ASSISTANT], "references": ["4"]}, Example(0, (USER,), "4", ("4",))),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, Example(0, (USER, ASSISTANT, USER), "4", ("4",))),
        ({"text": "good", "label": 1}, Example(0, "good", "", (), 1)),
        ({"sentence": "good", "label": 0, "id": 7}, Example(0, "good", "", (), 0)),
        ({"prompt": "a", "completion": "b", "references": []}, Example(0, "a", "b", ("b",))),
        ({"messages": [], "text": "t", "label": 2, "prompt": "a", "completion": "b"}, Example(0, "a", "b", ("b",))),
        ({"messages": [USER, ASSISTANT], "text": "t", "label": 2}, Example(0, (USER,), "4", ("4",))),
    ],
)
def test_formats(row: dict[str, Any], expected: Example, tmp_path: Path) -> None:
    (example,) = read_examples(write_jsonl(tmp_path, row))
    assert example == expected
    assert example.is_conversational == isinstance(expected.prompt, tuple)
    assert example.is_labelled == (expected.label is not None)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (Columns("question", "answer"), Example(0, "q", "a", ("a",))),
        (Columns(prompt="question"), Example(0, "q", "c", ("c",))),
        (Columns(completion="answer"), Example(0, "p", "a", ("a",))),
        (Columns("question", "class"), Example(0, "q", "", (), 3)),
    ],
)
def test_named_columns(columns: Columns, expected: Example, tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "class": 3, "prompt": "p", "completion": "c", "messages": [USER, ASSISTANT]}
    assert read_examples(write_jsonl(tmp_path, row), columns) == [expected]


# Bad input

GOOD = {"prompt": "a", "completion": "b"}


def label(value: Any) -> dict[str, Any]:
    return {"text": "a", "label": value}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, ["a", "b"]], "line 2: a list instead of an object"),
        ([{"query": "a", "reply": "b"}], "line 1: the columns are 'query', 'reply', .* prompt . completion"),
        ([{}], "the columns are none"),
        ([GOOD, {"prompt": "a"}], "line 2: no column 'completion', .* columns are 'prompt'"),
        ([{**GOOD, "prompt": 3}], "line 1: column 'prompt' must be text .*not a number"),
        ([{**GOOD, "completion": None}], "line 1: column 'completion' must be text .*not null"),
        ([GOOD, {**GOOD, "completion": " \n"}], "line 2: column 'completion' holds an empty answer"),
        ([GOOD, {**GOOD, "completion": [ASSISTANT]}], "line 2: column 'completion' must be text .*not a list"),
        ([GOOD, {"messages": [USER, ASSISTANT]}], "line 2: no column 'prompt'"),
        ([{"prompt": [USER], "completion": [ASSISTANT]}, GOOD], "line 2: .*'prompt' must be a list .*not text"),
        ([{"prompt": "a", "completion": [ASSISTANT]}], "'prompt' must be a list of messages"),
        ([{"prompt": [USER], "completion": [ASSISTANT, USER]}], "has 2 messages; pass exactly one"),
        ([{"prompt": [USER], "completion": [USER]}], "ends with a message of 'user'"),
        ([{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT, USER]}], "line 2: .*ends with a message of 'user'"),
        ([{"messages": [ASSISTANT]}], "nothing before the assistant"),
        ([{"messages": []}], "must be a list of messages .*not an empty one"),
        ([{"messages": [USER, {**ASSISTANT, "content": ""}]}], "empty answer"),
        ([{"messages": [USER, {"role": "assistant"}]}], "object with 'role' and 'content', not .*'assistant'"),
        ([{"messages": ["hello", ASSISTANT]}], "object with 'role' and 'content', not 'hello'"),
        (
            [{"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]}],
            r"holds {'type': 'image'}, which is no text",
        ),
        ([{"messages": [USER, {**ASSISTANT, "thinking": "hm"}]}], "'role', 'content', 'thinking'"),
        ([{"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]}], "column 'tools' changes"),
        ([label(" ")], "'label' is ' '. Classes must be integers 0..n-1, or names"),
        ([label(-1)], "Classes must be integers 0..n-1"),
        ([{**GOOD, "references": "b"}], "'references' must be a list of texts, not text"),
        ([{**GOOD, "references": ["b", 1]}], "each of 'references' must be text .*not a number"),
        ([], "is empty"),
    ],
)
def test_bad_rows(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_examples(write_jsonl(tmp_path, *rows))
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", jsonl_bytes(ROWS[:1]) + b"\n{'prompt': 1}\n", "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": "a", "completion": "\\ud800"}', "half of a surrogate pair"),
        ("a.jsonl", jsonl_bytes(ROWS[:1]) + '{"prompt": "ü"}'.encode("latin-1"), "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.jsonl.xz", b"", "corrupt or cut off after line 0"),
        ("a.jsonl.xz", jsonl_bytes(ROWS), "corrupt"),
        ("a.jsonl.gz", jsonl_bytes(ROWS), "corrupt"),
        ("a.jsonl.xz", lzma.compress(jsonl_bytes(ROWS * 100))[:-20], "corrupt or cut off after line"),
        ("a.jsonl.gz", gzip.compress(jsonl_bytes(ROWS * 100))[:-20], "corrupt or cut off after line"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"prompt,completion\n", "is empty"),
        ("a.csv", b"prompt,completion\n1,2\n1,2,3\n", "a.csv, line 3: 3 cells, but the header has 2"),
        ("a.csv", b"prompt,prompt\n1,2\n", "names a column twice"),
        ("a.csv", b'prompt,completion\n1,"2\n3,4\n', "a.csv, line 3: not CSV"),
        ("a.csv", b"prompt,completion\n\xff,2\n", "a.csv, line 2: not UTF-8"),
        ("a.csv", b"prompt,completion,references\n1,2,three\n", "'references' must be a list of texts, not text"),
        ("a.parquet", b"PAR1 and nothing else", "a.parquet is not a Parquet file"),
        ("a.parquet", b"", "a.parquet is not a Parquet file"),
        ("a.txt", b"prompt", "Not a type of file that lorazor reads: .*a.txt'. Pass a .jsonl"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_have_no_splits(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="split='dev'.*is a file"):
        read_examples(write_jsonl(tmp_path, *ROWS), split="dev")


def test_missing_files_are_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("dev.jsonl", "owner/dev.csv", "data/dev", "./name", "a/b/c", "folder/", "not a name", Path("name")):
        with pytest.raises(DataError, match="^No such file: '"):
            read_examples(source)


def test_an_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(DataError, match="^Not a type of file that lorazor reads: ''"):
        read_examples("")


@pytest.mark.usefixtures("dataset_cache")
def test_an_empty_folder_holds_no_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is no folder of data"):
        read_examples(tmp_path / "empty")


@pytest.mark.usefixtures("dataset_cache")
@pytest.mark.parametrize("name", ["no-such-data-set", "nobody/no-such-data-set"])
def test_a_name_that_is_neither_a_file_nor_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=f"^{name} is no file here, nor a data set on the hub") as caught:
        read_examples(name)
    assert "\n" not in str(caught.value)


def test_prompts_alone_and_rows_with_answers_do_not_go_into_one_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "completion": "given"}\n')
    with pytest.raises(DataError, match="has an answer, and the first row has none"):
        read_examples(path, needs_answers=False)


def test_what_is_no_text_is_refused(tmp_path):
    part = {"type": "image", "image": "cat.png"}
    for row, said in (
        ({"prompt": "what is it?", "completion": "a cat", "images": ["cat.png"]}, "column 'images' is no text"),
        ({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a cat"}]}, "cat.png"),
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=said) as caught:
            read_examples(path)
        assert "lorazor reads text alone" in str(caught.value)


def test_a_message_in_parts_is_its_text(tmp_path):
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}], "images": []}
            for asked in (parts, "what is it?")]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_examples(path)
    assert first.prompt == second.prompt
