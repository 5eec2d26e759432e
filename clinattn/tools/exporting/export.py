"""From settings to the folder and the program, each whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from clinattn.files.disk import parse_json, require_new_folder, require_writable
from clinattn.files.shapes import COUNT, TEXT, Each, Kind, Named, require
from clinattn.tools.exporting.model import Exported, read_model
from clinattn.tools.exporting.program import exported, signature, write_program
from clinattn.tools.exporting.settings import ExportSettings
from clinattn.training.origin import Origin, sha256

Progress = Callable[[str, int, int], None]
EVALUATION = Named(
    {
        "schema": COUNT,
        "kind": Kind("'evaluation'", lambda x: x == "evaluation"),
        "task": Kind("a task", lambda x: x in ("binary", "classes", "numbers")),
        "source": Named({"file": TEXT}),
        "by": Each(TEXT),
        "groups": Each(Named({"rows": COUNT, "figures": Named({}, others=Named({}))}), least=1),
    }
)


def export(settings: ExportSettings, progress: Progress) -> Iterator[str]:
    """Writes what the settings ask for; yields a line on each, and on what is left out.

    Raises ValueError for bad input, before anything is written.
    """
    if settings.output is not None:
        require_new_folder(settings.output)
    if settings.torch_export is not None:
        require_writable(settings.torch_export, "torch_export")
    evaluation = _evaluation(settings)
    progress(f"read: {settings.checkpoint}", 0, 3)
    model = read_model(settings.checkpoint)
    if model.saved is None and settings.output is not None:
        raise ValueError(
            f"checkpoint={settings.checkpoint!r} is a folder of transformers already: expected "
            "torch_export without output"
        )
    if model.config.channels:
        raise ValueError(
            f"checkpoint={settings.checkpoint!r} reads signals: expected one of tokens"
        )
    if evaluation is not None:
        _check_same(model, settings, evaluation)
    yield from model.notes
    if settings.output is not None:
        from clinattn.tools.exporting.folder import family_of, write_folder

        progress("write the folder", 1, 3)
        family, why = family_of(model)
        write_folder(model, settings, evaluation)
        if why:
            yield f"{why}: the folder is loaded by clinattn alone, as its README.md says"
        yield f"wrote {settings.output}, a folder of {family.model_type}"
    if settings.torch_export is not None:
        progress("trace the program", 2, 3)
        yield _program(model, settings)


def _program(model: Exported, settings: ExportSettings) -> str:
    assert settings.torch_export is not None
    module = model.with_sdpa() if settings.plain else model.module
    write_program(exported(module, model.config, settings.plain), settings.torch_export)
    needs = "torch alone" if settings.plain else "torch, after `import clinattn`"
    takes = signature(model.config, settings.plain)
    return f"wrote {settings.torch_export}, for {needs}; it takes {takes} and returns logits"


def _check_same(model: Exported, settings: ExportSettings, evaluation: dict[str, Any]) -> None:
    """Raises ValueError for figures of another checkpoint, where their file names its own."""
    known = evaluation["source"].get("checkpoint")
    given = known.get("sha256") if isinstance(known, dict) else None
    if given is not None and given != sha256(Origin(model.path, model.saved)):
        raise ValueError(
            f"evaluation={str(settings.evaluation)!r} is of another checkpoint, "
            f"{known.get('name')!r}: expected one of {str(model.path)!r}"
        )


def _evaluation(settings: ExportSettings) -> dict[str, Any] | None:
    if settings.evaluation is None:
        return None
    where = f"evaluation={str(settings.evaluation)!r}"
    try:
        found = parse_json(settings.evaluation.read_bytes())
        require(found, EVALUATION)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}: expected the JSON of clinattn evaluate") from None
    return found
