"""The `lorazor` command: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer
from typer.main import get_command

import lorazor
from lorazor.cli import bench, boundary, curves, evaluate, export, fleet, inspect, prune, report, select, shrink, train
from lorazor.cli.options import Command
from lorazor.cli.output import quiet_bitsandbytes
from lorazor.errors import LorazorError

app = typer.Typer(
    name="lorazor",
    help="Make LoRA adapters as small as they can be at no loss that matters, and show that it is so.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_COMMANDS = {
    "shrink": (shrink.command, "Make an adapter as small as it can be, and judge it."),
    "inspect": (inspect.command, "What is in an adapter, and what servers make of it."),
    "export": (export.command, "The form of an adapter that a server computes right."),
    "fleet": (fleet.command, "Many adapters on one server: flags, and what would save more."),
    "train": (train.command, "Train an adapter, on all sites or on those that matter."),
    "select": (select.command, "Choose the sites to train, for any trainer."),
    "boundary": (boundary.command, "Find the layers that need LoRA, and prune the others."),
    "curves": (curves.command, "What each layer knows of the answer, with and without LoRA."),
    "prune": (prune.command, "Apply a selection or a boundary to an adapter."),
    "eval": (evaluate.command, "Compare adapters on the same examples."),
    "bench": (bench.command, "A suite of trainings: tasks, methods, budgets, seeds."),
    "report": (report.command, "One page of what came of runs."),
}
for name, (command, short_help) in _COMMANDS.items():
    app.command(name, cls=Command, short_help=short_help)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorazor {lorazor.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line: exit 0 on success, 1 on an error, 2 on wrong usage, 130 on Ctrl-C."""
    quiet_bitsandbytes()
    try:
        app()
    except LorazorError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code == 130:  # typer's answer to Ctrl-C
            print(_advice(sys.argv[1:]), file=sys.stderr)
        raise


def _advice(arguments: list[str]) -> str:
    """What to type after Ctrl-C."""
    if arguments[:1] == ["bench"]:
        return "Interrupted. The same command goes on; cells that have finished are kept."
    command = getattr(get_command(app), "commands", {}).get(next(iter(arguments), ""))
    if command is None or not any("--resume" in option.opts for option in command.params):
        return "Interrupted. Nothing is kept half done; the same command starts anew."
    resume = [] if "--resume" in arguments else ["--resume"]
    return f"Interrupted. To go on where it stopped: {shlex.join(['lorazor', *arguments, *resume])}"
