"""Clinical encoders on packed sequences: shapes by preset, language and classification heads.

Others import the names below, what heads.py says of labels, checkpoints (folders of transformers),
families (their model types), tensor_files (safetensors), the descriptions in presets, embeddings
and linear, linear_op (layers of the CPU).
"""

from .config import EncoderConfig
from .embeddings import patches
from .heads import CausalLanguageModel, HeadOutput, MaskedLanguageModel, SequenceClassifier
from .model import Encoder
from .presets import PRESETS
from .pretraining import PretrainingModel, PretrainingOutput

__all__ = [
    "PRESETS",
    "CausalLanguageModel",
    "Encoder",
    "EncoderConfig",
    "HeadOutput",
    "MaskedLanguageModel",
    "PretrainingModel",
    "PretrainingOutput",
    "SequenceClassifier",
    "patches",
]
