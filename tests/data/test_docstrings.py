"""Docstrings become examples of prose that are the same every time and never leak from one set into another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docstrings import docstring_examples, installed_roots, write_rows
from lorazor.data.examples import Example, read_examples
from lorazor.errors import DataError

SUMMARY = "Count how often every word of a text occurs in it."
REST = (
    "Words are what stands between two spaces, and upper case is the same as lower case.\n"
    "The result is a dictionary, with the most frequent word first."
)
EXPECTED = {"prompt": f"{REST.replace(chr(10), ' ')}\nSummary:", "completion": f" {SUMMARY}"}


def write_module(path: Path, *docstrings: str) -> Path:
    """A module that must not be imported, with a function for every docstring."""
    functions = [f"def function_{index}():\n    {docstring!r}\n" for index, docstring in enumerate(docstrings)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise SystemExit('imported')\n" + "\n".join(functions), encoding="utf-8")
    return path


def numbered(number: int) -> str:
    """Words for a number, so that texts differ from their first letters on."""
    return "".join("zyxwvutsrq"[int(digit)] * 3 for digit in f"{number:04d}")


def docstring(number: int) -> str:
    word = numbered(number)
    return f"Q{word} is the name of one of the functions here.\n\nIt is called {word} and {REST}"


def write_packages(root: Path, n_packages: int, n_modules: int = 2, n_functions: int = 2) -> Path:
    """Packages whose docstrings all differ."""
    number = 0
    for package in range(n_packages):
        for module in range(n_modules):
            numbers = range(number, number + n_functions)
            write_module(root / f"package_{package}" / f"module_{module}.py", *map(docstring, numbers))
            number += n_functions
    return root


def only_row(root: Path, *docstrings: str) -> list[dict[str, str]]:
    """What a single module gives."""
    write_module(root / "only.py", *docstrings)
    try:
        return docstring_examples(1, 0, 0, [root])[0]
    except DataError:
        return []


# What an example is


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"{SUMMARY}\n\n{REST}", id="summary line"),
        pytest.param(f"{SUMMARY} {REST}", id="same paragraph"),
        pytest.param(f"Count how often every word\n    of a text occurs in it.\n\n    {REST}\n", id="indented"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\nArgs:\n    text: any text.\n\nMore words.", id="google sections"),
        pytest.param(f"{SUMMARY}\n\n{REST}\nReturns:\n    the words.", id="section without an empty line"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\nParameters\n----------\ntext : str\n", id="numpy sections"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\n:param text: any text.\n", id="fields"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\n>>> count('a a')\n{{'a': 2}}\n", id="doctest"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\n- one item\n- and another\n", id="list"),
        pytest.param(f"{SUMMARY}\n\n{REST}\n\n.. note:: of interest.\n", id="directive"),
    ],
)
def test_the_first_sentence_is_the_answer_and_the_rest_of_the_prose_the_prompt(text: str, tmp_path: Path) -> None:
    assert only_row(tmp_path, text) == [EXPECTED]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(f"Count words.\n\n{REST}", id="summary too short"),
        pytest.param(f"Count {'many and many more ' * 6}words.\n\n{REST}", id="summary too long"),
        pytest.param(f"{SUMMARY}\n\nThe rest is too short to sum up.", id="rest too short"),
        pytest.param(SUMMARY, id="no rest"),
        pytest.param(f"Count how often every word of a text occurs\n\n{REST}", id="no sentence"),
        pytest.param(f"Return f(x) = {{word: n}} for every word x of text.\n\n{REST}", id="code in the summary"),
        pytest.param(f"{SUMMARY}\n\n{'x_1 = [2, 3]; ' * 20}", id="code in the rest"),
        pytest.param(f"{SUMMARY}\n\nArgs:\n    text: {REST}", id="nothing but a table"),
        pytest.param(f"{SUMMARY}\n\n>>> count('a')\n{REST}", id="nothing but a doctest"),
        pytest.param(f"Zähle, wie oft jedes Wort in einem Text vorkommt.\n\n{REST}", id="not ascii"),
    ],
)
def test_what_is_not_prose_is_left_out(text: str, tmp_path: Path) -> None:
    assert only_row(tmp_path, text) == []


def test_abbreviations_do_not_end_the_first_sentence(tmp_path: Path) -> None:
    for abbreviation in ("e.g.", "i.e.", "vs.", "etc."):
        summary = f"Count the words of a text that is long enough, {abbreviation} Of this one."
        (row,) = only_row(tmp_path, f"{summary} {REST}")
        assert row["completion"] == f" {summary}"


@pytest.mark.parametrize("most", [100, 113, 600])
def test_prompts_are_cut_between_words(most: int, tmp_path: Path) -> None:
    words = [f"w{numbered(number)}" for number in range(60)]
    write_module(tmp_path / "long.py", f"{SUMMARY}\n\n{' '.join(words)}")
    ((row,), _, _) = docstring_examples(1, 0, 0, [tmp_path], most_prompt_characters=most)
    prompt = row["prompt"].removesuffix("\nSummary:")
    n_words = len(prompt.split())
    assert prompt == " ".join(words[:n_words]) and len(prompt) <= most < len(" ".join(words[: n_words + 1]))


def test_modules_and_classes_have_docstrings_too(tmp_path: Path) -> None:
    for name, before in (("module", ""), ("kind", "class Kind:\n    "), ("waiting", "async def wait():\n    ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text(f"{before}{f'{SUMMARY} {REST}'!r}\n", encoding="utf-8")
        assert docstring_examples(1, 0, 0, [tmp_path / name])[0] == [EXPECTED]


def test_files_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "template.py").write_text("{{ not python }}\n", encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b"\0")
    (tmp_path / "latin.py").write_bytes("# no coding line: é\n".encode("latin-1"))
    (tmp_path / "escapes.py").write_text(f'"\\d"\ndef f():\n    """{SUMMARY}\n\n    {REST}"""\n', encoding="utf-8")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert docstring_examples(1, 0, 0, [tmp_path, tmp_path / "missing"])[0] == [EXPECTED]


@pytest.mark.parametrize("folder", ["tests", "site-packages", "package/test", "package/__pycache__", "not-a-package"])
def test_tests_and_what_is_no_package_are_not_read(folder: str, tmp_path: Path) -> None:
    write_module(tmp_path / folder / "file.py", f"{SUMMARY} {REST}")
    with pytest.raises(DataError):
        docstring_examples(1, 0, 0, [tmp_path])


# The three sets


def packages_of(root: Path, rows: list[dict[str, str]]) -> set[str]:
    """The packages that rows come from, found by searching all files."""
    texts = {path: path.read_text(encoding="utf-8") for path in root.rglob("*.py")}
    found = set()
    for row in rows:
        (path,) = [path for path, text in texts.items() if f"'{row['completion'].strip()}" in text]
        found.add(path.relative_to(root).parts[0])
    return found


def test_every_package_is_in_one_set_only(tmp_path: Path) -> None:
    root = write_packages(tmp_path, n_packages=20)
    sets = docstring_examples(24, 8, 8, [root])
    assert [len(rows) for rows in sets] == [24, 8, 8]
    assert len({row["completion"] for rows in sets for row in rows}) == 40
    train, validation, held_out = (packages_of(root, rows) for rows in sets)
    assert len(train) >= 6 and len(validation) >= 2 and len(held_out) >= 2
    assert not train & validation and not train & held_out and not validation & held_out


def test_the_same_packages_give_the_same_sets_wherever_they_lie(tmp_path: Path) -> None:
    here, there = write_packages(tmp_path / "here", 8), tmp_path / "there"
    for path in sorted(here.rglob("*.py"), reverse=True):
        write_module(there / path.relative_to(here)).write_bytes(path.read_bytes())
    first = docstring_examples(8, 4, 4, [here])
    assert docstring_examples(8, 4, 4, [there]) == first
    script = "import json, pathlib, docstrings as d; "
    script += f"print(json.dumps(d.docstring_examples(8, 4, 4, [pathlib.Path({str(here)!r})])))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert json.loads(result.stdout) == list(first)


@pytest.mark.parametrize(
    ("summary", "rest"),
    [
        pytest.param(SUMMARY, f"It differs. {REST}", id="same answer"),
        pytest.param("It does something altogether different.", REST, id="same prompt"),
        pytest.param(SUMMARY.upper().replace("IT.", "something."), f"It differs. {REST}", id="answer begins alike"),
        pytest.param("It does something altogether different.", f"{REST} And more.", id="prompt begins alike"),
    ],
)
def test_texts_that_begin_alike_are_used_once(summary: str, rest: str, tmp_path: Path) -> None:
    write_module(tmp_path / "first.py", f"{SUMMARY}\n\n{REST}")
    write_module(tmp_path / "vendor" / "second.py", f"{summary}\n\n{rest}")
    assert len(docstring_examples(1, 0, 0, [tmp_path / "vendor"])[0]) == 1  # it would do on its own
    with pytest.raises(DataError, match=r"gave 1 \+ 0 \+ 0 "):
        docstring_examples(1, 1, 0, [tmp_path])


def test_no_package_makes_up_a_set(tmp_path: Path) -> None:
    write_packages(tmp_path, n_packages=1, n_modules=30, n_functions=5)
    with pytest.raises(DataError, match=r"gave 8 \+ 0 \+ 0 docstrings.* 20 \+ 0 \+ 0 are wanted.*Pass data"):
        docstring_examples(20, 0, 0, [tmp_path])


def test_it_stops_reading_when_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packages(tmp_path, n_packages=30)
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    docstring_examples(4, 2, 2, [tmp_path])
    assert len(read) == 4  # two examples of each


def test_rows_are_written_as_lorazor_reads_them(tmp_path: Path) -> None:
    rows = docstring_examples(3, 0, 0, [write_packages(tmp_path / "packages", 3)])[0]
    write_rows(tmp_path / "rows.jsonl", rows)
    expected = [
        Example(index, row["prompt"], row["completion"], (row["completion"],)) for index, row in enumerate(rows)
    ]
    assert read_examples(tmp_path / "rows.jsonl") == expected


def test_this_python_has_packages() -> None:
    roots = installed_roots()
    assert (roots[0] / "json" / "__init__.py").exists()
    assert any((root / "pytest").is_dir() for root in roots)
