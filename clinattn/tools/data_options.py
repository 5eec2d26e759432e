"""Options that say what data a command reads: --data, and the older words for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import typer

from clinattn.tools import console
from clinattn.tools.parameters import keyword, source_of, spelled
from clinattn.training.settings import profiles

MEDS_VARIABLES = ["MEDS_DIR", "CLINATTN_MEDS_DIR"]


class Word(NamedTuple):
    """An older option for --data: the kind of data that it names, its type and help."""

    kind: str
    type: type
    help: str


WORDS = {
    "meds_dir": Word("meds", Path, "The same as --data meds:DIR."),
    "text": Word("text", Path, "The same as --data text:FILE: csv, tsv, jsonl or parquet."),
    "profile": Word("profile", str, "The same as --data profile:NAME."),
}


def word_parameters(environment: bool) -> list[Any]:
    """The typer parameters of the words. environment: MEDS_DIR is read for --meds-dir."""
    found = []
    for name, (_, kind, help) in WORDS.items():
        known: Any = {}
        if environment and name == "meds_dir":
            known = {"envvar": MEDS_VARIABLES}
            help = f"{help} Without any data: {console.DEMO}, if there."
        if name == "profile":
            known = {"autocompletion": lambda: list(profiles().items())}
        found.append(keyword(name, kind, None, typer.Option(spelled(name), help=help, **known)))
    return found


def data_of(context: typer.Context, values: dict[str, Any], environment: bool) -> str | None:
    """Returns the data of a command in the form of --data; None where nothing says it.

    Options go before the environment, and MEDS_DIR before the demo folder.
    Raises ValueError where two options say it.
    """
    from clinattn.workloads.opening import only_one

    said = {"data": values["data"]}
    said |= {name: f"{found.kind}:{values[name]}" for name, found in WORDS.items()}
    by_option = [name for name in said if source_of(context, name) == "COMMANDLINE"]
    data = only_one({spelled(name): said[name] for name in by_option})
    if data is None and environment:
        if values["meds_dir"] is not None:
            return said["meds_dir"]
        return f"meds:{console.DEMO}" if console.DEMO.is_dir() else None
    return data
