"""Command-line options made from settings dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer


def options(**groups: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command one option per field of the named settings classes.

    The command declares a keyword parameter for each group and receives an instance of it:

        @options(model=ModelSettings)
        def inspect(adapter: str, *, model: ModelSettings): ...

    Each field is annotated with its type and its help text, `Annotated[int, "Optimizer steps."]`.
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
                values[name] = settings(
                    **{field.name: values.pop(field.name) for field in dataclasses.fields(settings)}
                )
            return command(**values)

        call.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def as_options(*groups: Any) -> list[str]:
    """The words of a command line that give these settings, less those that have their default."""
    return [
        word
        for group in groups
        for field in dataclasses.fields(group)
        if getattr(group, field.name) != field.default
        for word in _words(field.name.replace("_", "-"), getattr(group, field.name))
    ]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _option_parameters(settings: type) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(settings, include_extras=True)
    parameters = []
    for field in dataclasses.fields(settings):
        kind, text = typing.get_args(hints[field.name])
        required = field.default is dataclasses.MISSING
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else field.default,
                annotation=Annotated[kind, typer.Option(help=text, show_default=field.default is not None)],
            )
        )
    return parameters
