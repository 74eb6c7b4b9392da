"""`lorazor select`: choose the sites to train, and print them for the trainer that will."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorazor.cli.options import as_options, options
from lorazor.cli.output import JsonFlag, free_place, is_printed_as_json, print_next, quiet_libraries, say
from lorazor.settings import LoraSettings, SelectSettings, TrainSettings

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


@options(settings=SelectSettings)
def command(
    data: Annotated[str, typer.Option(help="Examples to train on: a file, a dataset folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="New run folder, for selection.json and scores.jsonl.")],
    format: Annotated[Format, typer.Option(help="The trainer to print the choice for.")] = "all",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    as_json: JsonFlag = False,
    *,
    settings: SelectSettings,
) -> None:
    """Choose the sites to train, in the first steps of a training, and print them as settings for a trainer."""
    from lorazor.workflow.train import select_sites

    quiet_libraries()
    selection = select_sites(data, out=out, settings=settings, resume=resume, say=say).selection
    if is_printed_as_json({"out": out, "kept": selection.kept, "n_sites": len(selection.sites)}, as_json):
        return
    for text in texts(selection, format, settings.lora):
        typer.echo(text)
    say(f"Scores of all sites: {out / 'scores.jsonl'}")
    words = ["train", "--selection", out / "selection.json", "--data", data, "--out", free_place(out, "adapter")]
    training = TrainSettings(
        batch_size=settings.batch_size,
        report_to=settings.report_to,
        lora=settings.lora,
        fit=settings.fit,
        model=settings.model,
        reading=settings.reading,
    )
    print_next("These sites, trained here", *words, *as_options(training), err=True)


def texts(selection: Selection, format: Format, lora: LoraSettings) -> list[str]:
    """The choice as settings, for one trainer or for all; of all, one that cannot be told says why."""
    from lorazor.errors import LorazorError
    from lorazor.train.recipes import recipe

    alpha = lora.alpha * max(site.kept_rank for site in selection.kept) / lora.rank
    if format != "all":
        try:
            return [recipe(selection, format, alpha, lora.dropout)]
        except LorazorError as error:
            raise type(error)(
                f"{error} The choice is made: the same command with --resume --format all prints it."
            ) from error
    parts = []
    for style, title in _TITLES.items():
        try:
            text = recipe(selection, style, alpha, lora.dropout)
        except LorazorError as error:
            text = f"# {error}\n"
        parts.append(f"# {title}\n{text}")
    return parts
