"""Whatever is wrong with what a user passes, a public function says so in one line, as a LorazorError."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorazor
from tests.tiny_folders import TinyFolders

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = Path(lorazor.__file__).parent


def refuses(call: Callable[[], Any]) -> str:
    """The message of a LorazorError, on one line; anything else, or nothing, fails."""
    with pytest.raises(lorazor.LorazorError) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# Every verb, on an adapter, data and a place for its output

MODEL = {"fit": lorazor.FitSettings(steps=4, rise_steps=0)}


def training(tiny: TinyFolders, **more: Any) -> lorazor.TrainSettings:
    return lorazor.TrainSettings(**{"model": lorazor.ModelSettings(str(tiny.base)), **MODEL, **more})


def selecting(tiny: TinyFolders, **more: Any) -> lorazor.SelectSettings:
    budget = lorazor.BudgetSettings(keep=3)
    return lorazor.SelectSettings(**{"model": lorazor.ModelSettings(str(tiny.base)), "budget": budget, **MODEL, **more})


ON_DATA: dict[str, Callable[..., Any]] = {
    "shrink": lambda tiny, adapter, data, out: lorazor.shrink(adapter, data, out=out),
    "find_boundary": lambda tiny, adapter, data, out: lorazor.find_boundary(adapter, data, out=out),
    "measure_curves": lambda tiny, adapter, data, out: lorazor.measure_curves(adapter, data, out=out),
    "evaluate": lambda tiny, adapter, data, out: lorazor.evaluate([adapter], data, out=out),
}
TRAINING: dict[str, Callable[..., Any]] = {
    "train_adapter": lambda tiny, adapter, data, out: lorazor.train_adapter(data, out=out, settings=training(tiny)),
    "select_sites": lambda tiny, adapter, data, out: lorazor.select_sites(data, out=out, settings=selecting(tiny)),
}
ON_ADAPTERS: dict[str, Callable[..., Any]] = {
    **ON_DATA,
    "inspect": lambda tiny, adapter, data, out: lorazor.inspect(adapter),
    "export": lambda tiny, adapter, data, out: lorazor.export(adapter, "vllm", out=out),
    "plan_fleet": lambda tiny, adapter, data, out: lorazor.plan_fleet([adapter], "vllm", out=out),
    "prune": lambda tiny, adapter, data, out: lorazor.prune(adapter, out=out, settings=lorazor.PruneSettings(2)),
    "load": lambda tiny, adapter, data, out: lorazor.load(adapter),
}
WRITING: dict[str, Callable[..., Any]] = {
    **ON_DATA,
    **TRAINING,
    **{name: ON_ADAPTERS[name] for name in ("prune", "export", "plan_fleet")},
}


def configured(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


BROKEN_ADAPTERS: dict[str, Callable[[Path], Any]] = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut off": cut_weights,
    "weights of another kind": lambda folder: (folder / WEIGHTS).write_bytes(b"junk"),
    "config that is no JSON": lambda folder: (folder / CONFIG).write_text("{"),
    "config that is a list": lambda folder: (folder / CONFIG).write_text("[1]"),
    "config that is no text": lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"),
    "DoRA": configured(use_dora=True),
    "IA3": configured(peft_type="IA3"),
    "rank in words": configured(r="four"),
    "no rank": configured(r=0),
    "no alpha": configured(lora_alpha=None),
    "ranks in a list": configured(rank_pattern=[1]),
}
BASE_GONE: dict[str, Callable[[Path], Any]] = {
    "folder": configured(base_model_name_or_path="/nowhere/at/all"),
    "number": configured(base_model_name_or_path=7),
    "none": configured(base_model_name_or_path=None),
}


@pytest.mark.parametrize("broken", BROKEN_ADAPTERS)
@pytest.mark.parametrize("verb", ON_ADAPTERS)
def test_an_adapter_that_is_none(tiny, tmp_path, verb, broken):
    adapter, out = shutil.copytree(tiny.adapter, tmp_path / "adapter"), tmp_path / "out"
    BROKEN_ADAPTERS[broken](adapter)
    refuses(lambda: ON_ADAPTERS[verb](tiny, adapter, str(tiny.validation), out))
    assert not out.exists()


@pytest.mark.parametrize("gone", BASE_GONE)
@pytest.mark.parametrize("verb", [*ON_DATA, "load", "export"])
def test_an_adapter_whose_base_model_is_gone(tiny, tmp_path, verb, gone):
    adapter, out = shutil.copytree(tiny.adapter, tmp_path / "adapter"), tmp_path / "out"
    BASE_GONE[gone](adapter)
    refuses(lambda: ON_ADAPTERS[verb](tiny, adapter, str(tiny.validation), out))
    assert not out.exists()


@pytest.mark.parametrize("verb", ON_ADAPTERS)
def test_a_file_and_nothing_are_no_adapter(tiny, out, verb):
    for adapter in (str(tiny.validation), ""):
        refuses(lambda adapter=adapter: ON_ADAPTERS[verb](tiny, adapter, str(tiny.validation), out))


def test_weights_that_are_not_numbers(tiny, tmp_path):
    adapter = shutil.copytree(tiny.adapter, tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    refuses(lambda: lorazor.evaluate([adapter], str(tiny.validation), out=tmp_path / "out"))


ROWS: dict[str, bytes] = {
    "empty.jsonl": b"",
    "cut.jsonl": b'{"prompt": "a", "completion": "b"}\n{"prompt": \n',
    "lists.jsonl": b"[1, 2]\n",
    "numbers.jsonl": b"1\n2\n",
    "no-text.jsonl": b"\x00\xff\xfe\x80" * 100,
    "other-columns.jsonl": b'{"a": 1, "b": 2}\n' * 3,
    "null.jsonl": b'{"prompt": null, "completion": null}\n' * 3,
    "no-answers.jsonl": b'{"prompt": "a", "completion": ""}\n' * 3,
    "no-messages.jsonl": b'{"messages": "hi"}\n' * 3,
    "label-below-0.jsonl": b'{"text": "a", "label": -1}\n' * 3,
    "label-nan.jsonl": b'{"text": "a", "label": NaN}\n' * 3,
    "short-row.csv": b"a,b\n1\n",
    "another.ending": b"a,b\n1\n",
    "no-array.json": b'{"a": 1}',
    "junk.parquet": b"nope",
}
PLACES = ("missing.jsonl", "nothing", "a folder")


@pytest.mark.parametrize("name", [*ROWS, *PLACES])
@pytest.mark.parametrize("verb", [*ON_DATA, *TRAINING, "read_examples"])
def test_data_that_cannot_be_used(tiny, tmp_path, verb, name):
    data, out = tmp_path / "data" / name, tmp_path / "out"
    data.parent.mkdir()
    if name in ROWS:
        data.write_bytes(ROWS[name])
    if name == "a folder":
        data.mkdir()
    source = "" if name == "nothing" else str(data)
    if verb == "read_examples":
        refuses(lambda: lorazor.read_examples(source))
    else:
        refuses(lambda: WRITING[verb](tiny, tiny.adapter, source, out))
    assert not out.exists()


@pytest.mark.parametrize("verb", WRITING)
def test_an_output_that_cannot_be_written(tiny, tmp_path, verb):
    (tmp_path / "taken").mkdir()
    for file in (tmp_path / "taken" / "mine.txt", tmp_path / "file"):
        file.write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "file", tmp_path / "file" / "below"):
        refuses(lambda out=out: WRITING[verb](tiny, tiny.adapter, str(tiny.validation), out))
    assert (tmp_path / "taken" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


# What is no verb


def test_selections_that_are_none(tiny, tmp_path):
    for name, text in {"bad": "{", "list": "[]", "empty": "{}"}.items():
        path = tmp_path / f"{name}.json"
        path.write_text(text)
        refuses(lambda path=path: lorazor.prune(tiny.adapter, path, out=tmp_path / "out"))
    for path in (tmp_path / "none.json", tmp_path):
        refuses(lambda path=path: lorazor.prune(tiny.adapter, path, out=tmp_path / "out"))
    both = lorazor.PruneSettings(boundary=2)
    refuses(lambda: lorazor.prune(tiny.adapter, tmp_path / "bad.json", out=tmp_path / "out", settings=both))


def test_runs_that_are_none(tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    for run in (tmp_path / "none", tmp_path / "file", tmp_path, tiny.adapter):
        refuses(lambda run=run: lorazor.report_runs([run], out=tmp_path / "page.html"))
    refuses(lambda: lorazor.report_runs([], out=tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_functions_on_a_model(tiny):
    sites = lorazor.load(tiny.adapter).sites
    few, many = torch.ones(3), torch.ones(4 * len(sites))
    for call in (
        lambda: lorazor.site_gates(sites, few),
        lambda: lorazor.gated(sites, few).__enter__(),
        lambda: lorazor.gated(sites, many * math.nan).__enter__(),
        lambda: lorazor.fold_(sites, few),
        lambda: lorazor.fold_(sites, many * math.inf),
        lambda: lorazor.find_sites(torch.nn.Linear(2, 2)),
        lambda: lorazor.select_boundary(sites, 9),
        lambda: lorazor.select_boundary(sites, math.nan),  # pyright: ignore[reportArgumentType]
        lambda: lorazor.select_boundary(sites, 1, "zz"),
        lambda: lorazor.load(None),
        lambda: lorazor.load(None, lorazor.ModelSettings("/nowhere/at/all")),
        lambda: lorazor.text_scores("magic", [["a", "b"]], [["a"], ["b"]]),
        lambda: lorazor.text_scores("loss", [["a", "b"]], [["a"], ["b"]]),
        lambda: lorazor.text_scores("rougeL", [["a"]], [["a"], ["b"]]),
        lambda: lorazor.text_scores("rougeL", [["a", "b"]], [["a"], []]),
    ):
        refuses(call)


def test_every_public_function_is_in_these_tables():
    functions = {name for name in lorazor.__all__ if inspect.isfunction(getattr(lorazor, name))}
    others = {"read_examples", "report_runs", "site_gates", "gated", "silenced", "fold_", "find_sites"}
    others |= {"select_boundary", "text_scores", "kept"}  # silenced takes sites alone, as `find_sites` gives them
    assert functions == {*ON_ADAPTERS, *WRITING, *others}


@pytest.mark.parametrize("verb", ["inspect", "prune", "export", "plan_fleet", "report_runs", *ON_DATA, *TRAINING])
def test_verbs_have_one_form(verb):
    """Inputs first; then keywords, of the same names and in the same order."""
    parameters = inspect.signature(getattr(lorazor, verb)).parameters.values()
    of_kind = {kind: [one.name for one in parameters if one.kind is kind] for kind in inspect._ParameterKind}
    keywords = of_kind[inspect.Parameter.KEYWORD_ONLY]
    order = ["out", "server", "fleet", "confirm", "heal", "tokenizer", "settings", "resume", "say"]
    assert keywords == [name for name in order if name in keywords]
    inputs = of_kind[inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert set(inputs) <= {"adapter", "adapters", "data", "selection", "runs", "server"}
    assert of_kind[inspect.Parameter.VAR_KEYWORD] == ["fields"]


@pytest.mark.parametrize("verb", ["prune", *ON_DATA, *TRAINING])
def test_fields_of_the_settings_are_keywords(tiny, out, verb):
    inputs = {"train_adapter": [], "select_sites": [], "evaluate": [[tiny.adapter]]}.get(verb, [tiny.adapter])
    inputs = [*inputs, *([] if verb == "prune" else [str(tiny.validation)])]
    assert "'magic' is no field of" in refuses(lambda: getattr(lorazor, verb)(*inputs, out=out, magic=1))
    known = {"prune": "boundary", "evaluate": "base", "measure_curves": "settled_within"}.get(verb, "model")
    assert refuses(lambda: getattr(lorazor, verb)(*inputs, out=out, **{known: "x"})).startswith(f"{known}=")


@pytest.mark.parametrize("verb", ["find_boundary", "measure_curves", "evaluate"])
def test_without_out_the_run_is_in_a_temporary_folder_that_the_result_names(tiny, tmp_path, monkeypatch, verb):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = getattr(lorazor, verb)(tiny.adapter, str(tiny.validation))
    assert result.out.parent == tmp_path
    assert (result.out / "run.json").exists()


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()
