"""Clinical sequences to run models on: a Source of a MEDS folder, a text file or a length profile.

Others import the names below, opening (the forms of --data), meds, source (what every Source has),
profiles, text and vocabulary (its special tokens), and seeds (numbers that follow from names).
"""

from .meds import MedsDataset, MedsError, Timeline, read_meds
from .opening import open_source
from .profiles import PROFILES, sample_lengths
from .source import Source
from .vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "PROFILES",
    "SPECIAL_TOKENS",
    "MedsDataset",
    "MedsError",
    "Source",
    "Timeline",
    "Vocabulary",
    "open_source",
    "read_meds",
    "sample_lengths",
]
