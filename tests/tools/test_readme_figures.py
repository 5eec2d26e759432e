"""The figures in README are those of the rows that are kept."""

from __future__ import annotations

import json

import pytest
from places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = {"notes": "notes", "chunks": "chunks of notes", "timelines": "patient timelines"}


def kept(kind: str) -> list[dict]:
    """The rows of the newest runs, a run each, in the order of their names."""
    paths = sorted((ROOT / "bench" / "results").glob(f"{kind}-*.json"))
    assert paths
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def encoder_lines() -> list[str]:
    rows = {(row["label"], row["mode"]): row for row in kept("encoder")[-1]["rows"]}
    lines = []
    for label, mode in rows:
        if mode == "train":
            rates = [rows[label, m]["tokens_per_s"]["median"] for m in ("train", "infer")]
            padding = rows[label, "train"]["padding_share"]
            lines.append(f"| {label} | {rates[0]:,.0f} | {rates[1]:,.0f} | {100 * padding:.1f} % |")
    return lines


def against_lines() -> list[str]:
    """Ratios of each batch in both dtypes, the lower of all runs that have it."""
    found: dict[tuple, dict[str, list[float]]] = {}
    for run in kept("against-transformers"):
        for row in run["rows"]:
            named = tuple(row[x] for x in ("preset", "inputs", "cap", "layers"))
            own = found.setdefault((*named, row["rows"], row["padding"]), {})
            own.setdefault(row["dtype"], []).append(row["ratio"])
    return [
        f"| `{preset}`, {layers} layers, {rows} {WORDS[inputs]} of up to {cap:,} tokens "
        f"| {100 * padding:.0f} % | {min(ratios['fp32']):.1f} | {min(ratios['bf16']):.1f} |"
        for (preset, inputs, cap, layers, rows, padding), ratios in found.items()
    ]


def memory_lines() -> list[str]:
    lines = []
    for benchmark in kept("suites")[-1]["benchmarks"]:
        extra = benchmark["extra_info"]
        if extra["kind"] == "memory" and extra["passes"] == "forward_backward":
            cells = [f"{peak / (1 << 20):,.0f}" for peak in extra["peak_bytes"].values()]
            lines.append(f"| {extra['way']} | {' | '.join(cells)} |")
    return lines


def of_gpu(run: str) -> list[dict]:
    """The rows of a run on a GPU."""
    (path,) = (ROOT / "bench" / "results").glob(f"gpu-*-{run}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gpu_lines() -> list[str]:
    """TFLOP/s at N 8192, forward and backward: ours, torch's best, and its FlashAttention-2."""
    rows = [row for row in of_gpu("third") if row.get("n") == 8192 and "tflops" in row]
    rows = [row for row in rows if row["stage"] == "speed"]
    lines = []
    for dim, mask in ((64, "full"), (64, "causal"), (128, "full"), (128, "causal")):
        cells = []
        for names in (("clinattn-triton",), ("sdpa-cudnn", "sdpa-flash"), ("sdpa-flash",)):
            best = [
                max(
                    row["tflops"]
                    for row in rows
                    if (row["dim"], row["mask"], row["direction"]) == (dim, mask, direction)
                    and row["provider"] in names
                )
                for direction in ("forward", "backward")
            ]
            cells.append(f"{best[0]:.0f} / {best[1]:.0f}")
        kind = ", causal" if mask == "causal" else ""
        lines.append(f"| head dimension {dim}{kind} | {' | '.join(cells)} |")
    return lines


def gpu_encoder_lines() -> list[str]:
    rows = [row for row in of_gpu("second") if row.get("case") == "tokens/s"]
    labels = {
        "sdpa_padded": "torch SDPA, padded",
        "sdpa_bucketed": "torch SDPA, length-bucketed",
        "clinattn_padded": "clinattn, padded",
        "clinattn_packed": "clinattn, packed",
    }
    lines = []
    for name, label in labels.items():
        by_mode = {row["mode"]: row for row in rows if row["provider"] == name}
        rates = [by_mode[mode]["tokens_per_s"] for mode in ("train", "infer")]
        padding = 100 * by_mode["train"]["padding_share"]
        lines.append(f"| {label} | {rates[0]:,.0f} | {rates[1]:,.0f} | {padding:.1f} % |")
    return lines


@pytest.mark.parametrize(
    "lines", [encoder_lines, against_lines, memory_lines, gpu_lines, gpu_encoder_lines]
)
def test_tables_are_of_the_kept_rows(lines):
    for line in lines():
        assert line in README.splitlines(), line


def test_the_time_of_an_import_is_of_the_kept_rows():
    (seconds,) = (
        benchmark["extra_info"]["seconds"]
        for benchmark in kept("suites")[-1]["benchmarks"]
        if benchmark["extra_info"]["kind"] == "startup"
        and benchmark["extra_info"]["way"] == "clinattn"
    )
    words = f"takes {1e3 * seconds['import clinattn']['median']:.0f} ms after torch's"
    assert words in " ".join(README.split())
