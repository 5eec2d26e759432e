"""Clinical length profiles: how long real notes and patient timelines are, without the data.

Log-normals fitted to published figures; a draw is clipped to 1..max_tokens, as models cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .source import Source
from .vocabulary import SPECIAL_TOKENS, Vocabulary

CHUNK_TOKENS = 128  # PLM-ICD encodes a note as independent rows of this many tokens
POOL = 2000  # sequences that are drawn from a profile


@dataclass(frozen=True)
class Profile:
    """draw(rng, count, max_tokens) gives uncut token counts."""

    description: str
    source: str
    draw: Callable[[np.random.Generator, int, int], np.ndarray]


def _log_normal(mu: float, sigma: float) -> Callable[..., np.ndarray]:
    return lambda rng, count, max_tokens: rng.lognormal(mu, sigma, count)


_DISCHARGE = _log_normal(7.651, 0.388)


def _chunks(rng: np.random.Generator, count: int, max_tokens: int) -> np.ndarray:
    """Rows of CHUNK_TOKENS: each note gives full rows and one for what is left."""
    rows = np.empty(0, dtype=np.int64)
    while len(rows) < count:
        notes = np.ceil(_DISCHARGE(rng, count // 8 + 1, max_tokens)).astype(np.int64)
        full, rest = np.divmod(notes, CHUNK_TOKENS)
        cut = [np.append(np.full(n, CHUNK_TOKENS), r) for n, r in zip(full, rest, strict=True)]
        rows = np.concatenate([rows, *cut])
        rows = rows[rows > 0]
    return rows[:count]


PROFILES = {
    "note_discharge": Profile(
        "discharge summaries: p50 2,102, p90 3,457, p99 5,185 tokens",
        "physionet labelled-notes-hospital-course 1.1.0: mean 2,267, sd 914",
        _DISCHARGE,
    ),
    "ehr_population": Profile(
        "system-wide patient timelines: p50 71, p90 1,380, p99 10,235 tokens",
        "som-shahlab/long_context_clues dataloader_stats (STARR, 2.6 million patients)",
        _log_normal(4.263, 2.25),
    ),
    "ehr_icu": Profile(
        "intensive-care timelines: p50 about 5,200, p90 19,700 events",
        "fit to the patients of the MIMIC-IV demo",
        _log_normal(8.557, 1.038),
    ),
    "note_chunks": Profile(
        f"discharge summaries cut into rows of {CHUNK_TOKENS} tokens",
        "JoakimEdin/medical-coding-reproducibility (PLM-ICD)",
        _chunks,
    ),
    "fixed": Profile(
        "every sequence at the cap: no padding at all",
        "control",
        lambda rng, count, max_tokens: np.full(count, max_tokens),
    ),
}
"""The clinical length profiles by name: a description, its source, and how lengths are drawn."""


def sample_lengths(profile: str, count: int, max_tokens: int, seed: int = 0) -> np.ndarray:
    """`count` token counts, int64 in 1..max_tokens, the same for the same seed.

    Raises ValueError for an unknown profile, or a count or cap below 1.
    """
    require_profile(profile)
    for name, value in (("count", count), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    lengths = PROFILES[profile].draw(np.random.default_rng(seed), count, max_tokens)
    return np.clip(np.ceil(lengths), 1, max_tokens).astype(np.int64)


def require_profile(profile: str) -> None:
    """Raises ValueError, with the choices, for a name that is no profile."""
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r} is unknown: expected one of {sorted(PROFILES)}")


def profile_source(profile: str, max_tokens: int, vocab_size: int, seed: int = 0) -> Source:
    """POOL sequences of random tokens at the lengths of a profile, [CLS] counted.

    The same arguments draw the same. Raises ValueError as sample_lengths does.
    """
    lengths = sample_lengths(profile, POOL, max_tokens, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randint(len(SPECIAL_TOKENS), vocab_size, (length,), generator=generator)[1:]
        for length in lengths.tolist()
    ]
    offsets = np.r_[0, np.cumsum(lengths - 1)].astype(np.int64)
    names = tuple(f"token {i}" for i in range(len(SPECIAL_TOKENS), vocab_size))
    return Source(
        name=profile,
        title=f"length profile {profile}",
        unit="sequences",
        where=f"profile={profile!r}",
        subjects=range(POOL),
        begins=offsets[:-1],
        starts=offsets[:-1],
        ends=offsets[1:],
        ids=torch.cat(drawn).numpy(),
        vocabulary=Vocabulary(SPECIAL_TOKENS + names, unknown=None),
        note=PROFILES[profile].description,
    )
