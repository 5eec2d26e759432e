"""Clinical sequences to run models on: a Source of a MEDS folder, a text file or a length profile.

Others import the names below, opening (the forms of --data), source (what every Source has),
pieces (columns of events), store (timelines on disk), timelines (when they are made), splits,
labels (of tasks), code_names, meds, profiles, vocabulary (special tokens), seeds (numbers from
names), and of texts: text, tables and encodings (files), words, tokenizer and wordpiece.
"""

from .meds import MedsDataset, Timeline, read_meds
from .meds_files import MedsError
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
