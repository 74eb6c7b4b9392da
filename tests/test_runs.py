"""Run folders: nothing is overwritten, nothing finished is lost, and another run is not resumed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from lorazor.errors import OutputError, SettingsError
from lorazor.runs import RunFolder


def start(path: Path, resume: bool = False, seed: int = 0, source: Path | None = None) -> RunFolder:
    return RunFolder.start(path, "boundary", {"seed": seed}, {"data": source}, resume)


def test_a_folder_with_something_in_it_is_left_alone(out):
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputError, match="is not empty"):
            start(out, resume)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_rows_survive_and_a_torn_line_is_taken_off(out):
    run = start(out)
    run.append("rows.jsonl", [{"a": 1}, {"a": 2}])
    with (out / "rows.jsonl").open("a") as file:
        file.write('{"a": 3')  # the power went
    again = start(out, resume=True)
    assert again.rows("rows.jsonl") == [{"a": 1}, {"a": 2}]
    again.append("rows.jsonl", [{"a": 3}])
    assert [json.loads(line)["a"] for line in (out / "rows.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_another_run_is_not_resumed(out, tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text("{}")
    start(out, source=source).append("rows.jsonl", [])
    with pytest.raises(OutputError, match="seed was 0 and is now 1"):
        start(out, resume=True, seed=1, source=source)
    source.write_text("{ }")
    with pytest.raises(OutputError, match="the contents of data have changed"):
        start(out, resume=True, source=source)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "deep/rows.jsonl"])
def test_a_change_inside_a_folder_is_seen(out, tmp_path, name):
    """An adapter's weights are nothing without the scaling in its config; a data set may be a folder of files."""
    folder = tmp_path / "input"
    for one in {"adapter_config.json", name} if name.startswith("adapter") else {name}:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).write_text("before")
    start(out, source=folder).append("rows.jsonl", [])
    start(out, resume=True, source=folder)
    (folder / name).write_text("after")
    with pytest.raises(OutputError, match="the contents of data have changed"):
        start(out, resume=True, source=folder)


def test_lines_are_read_as_they_were_written_whatever_ends_a_line_in_a_text(out):
    run = start(out)
    rows = [{"text": "a\u2028b\u2029c\x85d\x0be\r\nf"}, {"text": "g"}]
    run.append("rows.jsonl", rows)
    assert run.rows("rows.jsonl") == rows


def test_a_note_is_said_again_and_kept_once(out):
    said = []
    run = start(out)
    for _ in range(2):
        run.noting(said.append)("cut")
    assert said == ["cut", "cut"]
    assert run.document["notes"] == ["cut"]


def test_another_base_model_is_not_gone_on_with(out):
    run = start(out)
    run.note_base("one", "1234")
    run.note_base("two", "5678")
    run.append("rows.jsonl", [])
    again = start(out, resume=True)
    again.note_base("one", "1234")
    with pytest.raises(OutputError, match="the weights of the base model 'two' have changed"):
        again.note_base("two", "9999")


def test_a_refusal_says_where_the_measurements_are(out):
    run = start(out)
    with pytest.raises(SettingsError, match="^too small$"), run.explaining():
        raise SettingsError("too small")
    run.append("rows.jsonl", [])
    with pytest.raises(SettingsError, match=r"^too small What was measured is in '.*': remove it"), run.explaining():
        raise SettingsError("too small")
    with pytest.raises(OutputError, match="^full$"), run.explaining():
        raise OutputError("full")


def test_a_full_disk_is_one_error_and_keeps_what_was_there(out, monkeypatch):
    run = start(out)
    run.append("rows.jsonl", [])
    before = (out / "run.json").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match="the disk is full"):
        run.write_json("run.json", {"other": True})
    assert (out / "run.json").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["rows.jsonl", "run.json"]


def test_a_run_that_wrote_nothing_leaves_the_place_free(out):
    start(out, seed=1)
    start(out, seed=2).append("rows.jsonl", [{"a": 1}])
    assert json.loads((out / "run.json").read_text())["settings"] == {"seed": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no run.json"), ("{", "not a JSON file"), ('{"format": "lorazor.run/9"}', "'lorazor.run/9'")],
)
def test_what_is_not_a_run_is_said(out, content, message):
    out.mkdir()
    if content is not None:
        (out / "run.json").write_text(content)
    with pytest.raises(OutputError, match=message):
        RunFolder.open(out)


def test_a_process_that_does_not_write_leaves_no_trace(out):
    run = RunFolder(out, {}, is_writer=False)
    run.append("rows.jsonl", [{"a": 1}])
    run.write_json("run.json", {})
    assert not out.exists()


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("/venv/bin/lorazor", "lorazor shrink 'my run; rm -rf'"),
        ("/site-packages/lorazor/__main__.py", "lorazor shrink 'my run; rm -rf'"),
        ("/site-packages/pytest/__main__.py", None),
        ("train.py", None),
    ],
)
def test_a_run_knows_the_command_line_that_started_it(out, monkeypatch, program, said):
    monkeypatch.setattr("sys.argv", [program, "shrink", "my run; rm -rf"])
    assert RunFolder.start(out, "shrink", {}, {}, resume=False).document["command_line"] == said


def refuse_constant(word: str) -> None:
    pytest.fail(f"{word} is no JSON")


def test_what_json_has_no_word_for_is_null(out):
    run = start(out)
    numbers = {"bound": float("inf"), "below": [-float("inf"), {"loss": float("nan")}], "fine": (1.5, True, out)}
    run.write_json("one.json", numbers)
    run.append("rows.jsonl", [numbers])
    for text in ((out / "one.json").read_text(), (out / "rows.jsonl").read_text()):
        seen = json.loads(text, parse_constant=refuse_constant)
        assert seen == {"bound": None, "below": [None, {"loss": None}], "fine": [1.5, True, str(out)]}
