"""Griffe extension: the arguments in clinattn's docstrings become a list.

The docstrings write `name: what it is` at the beginning of a line or after a full stop, and go on
until another name, an empty line, or a line that begins with "Returns" or "Raises". Markdown would
make one paragraph of all that.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

NAMES = r"[a-z]\w*(?:(?:, | and )[a-z]\w*)*"
ITEM = re.compile(rf"({NAMES}): (.*)", re.DOTALL)
BETWEEN = re.compile(rf"(?<=[.;]) (?={NAMES}: )")
AFTER = ("Returns ", "Raises ")


def as_markdown(docstring: str, names: set[str]) -> str:
    """Returns the docstring with a list item for each of the arguments or fields in `names`."""
    return "\n\n".join(
        _paragraph(part, names) if not part.startswith("    ") else part
        for part in docstring.split("\n\n")
    )


def _paragraph(text: str, names: set[str]) -> str:
    pieces: list[str] = []  # texts and items in order, each in one line
    for line in _escaped(text).splitlines():
        line = line.strip()
        begins = _named(line, names) or (line.startswith(AFTER) and pieces and "\0" in pieces[-1])
        if begins or not pieces:
            pieces.append(line)
        else:
            pieces[-1] += f" {line}"
        if _named(line, names):
            pieces[-1] = f"\0{pieces[-1]}"  # marks an item until all its lines are there
    out: list[str] = []
    for piece in pieces:
        if not piece.startswith("\0"):
            out += ["", piece, ""]
            continue
        for part in _split(piece[1:], names):
            found = ITEM.fullmatch(part)
            assert found is not None
            out.append(f"- `{found[1]}`: {found[2].removesuffix(';')}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n")


def _named(text: str, names: set[str]) -> bool:
    found = ITEM.match(text)
    return found is not None and set(re.split(", | and ", found[1])) <= names


def _split(text: str, names: set[str]) -> list[str]:
    """An item, and those that follow it in the same lines."""
    parts: list[str] = []
    for part in BETWEEN.split(text):
        if parts and not _named(part, names):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return parts


def _escaped(text: str) -> str:
    """A name in angle brackets, as in data/<split>/, is no element of HTML."""
    return text if "`" in text else re.sub(r"<(?=\w)", "&lt;", text)


class Lists(Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        names: set[str] = set()
        if isinstance(obj, Function):
            names = {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, Class):
            names = set(obj.members)
        else:  # a module may say what the arguments of its functions have in common
            functions = (x for x in obj.members.values() if isinstance(x, Function))
            names = {parameter.name for one in functions for parameter in one.parameters}
        obj.docstring.value = as_markdown(obj.docstring.value, names)
