"""Clinical encoders on packed sequences: sizes by preset, masked-LM and classification heads."""

from .config import PRESETS, EncoderConfig
from .heads import HeadOutput, MaskedLanguageModel, SequenceClassifier
from .model import Encoder

__all__ = [
    "PRESETS",
    "Encoder",
    "EncoderConfig",
    "HeadOutput",
    "MaskedLanguageModel",
    "SequenceClassifier",
]
