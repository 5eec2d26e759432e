"""Training steps of small encoders of transformers: padded batches against packed ones.

    python bench/models/packed_training.py                  every case
    python bench/models/packed_training.py -k bert          those with the word
    python bench/models/packed_training.py --json FILE      keep the rows

The same sequences, a label for each token, forward, backward and a step of AdamW. Padded batches
are of 16 patients or 4 notes, in random order or of neighbours in length; packed ones by a budget
of about as many tokens as a padded batch has on average. The losses are compared before anything is
timed; all ways take turns in one process, and a time is the median of rounds.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.utils.rnn import pad_sequence

import clinattn
from clinattn.integrations.trainer import PackingCollator, TokenBudgetSampler
from clinattn.tools.benchmark.measure import quartiles
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Watch, disturbance, here
from clinattn.tools.peaks import peaks_in_force
from clinattn.workloads import sample_lengths

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
from rows_file import output_file, write_json

CLASSES = 9
SIZES = {
    "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_labels": CLASSES,
}  # fmt: skip
# fp32 rounds by 2^-24; the loss is a mean over thousands of tokens
BOUND = 1e-5


@dataclass(frozen=True)
class Case:
    """sequences of a length profile, cut at cap tokens; rows of them make a padded batch."""

    model: str
    profile: str
    cap: int
    sequences: int
    rows: int

    def __str__(self) -> str:
        return f"{self.model} {self.profile} cap {self.cap}"


CASES = (
    Case("bert", "ehr_population", 512, 64, 16),
    Case("modernbert", "note_discharge", 4096, 8, 4),
)


def model_of(case: Case) -> Any:
    more = {"intermediate_size": 1024, "max_position_embeddings": case.cap}
    if case.model == "modernbert":
        more |= {"intermediate_size": 384, "local_attention": 128, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(case.model, **SIZES | more)
    torch.manual_seed(0)
    return transformers.AutoModelForTokenClassification.from_config(config).eval()


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    column = lambda name, fill: pad_sequence([x[name] for x in rows], True, padding_value=fill)
    ids = column("input_ids", 0)
    return {"input_ids": ids, "labels": column("labels", -100), "attention_mask": ids.ne(0).long()}


class Way:
    """A model, its batches, and an epoch of training over them."""

    def __init__(self, model: Any, batches: list[dict[str, Any]]):
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def padding(self) -> float:
        cells = sum(x["input_ids"].numel() for x in self.batches)
        return 1 - sum(int(x["input_ids"].ne(0).sum()) for x in self.batches) / cells

    @torch.no_grad()
    def loss(self) -> float:
        counts = [int(x["labels"].ne(-100).sum()) for x in self.batches]
        losses = [
            float(self.model(**x).loss) * n for x, n in zip(self.batches, counts, strict=True)
        ]
        return sum(losses) / sum(counts)

    def epoch(self) -> None:
        for batch in self.batches:
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def ways_of(case: Case) -> dict[str, Way]:
    model = model_of(case)
    lengths = torch.as_tensor(sample_lengths(case.profile, case.sequences, case.cap))
    draw = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(1, SIZES["vocab_size"], (n,), generator=draw),
            "labels": torch.randint(0, CLASSES, (n,), generator=draw),
        }
        for n in lengths.tolist()
    ]
    replaced = copy.deepcopy(model)
    clinattn.replace_attention(replaced)
    orders = {"random": torch.arange(len(data)), "by length": lengths.argsort()}
    batches = {
        name: [padded([data[i] for i in part]) for part in order.split(case.rows)]
        for name, order in orders.items()
    }
    collate = PackingCollator(replaced)
    # a batch's sequences do not come out even: a tenth more than the average, or one whole sequence
    budget = max(int(1.1 * lengths.sum()) * case.rows // len(data), int(lengths.max()))
    sampler = TokenBudgetSampler(lengths, budget)
    packed = [collate([data[i] for i in part]) for part in sampler]
    return {
        "transformers, padded": Way(model, batches["random"]),
        "clinattn, padded": Way(replaced, batches["random"]),
        "clinattn, length-bucketed": Way(copy.deepcopy(replaced), batches["by length"]),
        "clinattn, packed": Way(copy.deepcopy(replaced), packed),
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    ways = ways_of(case)
    losses = [way.loss() for way in ways.values()]
    difference = (max(losses) - min(losses)) / max(losses)
    if not difference <= BOUND:
        raise SystemExit(f"{case}: losses differ by {difference:.2g}")
    watch = Watch()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(ways):
            started = time.perf_counter()
            ways[name].epoch()
            seconds[name].append(time.perf_counter() - started)
    beside = here([watch.spent()], torch.device("cpu"))
    tokens = sum(x["input_ids"].numel() for x in ways["clinattn, packed"].batches)
    return asdict(case) | {
        "tokens": tokens,
        "batches": {name: len(way.batches) for name, way in ways.items()},
        "padding": {name: way.padding() for name, way in ways.items()},
        "difference": difference,
        "seconds": seconds,
        "tokens_per_s": {name: tokens / quartiles(x)["median"] for name, x in seconds.items()},
        **beside,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="WORD", default="", help="cases that have it")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    chosen = [case for case in CASES if given.k in str(case).split() or not given.k]
    if given.rounds < 1 or not chosen:
        parser.error("expected --rounds of at least 1, and a case with the word of -k")
    transformers.logging.set_verbosity_error()
    facts = environment(torch.device("cpu")) | peaks_in_force()
    rows = []
    for case in chosen:
        print(case, file=sys.stderr, flush=True)
        rows.append(measure(case, given.rounds))
        if given.json:
            content = {"kind": "packed_training", "environment": facts, "rows": rows}
            write_json(given.json, content)
    print("{cpu}, {threads} threads, torch {torch}, {transformers}, {date}".format(**facts))
    table = Table("case", "way", "padding", "real tokens/s", "times as fast")
    for case, row in zip(chosen, rows, strict=True):
        for name, rate in row["tokens_per_s"].items():
            first = row["tokens_per_s"]["transformers, padded"]
            table.add_row(
                str(case), name, f"{row['padding'][name]:.0%}", f"{rate:,.0f}",
                f"{rate / first:.2f}x" + "*" * row["disturbed"],
            )  # fmt: skip
    Console(width=120).print(table)
    if note := disturbance(rows):
        print(f"* {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
