"""The expression that a short forward returns, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def formula_of(function: Callable[..., Any]) -> str | None:
    """The expression that a function returns, its names put in: `self.b(self.a(x))`.

    None where that does not tell all that it does: decorators, anything but assignments and a
    return, a name assigned and read not exactly once, source that cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        body = tree.body[0]
        if not isinstance(body, ast.FunctionDef) or body.decorator_list:
            return None
        return _inlined(body.body)
    except (OSError, TypeError, SyntaxError, _Unclear):
        return None


class _Unclear(Exception):
    """The function is no single expression."""


class _Inline(ast.NodeTransformer):
    """Puts what was assigned to a name in its place, once."""

    def __init__(self) -> None:
        self.assigned: dict[str, ast.expr] = {}
        self.read: set[str] = set()

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.read:
            raise _Unclear
        if node.id not in self.assigned:
            return node
        self.read.add(node.id)
        return self.assigned.pop(node.id)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if not isinstance(target, ast.Name) or target.id in self.assigned:
            raise _Unclear
        self.read.discard(target.id)
        self.assigned[target.id] = value


def _inlined(body: list[ast.stmt]) -> str | None:
    inline = _Inline()
    for statement in body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        if isinstance(statement, ast.Return) and statement.value is not None:
            result = inline.visit(statement.value)
            return None if inline.assigned else ast.unparse(result)
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            return None
        value, target = inline.visit(statement.value), statement.targets[0]
        if isinstance(target, ast.Tuple):
            for i, name in enumerate(target.elts):
                inline.assign(name, ast.Subscript(value, ast.Constant(i), ast.Load()))
        else:
            inline.assign(target, value)
    return None
