"""The origin of a trained model: a checkpoint, a run's folder, or a folder of transformers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinattn.files.disk import file_sha256

from .checkpoint import checkpoints, load_checkpoint, newest_intact

FORMS = "a step-*.pt of clinattn train, the folder of a run, or a folder of transformers"


@dataclass(frozen=True)
class Origin:
    """A checkpoint or a folder, found at the path that a CHECKPOINT gives.

    path: of a step-*.pt, or of a folder of transformers. saved: the contents of the checkpoint,
    None for a folder of transformers. damaged: a message for each newer checkpoint of the run that
    is damaged and was passed over.
    """

    path: Path
    saved: dict[str, Any] | None = None
    damaged: tuple[str, ...] = ()


def resolve(path: str | Path, name: str = "checkpoint") -> Origin:
    """Reads what `path` names: a step-*.pt, a run's folder, or a folder with config.json.

    Of a run's folder it is the newest checkpoint that is intact. name: of the argument, for
    messages. Raises ValueError where nothing is there, or nothing that is intact.
    """
    given, where = Path(path), f"{name}={str(path)!r}"
    if not given.is_dir():
        return Origin(given, load_checkpoint(given))
    found = checkpoints(given)
    if (given / "config.json").is_file():
        if found:
            raise ValueError(
                f"{where} holds both config.json and {found[-1].name}: expected one, or the path "
                "of the file"
            )
        return Origin(given)
    if not found:
        raise ValueError(f"{where} holds neither step-*.pt nor config.json: expected {FORMS}")
    return Origin(*newest_intact(found, where))


def sha256(origin: Origin) -> str:
    """The SHA-256 of the file, or of the names and contents of the files of a folder."""
    if origin.path.is_file():
        return file_sha256(origin.path)
    whole = hashlib.sha256()
    for path in sorted(x for x in origin.path.iterdir() if x.is_file()):
        whole.update(f"{path.name}\0".encode() + bytes.fromhex(file_sha256(path)))
    return whole.hexdigest()
