"""Writes clinattn/__init__.pyi, in which the result's type follows from return_lse.

    python tests/lib/stubs.py

The functions say their arguments once, and mypy has no other way to tell o from (o, lse) than to
list them for each. A test holds the file to the functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from places import ROOT

import clinattn

PATH = ROOT / "clinattn" / "__init__.pyi"
# The type of return_lse, its default, and what is returned. Two literals, and a bool known later
FORMS = (
    ("Literal[False]", " = ...", "Tensor"),
    ("Literal[True]", "", "tuple[Tensor, Tensor]"),
    ("bool", "", "Tensor | tuple[Tensor, Tensor]"),
)
HEAD = '''"""Types of the public names; tests/lib/stubs.py writes this file."""

from typing import Literal, overload

from torch import Tensor

'''


def stub() -> str:
    """The text of the file."""
    functions = [clinattn.fused_attention, clinattn.fused_attention_varlen]
    own = {x.__name__ for x in functions}
    others = {name: getattr(clinattn, name) for name in clinattn.__all__ if name not in own}
    imports = [f"from {home_of(x)} import {name} as {name}" for name, x in others.items()]
    imports.append("from clinattn.operator.visibility import PreparedMask, Window")
    lines = "\n".join(sorted(imports, key=lambda x: (x.split()[1], x)))
    overloads = "\n".join(text for function in functions for text in overloads_of(function))
    return f"{HEAD}{lines}\n\n__version__: str\n\n{overloads}"


def home_of(public: Any) -> str:
    """The module that a public name is imported from; a module comes from its package."""
    if inspect.ismodule(public):
        return public.__name__.rpartition(".")[0]
    return public.__module__


def overloads_of(function: Callable[..., Any]) -> Iterator[str]:
    for kind, default, result in FORMS:
        yield "@overload"
        yield f"def {function.__name__}("
        keyword_only = False
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
                keyword_only = True
                yield "    *,"
            if parameter.name == "return_lse":
                yield f"    return_lse: {kind}{default},"
                continue
            optional = "" if parameter.default is parameter.empty else " = ..."
            yield f"    {parameter.name}: {parameter.annotation}{optional},"
        yield f") -> {result}: ..."


if __name__ == "__main__":
    PATH.write_text(stub() + "\n")
