"""The one way to open a source: meds:DIR, meds-torch:DIR, text:FILE or profile:NAME."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from .meds_cohort import cohort_source
from .profiles import PROFILES, profile_source, require_profile
from .source import Source
from .store.making import Progress
from .text import text_source
from .timelines import on_stderr, silent, timelines_source


class Kind(NamedTuple):
    """A kind of data: its form, the older word for it, and what its events have besides ids."""

    form: str
    word: str
    has: frozenset[str] = frozenset()


KINDS = {
    "meds": Kind("meds:DIR", "meds_dir", frozenset({"times", "values"})),
    "meds-torch": Kind("meds-torch:DIR", "cohort", frozenset({"times", "values"})),
    "text": Kind("text:FILE", "text_file"),
    "profile": Kind("profile:NAME", "profile"),
}
FORMS = "{}, {}, {} or {}".format(*(kind.form for kind in KINDS.values()))


class Data(NamedTuple):
    """A value of --data. place: a folder, a file or the name of a profile."""

    kind: str
    place: str


def parse_data(data: str, tokenizer: str | Path | None = None) -> Data:
    """Splits "meds:DIR" and the like, before anything is read.

    Raises ValueError for another kind or profile, or a tokenizer with what is no text.
    """
    kind, colon, place = str(data).partition(":")
    if kind not in KINDS or not colon or not place:
        raise ValueError(
            f"data={str(data)!r}: expected {FORMS}, where NAME is one of {sorted(PROFILES)}"
        )
    if kind == "profile":
        require_profile(place)
    if tokenizer is not None and kind != "text":
        raise ValueError(f"tokenizer: expected only with text_file or text:FILE, not with {kind}:")
    return Data(kind, place)


def of_timelines(kind: str) -> bool:
    """Returns whether events of a kind of data have times, as those of patients have."""
    return kind in KINDS and "times" in KINDS[kind].has


def only_one(given: Mapping[str, str]) -> str | None:
    """Returns the only value that is given, None for none. Raises ValueError for more.

    given: the names by which a user can say where the data are, with what was said.
    """
    if len(given) > 1:
        *others, last = given
        many = "both" if len(given) == 2 else "all"
        raise ValueError(
            f"{', '.join(others)} and {last}: got {many}, expected exactly one of them"
        )
    return next(iter(given.values()), None)


def from_words(data: str | None, **words: str | Path | None) -> str | None:
    """Returns `data`, or what an older word for it says: meds_dir, text_file or profile.

    Raises ValueError where two are given.
    """
    given = {} if data is None else {"data": data}
    for kind, (_, word, _) in KINDS.items():
        if words.get(word) is not None:
            given[word] = f"{kind}:{words[word]}"
    return only_one(given)


def open_source(
    data: str,
    *,
    tokenizer: str | Path | None = None,
    labelled: bool = False,
    max_tokens: int = 4096,
    vocab_size: int = 8192,
    seed: int = 0,
    beside: Path | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = on_stderr,
) -> Source:
    """Opens the source that `data` names.

    tokenizer, labelled: for a text, a tokenizer.json or a folder with a tokenizer, in place of
        words, and whether rows need a label. max_tokens, vocab_size, seed: for a profile, whose
        sequences are drawn: the longest sequence with [CLS], the number of token ids, and the
        seed of the draw. beside, progress, say: as in timelines_source, for a MEDS folder of more
        events than are read into memory.
    Raises MedsError or ValueError, naming the input, where it cannot be used.
    """
    kind, place = parse_data(data, tokenizer)
    if kind == "meds":
        return timelines_source(place, beside, progress, say)
    if kind == "meds-torch":
        return cohort_source(place)
    if kind == "text":
        return text_source(place, tokenizer, labelled)
    return profile_source(place, max_tokens, vocab_size, seed)
