"""Runs keep the examples that they compare adapters on, as text for people."""

from __future__ import annotations

import json

from lorazor.data.examples import Example
from lorazor.data.questions import Question
from lorazor.runs import RunFolder
from lorazor.workflow.reading import prompt_text, write_examples

CHAT = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"})


def test_prompts_are_plain_text():
    assert prompt_text(Example(0, "as it is", "yes", ("yes",))) == "as it is"
    assert prompt_text(Example(0, CHAT, "Hi", ("Hi",))) == "system: Be brief.\n\nuser: Hello"
    assert prompt_text(Question(0, "Who?", "Ada wrote it.", ("Ada",), (0,))) == "Ada wrote it.\n\nWho?"


def test_examples_are_written_whole_and_again_on_resume(tmp_path):
    run = RunFolder.start(tmp_path / "run", "eval", {}, {}, resume=False)
    examples = [Example(3, CHAT, "Hi", ("Hi", "Hey")), Example(4, "a text", "", (), label=1)]
    for _ in range(2):
        write_examples(run, examples)
    rows = [json.loads(line) for line in (tmp_path / "run" / "examples.jsonl").read_text().splitlines()]
    assert rows == [
        {"example": 3, "prompt": "system: Be brief.\n\nuser: Hello", "references": ["Hi", "Hey"], "label": None},
        {"example": 4, "prompt": "a text", "references": [], "label": 1},
    ]


def test_only_the_main_process_writes(tmp_path):
    run = RunFolder.start(tmp_path / "run", "eval", {}, {}, resume=False)
    run.is_writer = False
    write_examples(run, [Example(0, "p", "c", ("c",))])
    assert not (tmp_path / "run").exists()
