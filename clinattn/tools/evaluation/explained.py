"""The explanation of a prediction, by `clinattn explain --json`, on the page of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clinattn.files.disk import parse_json
from clinattn.files.shapes import (
    COUNT,
    FLAG,
    NOTHING,
    NUMBER,
    TEXT,
    Each,
    Kind,
    Named,
    require,
)
from clinattn.tools.explanation.deletion import SAID, conclusions
from clinattn.tools.explanation.settings import METHODS
from clinattn.tools.explanation.words import (
    Record,
    agreement,
    conclusion,
    label,
    ranks,
    scores_of,
    shown_shares,
)
from clinattn.tools.report.section import Table

METHOD = Kind("a method of explain", lambda x: isinstance(x, str) and x in METHODS)
UNIT = Named(
    {
        "name": TEXT,
        "value": TEXT,
        "description": TEXT,
        "time": TEXT,
        "known": FLAG,
        "scores": Each(NUMBER, 2),
    }
)
EXPLANATION = Named(
    {
        "kind": Kind("'explanation'", lambda x: x == "explanation"),
        "checkpoint": TEXT,
        "title": TEXT,
        "unit": TEXT,
        "facts": Named({}, others=TEXT),
        "warnings": Each(TEXT),
        "target": TEXT,
        "probability": NUMBER,
        "methods": Each(METHOD, 2),
        "units": Each(UNIT, 1),
        "strongest": Each(COUNT, 1),
        "agreement": Named(
            {"top": COUNT, "shared": COUNT, "rank_correlation": NUMBER | NOTHING}
        ),
        "deletion": Named(
            {
                "shares": Each(COUNT, 1),
                "counts": Each(COUNT, 1),
                "methods": Named({}, others=Each(NUMBER, 1)),
                "random": Each(Each(NUMBER, 1), 1),
            }
        ),
    }
)


def read_explanation(path: Path, of_predictions: dict[str, Any]) -> Record:
    """Reads what explain wrote. of_predictions: facts on the file of predictions.

    Raises ValueError for another file, and for an explanation of another checkpoint, where the
    predictions name theirs.
    """
    where = f"explanation={str(path)!r}"
    try:
        found = parse_json(path.read_bytes())
        require(found, EXPLANATION)
        _require_consistent(found)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(
            f"{where}: {error}: expected the JSON of clinattn explain for one prediction"
        ) from None
    own = of_predictions.get("checkpoint")
    known = own if isinstance(own, dict) else {}
    if known.get("sha256") not in (None, found["checkpoint"]):
        raise ValueError(
            f"{where} is of another checkpoint than the predictions: expected one of "
            f"{known.get('name')!r}"
        )
    return found


def _require_consistent(record: Record) -> None:
    """Raises ValueError for numbers of units, shares or methods that do not fit each other."""
    curve = record["deletion"]
    rows = [*curve["methods"].values(), *curve["random"], curve["counts"]]
    for name, good in (
        ("strongest", max(record["strongest"]) < len(record["units"])),
        ("deletion.shares", SAID in curve["shares"]),
        ("deletion", all(len(row) == len(curve["shares"]) for row in rows)),
        ("deletion.methods", set(curve["methods"]) == set(record["methods"])),
        ("scores", all(len(x["scores"]) == len(record["methods"]) == 2 for x in record["units"])),
    ):
        if not good:
            raise ValueError(f"{name} does not fit the rest")


def on_page(record: Record) -> dict[str, Any]:
    """Words for the page: sentences, and the strongest events or words as a table."""
    titles = [METHODS[method].title for method in record["methods"]]
    placed = [ranks(scores_of(record, column)) for column in range(2)]
    rows = []
    for i in record["strongest"]:
        unit = record["units"][i]
        name = label(unit) + ("" if unit["known"] else ", unknown to the model")
        rows.append(
            (
                name,
                unit["time"] or "-",
                *shown_shares(unit["scores"], record),
                *(f"{place[i]:,}" for place in placed),
            )
        )
    header = (record["unit"], "time", *titles, *(f"rank of {title}" for title in titles))
    return {
        "title": record["title"],
        "conclusion": conclusion(record),
        "warnings": record["warnings"],
        "strongest": Table(f"Strongest {record['unit']}s by either method", header, rows, labels=2),
        "agreement": agreement(record),
        "verdicts": conclusions(
            record["deletion"], record["probability"], record["target"], record["unit"]
        ),
        "facts": Table("This prediction", ("fact", "value"), list(record["facts"].items()), 2),
    }
