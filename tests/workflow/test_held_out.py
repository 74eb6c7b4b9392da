"""What was learned or chosen on holds out nothing: no set shares a prompt with another, whatever the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorazor.data.examples import read_examples
from lorazor.errors import SettingsError
from lorazor.settings import RefitSettings, ScoreSettings, SubsetBudgetSettings
from lorazor.workflow.prune import Choice, prune_adapter
from lorazor.workflow.reading import check_held_out
from lorazor.workflow.score import score_adapter
from lorazor.workflow.subset import find_subset
from lorazor.workflow.variants import SubsetSettings
from tests.tiny_folders import write_rows

BY_NORM = ScoreSettings(method="norm")
SO = {"role": "assistant", "content": "so"}
KEEP = SubsetBudgetSettings(keep=3)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(*prompts: str, answer: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f" {answer} {index}"} for index, prompt in enumerate(prompts)]


def chat(*texts: str, role: str = "user") -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": text}, SO]} for text in texts]


def labelled(*texts: str, label: int = 0) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text in texts]


def check(tmp_path: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    sources = {"--confirm": write(tmp_path / "a.jsonl", first), "--data": write(tmp_path / "b.jsonl", second)}
    check_held_out({option: (source, read_examples(source)) for option, source in sources.items()})


TWENTY = [f"question {n}?" for n in range(20)]


@pytest.mark.parametrize(
    ("first", "second", "n_shared", "prompt"),
    [
        (pairs(*TWENTY, answer="no"), pairs(*TWENTY), 20, "question 0?"),
        (pairs("new", "a", "a", "other"), pairs("a", "b"), 2, "a"),  # two answers to a prompt are two rows to take out
        (pairs("new", " a\n b "), pairs("a b"), 1, " a\\n b "),
        (labelled("fine", "good", label=1), labelled("good"), 1, "good"),
        (chat("who?", "why?"), chat("why?"), 1, "user: why?"),
        ([{"messages": [{"content": "why?", "role": "user"}, SO]}], chat("why?"), 1, "user: why?"),
        (chat("why?"), pairs("why?"), 1, "user: why?"),  # a chat of one question is that question
        (pairs("", "a"), pairs(""), 1, "''"),  # without a prompt, the answer is the example
    ],
)  # fmt: skip
def test_shared_prompts_are_refused_with_their_number_and_the_first(tmp_path, first, second, n_shared, prompt):
    with pytest.raises(SettingsError) as caught:
        check(tmp_path, first, second)
    message = str(caught.value)
    assert f"{n_shared} of the {len(first)} examples of --confirm" in message and "--data" in message
    assert prompt in message and "Take" in message and "\n" not in message


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pairs("a", "a", "b"), pairs("c", "c")),  # several rows of a prompt within one set
        (labelled("a"), labelled("b")),
        (chat("why?"), chat("why?", role="system")),
        (chat("why?"), pairs("user: why?")),
        ([{"prompt": "", "completion": "one"}], [{"prompt": "", "completion": "two"}]),
    ],
)
def test_sets_without_a_common_prompt_pass(tmp_path, first, second):
    check(tmp_path, first, second)


def test_a_refit_on_the_examples_that_choose_is_refused(tiny, out, monkeypatch):
    monkeypatch.setattr("lorazor.workflow.subset.load", lambda *_: pytest.fail("the model was loaded"))
    settings = SubsetSettings(KEEP, BY_NORM, refitting=RefitSettings(refit=str(tiny.validation)))
    with pytest.raises(SettingsError, match="6 of the 6 examples of --refit .* in --data"):
        find_subset(tiny.adapter, str(tiny.validation), out, settings=settings)
    settings = SubsetSettings(KEEP, BY_NORM, refitting=RefitSettings(refit=str(tiny.held_out)))
    with pytest.raises(SettingsError, match="6 of the 6 examples of --confirm .* in --refit"):
        find_subset(tiny.adapter, str(tiny.validation), out, str(tiny.held_out), settings)
    assert not out.exists()


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """A run that scored on the validation examples, and one that chose on them and confirmed on the held-out ones."""
    root = tmp_path_factory.mktemp("runs")
    score_adapter(tiny.adapter, str(tiny.validation), root / "scores", BY_NORM)
    find_subset(tiny.adapter, str(tiny.validation), root / "run", str(tiny.held_out), SubsetSettings(KEEP, BY_NORM))
    return root


def choice_of(runs: Path, kind: str) -> Choice:
    if kind == "scores":
        return Choice(scores=runs / "scores", budget=KEEP)
    return Choice(selection=runs / "run" / "selection.json")


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("scores", "val.jsonl", "6 of the 6 examples of --refit .* --data of the choice"),
        ("selection", "val.jsonl", "6 of the 6 .* --data of the choice"),
        ("selection", "test.jsonl", "6 of the 6 .* --confirm of the choice"),
        ("scores", "one.jsonl", "1 of the 2 .* --data of the choice .*after 5 comes:"),
        ("selection", "one.jsonl", "1 of the 2 .* --data of the choice"),
    ],
)
def test_prune_refits_on_no_example_of_the_choice(tiny, runs, out, monkeypatch, kind, source, message):
    monkeypatch.setattr("lorazor.workflow.prune.load", lambda *_: pytest.fail("the model was loaded"))
    if source == "one.jsonl":
        refit = write(out.parent / source, pairs("after 5 comes:", "new"))
    else:
        refit = str(tiny.validation.with_name(source))
    with pytest.raises(SettingsError, match=message):
        prune_adapter(tiny.adapter, out, choice_of(runs, kind), RefitSettings(refit=refit))
    assert not out.exists()


@pytest.mark.parametrize("kind", ["scores", "selection"])
def test_prune_refits_on_other_examples(tiny, runs, out, kind):
    refit = RefitSettings(refit=str(write_rows(out.parent / "train.jsonl", range(20, 26))), refit_steps=1)
    messages: list[str] = []
    prune_adapter(tiny.adapter, out, choice_of(runs, kind), refit, say=messages.append)
    assert (out / "adapter_model.safetensors").exists() and not any("could not" in one for one in messages)


def test_a_selection_by_itself_knows_the_files_it_was_chosen_on(tiny, runs, out):
    """Without its run there are hashes only: the file is refused, and that its prompts were not compared is said."""
    alone = out.parent / "selection.json"
    alone.write_bytes((runs / "run" / "selection.json").read_bytes())
    for source in (tiny.validation, tiny.held_out):
        with pytest.raises(SettingsError, match="of the choice"):
            prune_adapter(tiny.adapter, out, Choice(selection=alone), RefitSettings(refit=str(source)))
    train, messages = write_rows(out.parent / "train.jsonl", range(20, 26)), []
    refit = RefitSettings(refit=str(train), refit_steps=1)
    prune_adapter(tiny.adapter, out, Choice(selection=alone), refit, say=messages.append)
    assert sum("could not be compared" in one for one in messages) == 2


def test_training_examples_may_be_learned_on_again(tiny, out, tmp_path):
    """What a training chose on is what it trained on, and a refit is more of that."""
    chosen = find_selection_of_training(tiny, tmp_path)
    refit = RefitSettings(refit=str(tiny.validation), refit_steps=1)
    prune_adapter(tiny.adapter, out, Choice(selection=chosen), refit)
    assert (out / "adapter_model.safetensors").exists()


def find_selection_of_training(tiny, tmp_path: Path) -> Path:
    from lorazor.adapter.folder import read_adapter
    from lorazor.adapter.prune import select_boundary
    from lorazor.files import sha256_of_file
    from lorazor.selection import Selection

    sites = select_boundary(read_adapter(tiny.adapter).sites, 2).sites
    provenance = {"hashes": {"data": sha256_of_file(tiny.validation)}}
    Selection(sites, "weightlora", {}, provenance).save(tmp_path / "chosen.json")
    return tmp_path / "chosen.json"
