"""The folder of a model: as transformers writes it where it has the model type, else ours."""

from __future__ import annotations

import json
from typing import Any

from clinattn.encoder.checkpoints import save
from clinattn.encoder.families import OWN, Family, family_for
from clinattn.files.disk import folder_written_whole, write_text
from clinattn.tools.exporting.card import card
from clinattn.tools.exporting.model import Exported
from clinattn.tools.exporting.settings import ExportSettings
from clinattn.training.start import tokenizer_of
from clinattn.workloads.tokenizer import TextTokenizer

VOCABULARY, READING, TOKENIZER = "vocabulary.json", "clinattn.json", "tokenizer.json"


def family_of(model: Exported) -> tuple[Family, str]:
    """The family of the folder, and why it is ours; "" where transformers has one."""
    try:
        return family_for(model.config, model.module.task), ""
    except ValueError as error:
        return OWN, str(error)


def write_folder(
    model: Exported, settings: ExportSettings, evaluation: dict[str, Any] | None
) -> None:
    """Writes the folder whole or not at all."""
    assert settings.output is not None and model.saved is not None
    saved = model.saved
    family, why = family_of(model)
    with folder_written_whole(settings.output) as folder:
        labels = saved["classes"] or None  # a number has no class
        save(model.module, folder, labels, family)
        write_text(folder / VOCABULARY, _json({x: i for i, x in enumerate(saved["tokens"])}))
        write_text(folder / READING, _json(reading(saved)))
        tokenizer = tokenizer_of(saved)
        if tokenizer is not None:
            write_text(folder / TOKENIZER, tokenizer.json())
            write_text(folder / "tokenizer_config.json", _json(_of_tokenizer(tokenizer)))
        held = sorted(path.name for path in folder.iterdir())
        text = card(model, settings, family, why, evaluation, held)
        write_text(folder / "README.md", text)


def _of_tokenizer(tokenizer: TextTokenizer) -> dict[str, Any]:
    """Names of the special tokens, which transformers asks for beside a tokenizer.json."""
    own = tokenizer.vocabulary
    ids = {"cls": own.cls, "sep": own.sep, "mask": own.mask, "unk": own.unknown}
    found = {f"{name}_token": own.tokens[i] for name, i in ids.items() if i is not None}
    padding = next((x for x in ("[PAD]", "<pad>") if x in own.tokens), None)
    found |= {} if padding is None else {"pad_token": padding}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **found}


def reading(saved: dict[str, Any]) -> dict[str, Any]:
    """Facts by which a timeline or a text becomes the model's input, besides the vocabulary."""
    scales = saved.get("standard")
    return {
        "step": saved["step"],
        "settings": saved["settings"],
        "classes": list(saved["classes"]),
        "target": saved.get("target"),
        "values": None if scales is None else {n: _known(x) for n, x in scales.items()},
    }


def _known(x: Any) -> list[float | None]:
    return [None if value != value else value for value in x.tolist()]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
