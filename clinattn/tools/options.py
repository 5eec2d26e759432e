"""Options of a command made from the fields of its settings, and the ways to say where data are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from clinattn.tools import console
from clinattn.training.fields import Option, options

MEDS_VARIABLES = ["MEDS_DIR", "CLINATTN_MEDS_DIR"]


@dataclass(frozen=True)
class Word:
    """An older option for --data: its type, and the kind of data that it names."""

    kind: str
    type: type
    help: str


WORDS = {
    "meds_dir": Word("meds", Path, "The same as --data meds:DIR."),
    "text": Word("text", Path, "The same as --data text:FILE: a .csv or .jsonl with column text."),
    "profile": Word("profile", str, "The same as --data profile:NAME."),
}


def takes(
    settings: type, *, without: tuple[str, ...] = (), environment: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of a dataclass.

    The command gets a dict of the fields that a user has given, and its own parameters by keyword.
    without: fields that are parameters of the command. environment: without --data or a word for
    it, MEDS_DIR and then the demo folder say where the data are.
    """
    known = {name: found for name, found in options(settings).items() if name not in without}
    types = {name: plain_type(found) for name, found in get_type_hints(settings).items()}
    defaults = {field.name: field.default for field in fields(settings)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = []
        for name, found in known.items():
            parameters.append(parameter(name, found, types[name], defaults[name]))
            if name == "data":
                parameters += [word(name, found, environment) for name, found in WORDS.items()]

        def run(context: typer.Context, **values: Any) -> None:
            said = {name: source_of(context, name) for name in values}
            if "data" in known:
                values["data"] = data_of(values, said, environment)
                said["data"] = values["data"] and "COMMANDLINE"
                for name in WORDS:
                    del values[name]
            given = {name: values.pop(name) for name in known}
            given = {n: of_field(x, types[n]) for n, x in given.items() if said[n]}
            command(given, **values)

        context = inspect.Parameter(
            "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
        )
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        signature = inspect.Signature([context, *parameters, *own])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def listing(settings: type) -> type[TyperCommand]:
    """The class of a command whose help lists the choices and least values of settings.

    They are looked up when that command runs: some choices take imports that others do without.
    """

    class Listing(TyperCommand):
        listed = False

        def get_params(self, ctx: Any) -> Any:
            shown: Any
            for shown in () if self.listed else self.params:
                if known := options(settings).get(shown.name):
                    shown.help = help_of(known)
            self.listed = True
            return super().get_params(ctx)

    return Listing


def help_of(found: Option) -> str:
    """The help of an option, with its choices or its least value."""
    if allowed := found.allowed():
        return f"{found.help} Choices: {', '.join(allowed)}."
    if found.names is not None:
        return f"{found.help} NAME: {', '.join(found.names())}."
    return found.help if found.least is None else f"{found.help} At least {found.least}."


def parameter(name: str, found: Option, kind: type, default: Any) -> inspect.Parameter:
    """The typer parameter of a field. Numbers and choices are checked by the settings alone."""
    spelled = found.name or f"--{name.replace('_', '-')}"
    shown: Any = {} if found.shown is None else {"show_default": found.shown}
    if kind is tuple:
        kind, default = str, ",".join(default)
    if kind is Path and default is not None:
        default = Path(default)
    return keyword(name, kind, default, typer.Option(spelled, help=found.help, **shown))


def word(name: str, found: Word, environment: bool) -> inspect.Parameter:
    """The typer parameter of a word for --data."""
    variable = MEDS_VARIABLES if environment and name == "meds_dir" else None
    spelled = f"--{name.replace('_', '-')}"
    return keyword(name, found.type, None, typer.Option(spelled, help=found.help, envvar=variable))


def keyword(name: str, kind: type, default: Any, told: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None if default is None else kind, told]  # type: ignore
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def plain_type(found: Any) -> type:
    """The type of an option: that of a field without None; a path may be a str."""
    kinds = [kind for kind in get_args(found) or (found,) if kind is not type(None)]
    if getattr(found, "__origin__", None) is tuple:
        return tuple
    return Path if Path in kinds else kinds[0]


def of_field(value: Any, kind: type) -> Any:
    """The value of a field from that of its option: names between commas are a tuple."""
    return tuple(value.split(",")) if kind is tuple else value


def source_of(context: typer.Context, name: str) -> str:
    """Where a value comes from: "COMMANDLINE", "ENVIRONMENT", or "" for a default."""
    found = context.get_parameter_source(name)
    return found.name if found is not None and not found.name.startswith("DEFAULT") else ""


def data_of(values: dict[str, Any], said: dict[str, str], environment: bool) -> str | None:
    """Where the data are, from --data, a word for it, or else the environment or the demo folder.

    Raises ValueError where two options say it.
    """
    from clinattn.workloads.opening import only_one

    told = {"data": values["data"]}
    told |= {name: f"{found.kind}:{values[name]}" for name, found in WORDS.items()}
    data = only_one(
        {
            f"--{name.replace('_', '-')}": value
            for name, value in told.items()
            if said[name] == "COMMANDLINE"
        }
    )
    if data is not None or not environment:
        return data
    if values["meds_dir"] is not None:
        return told["meds_dir"]
    return f"meds:{console.DEMO}" if console.DEMO.is_dir() else None
