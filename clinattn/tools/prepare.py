"""`clinattn prepare`: a MEDS folder as timelines on disk, for training and other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinattn.tools import console
from clinattn.tools.cpus import cpus
from clinattn.tools.options import takes
from clinattn.training.fields import check, option


@dataclass(frozen=True)
class PrepareSettings:
    """A MEDS folder, and the folder of its timelines. Raises ValueError.

    processes: None for one on each CPU.
    """

    data: str | None = option(None, "The events: meds:DIR, a MEDS folder.")
    output: Path | None = option(
        None, "A new folder for the timelines, or the one in which an earlier run has begun them."
    )
    processes: int | None = option(
        None,
        "Processes at a time, each with up to 1.5 GB; the files are the same for any number.",
        least=1,
        shown="one on each CPU",
    )

    def __post_init__(self) -> None:
        check(self)
        kind, _, folder = (self.data or "").partition(":")
        if kind != "meds" or not folder:
            raise ValueError(f"data={self.data!r}: expected meds:DIR, a MEDS folder")
        if self.output is None:
            raise ValueError("output: got none, expected a folder for the timelines")

    @property
    def meds_dir(self) -> Path:
        return Path(str(self.data).partition(":")[2])


@takes(PrepareSettings, words=False)
def prepare(given: dict[str, Any]) -> None:
    """Writes the patients of a MEDS folder as files that training maps instead of reading them.

    --data meds:OUTPUT then opens them in each command, at once and in little memory, however many
    events there are. A run that ended early goes on where it stopped.
    """
    settings = PrepareSettings(**given)
    assert settings.output is not None
    from clinattn.workloads.store.format import about
    from clinattn.workloads.store.prepare import prepare as made

    processes = settings.processes or cpus().useful
    with console.progress_bar() as progress:
        new = made(settings.meds_dir, settings.output, processes, progress)
    said = about(settings.output)
    events = sum(said["events"])
    state = "wrote" if new else "nothing to do: these timelines are whole in"
    console.out.print(
        f"{state} {settings.output}: {events:,} events of {said['patients']:,} patients; "
        f"--data meds:{settings.output} opens them",
        soft_wrap=True,
    )
