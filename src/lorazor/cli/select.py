"""`lorazor select`: choose the sites to train, and print them for the trainer that will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorazor.cli.options import as_options, options
from lorazor.cli.output import JsonFlag, free_place, print_json, print_next, quiet_libraries, say
from lorazor.settings import (
    BudgetSettings,
    DataSettings,
    LoraSettings,
    MethodSettings,
    ModelSettings,
    TrackingSettings,
    TrainSettings,
    WarmupSettings,
)

if TYPE_CHECKING:
    from lorazor.selection import Selection
    from lorazor.train.recipes import Style

Format = Literal["all", "peft", "axolotl", "llama-factory", "unsloth"]
_TITLES: dict[Style, str] = {
    "peft": "PEFT",
    "axolotl": "Axolotl",
    "llama-factory": "LLaMA-Factory",
    "unsloth": "Unsloth",
}


@options(
    budget=BudgetSettings,
    warmup=WarmupSettings,
    lora=LoraSettings,
    training=TrainSettings,
    model=ModelSettings,
    reading=DataSettings,
    tracking=TrackingSettings,
)
def command(
    data: Annotated[str, typer.Option(help="Examples to train on: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder, for selection.json and scores.jsonl.")],
    format: Annotated[Format, typer.Option(help="The trainer to print the choice for.")] = "all",
    grow: Annotated[
        bool, typer.Option("--grow", help="Raise the rank of the chosen sites by what the others free.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    budget: BudgetSettings,
    warmup: WarmupSettings,
    lora: LoraSettings,
    training: TrainSettings,
    model: ModelSettings,
    reading: DataSettings,
    tracking: TrackingSettings,
) -> None:
    """Choose the sites to train, in the first steps of a training, and print them as settings for a trainer."""
    from lorazor.measure.sharding import is_main_process
    from lorazor.workflow.train import TrainingSettings, select_sites

    quiet_libraries()
    method = MethodSettings("weightlora+" if grow else "weightlora")
    settings = TrainingSettings(model, reading, lora, training, method, budget, warmup, tracking)
    selection = select_sites(data, out, settings, resume, say)
    if not is_main_process():
        return
    if as_json:
        print_json({"out": out, "kept": selection.kept, "n_sites": len(selection.sites)})
        return
    for text in texts(selection, format, lora):
        typer.echo(text)
    say(f"Scores of all sites: {out / 'scores.jsonl'}")
    words = ["train", "--selection", out / "selection.json", "--data", data, "--out", free_place(out, "adapter")]
    given = as_options(lora, training, model, reading, tracking)
    print_next("These sites, trained here", *words, *given, err=True)


def texts(selection: Selection, format: Format, lora: LoraSettings) -> list[str]:
    """The choice as settings, for one trainer or for all; of all, one that cannot be told says why."""
    from lorazor.errors import LorazorError
    from lorazor.train.recipes import recipe

    alpha = lora.alpha * selection.kept[0].rank / lora.rank
    if format != "all":
        return [recipe(selection, format, alpha, lora.dropout)]
    parts = []
    for style, title in _TITLES.items():
        try:
            text = recipe(selection, style, alpha, lora.dropout)
        except LorazorError as error:
            text = f"# {error}\n"
        parts.append(f"# {title}\n{text}")
    return parts
