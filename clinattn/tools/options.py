"""Options of a command, made from the fields of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from clinattn.tools.data_options import data_of, word_parameters
from clinattn.tools.parameters import keyword, source_of, spelled
from clinattn.training.fields import Option, Phrases, options


def takes(
    settings: type, *, environment: bool = False, words: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of a dataclass.

    The command gets a dict of the fields that a user has given, and its own parameters by keyword.
    A field `data` has the words of data_options.py beside it, unless `words` is False. environment:
    without any of them, MEDS_DIR and then the demo folder say where the data are.
    """
    known = options(settings)
    types = {name: plain_type(found) for name, found in types_of(settings).items()}
    defaults = {field.name: field.default for field in fields(settings)}
    parameters = []
    for name, found in known.items():
        parameters.append(parameter(name, found, types[name], defaults[name]))
        if name == "data" and words:
            parameters += word_parameters(environment)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        written = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(written)[1:]]

        def run(context: typer.Context, **values: Any) -> None:
            given = {
                name: of_field(values[name], types[name])
                for name in known
                if source_of(context, name)
            }
            if "data" in known and words:
                data = data_of(context, values, environment)
                given |= {} if data is None else {"data": data}
            command(given, **{p.name: values[p.name] for p in own})

        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        signature = inspect.Signature([context, *parameters, *own])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def listing(settings: type) -> type[TyperCommand]:
    """The class of a command whose help lists the choices and least values of settings.

    Choices with phrases are lists of their own below the options.

    They are looked up when that command runs: some choices take imports that others do without.
    """
    known = options(settings)

    class Listing(TyperCommand):
        listed = False

        def get_params(self, ctx: Any) -> Any:
            shown: Any
            for shown in () if self.listed else self.params:
                if shown.name in known:
                    shown.help = help_of(shown.name, known[shown.name])
            self.listed = True
            return super().get_params(ctx)

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            for name, found in known.items():
                if phrases := found.phrases():
                    Console(markup=False, highlight=False).print(panel(title(name, found), phrases))

    return Listing


def panel(title: str, phrases: Phrases) -> Panel:
    """A list of names and their phrases, in the looks of typer's help."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    for name, phrase in phrases.items():
        table.add_row(name, Text(phrase))
    return Panel(table, title=title, title_align="left", border_style="dim")


def title(name: str, found: Option) -> str:
    """The title of an option's list, by which its help refers to the list."""
    option = found.name or spelled(name)
    return f"Choices of {option}" if found.names is None else f"NAME of {option}"


def help_of(name: str, found: Option) -> str:
    """The help of an option, with its choices or its least value."""
    if found.phrases():
        return f"{found.help} Below: {title(name, found)}."
    if allowed := found.allowed():
        return f"{found.help} Choices: {', '.join(allowed)}."
    return found.help if found.least is None else f"{found.help} At least {found.least}."


def completions(found: Option) -> list[tuple[str, str]]:
    """Words with which a shell completes an option's value, each with a phrase that may be empty.

    They are its choices, or the kinds of --data.
    """
    if found.names is None:
        return list((found.phrases() or dict.fromkeys(found.allowed(), "")).items())
    named = [(f"profile:{name}", phrase) for name, phrase in found.phrases().items()]
    return [("meds:", "a MEDS folder"), ("text:", "a csv, tsv, jsonl or parquet file"), *named]


def parameter(name: str, found: Option, kind: type, default: Any) -> inspect.Parameter:
    """The typer parameter of a field. Numbers and choices are checked by the settings alone."""
    shown: Any = {} if found.shown is None else {"show_default": found.shown}
    if kind is tuple:
        kind, default = str, ",".join(default)
    if kind is Path and default is not None:
        default = Path(default)
    complete = (lambda: completions(found)) if found.choices or found.names else None
    told = typer.Option(
        found.name or spelled(name), help=found.help, autocompletion=complete, **shown
    )
    return keyword(name, kind, default, told)


def types_of(settings: type) -> dict[str, Any]:
    """The types of a dataclass by name. typing.get_type_hints refuses an InitVar in Python 3.10."""
    of_classes = (inspect.get_annotations(x, eval_str=True) for x in reversed(settings.__mro__))
    return {name: found for own in of_classes for name, found in own.items()}


def plain_type(found: Any) -> type:
    """The type of an option: that of a field without None; a path may be a str."""
    if get_origin(found) is tuple:
        return tuple
    kinds = [kind for kind in get_args(found) or (found,) if kind is not type(None)]
    return Path if Path in kinds else kinds[0]


def of_field(value: Any, kind: type) -> Any:
    """The value of a field from that of its option: names between commas are a tuple."""
    return tuple(value.split(",")) if kind is tuple else value
