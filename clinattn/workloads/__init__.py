"""Clinical sequences to run models on: length profiles, and real ones from a MEDS folder.

Others import the names below, meds (how a folder is read) and vocabulary (special tokens).
"""

from .meds import MedsDataset, MedsError, Timeline, read_meds
from .profiles import PROFILES, sample_lengths
from .vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "PROFILES",
    "SPECIAL_TOKENS",
    "MedsDataset",
    "MedsError",
    "Timeline",
    "Vocabulary",
    "read_meds",
    "sample_lengths",
]
