"""Going on with a run: from which checkpoint, and whether its settings are those of before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clinattn.files.disk import file_sha256

from .checkpoint import FORMAT, Damaged, checkpoints, load_checkpoint, newest_intact, shards_of
from .ranks import Ranks, restarted
from .settings import TrainingSettings

FOLLOW = ("preset", "lr")  # settings whose default follows from where a run starts


def settled_resume(settings: TrainingSettings, ranks: Ranks) -> TrainingSettings:
    """The settings, with `resume` as the folder asks for after a restart by torchrun or Slurm.

    The attempt before may have ended before its first checkpoint, or started without resume.
    """
    if not restarted():
        return settings
    return replace(settings, resume=ranks.by_first(lambda: bool(checkpoints(_folder(settings)))))


def saved_run(
    settings: TrainingSettings, ranks: Ranks, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, whose settings are checked; None without `resume`.

    Rank 0 looks for it, and the others read the one that it found. Raises ValueError.
    """
    held: list[tuple[Path, dict[str, Any]]] = []

    def find() -> tuple[Path, str] | None:
        folder = _folder(settings)
        found = checkpoints(folder)
        if not settings.resume:
            if found:
                raise ValueError(
                    f"output={str(folder)!r} holds {found[-1].name}: expected resume, or "
                    "another folder"
                )
            return None
        if not found:
            raise ValueError(f"resume: output={str(folder)!r} holds no checkpoint")
        where = f"resume: output={str(folder)!r}"
        path, saved, damaged = newest_intact(found, where, load_resumable)
        _check(settings, path, saved)
        held.append((path, saved))
        if not damaged:
            return path, ""
        return path, f"{'; '.join(damaged)}; going on from {path.name}, which is intact"

    found = ranks.by_first(find)
    if found is None:
        return None
    path, message = found
    if message:
        say(message)
    return held[0] if held else (path, load_resumable(path))


def load_resumable(path: Path) -> dict[str, Any]:
    """load_checkpoint, and the checksums of its shards, if any. Raises Damaged, ValueError."""
    saved = load_checkpoint(path)
    folder = shards_of(path)
    for name, digest in saved.get("shards", {}).items():
        if not (folder / name).is_file():
            raise Damaged(f"checkpoint {str(path)!r} lacks {folder.name}/{name}")
        if file_sha256(folder / name) != digest:
            raise Damaged(f"{folder / name} is damaged: its checksum is not that of its checkpoint")
    return saved


def _folder(settings: TrainingSettings) -> Path:
    return Path(settings.output)


def _check(settings: TrainingSettings, path: Path, saved: dict[str, Any]) -> None:
    """Raises ValueError where further steps would not be those of the run before."""
    if "privacy" in saved:
        raise ValueError(
            f"resume: {path.name} was trained with differential privacy, which further steps "
            "would end: expected a checkpoint without, or init in place of resume"
        )
    if saved["format"] != FORMAT:
        raise ValueError(
            f"resume: {path.name} is of a version that took sequences in another order: expected "
            "that version, or init in place of resume"
        )
    for name, value in settings.maths().items():
        # a checkpoint without a setting is older than it, and was made as its default is
        before = saved["settings"].get(name, getattr(TrainingSettings, name))
        if before != value and not (value is None and name in FOLLOW):
            raise ValueError(f"resume: {name}={value!r}: expected {before!r} as in {path.name}")
