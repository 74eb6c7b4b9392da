"""Rows in the schema of each named data set of the hub are read as they are; names of classes come along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from lorazor.data.examples import Example, asked, read_examples
from lorazor.data.forms import Columns
from lorazor.data.labels import class_names, numbered
from lorazor.data.questions import read_questions
from lorazor.errors import DataError


def example(prompt: str, completion: str, *references: str) -> Example:
    return Example(0, prompt, completion, references or (completion,))


def classified(prompt: str, label: Any, pair: str | None = None) -> Example:
    return Example(0, prompt, "", (), label, None, pair)


DART = [["Mars Hill", "JOINED", "1973"], ["Mars Hill", "LOCATION", "NC"]]
ROWS: dict[str, tuple[dict[str, Any], Example]] = {
    "cola": ({"sentence": "They drank.", "label": 1, "idx": 0}, classified("They drank.", 1)),
    "sst2": ({"sentence": "fun ", "label": 0, "idx": 0}, classified("fun ", 0)),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}, classified("a", 1, "b")),
    "qqp": ({"question1": "a", "question2": "b", "label": 0, "idx": 0}, classified("a", 0, "b")),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.8, "idx": 0}, classified("a", 3.8, "b")),
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2, "idx": 0}, classified("a", 2, "b")),
    "qnli": ({"question": "a", "sentence": "b", "label": 0, "idx": 0}, classified("a", 0, "b")),
    "xsum": ({"document": "long", "summary": "short", "id": "1"}, example("long", "short")),
    "cnn_dailymail": ({"article": "long", "highlights": "x .\ny .", "id": "1"}, example("long", "x .\ny .")),
    "samsum": ({"id": "1", "dialogue": "A: hi", "summary": "hi"}, example("A: hi", "hi")),
    "dialogsum": ({"id": "1", "dialogue": "A: hi", "summary": "hi", "topic": "x"}, example("A: hi", "hi")),
    "gsm8k": ({"question": "9 * 2?", "answer": "#### 18"}, example("9 * 2?", "#### 18")),
    "e2e": ({"meaning_representation": "name[x]", "human_reference": "x is"}, example("name[x]", "x is")),
    "dart": (
        {"tripleset": DART, "subtree_was_extended": False, "annotations": {"source": ["s", "s"], "text": ["x", "y"]}},
        example("Mars Hill : JOINED : 1973 | Mars Hill : LOCATION : NC", "x", "x", "y"),
    ),
    "web_nlg": (
        {
            "modified_triple_sets": {"mtriple_set": [["Aarhus | leader | Jacob B", "a | b | c"]]},
            "lex": {"comment": ["good", "good"], "lid": ["1", "2"], "text": ["x", "y"]},
        },
        example("Aarhus : leader : Jacob B | a : b : c", "x", "x", "y"),
    ),
    "GEM/web_nlg": (
        {"input": ["Aarhus | leader | Jacob B"], "target": "x", "references": ["x", "z"]},
        example("Aarhus : leader : Jacob B", "x", "x", "z"),
    ),
    "GEM/e2e_nlg": (
        {"meaning_representation": "name[x]", "target": "x is", "references": []},
        example("name[x]", "x is"),
    ),
}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_in_the_schema_of(name: str, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    assert read_examples(write(tmp_path, row)) == [expected]
    if expected.is_labelled:
        alone = {key: value for key, value in row.items() if key != "label"}
        (prompt,) = read_examples(write(tmp_path, alone), needs_answers=False)
        assert (prompt.prompt, prompt.pair, prompt.label) == (expected.prompt, expected.pair, None)


def test_squad_rows(tmp_path: Path) -> None:
    answers = {"text": ["Köln"], "answer_start": [0]}
    row = {"id": "1", "title": "t", "context": "Köln is", "question": "Where?", "answers": answers}
    (question,) = read_questions(write(tmp_path, row))
    assert (question.answers, question.context) == (("Köln",), "Köln is")


def test_columns_that_are_named_come_first(tmp_path: Path) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": 1, "x": "c", "y": "d", "stars": 4, "mood": "good"}
    path = write(tmp_path, row)
    assert read_examples(path, Columns(prompt="x", pair="y")) == [classified("c", 1, "d")]
    assert read_examples(path, Columns(prompt="x")) == [classified("c", 1)]
    assert read_examples(path, Columns(completion="stars", labels="numbers")) == [classified("a", 4.0, "b")]
    named = Example(0, "c", "", (), None, "good")
    assert read_examples(path, Columns(prompt="x", completion="mood", labels="classes")) == [named]
    assert asked(classified("a", 1, "b")) != asked(classified("a", 1, "c")) != asked(classified("a", 1))


def test_names_of_a_feature_come_along_from_folders_and_parquet(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["yes", "no"])
    features = datasets.Features({"premise": datasets.Value("string"), "hypothesis": datasets.Value("string")})
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features({**features, "label": names}))
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    expected = [Example(0, "a", "", (), 1, "no", "c"), Example(1, "b", "", (), 0, "yes", "d")]
    assert read_examples(tmp_path / "saved") == read_examples(tmp_path / "rows.parquet") == expected
    assert class_names(expected) == {0: "yes", 1: "no"}
    assert [one.label for one in numbered(expected, {0: "No", 1: "YES"}, 2, "model")] == [0, 1]  # by name
    assert numbered(expected, {0: "LABEL_0", 1: "LABEL_1"}, 2, "model") == expected  # by number


def test_a_configuration_and_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = []

    def load(name: str, configuration: str | None = None, split: str | None = None) -> Any:
        asked_for.append((name, configuration, split))
        if name == "nyu-mll/glue":
            return datasets.Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "label": [1]})
        raise ConnectionError("no net")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_examples("nyu-mll/glue:rte", split="validation") == [classified("a", 1, "b")]
    with pytest.raises(DataError, match="no net.*pass a copy: a folder that save_to_disk .*or the data's own .parquet"):
        read_examples("openai/gsm8k:main")
    assert asked_for == [("nyu-mll/glue", "rte", "validation"), ("openai/gsm8k", "main", None)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "a", "sentence2": 3, "label": 1}], "'sentence2' must be text"),
        ([{"sentence1": "a", "sentence2": "b", "label": -1}], "-1 stands for the hidden labels of a test split"),
        ([{"text": "a", "label": 1}, {"text": "a", "label": 1.5}], "line 2.*labels before it are classes.*--labels"),
        ([{"text": "a", "label": 1.5}, {"text": "a", "label": "x"}], "line 2.*labels are numbers to predict"),
        ([{"text": "a", "label": float("nan")}], "pass finite ones"),
        ([{"text": "a", "label": True}], "Classes must be integers 0..n-1, or names"),
        ([{"tripleset": [1], "annotations": {"text": ["x"]}}], "must be a list of .subject, relation, object"),
        ([{"tripleset": DART, "annotations": {"text": []}}], "with at least one"),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_examples(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("example", "names", "n_classes", "message"),
    [
        (classified("a", 3), {}, 3, "label 3, but the head of M has 3 classes, 0..2"),
        (classified("a", 1), {}, 1, "label 1, a class, but the head of M has one output, .*Pass --labels numbers"),
        (classified("a", 1.5), {}, 2, "label 1.5, a number to predict, but the head of M has 2 classes"),
        (Example(0, "a", "", (), None, "x"), {}, 2, "'x', but the head of M has 2 classes without a name"),
    ],
)
def test_labels_that_a_head_lacks(example: Example, names: dict[int, str], n_classes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        numbered([example], names, n_classes, "M")
    with pytest.raises(DataError, match="'x', but the head of M has the classes 'no', 'yes'"):
        numbered(
            [Example(n, "a", "", (), None, name) for n, name in enumerate(["yes", "x"])], {1: "yes", 0: "no"}, 2, "M"
        )


def test_names_alone_are_numbered_in_alphabetical_order() -> None:
    named = [Example(n, "a", "", (), None, name) for n, name in enumerate(["neutral", "entailment", "neutral"])]
    assert class_names(named) == {0: "entailment", 1: "neutral"}
    assert [one.label for one in numbered(named, class_names(named), 2, "M")] == [1, 0, 1]
    with pytest.raises(DataError, match="Some labels are names and some are numbers"):
        class_names([*named, classified("a", 1)])
    with pytest.raises(DataError, match="Example 1: label 0 is named 'y', and before 'x'"):
        class_names([Example(n, "a", "", (), 0, name) for n, name in enumerate("xy")])
