"""The benchmark: check, calibrate, warm up, then time the four ways in interleaved rounds."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from clinattn.backends.select import implementation
from clinattn.encoder import EncoderConfig, MaskedLanguageModel
from clinattn.encoder.heads import IGNORE
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Spent, here
from clinattn.workloads.opening import open_source, parse_data
from clinattn.workloads.source import Source
from clinattn.workloads.splits import ALL, TRAIN, chosen_split
from clinattn.workloads.timelines import silent

from .agreement import check_agreement
from .measure import peak_memory, quartiles
from .settings import DTYPES, BenchmarkSettings, EncoderSettings
from .summary import describe, speedups
from .variants import VARIANTS, Runner, TimeOver, Variant, padded_length
from .workload import MaskedExample, Workload, shortened

CHECK_SEQUENCES, CHECK_TOKENS = 4, 512
CALIBRATION_TOKENS, WARM_UP_TOKENS = 4096, 64
BATCH_TOKENS, MIN_BATCH, MAX_BATCH = 16_384, 2, 32
PLANNED_ROUNDS, MAX_ROUNDS = 3, 15
SAFETY = 0.8  # of the time that is left goes into the plan: the estimate is linear in tokens
MIN_SEQUENCES = 4

Progress = Callable[[str, int, int], None]


@dataclass
class Benchmark:
    """The state of one run; result() at any time says what has been measured so far.

    say: gets a line for each measurement.
    """

    settings: BenchmarkSettings
    progress: Progress = lambda message, done, total: None
    say: Callable[[str], None] = lambda line: None
    workload: Workload | None = None
    agreement: dict[str, Any] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    batch_size: int = 0
    spent: dict[tuple[str, str], list[Spent]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[tuple[str, str], int | None] = field(default_factory=dict)
    too_large: list[tuple[str, Variant]] = field(default_factory=list)
    interrupted: bool = False
    time_over: bool = False

    def run(self) -> dict[str, Any]:
        """All of it. Ctrl-C ends it early, as the deadline does, and the result says so.

        Raises MedsError, ValueError or Disagreement before anything is timed.
        """
        self.until = time.perf_counter() + self.settings.budget_s
        try:
            self._prepare()
            self._plan()
            self._warm_up()
            self._rounds()
        except KeyboardInterrupt:
            self.interrupted = True
        except TimeOver:
            self.time_over = True
        return self.result()

    def _begin(self, message: str, done: int, total: int) -> None:
        """Raises TimeOver where there is no time for what is to begin."""
        if time.perf_counter() > self.until:
            raise TimeOver
        self.progress(message, done, total)

    def _prepare(self) -> None:
        s = self.settings
        self._begin("reading sequences", 0, 1)
        if s.threads is not None:
            torch.set_num_threads(s.threads)
        torch.manual_seed(s.seed)
        self.workload = open_workload(s, self.progress)
        config = encoder_config(s, vocab_size=len(self.workload.source.vocabulary))
        device = torch.device(s.device)
        model = MaskedLanguageModel(config).to(device, DTYPES[s.dtype])
        self.runner = Runner(model, device, self.until)
        self.config = config

        self._begin("checking that all four agree", 0, 1)
        indices = self.workload.sample(min(CHECK_SEQUENCES, len(self.workload.lengths)), s.seed)
        examples = shortened([self.workload.example(i, s.seed) for i in indices], CHECK_TOKENS)
        if not any((example.labels != IGNORE).any() for example in examples):
            raise ValueError(
                f"{self.workload.source.where}: none of the {len(examples)} sequences that are "
                "checked has a masked token: expected longer sequences"
            )
        self.agreement = {
            "sequences": len(examples),
            "tokens": sum(len(example.ids) for example in examples),
            "errors": check_agreement(self.runner, examples, batch_size=2),
        }

    def _plan(self) -> None:
        """Choose how many sequences to run from the time that one takes."""
        assert self.workload is not None
        s, lengths = self.settings, self.workload.lengths
        rates = self._seconds_per_token()
        seconds_left = self.until - time.perf_counter()
        available = len(lengths)
        counts = [s.sequences] if s.sequences is not None else descending(available, MIN_SEQUENCES)
        for count in counts:
            indices = self.workload.sample(min(count, available), s.seed)
            self.lengths = [int(lengths[i]) for i in indices]
            self.batch_size = s.batch_size or self._default_batch_size(count)
            if self._estimate(rates) < SAFETY * seconds_left:
                break
        self.examples = [self.workload.example(i, s.seed) for i in indices]

    def _default_batch_size(self, sequences: int) -> int:
        """About BATCH_TOKENS tokens, yet four batches or more, so that bucketing has a choice."""
        assert self.workload is not None
        by_tokens = int(BATCH_TOKENS / self.workload.lengths.mean())
        return max(MIN_BATCH, min(by_tokens, MAX_BATCH, sequences // 4))

    def _seconds_per_token(self) -> dict[tuple[str, str], float]:
        """Returns the seconds of a computed token, by mode and attention.

        On a GPU they are those of a whole batch that has run before: launches would fill the time
        of a small batch, and compilers that of a first.
        """
        assert self.workload is not None
        lengths, seed = self.workload.lengths, self.settings.seed
        on_gpu = self.runner.device.type == "cuda"
        about = BATCH_TOKENS if on_gpu else CALIBRATION_TOKENS
        count = int(np.clip(about / lengths.mean(), 1, MAX_BATCH))
        indices = self.workload.sample(min(count, len(lengths)), seed)
        batch = [self.workload.example(i, seed) for i in indices]
        own = [len(example.ids) for example in batch]
        rates: dict[tuple[str, str], float] = {}
        for mode in self.settings.modes:
            for attention, variant in {v.attention: v for v in VARIANTS}.items():
                self._begin(f"calibrating: {mode}", len(rates), 2 * len(self.settings.modes))
                first = batch if on_gpu else shortened(batch, WARM_UP_TOKENS)
                tokens = variant.computed_tokens(own, list(range(len(own))))
                rates[mode, attention] = 0.0
                try:
                    self.runner.seconds(mode, variant, [first])
                    seconds = self.runner.seconds(mode, variant, [batch])
                    rates[mode, attention] = seconds / tokens
                except torch.OutOfMemoryError:
                    continue  # the warm-up meets it again, and takes note
        return rates

    def _estimate(self, rates: dict[tuple[str, str], float]) -> float:
        """Seconds for the planned rounds and the warm-up."""
        total = 0.0
        for mode in self.settings.modes:
            for variant in VARIANTS:
                tokens = [variant.computed_tokens(self.lengths, b) for b in self._batches(variant)]
                rounds = self.settings.rounds or PLANNED_ROUNDS
                first = sum(tokens) if self.runner.device.type == "cuda" else max(tokens)
                total += rates[mode, variant.attention] * (rounds * sum(tokens) + first)
        return total

    def _batches(self, variant: Variant) -> list[list[int]]:
        return variant.batches(self.lengths, self.batch_size)

    def _cases(self) -> list[tuple[str, Variant]]:
        """All ways, less those for which memory did not suffice."""
        cases = [(mode, variant) for mode in self.settings.modes for variant in VARIANTS]
        return [case for case in cases if case not in self.too_large]

    def _warm_up(self) -> None:
        """Run each way's heaviest batch once, on a GPU all of them; memory is the peak of the way.

        There the first batch of a shape compiles, plans and takes fresh memory.
        """
        cases = self._cases()
        for done, (mode, variant) in enumerate(cases):
            self._begin(f"memory: {mode}, {variant.label}", done, len(cases))
            chosen = self._batches(variant)
            if self.runner.device.type != "cuda":
                size = functools.partial(variant.computed_tokens, self.lengths)
                chosen = [max(chosen, key=size)]
            work = functools.partial(self.runner.seconds, mode, variant, self._of(chosen))
            try:
                self.memory[mode, variant.name] = peak_memory(work, self.runner.device)
            except torch.OutOfMemoryError:
                self.too_large.append((mode, variant))
            if self.too_large:  # once its frames are gone, and with them its tensors
                self.runner.free()

    def _of(self, batches: list[list[int]]) -> list[list[MaskedExample]]:
        return [[self.examples[i] for i in batch] for batch in batches]

    def _rounds(self) -> None:
        """Rounds in rotated order, so that no way always follows the same one, while time lasts.

        One that is cut short counts for the ways that it has measured.
        """
        cases = self._cases()
        planned = self.settings.rounds or MAX_ROUNDS
        longest = 0.0
        for round_ in range(planned):
            started = time.perf_counter()
            if self.settings.rounds is None and round_ > 1 and started + longest > self.until:
                break
            shift = round_ % len(cases)
            for done, (mode, variant) in enumerate(cases[shift:] + cases[:shift]):
                message = f"round {round_ + 1}: {mode}, {variant.label}"
                self._begin(message, round_ * len(cases) + done, planned * len(cases))
                spent = self.runner.spent(mode, variant, self._of(self._batches(variant)))
                self.spent[mode, variant.name].append(spent)
                self.say(f"{message}: {sum(self.lengths) / spent.wall:,.0f} tokens/s")
            longest = max(longest, time.perf_counter() - started)
        self.progress("done", 1, 1)

    def result(self) -> dict[str, Any]:
        """Everything as plain values: what goes into the JSON."""
        s = self.settings
        facts = environment(torch.device(s.device))
        result: dict[str, Any] = {
            "schema": 1,
            "interrupted": self.interrupted,
            "time_over": self.time_over,
            "environment": facts,
            "settings": asdict(s) | shareable(s),
            "agreement": self.agreement,
        }
        if self.workload is None or not self.agreement:
            return result | {"rows": [], "speedups": []}
        dtype, device = DTYPES[s.dtype], torch.device(s.device)
        result["backend"] = implementation("", torch.empty(0, dtype=dtype, device=device)).name
        result["encoder"] = asdict(self.config) | {
            "parameters": sum(p.numel() for p in self.runner.model.parameters())
        }
        result["workload"] = describe(self.workload, self.lengths, s.max_tokens)
        rows = [self._row(mode, variant) for mode, variant in self._cases()]
        shared = {
            "workload": self.workload.source.name,
            "preset": s.preset,
            "max_tokens": s.max_tokens,
            "dtype": s.dtype,
            "backend": result["backend"],
        }
        result["rows"] = [row | shared | facts for row in rows if row["rounds"]]
        result["out_of_memory"] = [
            {"mode": mode, "variant": v.name, "label": v.label} for mode, v in self.too_large
        ]
        result["speedups"] = speedups(result["rows"])
        return result

    def _row(self, mode: str, variant: Variant) -> dict[str, Any]:
        spent = self.spent[mode, variant.name]
        seconds = [one.wall for one in spent]
        batches = self._batches(variant) if self.lengths else []
        real = sum(self.lengths)
        computed = sum(variant.computed_tokens(self.lengths, b) for b in batches)
        return {
            "mode": mode,
            "variant": variant.name,
            "label": variant.label,
            "tokens_per_s": quartiles([real / t for t in seconds]) if seconds else None,
            "seconds": [round(t, 6) for t in seconds],
            "process_seconds": [round(one.process, 6) for one in spent],
            **(here(spent, torch.device(self.settings.device)) if spent else {}),
            "rounds": len(seconds),
            "sequences": len(self.lengths),
            "batch_size": self.batch_size,
            "real_tokens": real,
            "computed_tokens": computed,
            "padding_share": 1 - real / computed if computed else None,
            "peak_memory_bytes": self.memory.get((mode, variant.name)),
        }


def open_workload(settings: EncoderSettings, progress: Progress = silent) -> Workload:
    """The sequences of settings.split in settings.data, with the vocabulary of these alone.

    Raises MedsError or ValueError where the data cannot be used.
    """
    assert settings.data is not None
    source = open_source(
        settings.data,
        tokenizer=settings.tokenizer,
        max_tokens=settings.max_tokens,
        vocab_size=EncoderConfig.preset(settings.preset).vocab_size,
        seed=settings.seed,
        progress=progress,
    )
    return Workload(of_split(source, settings.split), settings.max_tokens)


def of_split(source: Source, split: str | None) -> Source:
    """Returns the sequences of a split; None is TRAIN where the data's owner lists splits.

    Raises ValueError for a split that the source has not.
    """
    if source.splits is None:
        if split not in (None, ALL):
            raise ValueError(
                f"split={split!r}: {source.where} has no list of splits, expected none or {ALL!r}"
            )
        return source
    chosen = TRAIN if split is None else split
    if chosen == ALL:
        return source
    part = source.only(chosen_split(source, chosen, 0))
    return replace(part, title=f"{source.title}, split {chosen}")


def shareable(settings: EncoderSettings) -> dict[str, str | None]:
    """Facts on the data for a result: the kind, and of a profile its name, but no path."""
    assert settings.data is not None
    kind, place = parse_data(settings.data)
    return {
        "data": settings.data if kind == "profile" else kind,
        "tokenizer": None if settings.tokenizer is None else "given",
        "meds_dir": "given" if kind == "meds" else None,
        "profile": place if kind == "profile" else None,
    }


def encoder_config(settings: EncoderSettings, **overrides: Any) -> EncoderConfig:
    """The preset without dropout, long enough for the sequences."""
    published = EncoderConfig.preset(settings.preset)
    longest = padded_length(settings.max_tokens) + published.position_offset
    if settings.full_attention:
        overrides["windows"] = ()
    return EncoderConfig.preset(
        settings.preset,
        max_positions=max(published.max_positions, longest),
        embedding_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **overrides,
    )


def descending(start: int, end: int) -> list[int]:
    """start, then ever fewer by a tenth or so, down to end."""
    counts = [start]
    while counts[-1] > end:
        counts.append(max(end, counts[-1] * 9 // 10))
    return counts
