"""A hospital's own computing in a federation, whatever framework carries its messages.

It counts codes, from which all agree on token ids. In a round it takes the weights of all, trains
about one pass over its own patients, and returns weights and a number of tokens. A round follows
from its arguments: the moments of the optimiser begin anew in each, so that a client may be stopped
and started between rounds.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consortium import Plan, Trained, Weights, weights_of
from privacy import spent, train_in_private
from sklearn.metrics import average_precision_score

from clinattn.training.batches import padded
from clinattn.training.checkpoint import content_of, save_checkpoint
from clinattn.training.corpus import read_corpus
from clinattn.training.loop import Trainer
from clinattn.training.optimiser import adamw
from clinattn.training.settings import TrainingSettings

SAME = ("label_code", "cuts", "max_tokens", "batch_tokens", "lr", "seed")


class Hospital:
    """A hospital with a MEDS folder. folder, output: where its data are, and its checkpoints go."""

    def __init__(self, folder: str | Path, plan: Plan, output: str | Path):
        if plan.noise and plan.cuts > 1:
            raise ValueError(f"cuts={plan.cuts}: expected 1 with noise, whose samples are patients")
        self.plan, self.output = plan, Path(output)
        same = {name: getattr(plan, name) for name in SAME}
        self.settings = TrainingSettings(f"meds:{folder}", "classify", output=output, **same)
        self.corpus = read_corpus(self.settings)
        self.joined: Sequence[str] | None = None
        self.tokens = sum(map(len, self.corpus.train))
        self.steps = math.ceil(self.tokens / plan.batch_tokens)  # of a round

    def counts(self) -> dict[str, int]:
        """The number of patients with each code, where it is `least` or more."""
        seen = {(x.subject, token) for x in self.corpus.train for token in x.ids.tolist()}
        of = Counter(self.corpus.tokens[i] for _, i in seen if i not in self.corpus.special)
        return {code: patients for code, patients in of.items() if patients >= self.plan.least}

    def join(self, tokens: Sequence[str]) -> "Hospital":
        """Makes a trainer with the token ids of all, from a checkpoint that says them."""
        if self.joined == tokens:
            return self
        model, shared = self.plan.model(tokens), replace(self.corpus, tokens=tuple(tokens))
        begin = self.output / "begin"
        begin.mkdir(parents=True, exist_ok=True)
        content = content_of(self.settings, shared, model, adamw(model, 0.0), 0)
        init, steps = save_checkpoint(begin, content, keep=1), self.plan.rounds * self.steps
        self.trainer = Trainer(replace(self.settings, init=init, steps=steps))
        self.corpus, self.joined = self.trainer.corpus, tokens
        return self

    def train(self, number: int, weights: Weights) -> Trained:
        """Trains in round `number`, of which the first is 0, from the weights of all."""
        trainer, plan = self._with(weights), self.plan
        if plan.noise:
            train_in_private(trainer.model, self.corpus.train, plan.noise, self.steps, plan.lr)
            epsilon = self._spent(number + 1)["epsilon"]
            return Trained(weights_of(trainer.model), self.tokens, epsilon)
        trainer.optimiser.state.clear()
        trainer.step = number * self.steps
        trainer.batches.seek(number, 0)
        tokens = trainer.advance(self.steps)
        return Trained(weights_of(trainer.model), tokens, 0.0)

    def scores(self, weights: Weights) -> tuple[np.ndarray, np.ndarray]:
        """Labels and scores of its patients to evaluate, (N,) each."""
        model, examples = self._with(weights).model.eval(), self.corpus.held_out
        ids, arguments = padded(examples, torch.device("cpu"))
        with torch.no_grad():
            scores = model(ids, **arguments).logits.diff()[:, 0].numpy()
        return np.array([example.label for example in examples]), scores

    def finish(self, weights: Weights) -> float:
        """Leaves a checkpoint for `clinattn predict`; returns AUPRC on the patients to evaluate.

        NaN for fewer than `least` patients of a label: the AUPRC of one patient tells the label.
        """
        labels, scores = self.scores(weights)
        trainer, step = self.trainer, self.plan.rounds * self.steps
        content = content_of(self.settings, self.corpus, trainer.model, trainer.optimiser, step)
        if self.plan.noise:
            content["privacy"] = self._spent(self.plan.rounds)
        save_checkpoint(self.output, content, keep=1)
        of = [{x.subject for x in self.corpus.held_out if x.label == label} for label in (0, 1)]
        told = min(map(len, of)) >= self.plan.least
        return float(average_precision_score(labels, scores)) if told else math.nan

    def _spent(self, rounds: int) -> dict[str, Any]:
        return spent(len(self.corpus.train), self.plan.noise, self.steps, rounds)

    def _with(self, weights: Weights) -> Trainer:
        self.trainer.load_weights({name: torch.from_numpy(x) for name, x in weights.items()})
        return self.trainer


opened = lru_cache(Hospital)  # a process reads the data of its hospital once
