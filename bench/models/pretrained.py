"""A pretrained encoder on clinical phrases: eager attention, torch's SDPA, and after replacing it.

    python bench/models/pretrained.py                                           three minutes
    python bench/models/pretrained.py --json bench/results/pretrained-NAME.json keep the rows

all-MiniLM-L6-v2 embeds titles of ICD-10-CM codes, and lists of up to 24 of them, as a chart's
problem list has; its limit of 512 tokens holds. Embeddings are compared before anything is timed.
All three ways take turns in one process, and a time is the median of rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from clinattn.integrations.replace import replace_attention
from clinattn.tools.benchmark.measure import quartiles
from clinattn.tools.environment import environment
from clinattn.tools.other_work import Watch, disturbance, here
from clinattn.tools.peaks import peaks_in_force
from clinattn.tools.ways import pass_name, way_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "lib"))
from minilm import clinical_phrases, embed, unpacked_encoder

from rows_file import output_file, write_json
from turns import in_turns

RIVALS = ("eager", "sdpa")
WAYS = (*RIVALS, "clinattn")
BOUND = 1e-5
BATCH, BATCHES = 8, 4
LONGEST_LIST = 24

Tokens = dict[str, Tensor]


def models(folder: Path) -> dict[str, Any]:
    load = transformers.AutoModel.from_pretrained
    found = {name: load(folder, attn_implementation=name) for name in ("eager", "sdpa")}
    found["clinattn"] = load(folder, attn_implementation="eager")
    replace_attention(found["clinattn"])
    return {name: model.eval() for name, model in found.items()}


def workloads(tokenizer: Any) -> dict[str, list[Tokens]]:
    """Batches in no order of length, padded on the right."""
    titles = clinical_phrases(BATCH * BATCHES)
    sizes = [1 + 7 * i % LONGEST_LIST for i in range(BATCH * BATCHES)]
    more = iter(clinical_phrases(sum(sizes)))
    lists = ["; ".join(next(more) for _ in range(size)) for size in sizes]
    tokens = lambda texts: dict(
        tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    )
    return {
        name: [tokens(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
        for name, texts in (("titles", titles), ("problem lists", lists))
    }


def embed_all(model: Any, batches: list[Tokens]) -> Tensor:
    with torch.no_grad():
        return torch.cat([embed(model, tokens) for tokens in batches])


def train_all(model: Any, batches: list[Tokens]) -> None:
    """Forward and backward; the gradients are thrown away."""
    for tokens in batches:
        embed(model, tokens).sum().backward()
        model.zero_grad(set_to_none=True)


PASSES: dict[str, Callable[[Any, list[Tokens]], Any]] = {"infer": embed_all, "train": train_all}


def check(found: dict[str, Any], batches: list[Tokens]) -> float:
    """The largest difference from eager attention; AssertionError where it is too large."""
    expected = embed_all(found["eager"], batches)
    error = float((embed_all(found["clinattn"], batches) - expected).abs().max())
    assert error <= BOUND, f"embeddings differ by {error:.2g}, allowed {BOUND}; nothing was timed"
    return error


def measure(folder: Path, rounds: int, console: Console) -> Iterator[dict[str, Any]]:
    found = models(folder)
    for workload, batches in workloads(transformers.AutoTokenizer.from_pretrained(folder)).items():
        error = check(found, batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        slots = sum(batch["attention_mask"].numel() for batch in batches)
        for name, work in PASSES.items():
            console.print(f"{workload}, {name}", highlight=False)
            watch = Watch()
            seconds = in_turns({way: partial(work, found[way], batches) for way in WAYS}, rounds)
            yield {
                "workload": workload,
                "pass": name,
                "sequences": BATCH * BATCHES,
                "tokens": tokens,
                "padding": 1 - tokens / slots,
                "largest_difference": error,
                **here([watch.spent()], torch.device("cpu")),
                "seconds": seconds,
                "tokens_per_s": {
                    way: quartiles([tokens / s for s in times]) for way, times in seconds.items()
                },
            }


def table(rows: list[dict[str, Any]]) -> Table:
    rates = [f"{way_name(way, 'padded')}, tokens/s" for way in WAYS]
    ratios = [f"times as fast as {way_name(way)}" for way in RIVALS]
    shown = Table("workload", "pass", *rates, *ratios, show_edge=False)
    for row in rows:
        rate = {way: row["tokens_per_s"][way]["median"] for way in WAYS}
        ratios = [f"{rate['clinattn'] / rate[way]:.2f}" for way in RIVALS]
        name = pass_name(row["pass"]) + "*" * row["disturbed"]
        shown.add_row(row["workload"], name, *(f"{rate[w]:,.0f}" for w in WAYS), *ratios)
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: as torch chooses)")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write the rows there")
    given = parser.parse_args()
    if given.rounds < 1 or (given.threads is not None and given.threads < 1):
        parser.error("--rounds and --threads are at least 1")
    return given


def main() -> int:
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure(unpacked_encoder(Path(folder)), given.rounds, Console(stderr=True)))
    facts = environment(torch.device("cpu")) | peaks_in_force()
    print("{cpu}, {threads} threads, torch {torch}, transformers {transformers}, ".format(**facts))
    print("{commit}, {date}".format(**facts))
    Console(width=110).print(table(rows))
    if note := disturbance(rows):
        print(f"* {note}")
    if given.json:
        write_json(given.json, {"environment": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
