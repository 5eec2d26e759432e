"""Griffe extension: the arguments in clinattn's docstrings become a list.

The docstrings write `name: what it is` at the beginning of a line, and go on in the next lines
until another name or an empty line. Markdown would make one paragraph of all that.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

ITEM = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*)(:| \()")


def as_markdown(docstring: str, names: set[str]) -> str:
    """Returns the docstring with a list item for each run of lines that begins with some names.

    names: of the arguments or fields; a line that begins with another word goes on as text.
    """
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        text = line.strip()
        found = ITEM.match(text)
        if found and set(found[1].split(", ")) <= names:
            if not inside and lines and lines[-1]:
                lines.append("")
            rest = text[len(found[1]) :].removeprefix(":").strip()
            lines.append(f"- `{found[1]}`: {rest}")
            inside = True
        elif not text:
            lines.append("")
            inside = False
        else:
            lines.append(f"  {text}" if inside else line)
    return "\n".join(lines)


class Lists(Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is None:
            return
        if isinstance(obj, Function):
            names = {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, Class):
            names = set(obj.members)
            if init := obj.members.get("__init__"):
                names |= {p.name for p in getattr(init, "parameters", ())}
        else:
            names = set()
        obj.docstring.value = as_markdown(obj.docstring.value, names)
