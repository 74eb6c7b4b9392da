"""Command-line options made from settings dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Container, Iterator
from typing import Annotated, Any

import typer
import typer.core

from lorazor.fields import MORE


def options(**groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per field of the named settings classes, fields of nested settings included.

    The command declares a keyword parameter for each group and receives an instance of it:

        @options(settings=ShrinkSettings)
        def command(adapter: str, *, settings: ShrinkSettings): ...

    Each field is annotated with its type, its help text and, where few people need it, MORE:
    `Annotated[int, "Optimizer steps.", MORE]`. Fields of a group inside are all MORE, but for those that its annotation
    names: `Annotated[ModelSettings, "model"]`.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name not in groups
        ]
        flat = [parameter for settings in groups.values() for parameter in _option_parameters(settings)]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*own, *flat]]

        @functools.wraps(command)
        def call(**values: Any) -> Any:
            for name, settings in groups.items():
                values[name] = _filled(settings, values)
            return command(**values)

        call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def as_options(*groups: Any) -> list[str]:
    """The words of a command line that give these settings, less those that have their default."""
    words: list[str] = []
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if dataclasses.is_dataclass(value):
                words += as_options(value)
            elif value != field.default:
                name = field.name.replace("_", "-")
                words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


class Command(typer.core.TyperCommand):
    """A command whose help names what a person must decide first, and the rest under "more options"."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in two lists."""
        first, more = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                (more if getattr(parameter, "rich_help_panel", None) == MORE else first).append(record)
        for title, records in (("Options", first), ("More options", more)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _filled(settings: type, values: dict[str, Any]) -> Any:
    """An instance of a settings class, with the values of its fields taken out of `values`."""
    hints = typing.get_type_hints(settings)
    return settings(
        **{
            field.name: _filled(hints[field.name], values)
            if dataclasses.is_dataclass(hints[field.name])
            else values.pop(field.name)
            for field in dataclasses.fields(settings)
        }
    )


def _option_parameters(settings: type, first: Container[str] | None = None) -> Iterator[inspect.Parameter]:
    """The options of a settings class; of a group, only those named in `first` are on the first screen of the help."""
    hints = typing.get_type_hints(settings, include_extras=True)
    for field in dataclasses.fields(settings):
        kind, *marks = typing.get_args(hints[field.name]) or (hints[field.name],)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _option_parameters(kind, first=marks)
            continue
        text, *marks = marks
        is_more = MORE in marks or (first is not None and field.name not in first)
        option = typer.Option(
            help=text, show_default=field.default is not None, rich_help_panel=MORE if is_more else None
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[kind, option],
        )
