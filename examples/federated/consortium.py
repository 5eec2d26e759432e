"""The agreement of a federation's hospitals, and the sums of their coordinator."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.workloads import Vocabulary
from clinattn.workloads.seeds import derived_seed

Weights = dict[str, np.ndarray]


class Trained(NamedTuple):
    """The answer of a hospital in a round.

    tokens: that it trained on. epsilon: spent by its patients in all rounds until now, 0 without
    differential privacy.
    """

    weights: Weights
    tokens: int
    epsilon: float


@dataclass(frozen=True)
class Plan:
    """Settings that are the same in all hospitals.

    label_code to lr: as in TrainingSettings. least: a code that fewer patients of a hospital have
    is not told to the others. noise: of Opacus, over the norm that a patient's gradient is clipped
    to; 0 trains without differential privacy.
    """

    label_code: str
    hospitals: int = 5
    rounds: int = 10
    cuts: int = 1
    max_tokens: int = 128
    batch_tokens: int = 2048
    lr: float = 1e-3
    seed: int = 0
    least: int = 3
    noise: float = 0.0
    hidden_size: int = 64
    num_layers: int = 2

    @classmethod
    def read(cls, path: Path) -> "Plan":
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def model(self, tokens: Sequence[str]) -> SequenceClassifier:
        """The model that all begin from."""
        size, layers = self.hidden_size, self.num_layers
        shape = {"num_heads": 2, "intermediate_size": 96, "windows": (), "pooling": "mean"}
        config = EncoderConfig.preset(
            "tiny", vocab_size=len(tokens), hidden_size=size, num_layers=layers, **shape
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("weights", self.seed))
            return SequenceClassifier(config, 2)


def weights_of(model: torch.nn.Module) -> Weights:
    return {name: x.numpy().copy() for name, x in model.state_dict().items()}


def vocabulary(counts: Iterable[dict[str, int]]) -> list[str]:
    """Returns the tokens of all, from the number of patients with each code at each hospital."""
    total = sum(map(Counter, counts), Counter())
    return list(Vocabulary.build(list(total), np.array(list(total.values()))).tokens)


def average(trained: Sequence[Trained]) -> Weights:
    """Returns the mean of the hospitals' weights by their tokens, added up in the order given."""
    total = sum(part.tokens for part in trained)
    shares = [(part.weights, part.tokens / total) for part in trained]
    return {name: sum(own[name] * share for own, share in shares) for name in trained[0].weights}


def leave(output: Path, weights: Weights, tokens: Sequence[str], **figures: dict) -> None:
    """Writes weights.npz, and result.json with the tokens and figures by hospital."""
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "weights.npz", **weights)
    (output / "result.json").write_text(json.dumps({"tokens": list(tokens)} | figures))
