"""The encoder here against transformers' own with torch's SDPA: same weights, same batch of notes.

    python bench/models/against_transformers.py                         every case
    python bench/models/against_transformers.py -k "bf16 notes"         those with both words
    python bench/models/against_transformers.py --json FILE             keep the rows

Lengths are of discharge notes, at evenly spaced quantiles, and for BERT of its inputs: notes cut at
512 tokens (no padding at all), their consecutive chunks of 512 (the last of a note is short), and
patient timelines. transformers gets a batch padded to its longest, the encoder here drops the
padding once. Hidden states of real tokens are compared before anything is
timed; both take turns in one process, and a time is the median of rounds. Inference.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clinattn.encoder import Encoder, EncoderConfig
from clinattn.operator.packing import mask_from_lengths
from clinattn.tools.benchmark.measure import quartiles
from clinattn.tools.benchmark.workload import profile_workload
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Watch, disturbance, here
from clinattn.tools.peaks import peaks_in_force
from clinattn.tools.report.sections.encoders import SIDES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
from rows_file import output_file, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest hidden state: both round every layer, in fp32 by 2^-24 and in bf16 by 2^-9.
BOUND = {"fp32": 1e-4, "bf16": 0.1}


@dataclass(frozen=True)
class ModelCase:
    """rows sequences of those in INPUTS, cut at cap tokens. target: times as fast."""

    preset: str
    dtype: str
    inputs: str
    cap: int
    rows: int
    layers: int
    target: float

    def __str__(self) -> str:
        return f"{self.preset} {self.dtype} {self.inputs} cap {self.cap} layers {self.layers}"


MODERNBERT, BERT = "bioclinical-modernbert-base", "clinicalbert"
CASES = (
    ModelCase(MODERNBERT, "fp32", "notes", 4096, 8, 6, 1.8),
    ModelCase(MODERNBERT, "bf16", "notes", 4096, 8, 6, 2.0),
    ModelCase(MODERNBERT, "fp32", "notes", 4096, 4, 22, 1.8),
    ModelCase(MODERNBERT, "bf16", "notes", 4096, 4, 22, 2.0),
    ModelCase(MODERNBERT, "fp32", "notes", 8192, 16, 6, 3.0),
    ModelCase(MODERNBERT, "bf16", "notes", 8192, 16, 6, 3.0),
    *(
        ModelCase(BERT, dtype, inputs, 512, 32, 6, 1.3)
        for inputs in ("notes", "chunks", "timelines")
        for dtype in DTYPES
    ),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="WORDS", default="", help="cases that have all of them")
    parser.add_argument("--layers", type=int, help="at most (default: those of the case)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    if min(given.layers or 1, given.rounds) < 1:
        parser.error("--layers, --rounds: expected at least 1")
    return given


def models(case: ModelCase, layers: int | None) -> tuple[Encoder, Any]:
    """The encoder here and transformers' model of its weights, both in eval mode."""
    config = EncoderConfig.preset(case.preset)
    depth = min(layers or case.layers, case.layers)
    config = EncoderConfig.preset(case.preset, num_layers=depth, windows=config.windows[:depth])
    torch.manual_seed(0)
    ours = Encoder(config).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.save_pretrained(folder)
        theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa")
    dtype = DTYPES[case.dtype]
    return ours.to(dtype), theirs.to(dtype).eval()


def sampled(profile: str, cap: int, rows: int, vocab_size: int) -> list[Tensor]:
    work = profile_workload(profile, cap, vocab_size, seed=0)
    return [work.tokens(i) for i in work.sample(rows, seed=0)]


def chunks(cap: int, rows: int, vocab_size: int) -> list[Tensor]:
    """Notes at evenly spaced quantiles, each cut into rows of cap and one for what is left."""
    notes = sampled("note_discharge", LONGEST_NOTE, rows, vocab_size)
    return [row for note in notes for row in note.split(cap)][:rows]


LONGEST_NOTE = 8192
# (cap, rows, vocab_size) -> sequences
INPUTS: dict[str, Callable[[int, int, int], list[Tensor]]] = {
    "notes": functools.partial(sampled, "note_discharge"),
    "chunks": chunks,
    "timelines": functools.partial(sampled, "ehr_population"),
}


def batch(case: ModelCase, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, N), zeros in the padding, and lengths (B,)."""
    sequences = INPUTS[case.inputs](case.cap, case.rows, vocab_size)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return ids, torch.tensor([len(x) for x in sequences])


@torch.inference_mode()
def measure(case: ModelCase, layers: int | None, rounds: int) -> dict[str, Any]:
    ours, theirs = models(case, layers)
    ids, lengths = batch(case, ours.config.vocab_size)
    mask = mask_from_lengths(lengths, ids.shape[1])
    ways: dict[str, Callable[[], Tensor]] = {
        "clinattn": lambda: ours(ids, lengths=lengths),
        "transformers": lambda: theirs(ids, attention_mask=mask.long()).last_hidden_state,
    }
    found = {name: way()[mask].float() for name, way in ways.items()}
    scale = float(found["transformers"].abs().max())
    difference = float((found["clinattn"] - found["transformers"]).abs().max()) / scale
    if not difference <= BOUND[case.dtype]:
        raise SystemExit(f"{case}: outputs differ by {difference:.2g} of the largest")
    watch = Watch()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(ways):
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    beside = here([watch.spent()], ids.device)
    tokens = int(lengths.sum())
    rate = {name: tokens / quartiles(x)["median"] for name, x in seconds.items()}
    return asdict(case) | {
        "layers": len(ours.layers),
        "tokens": tokens,
        "longest": ids.shape[1],
        "padding": 1 - tokens / ids.numel(),
        "difference": difference,
        "seconds": seconds,
        "tokens_per_s": rate,
        "ratio": rate["clinattn"] / rate["transformers"],
        **beside,
    }


def main() -> int:
    given = arguments()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    words = given.k.split()
    chosen = [case for case in CASES if all(word in str(case) for word in words)]
    if not chosen:
        print(f"error: -k {given.k!r} fits no case", file=sys.stderr)
        return 2
    facts = environment(torch.device("cpu")) | peaks_in_force()
    rows = []
    for case in chosen:
        print(case, file=sys.stderr, flush=True)
        rows.append(measure(case, given.layers, given.rounds))
        if given.json:
            content = {"kind": "against_transformers", "environment": facts, "rows": rows}
            write_json(given.json, content)
    print("{cpu}, {threads} threads, torch {torch}, {transformers}, {date}".format(**facts))
    sides = [f"{name}, tokens/s" for name in SIDES.values()]
    table = Table("case", "layers", "padding", *sides, "times as fast", "target")
    for case, row in zip(chosen, rows, strict=True):
        rate = row["tokens_per_s"]
        table.add_row(
            str(case), str(row["layers"]), f"{row['padding']:.0%}",
            f"{rate['transformers']:,.0f}", f"{rate['clinattn']:,.0f}",
            f"{row['ratio']:.2f}x" + "*" * row["disturbed"], f"{case.target}x",
        )  # fmt: skip
    Console(width=120).print(table)
    if note := disturbance(rows):
        print(f"* {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
