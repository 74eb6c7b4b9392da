"""What was learned or chosen on holds out nothing: no set shares a prompt with another, whatever the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorazor.data.examples import read_examples
from lorazor.errors import SettingsError
from lorazor.settings import ShrinkSettings
from lorazor.workflow.reading import check_held_out
from lorazor.workflow.shrink import shrink

SO = {"role": "assistant", "content": "so"}


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


@pytest.mark.parametrize("heal", ["data", "confirm"])
def test_healing_on_what_chooses_or_judges_is_refused(tiny, out, monkeypatch, heal):
    """Whatever the answers: the prompts are what counts."""
    monkeypatch.setattr("lorazor.workflow.opening.load", lambda *_: pytest.fail("the model was loaded"))
    numbers = {"data": range(6), "confirm": range(10, 16)}[heal]
    train = write(out.parent / "train.jsonl", [{"prompt": f"after {n} comes:", "completion": " no"} for n in numbers])
    with pytest.raises(SettingsError, match=f"6 of the 6 examples of --heal .* in --{heal}|--{heal} .* in --heal"):
        shrink(
            tiny.adapter, str(tiny.validation), out=out, confirm=str(tiny.held_out), settings=ShrinkSettings(heal=train)
        )
    assert not out.exists()


def test_confirming_on_what_chooses_is_refused(tiny, out):
    with pytest.raises(SettingsError, match="6 of the 6 examples of --confirm .* in --data"):
        shrink(tiny.adapter, str(tiny.validation), out=out, confirm=str(tiny.validation))
    assert not out.exists()
