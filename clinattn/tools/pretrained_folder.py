"""A folder of transformers with its weights and its tokenizer, checked before it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HEAD = "ForSequenceClassification"


@dataclass(frozen=True)
class PretrainedFolder:
    """A local folder with config.json. where: the folder, for messages."""

    path: Path
    where: str
    config: Any

    @property
    def architecture(self) -> str:
        return (getattr(self.config, "architectures", None) or ["none"])[0]

    @property
    def is_classifier(self) -> bool:
        return self.architecture.endswith(HEAD)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(self.config.id2label[i]) for i in range(self.config.num_labels))

    @property
    def independent(self) -> bool:
        """Each class has a probability for itself."""
        return bool(self.config.problem_type == "multi_label_classification")

    def loaded(self, load: Callable[[], Any]) -> Any:
        """Returns load(). Raises ValueError of one line in place of what transformers raises."""
        from clinattn.tools.model_report.source import first_line_of_errors

        return first_line_of_errors(str(self.path), load)

    @cached_property
    def model(self) -> Any:
        """The model of transformers, with its own attention, in eval mode and fp32."""
        from clinattn.tools.model_report.source import load_model

        return load_model(str(self.path))[0]

    @cached_property
    def tokenizer(self) -> Any:
        """Raises ValueError for one without a tokenizer.json, which knows no places of words."""
        from transformers import AutoTokenizer

        load = partial(AutoTokenizer.from_pretrained, self.path, local_files_only=True)
        tokenizer = self.loaded(load)
        if not tokenizer.is_fast:
            raise ValueError(f"{self.where} has a slow tokenizer: expected a tokenizer.json")
        return tokenizer

    @property
    def limit(self) -> int | None:
        """The most tokens that the model has positions for; None without a limit."""
        from clinattn.tools.model_report.report import position_limit

        return position_limit(self.model)

    def most_tokens(self, limit: int | None) -> int:
        """The most tokens of a text, by the tokenizer and a limit of positions."""
        most: int = self.tokenizer.model_max_length
        return min(most, limit or most)


def open_folder(path: Path) -> PretrainedFolder:
    """Raises ValueError without transformers, config.json or weights."""
    where = f"checkpoint {str(path)!r}"
    if find_spec("transformers") is None:
        raise ValueError(f"{where} needs: pip install 'clinattn[integrations]'")
    from clinattn.tools.model_report.source import WEIGHTS, read_config

    config = read_config(str(path), path)
    if not any(any(path.glob(pattern)) for pattern in WEIGHTS):
        raise ValueError(f"{where} has no weights: expected one of {', '.join(WEIGHTS)}")
    return PretrainedFolder(path, where, config)


def require_classifier(folder: PretrainedFolder) -> None:
    """Raises ValueError for a model without a head of two classes or more."""
    if not folder.is_classifier:
        raise ValueError(
            f"{folder.where} has the architecture {folder.architecture}: expected one {HEAD}"
        )
    if folder.config.num_labels < 2:
        raise ValueError(f"{folder.where} has one output, no classes: expected two or more")
