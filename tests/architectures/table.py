"""The table of docs/architectures.md: written from results, and read back to be compared with results.

    make architectures                               # every family anew, then the page
    python -m tests.architectures.table FAMILY ...   # shows what comes of a few families, and writes nothing

`make architectures` appends each result to build/architectures.jsonl and goes on there after an interruption; the
file is removed when the page is written.
"""

from __future__ import annotations

import gc
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers

from tests.architectures.results import COLUMNS, Result, try_family
from tests.architectures.tiny_configs import FAMILIES, TASKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
UNFINISHED = PAGE.parents[1] / "build" / "architectures.jsonl"
TITLES = {
    "causal": "Causal language models",
    "seq2seq": "Sequence to sequence",
    "classification": "Sequence classification",
    "image-text": "Models that look at images and read text, on text",
    "experts": "Mixtures of experts, with LoRA on the experts",
}
VERSIONS = f"transformers {transformers.__version__}, PEFT {peft.__version__}, torch {torch.__version__.split('+')[0]}"
INTRODUCTION = """# Architectures

Written by `make architectures`, checked by `make test-slow`: {versions}.

A tiny random model of every family that transformers lists for a task, with LoRA of rank 2 on every linear map:

* **sites**: the sites that lorazor finds, live and in the folder, are those whose tensors PEFT wrote.
* **sweep**: the losses of all boundaries of all stacks equal those of B set to 0 beyond the boundary. The cell names
  the engine that was chosen.
* **directions**: gates on singular directions equal columns of B set to 0, and the credits of directions, for every
  row, equal gradients by hand of that row alone.
* **prune**: half of the sites and some directions are dropped; stock PEFT, on a fresh base model, computes the same.
* **reload**: what `lorazor` loads from disk computes the same as the live model, and so does the meter from texts.

Of mixtures of experts, the last table has LoRA on the experts, which PEFT adds to their parameters, of attention, and
of routers where PEFT's "all-linear" has them.

All within 0.0001 nats and the rounding of float32. *refused*: by lorazor, on purpose. *PEFT*: stock PEFT cannot do it,
so there is nothing to compare with. Small numbers lead to the reasons below.
"""


def render(results: Iterable[Result]) -> str:
    """The page."""
    results = list(results)
    reasons: dict[str, int] = {}
    tables = [_table(title, [one for one in results if one.task == task], reasons) for task, title in TITLES.items()]
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    parts = [INTRODUCTION.format(versions=VERSIONS), _summary(results), *tables, "## Reasons\n", "\n".join(notes)]
    return "\n".join(parts) + "\n"


def read_page() -> dict[tuple[str, str], tuple[dict[str, str], list[str]]]:
    """The cells of every column and the remarks of every task and family, from the page, reasons spelled out."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", text, flags=re.MULTILINE))
    rows = {}
    for task, title in TITLES.items():
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        for family, *cells in re.findall(r"^\| `(.*?)`" + r"(.*?) \|" + r" (.*?) \|" * 5 + "$", section, re.MULTILINE):
            spelled = [_spelled(cell, reasons) for cell in cells]
            remark = [spelled[0].removeprefix(": ")] if spelled[0] else []
            rows[task, family] = dict(zip(COLUMNS, spelled[1:], strict=True)), remark
    return rows


def _spelled(cell: str, reasons: dict[str, str]) -> str:
    return re.sub(r" ?<sup>(\d+)</sup>", lambda match: f": {reasons[match[1]]}", cell)


def _table(title: str, results: list[Result], reasons: dict[str, int]) -> str:
    lines = [f"## {title}\n", f"| family | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for result in results:
        cells = [_with_number(*result.cells[column].partition(": ")[::2], reasons) for column in COLUMNS]
        name = _with_number(f"`{result.family}`", "; ".join(result.remarks), reasons)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_number(text: str, reason: str, reasons: dict[str, int]) -> str:
    return f"{text} <sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>" if reason else text


def _summary(results: list[Result]) -> str:
    head = ["task", "families", "not built", *COLUMNS]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task in TASKS:
        of_task = [one for one in results if one.task == task]
        built = [one for one in of_task if not one.cells["sites"].startswith("not built")]
        right = [sum(": " not in one.cells[column] for one in built) for column in COLUMNS]
        lines.append(f"| {' | '.join(map(str, (task, len(of_task), len(of_task) - len(built), *right)))} |")
    return "\n".join(lines) + "\n\nThe last five columns count the families where lorazor is right.\n"


def measure(families: Iterable[tuple[str, str]]) -> Iterator[Result]:
    """Put families through all checks, one after another."""
    for task, family in families:
        with tempfile.TemporaryDirectory() as folder:
            yield try_family(task, family, Path(folder))
        gc.collect()


def write_page() -> None:
    """Measure every family, or those that an interrupted run left, and write the page."""
    UNFINISHED.parent.mkdir(exist_ok=True)
    lines = UNFINISHED.read_text(encoding="utf-8").splitlines() if UNFINISHED.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    done = {(one.task, one.family) for one in results}
    for result in measure(one for one in FAMILIES if one not in done):
        print(len(results), result.task, result.family, *result.failures, flush=True)
        results.append(result)
        with UNFINISHED.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
    order = {one: place for place, one in enumerate(FAMILIES)}
    PAGE.write_text(render(sorted(results, key=lambda one: order[one.task, one.family])), encoding="utf-8")
    UNFINISHED.unlink()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = set(sys.argv[1:])
    for one in measure(one for one in FAMILIES if one[1] in wanted or "/".join(one) in wanted):
        print(json.dumps(asdict(one), indent=2))
    if not wanted:
        write_page()
