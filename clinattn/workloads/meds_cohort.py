"""Cohorts of meds-torch-data 0.9, the folders that its MTD_preprocess writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .meds import as_source, in_order
from .meds_files import SCHEMAS, MedsError, place, read_columns
from .source import NO_TIME, Source
from .splits import of_folders
from .vocabulary import SPECIAL_TOKENS, Vocabulary

ARGUMENT = "cohort"
LAYOUT = (
    "a cohort of MTD_preprocess: metadata/codes.parquet, tokenization/schemas/**/*.parquet and "
    "data/**/*.nrt"
)
NO_CODE = 0  # its index of padding
# The columns of a schema that are read; a list without an item in a whole file has type null.
COLUMNS = {
    "subject_id": ("int64", lambda kind: str(kind).strip("u").startswith("int")),
    "time": ("lists of times", lambda kind: _lists(kind, "timestamp", "null")),
    "static_code": ("lists of numbers", lambda kind: _lists(kind, "int", "uint", "null")),
    "static_numeric_value": (
        "lists of numbers",
        lambda kind: _lists(kind, "float", "double", "null"),
    ),
}


class Shard(NamedTuple):
    """Events of a file, (E,): subject, time in microseconds, index of the code, value."""

    subject: np.ndarray
    time: np.ndarray
    code: np.ndarray
    value: np.ndarray


def cohort_source(folder: str | Path) -> Source:
    """Every patient of a cohort. Its split is the folder of its file, such as data/train.

    Codes have the names of metadata/codes.parquet. Times are those of tokenization/schemas, to the
    microsecond; the deltas in data, whose first is NaN, are not needed. Values are as the
    cohort has them, less the mean of their code over its standard deviation.
    Raises MedsError where the folder cannot be used, or its files contradict each other.
    """
    root = Path(folder)
    where = f"{ARGUMENT}={str(root)!r}"
    schemas = sorted((root / SCHEMAS).rglob("*.parquet")) if root.is_dir() else []
    if not schemas:
        state = "has no tokenization/schemas" if root.is_dir() else "is no folder"
        raise MedsError(f"{where} {state}: expected {LAYOUT}")
    names = _names(root)
    shards, listed = [], []
    for path in schemas:
        at = path.relative_to(root / SCHEMAS)
        shard = _read(root, path, root / "data" / at.with_suffix(".nrt"))
        unknown = set(np.unique(shard.code).tolist()) - names.keys()
        if unknown:
            raise MedsError(
                f"{place(root, path, ARGUMENT)} has code {min(unknown)}: expected a "
                "code/vocab_index of metadata/codes.parquet"
            )
        shards.append(shard)
        if len(at.parts) > 1:
            listed.append((np.unique(shard.subject), at.parts[0]))
    subject, time, code, value = (np.concatenate(column) for column in zip(*shards, strict=True))
    if not len(subject):
        raise MedsError(f"{where} has no events in its {len(schemas)} file(s): expected some")
    vocabulary = Vocabulary((*SPECIAL_TOKENS, *names.values()))
    places = np.zeros(max(names) + 1, dtype=np.int32)
    places[list(names)] = np.arange(len(names)) + len(SPECIAL_TOKENS)
    dataset = in_order(subject, time, places[code], value, vocabulary)
    title = f"meds-torch-data cohort {root.resolve().name}"
    owners = None
    if listed:
        owners = of_folders([own for own, _ in listed], [folder for _, folder in listed], where)
    return as_source(dataset, title, where, owners)


def _lists(kind: Any, *names: str) -> bool:
    """Returns whether a type of pyarrow is lists of types whose names begin so, or null."""
    items = getattr(kind, "value_type", kind)
    return str(items).startswith(names) and (items is not kind or str(kind) == "null")


def _names(root: Path) -> dict[int, str]:
    """The name of each index, by metadata/codes.parquet; of a name that is there twice, both."""
    path = root / "metadata" / "codes.parquet"
    table = read_columns(root, path, ["code", "code/vocab_index"], [], ARGUMENT)
    pairs = zip(table["code/vocab_index"].to_pylist(), table["code"].to_pylist(), strict=True)
    found = sorted((index, str(code)) for index, code in pairs if index is not None)
    names: dict[int, str] = {}
    taken = set(SPECIAL_TOKENS)
    for index, code in found:  # a code with modifiers has an index for each of them
        names[index] = code if code not in taken else f"{code} #{index}"
        taken.add(names[index])
    if len(names) < len(found) or not names or min(names) <= NO_CODE:
        raise MedsError(
            f"{place(root, path, ARGUMENT)} column 'code/vocab_index': expected different numbers "
            "from 1"
        )
    return names


def _read(root: Path, schema: Path, tensors: Path) -> Shard:
    """The events of a shard: static ones from its schema, the others from its tensors too."""
    table = read_columns(root, schema, list(COLUMNS), [], ARGUMENT)
    for name, (expected, taken) in COLUMNS.items():
        kind = table.schema.field(name).type
        if not taken(kind):
            raise MedsError(
                f"{place(root, schema, ARGUMENT)} column {name!r} has type {kind}: expected "
                f"{expected}"
            )
    columns = [table[name].to_pylist() for name in COLUMNS]
    static = _static(columns[0], *columns[2:])
    kept = table.filter([moments is not None and len(moments) > 0 for moments in columns[1]])
    lengths = np.array([len(moments) for moments in kept["time"].to_pylist()], dtype=np.int64)
    times = kept["time"].combine_chunks().flatten().cast("timestamp[us]").cast("int64").to_numpy()
    if not len(lengths):
        return static
    where = place(root, tensors, ARGUMENT)
    found = _tensors(tensors, where)
    events, measured = _lengths(found, "dim1", where), _lengths(found, "dim2", where)
    code, value = found["dim2/code"], found["dim2/numeric_value"]
    fits = np.array_equal(events, lengths) and len(measured) == len(times)
    if not fits or measured.sum() != len(code) or len(code) != len(value):
        raise MedsError(f"{where} has other events than {schema.name} of {SCHEMAS}")
    subject = np.repeat(kept["subject_id"].to_numpy(), lengths)
    timed = np.repeat(subject, measured), np.repeat(times, measured), code, value
    real = code != NO_CODE
    return Shard(*(np.r_[a, b[real]] for a, b in zip(static, timed, strict=True)))


def _static(subjects: list[int], codes: list[Any], values: list[Any]) -> Shard:
    """Static codes; a null is none."""
    rows = [
        (subject, code, np.nan if value is None else value)
        for subject, own, numbers in zip(subjects, codes, values, strict=True)
        for code, value in zip(own or (), numbers or (), strict=True)
        if code
    ]
    subject, code, value = zip(*rows, strict=True) if rows else ((), (), ())
    return Shard(
        np.array(subject, dtype=np.int64),
        np.full(len(rows), NO_TIME, dtype=np.int64),
        np.array(code, dtype=np.int64),
        np.array(value, dtype=np.float32),
    )


def _lengths(found: dict[str, np.ndarray], level: str, where: str) -> np.ndarray:
    """Numbers of items in the lists of a level, by the places where the lists end."""
    lengths = np.diff(found[f"{level}/bounds"], prepend=0)
    if (lengths < 0).any():
        raise MedsError(f"{where} has falling {level}/bounds: expected a file of MTD_preprocess")
    return lengths


def _tensors(path: Path, where: str) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ModuleNotFoundError:
        raise MedsError(f"{where} needs: pip install safetensors") from None
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MedsError(f"{where} cannot be read ({error}): expected {LAYOUT}") from None
    for name in ("dim1/bounds", "dim2/bounds", "dim2/code", "dim2/numeric_value"):
        if name not in found:
            raise MedsError(f"{where} has no {name} (it has {sorted(found)}): expected {LAYOUT}")
    return found
