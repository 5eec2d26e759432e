"""The training loop: steps over packed batches, evaluations, checkpoints, and going on from one.

Every draw of a run (order, masks, dropout) is seeded by its place in the run, so a checkpoint's
few counters are the whole state of its randomness, and which rank computes a batch changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clinattn.encoder.tensor_files import safetensors_module
from clinattn.files.claims import claimed
from clinattn.files.disk import require_writable_folder
from clinattn.operator.packing import batch_by_tokens
from clinattn.workloads.seeds import derived_seed

from .balance import balanced, cost_of, shares
from .batches import Batches
from .checkpoint import checkpoint_path, content_of, save_checkpoint
from .clock import Clock, own_column, waited
from .engines import engine_of
from .interruption import Stop, deferred_signals
from .metrics import MetricsFile
from .objectives import HELD_OUT_EPOCH, Evaluated, LabelledBatch
from .optimiser import adamw, learning_rate
from .origin import resolve
from .ranks import ALONE, Ranks
from .resuming import saved_run, settled_resume
from .settings import TrainingSettings
from .start import (
    make_config,
    make_corpus,
    make_objective,
    read_published,
    settled,
    take_encoder,
    take_published,
)

Progress = Callable[[str, int, int], None]


class Diverged(RuntimeError):
    """The loss, its gradient or a weight is not finite."""


class Trainer:
    """A training run. Whatever is wrong with its input is raised when a Trainer is made.

    say: gets a line for each evaluation. say and progress are called on rank 0 alone.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        ranks: Ranks = ALONE,
        device: torch.device | None = None,
        progress: Progress = lambda message, done, total: None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.settings, self.ranks = settled_resume(settings, ranks), ranks
        settings = self.settings
        self.device = device or torch.device(settings.device)
        quiet = ranks.rank > 0
        self.progress = (lambda message, done, total: None) if quiet else progress
        self.say = (lambda line: None) if quiet else say
        if settings.accumulate % ranks.world:
            raise ValueError(
                f"accumulate={settings.accumulate}: expected a multiple of the {ranks.world} ranks"
            )
        if settings.shard:
            try:  # before any work
                safetensors_module("safetensors.torch")
            except ImportError as error:
                raise ValueError(f"shard: {error}") from None
            if ranks.world == 1:
                raise ValueError("shard: got one process, expected several, started by torchrun")
        self.folder = Path(settings.output)
        if not quiet:
            require_writable_folder(self.folder)
        found = saved_run(settings, ranks, self.say)
        saved = None if found is None else found[1]
        start, published = None, None
        if settings.init is not None and saved is None:
            origin = resolve(settings.init, "init")
            if origin.damaged:
                self.say(f"{'; '.join(origin.damaged)}; starting from {origin.path.name}")
            if origin.saved is None:
                published = read_published(origin.path, settings)
            start = origin.saved
        self.progress("reading sequences", 0, 1)
        self.corpus = make_corpus(settings, start or saved, published, self.progress)
        for warning in self.corpus.warnings():
            self.say(f"warning: {warning}")
        self.config = make_config(settings, self.corpus, start or saved, published)
        self.preset, self.architecture, self.lr = settled(settings, start or saved, published)
        self.objective = make_objective(settings, self.corpus, self.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed("weights", settings.seed))
            self.model = self.objective.model(self.config)
        if start is not None:
            take_encoder(self.model, start)
        if published is not None and (new := take_published(self.model, published)):
            self.say(f"{settings.init} has no tensors for {', '.join(new)}: drawn at random")
        dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        self.model.to(dtype)
        self.clock = Clock(self.device)
        self.engine = engine_of(self.model, settings, ranks, self.device, self.clock)
        with self._own_draws():
            self.engine.rehearse(self._loss_of_first)
        self.optimiser = adamw(self.model, settings.weight_decay)
        lengths = partial(self.objective.lengths, 0)
        count = len(self.corpus.train)
        self.batches = Batches(count, lengths, settings.batch_tokens, settings.seed)
        labelled = {"mlm": settings.mask_share, "clm": 1.0}.get(settings.task, 0.0)
        self.cost = cost_of(self.config, labelled)
        self.step, self.tokens = 0, 0
        self.metrics: MetricsFile | None = None
        if found is not None:
            self._restore(*found)

    def summary(self) -> str:
        """A line on the data and the model."""
        weights = sum(p.numel() for p in self.model.parameters())
        tokens = [int(self.objective.lengths(epoch).sum()) for epoch in (0, HELD_OUT_EPOCH)]
        return (
            f"{self.corpus.source}: {tokens[0]:,} tokens to train on, {tokens[1]:,} to evaluate; "
            f"{self.architecture}, {weights:,} weights, {len(self.corpus.tokens):,} token ids"
        )

    def run(self) -> int:
        """Train to the last step; 0, or the number of the signal that ended it, after saving.

        Raises Diverged; the checkpoints before it stay. ValueError where another run is in the
        folder.
        """
        if self.ranks.rank > 0:
            return self._run()
        with claimed(self.folder):
            self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.step)
            return self._run()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes weights such as those of another hospital; moments and the schedule stay.

        weights: by name, as `model.state_dict()` has them, all of them. Raises ValueError.
        """
        self.engine.take(weights, "load_weights")

    def advance(self, steps: int) -> int:
        """Trains for `steps` steps without evaluations, files or signals; returns their tokens.

        The order of sequences, every draw and the learning rate go on from where the last call
        ended, so that two calls are one call of both. Raises Diverged, and ValueError for more
        steps than the settings have left.
        """
        left = self.settings.steps - self.step
        if not 0 <= steps <= left:
            raise ValueError(f"steps={steps}: expected 0 to {left}, which the settings have left")
        before = self.tokens
        with self._own_draws():
            for _ in range(steps):
                self._train_step(Stop())
        return self.tokens - before

    def _own_draws(self) -> AbstractContextManager[None]:
        """Leaves the caller's random numbers as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        return torch.random.fork_rng(devices=devices)

    def _run(self) -> int:
        s = self.settings
        with self._own_draws(), deferred_signals() as stop:
            while True:
                if self.step % s.eval_every == 0 or self.step == s.steps:
                    self._evaluate()
                if self.step == s.steps:
                    return 0
                ended_by = self._train_step(stop)
                if ended_by or self.step % s.save_every == 0 or self.step == s.steps:
                    self._save()
                if ended_by:
                    return ended_by

    def _train_step(self, stop: Stop) -> int:
        """Updates the weights from `accumulate` batches, shared out over the ranks.

        Losses are summed, and their sum divided by the labels of all ranks: a batch with few of
        them counts for as few. Of several losses, each is divided by its own labels.
        Returns the signal that any rank has had, so that all agree.
        """
        s = self.settings
        started = self.clock.mark()
        self.model.train()
        self.optimiser.zero_grad()
        batches = self._next_batches()
        read = self.clock.mark()
        own = torch.tensor([batch.labels for batch in batches.values()]).sum(0).to(self.device)
        counts = self.ranks.sum(own).clamp(min=1).tolist()
        labels = counts[0]
        counted = self.clock.mark()
        totals = torch.zeros(2, dtype=torch.float64)  # loss, tokens
        for number, batch in batches.items():
            torch.manual_seed(derived_seed("dropout", s.seed, self.step, number))
            with self.engine.microbatch(last=number == max(batches)):
                with self._autocast():
                    output = batch.run(self.engine.trained)
                # the gradient is divided by the labels of the first loss when it is whole
                parts = zip(output.losses, batch.labels, counts, strict=True)
                loss = torch.stack([x * n * (labels / count) for x, n, count in parts]).sum()
                loss.backward()
            totals += torch.tensor([float(loss.detach()), len(batch.ids)], dtype=torch.float64)
        # between two collectives: reading, and computing
        spans = (started, read), (counted, self.engine.computed())
        busy = own_column(self.clock.seconds_of(spans), self.ranks)
        sums = self.ranks.sum(torch.cat([totals, busy.flatten()]).to(self.device))
        loss_sum, tokens = sums[:2].tolist()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= labels
        norm = self.engine.clip(s.clip)
        loss_mean = loss_sum / labels
        if not math.isfinite(norm) or not math.isfinite(loss_mean):
            raise Diverged(
                f"step {self.step + 1}: loss {loss_mean}, gradient norm {norm}: a lower lr may help"
            )
        rate = learning_rate(self.step, s.steps, s.warmup, self.lr)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.step += 1
        self.tokens += int(tokens)
        seconds = self.clock.seconds(started, self.clock.mark())
        idle = waited(sums[2:].view_as(busy)) / seconds
        per_second = tokens / seconds
        self._record(
            {
                "step": self.step,
                "split": "train",
                "loss": loss_mean,
                "lr": rate,
                "tokens": int(tokens),
                "tokens_per_s": per_second,
                "idle_share": None if math.isnan(idle) else idle,
                "grad_norm": norm,
            }
        )
        message = f"training: loss {loss_mean:.4f}, {per_second:,.0f} tokens/s"
        self.progress(message, self.step, s.steps)
        return int(self.ranks.largest(torch.tensor(stop.signal, device=self.device)))

    def _loss_of_first(self, model: nn.Module) -> Tensor:
        batch = self.objective.batch([0], 0, self.device)
        with self._autocast():
            return torch.stack(batch.run(model).losses).sum()

    def _next_batches(self) -> dict[int, LabelledBatch]:
        """Returns this rank's share of the next `accumulate` batches, by their number."""
        s = self.settings
        drawn = [self.batches.next() for _ in range(s.accumulate)]
        read = np.array(sorted({index for _, indices in drawn for index in indices}))
        lengths = dict(zip(read.tolist(), self.batches.lengths(read).tolist(), strict=True))
        batches = balanced(drawn, lengths, s.batch_tokens, self.cost)
        costs = [sum(self.cost(lengths[i]) for i in indices) for _, indices in batches]
        own = shares(costs, self.ranks.world)[self.ranks.rank]
        return {
            number: self.objective.batch(indices, epoch, self.device)
            for number, (epoch, indices) in enumerate(batches)
            if number in own
        }

    def _evaluate(self) -> None:
        figures = self.objective.score(self._held_out(), self.ranks)
        split = self.corpus.evaluated
        self._record({"step": self.step, "split": split} | figures)
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in figures.items()
            if value is not None
        )
        self.say(f"step {self.step}: {split.replace('_', '-')} {shown}")

    @torch.no_grad()
    def _held_out(self) -> Iterator[Evaluated]:
        self.model.eval()
        lengths = self.objective.lengths(HELD_OUT_EPOCH).tolist()
        batches = batch_by_tokens(lengths, self.settings.batch_tokens)
        own = list(enumerate(batches))[self.ranks.rank :: self.ranks.world]
        forwards = self.engine.forwards(len(own), -(-len(batches) // self.ranks.world))
        for place in range(forwards):
            # a rank without a batch of its own takes one for the layers that others are waiting for
            done, indices = own[place] if place < len(own) else (len(batches), batches[-1])
            self.progress("evaluating", done, len(batches))
            batch = self.objective.batch(indices, HELD_OUT_EPOCH, self.device)
            with self._autocast():
                output = batch.run(self.model)
            if place < len(own):
                yield Evaluated(indices, batch, output)

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _record(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(row)

    def _save(self) -> None:
        """Saves a checkpoint. Raises Diverged, and removes none, where a weight is not finite."""
        wrong = torch.tensor(0 if self.engine.finite() else 1, device=self.device)
        if self.ranks.largest(wrong):
            raise Diverged(f"step {self.step}: a weight is not finite: a lower lr may help")
        path, weights = checkpoint_path(self.folder, self.step), self.engine.weights()
        moments = self.engine.moments(path, self.optimiser, weights)
        if self.ranks.rank == 0:
            content = content_of(self.settings, self.corpus, self.model, self.optimiser, self.step)
            del content["optimiser"]
            content |= {"model": weights} | moments
            settled = {"preset": self.preset, "lr": self.lr}
            content["settings"] = self.settings.maths() | settled
            content |= {"epoch": self.batches.epoch, "place": self.batches.place}
            content |= {"architecture": self.architecture}
            save_checkpoint(self.folder, content, self.settings.keep)

    def _restore(self, path: Path, saved: dict[str, Any]) -> None:
        if saved["data"] != self.corpus.fingerprint:
            raise ValueError(
                f"resume: {self.corpus.source} gives other sequences than step {saved['step']} "
                "was trained on: expected the same data"
            )
        self.engine.take(saved["model"], f"resume: step {saved['step']}")
        self.engine.take_moments(path, saved, self.optimiser)
        self.batches.seek(saved["epoch"], saved["place"])
        self.step = saved["step"]
