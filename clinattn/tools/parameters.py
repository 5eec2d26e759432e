"""Parameters of typer, made by code and not written in a signature."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer


def keyword(name: str, kind: type, default: Any, told: Any) -> inspect.Parameter:
    """A parameter of a command, of type `kind`; `told` is a typer.Option. A default may be None."""
    annotation = Annotated[kind | None if default is None else kind, told]  # type: ignore
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def spelled(name: str) -> str:
    """The option of a parameter: --max-tokens of max_tokens."""
    return f"--{name.replace('_', '-')}"


def source_of(context: typer.Context, name: str) -> str:
    """Returns where a value comes from: "COMMANDLINE", "ENVIRONMENT", or "" for a default."""
    found = context.get_parameter_source(name)
    return found.name if found is not None and not found.name.startswith("DEFAULT") else ""
