"""Tables and lines that `clinattn doctor` prints of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

RATES = (
    "Instruction sets of the CPU kernels, with GFLOP/s of one thread: of multiply-adds in "
    "registers (peak), and of attention in both passes"
)


def tables(found: dict[str, Any]) -> Iterator[RenderableType]:
    """Tables of the machine, the backends and the instruction sets, then lines of advice."""
    yield machine(found)
    yield ""
    yield backends(found["backends"])
    if found["instruction_sets"]:
        yield ""
        yield RATES
        yield instruction_sets(found["instruction_sets"])
        yield from reasons(found["instruction_sets"])
    labelled = [
        (label, line)
        for key, label in (("warnings", "warning"), ("slower", "slower"), ("information", "note"))
        for line in found[key]
    ]
    if labelled:
        yield ""
        grid = Table.grid(padding=(0, 2))
        for label, line in labelled:
            grid.add_row(Text(label, "yellow" if label != "note" else ""), Text(line))
        yield grid
    yield ""


def machine(found: dict[str, Any]) -> Table:
    table = Table("machine", "", show_edge=False)
    facts = dict(found["environment"])
    facts["cpus"] = shown_cpus(**found["cpus"])
    facts["compiler"] = found["compiler"]
    facts["kernels"] = shown_kernels(found["kernels"])
    for name, value in facts.items():
        table.add_row(name, Text("not available" if value is None else str(value)))
    return table


def shown_cpus(allowed: int, cores: int, quota: float | None) -> str:
    """CPUs with what sets them apart from cores, and with a limit of their time."""
    shown = str(allowed)
    if cores != allowed:
        shown += f", two to a core: {cores} cores"
    return shown if quota is None else f"{shown}, limited to the time of {quota:g}"


def shown_kernels(kernels: dict[str, str]) -> str:
    """The origin of the compiled kernels, then the facts of their build."""
    facts = (f"{name.replace('_', ' ')} {x}" for name, x in kernels.items() if name != "origin")
    return "; ".join([kernels["origin"], *facts])


def backends(found: dict[str, dict[str, Any]]) -> Table:
    table = Table("backend", "", show_edge=False)
    for name, state in found.items():
        if state["usable"]:
            table.add_row(name, Text("; ".join(["usable", *state["notes"]]), "green"))
        else:
            table.add_row(name, Text("; ".join(state["reasons"]), "red"))
    return table


def instruction_sets(found: list[dict[str, Any]]) -> Table:
    """A row a set; rates are GFLOP/s of a thread."""
    table = Table("instruction\nset", "built", "usable\nhere", "in\nforce", show_edge=False)
    for what in ("peak", "attention"):
        for dtype in ("fp32", "bf16"):
            table.add_column(f"{what}\n{dtype}", justify="right")
    for one in found:
        states = ("yes" if one[key] else "no" for key in ("built", "usable"))
        rates = (
            "-" if one[what] is None else f"{one[what][dtype] / 1e9:,.0f}"
            for what in ("peak", "attention")
            for dtype in ("fp32", "bf16")
        )
        table.add_row(one["name"], *states, "yes" if one["in_force"] else "", *rates)
    return table


def reasons(found: list[dict[str, Any]]) -> Iterator[str]:
    """Lines on the sets that are not usable."""
    for one in found:
        if one["reason"] is not None:
            yield f"{one['name']} is not usable: {one['reason']}"
