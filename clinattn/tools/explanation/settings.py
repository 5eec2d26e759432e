"""Settings of `clinattn explain`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from clinattn.training.fields import check, check_device, option


class Method(NamedTuple):
    """text: what it does, for readers of the page. signed: it tells what speaks against a class."""

    title: str
    text: str
    signed: bool


# The first two are those of the command: they find every planted cause (docs/explain.md).
METHODS = {
    "attnlrp": Method(
        "AttnLRP",
        "hands the prediction back through the layers of the model, to each token its part "
        "(Achtibat et al., 2024)",
        True,
    ),
    "rollout": Method(
        "Rollout",
        "follows attention through all layers. It knows of no class, and has no sign (Abnar and "
        "Zuidema, 2020)",
        False,
    ),
    "integrated_gradients": Method(
        "Integrated gradients",
        "sums the effect of each token while tokens without meaning turn into it (Sundararajan et "
        "al., 2017)",
        True,
    ),
    "relevance": Method(
        "Relevance",
        "follows attention that raises the class through all layers. It has no sign (Chefer et "
        "al., 2021)",
        False,
    ),
    "attingrad": Method(
        "AttInGrad",
        "is attention of the last layer, times the length of input times gradient. It has no sign "
        "(Edin et al., 2024)",
        False,
    ),
    "gradient_x_input": Method(
        "Gradient x input",
        "is what a very small change of each token would do; behind norms its sign may be wrong "
        "(Shrikumar et al., 2017)",
        True,
    ),
}


@dataclass(frozen=True)
class ExplainSettings:
    """A classifier, and the patient or note whose prediction is explained.

    checkpoint: of `clinattn train --task classify`, the folder of such a run, or a folder of
    transformers. methods: one or two names; without the second it is the first other of METHODS.
    Raises ValueError.
    """

    checkpoint: str
    methods: tuple[str, ...] = ()
    data: str | None = option(None, "The folder with the patient: meds:DIR or meds-torch:DIR.")
    patient: str | None = option(None, "With --data: the patient's subject_id.")
    text: Path | None = option(None, "The text of one note, in place of --data and --patient.")
    tokenizer: Path | None = option(
        None, "With --text: the tokenizer.json of a checkpoint that has none."
    )
    encoding: str | None = option(
        None,
        "With --text: of what encoding the file is, such as big5.",
        shown="UTF-8, GB18030 or marked UTF-16",
    )
    cut: int | None = option(
        None,
        "The cut of the timeline to predict at, from 1; 0 is its end, as for a patient of today.",
        least=0,
        shown="the last of training",
    )
    at: str | None = option(
        None,
        "With a checkpoint of task labels: the prediction time, such as 2150-03-01T12:00. Events "
        "at it are read.",
        shown="the end of the timeline",
    )
    target: str | None = option(None, "The class to explain.", shown="the most probable")
    top: int = option(15, "Rows of the table of the strongest.", least=1)
    visit_gap: float = option(24.0, "Hours without an event that separate two visits.")
    draws: int = option(8, "Random removals that the strongest are held against.", least=2)
    seed: int = option(0, "Seed of the random removals.")
    device: str = option(
        "cpu", "Where to run.", choices=("cpu", "cuda"), shown="cuda if there, else cpu"
    )
    threads: int | None = option(None, "Threads of torch.", least=1, shown="torch's")

    def __post_init__(self) -> None:
        check(self)
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"method={method!r}: expected one of {tuple(METHODS)}")
        if len(self.methods) > 2 or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"method={self.methods}: expected one or two different ones")
        others = (name for name in METHODS if name not in self.methods)
        while len(self.methods) < 2:
            object.__setattr__(self, "methods", (*self.methods, next(others)))
        if not 0 < self.visit_gap < float("inf"):
            raise ValueError(f"visit_gap={self.visit_gap}: expected more than 0 hours")
        if self.text is None:
            self._check_patient()
        else:
            for name in ("data", "patient", "cut", "at"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} and text: got both, expected a patient or a text")
        check_device(self.device)

    def _check_patient(self) -> None:
        if self.data is None and self.patient is None:
            raise ValueError("got neither data and patient nor text: expected one of them")
        if self.patient is None:
            raise ValueError("patient: got none, expected the subject_id of one in data")
        from clinattn.workloads.opening import of_timelines

        kind, _, folder = (self.data or "").partition(":")
        if not of_timelines(kind) or not folder:
            raise ValueError(f"data={self.data!r}: expected meds:DIR or meds-torch:DIR")
        if self.tokenizer is not None:
            raise ValueError("tokenizer: expected only with text")
        if self.cut is not None and self.at is not None:
            raise ValueError("cut and at: got both, expected one of them")
        if self.at is not None:
            try:
                naive = datetime.fromisoformat(self.at).tzinfo is None
            except ValueError:
                naive = False
            if not naive:
                raise ValueError(
                    f"at={self.at!r}: expected a time such as 2150-03-01T12:00, without a zone"
                )
