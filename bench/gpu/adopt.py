"""Puts measured tiles into kernels/configs.py, with each measurement as a comment above its row.

    python bench/gpu/adopt.py bench/results/gpu-*.jsonl            prints the change
    python bench/gpu/adopt.py bench/results/gpu-*.jsonl --write    makes it

It reads the verdicts of the stages candidates and tiles of run.py. A kind of call without a row of
its own takes the plain one, and changes with it: tests/triton/test_triton_aot.py then says whether
what it launches fits. Rows that two cards share are left to be changed by hand.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

CONFIGS = Path(__file__).resolve().parents[2] / "kernels" / "configs.py"
LEAST = 1.03  # times as fast as the shipped tile: less can be noise
WIDTH = 100
CARDS = {"A100": 80, "H100": 90, "H200": 90, "GH200": 90, "B200": 100, "GB200": 100}
UNTIMED = "No row has\nbeen timed on a device yet. Each was chosen by what it compiles to"
PARTLY_TIMED = (
    "A comment\nabove a row says what was measured for a kind of call. The other kinds were chosen "
    "by what they\ncompile to"
)


class Verdict(NamedTuple):
    """The winner of a contest of tiles, as a row of run.py states it."""

    table: str
    card: int
    bits: int
    dim: int
    kind: str
    best: tuple[int, ...]
    shipped: tuple[int, ...]
    gain: float
    where: str


class Change(NamedTuple):
    """Lines [begin, end) of the file, counted from 0, and what takes their place."""

    begin: int
    end: int
    lines: list[str]


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """The last one of each row of the tables."""
    found = {}
    for row in rows:
        if "best" not in row or not row.get("times_as_fast", 0) > 0:  # nan where none was timed
            continue
        verdict = Verdict(
            row["table"],
            card_of(row["gpu"]),
            row.get("bits", 16),
            row["dim"],
            row.get("kind", "plain"),
            tuple(row["best"]),
            tuple(row["shipped"]),
            row["times_as_fast"],
            f"{row['gpu'].removeprefix('NVIDIA ')}, {row['date'][:10]}",
        )
        found[verdict[:5]] = verdict
    return list(found.values())


def card_of(gpu: str) -> int:
    for name, card in CARDS.items():
        if re.search(rf"\b{name}\b", gpu):
            return card
    raise ValueError(f"{gpu!r} is none of {', '.join(CARDS)}")


def adopted(text: str, found: list[Verdict], least: float = LEAST) -> tuple[str, list[str]]:
    """The text of configs.py with these verdicts, and words about those that it cannot take."""
    refused = []
    for verdict in found:
        try:
            text = with_change(text, change_for(text, verdict, least))
        except LookupError as error:
            refused.append(f"{verdict.table} {verdict.bits} bits D {verdict.dim}: {error}")
    if found:
        text = text.replace(UNTIMED, PARTLY_TIMED)
    return text, refused


def change_for(text: str, verdict: Verdict, least: float) -> Change:
    entry, rows = entry_of(text, verdict)
    tiles = {"plain": rows.args[0]} | {x.arg: x.value for x in rows.keywords if x.arg}
    values = {kind: ast.literal_eval(node) for kind, node in tiles.items()}
    in_table = values.get(verdict.kind, values["plain"])
    better = verdict.best != verdict.shipped and verdict.gain >= least
    # A file that has taken this verdict already has its best tile.
    if in_table not in (verdict.shipped, verdict.best):
        raise LookupError(f"{verdict.shipped} was timed, and {in_table} is in the table now")
    if better:
        values[verdict.kind] = verdict.best
        comment = f"{verdict.gain:.2f} times as fast as {verdict.shipped}"
    else:
        comment = f"no tile that was timed is {least} times as fast"
    comment = f"# {verdict.kind}: {comment} ({verdict.where})"
    lines = text.splitlines()
    begin = entry.lineno - 1
    indent = " " * entry.col_offset
    above = begin
    while lines[above - 1].startswith(f"{indent}# "):
        above -= 1
    kept = [x for x in lines[above:begin] if not x.startswith(f"{indent}# {verdict.kind}: ")]
    return Change(
        above,
        rows.end_lineno or begin,
        [*kept, f"{indent}{comment}", *row_lines(indent, verdict.dim, values)],
    )


def entry_of(text: str, verdict: Verdict) -> tuple[ast.expr, ast.Call]:
    """The key of a head dim in the tables, and its Rows(...)."""
    node: ast.expr | None = None
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if statement.target.id == verdict.table.upper():
                node = statement.value
    key: ast.expr | None = None
    for wanted in (verdict.card, verdict.bits, verdict.dim):
        if not isinstance(node, ast.Dict):
            raise LookupError("its rows are shared with another card")
        pairs = {
            k.value: (k, v)
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant)
        }
        if wanted not in pairs:
            raise LookupError(f"the table has no row for {wanted}")
        key, node = pairs[wanted]
    if key is None or not isinstance(node, ast.Call):
        raise LookupError("its row is not a call of Rows")
    return key, node


def row_lines(indent: str, dim: int, values: dict[str, tuple[int, ...]]) -> list[str]:
    """`dim: Rows(...),` on one line, or on three where that is too long."""
    words = [str(tile) if kind == "plain" else f"{kind}={tile}" for kind, tile in values.items()]
    line = f"{indent}{dim}: Rows({', '.join(words)}),"
    if len(line) <= WIDTH:
        return [line]
    return [f"{indent}{dim}: Rows(", f"{indent}    {', '.join(words)}", f"{indent}),"]


def with_change(text: str, change: Change) -> str:
    lines = text.splitlines()
    lines[change.begin : change.end] = change.lines
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path, nargs="+", help="files of run.py, later ones win")
    parser.add_argument("--write", action="store_true", help="change kernels/configs.py")
    parser.add_argument("--least", type=float, default=LEAST, help=f"default: {LEAST}")
    options = parser.parse_args(argv)
    rows = [json.loads(x) for path in options.rows for x in path.read_text().splitlines()]
    before = CONFIGS.read_text()
    after, refused = adopted(before, verdicts(rows), options.least)
    for words in refused:
        print(f"left out: {words}", file=sys.stderr)
    if options.write:
        CONFIGS.write_text(after)
    names = ("kernels/configs.py", "kernels/configs.py, measured")
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="")
    print("\n".join(lines) or "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
