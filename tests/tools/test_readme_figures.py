"""The figures in README and docs/ are those of the rows that are kept."""

from __future__ import annotations

import json

import pytest
from documentation import explanation_table
from places import ROOT

from clinattn.tools.benchmark.variants import VARIANTS
from clinattn.tools.ways import way_name

README, SPEED = "README.md", "docs/speed.md"
H100 = "h100-2026-11-28-first"
WORDS = {"notes": "notes", "chunks": "chunks of notes", "timelines": "patient timelines"}


def kept(kind: str) -> list[dict]:
    """The rows of the newest runs, a run each, in the order of their names."""
    paths = sorted((ROOT / "bench" / "results").glob(f"{kind}-*.json"))
    assert paths
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def words(page: str) -> str:
    """The text of a page, as one line."""
    return " ".join(text(page).split())


def encoder_lines() -> list[str]:
    rows = {(way_name(row["variant"]), row["mode"]): row for row in kept("encoder")[-1]["rows"]}
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
            lines.append(f"| {way_name(extra['way'])} | {' | '.join(cells)} |")
    return lines


def cpu_lines() -> list[str]:
    """Ratios to torch, forward / backward, the lower of all runs."""
    named = {
        "4,096 tokens, head dimension 64": "full N4096 D64",
        "4,096 tokens, head dimension 128, causal": "causal N4096 D128",
        "8 discharge notes of up to 4,096 tokens, packed": "notes 8x12 packed",
        "a window of 128 in 8,192 tokens": "window 128 of 8192",
    }
    found: dict[tuple, list[float]] = {}
    for run in kept("cpu-kernels"):
        for row in run["rows"]:
            key = (row["case"], row["dtype"], row["passes"])
            found.setdefault(key, []).append(row["ratio"])

    def cell(case: str, dtype: str) -> str:
        lowest = [min(found[case, dtype, passes]) for passes in ("forward", "backward")]
        return " / ".join(f"{x:.0f}" if min(lowest) > 10 else f"{x:.1f}" for x in lowest)

    return [
        f"| {label} | {cell(case, 'fp32')} | {cell(case, 'bf16')} |"
        for label, case in named.items()
    ]


def pretrained_lines() -> list[str]:
    named = {
        "problem lists of up to 512 tokens": "problem lists",
        "single titles of some 16 tokens": "titles",
    }
    found: dict[tuple, list[float]] = {}
    for run in kept("pretrained"):
        for row in run["rows"]:
            rates = {name: rate["median"] for name, rate in row["tokens_per_s"].items()}
            for peer in ("eager", "sdpa"):
                key = (row["workload"], row["pass"], peer)
                found.setdefault(key, []).append(rates["clinattn"] / rates[peer])
    cell = lambda *key: f"{min(found[key]):.2f}"
    return [
        f"| {label} "
        + " ".join(
            f"| {cell(work, 'infer', peer)} / {cell(work, 'train', peer)}"
            for peer in ("eager", "sdpa")
        )
        + " |"
        for label, work in named.items()
    ]


def femr_lines() -> list[str]:
    named = {"infer": "inference", "train": "training"}
    lines = []
    rows = [row for run in kept("femr") for row in run["rows"]]
    for row in sorted(rows, key=lambda row: (row["tokens"], row["pass"])):
        ours, theirs = (row["tokens_per_s"][way]["median"] for way in ("clinattn", "scores"))
        peaks = (row["peak_memory_bytes"][way] / 2**20 for way in ("scores", "clinattn"))
        cells = (f"{ours / theirs:.1f}", *(f"{peak:,.0f}" for peak in peaks))
        lines.append(f"| {row['tokens']:,}, {named[row['pass']]} | {' | '.join(cells)} |")
    return lines


def clinical_code_lines() -> list[str]:
    lines = []
    for row in [row for run in kept("clinical-code") for row in run["rows"]]:
        before, after = row["before"], row["after"]
        peaks = (f"{x['peak_memory_bytes'] / 2**20:,.0f}" for x in (before, after))
        cells = (f"{before['median'] / after['median']:.2f}", *peaks)
        lines.append(f"| {row['code']} | {' | '.join(cells)} |")
    return lines


ENGINES = ("torch", "torch.compile", "onnxruntime", "openvino", "clinattn", "clinattn linear")


def engine_rows() -> dict[tuple[str, ...], dict]:
    """Rows by load, class, engine and batching; of two runs of a load the second counts.

    An engine whose graph gives NaN stands for itself by its graph with finite masks.
    """
    found: dict[tuple[str, ...], dict] = {}
    for run in kept("engines"):
        for row in run["rows"]:
            name, _, finite = row["engine"].partition(", ")
            if not row["not_finite"]:
                found[row["load"], row["kind"], name, row["batching"]] = row | {"finite": finite}
    return found


def engine_lines() -> list[str]:
    """Tokens/s, padded / sorted or packed, or one number where nothing is padded."""
    rows = engine_rows()
    lines = []
    for load, kind in dict.fromkeys(key[:2] for key in rows if key[1] != "8 bit"):
        cells = []
        for name in ENGINES:
            own = [rows.get((load, kind, name, how)) for how in ("padded", "sorted", "packed")]
            rates = [f"{row['tokens_per_s']['median']:,.0f}" for row in own if row]
            cells.append(" / ".join(rates) or "-")
        one = next(row for key, row in rows.items() if key[:2] == (load, kind))
        lines.append(f"| {one['model']}, {one['title']}, {kind} | {' | '.join(cells)} |")
    return lines


def engine_cost_lines() -> list[str]:
    """Errors by class, and start, memory and size of packages in fp32, without padding."""
    rows = engine_rows()
    lines = []
    for name in ENGINES:
        of = lambda kind, name=name: rows.get(("full", kind, name, "padded"))
        errors = [
            "-" if (row := of(kind)) is None else f"{row['error']:.1e}"
            for kind in ("fp32", "16 bit", "8 bit")
        ]
        one = of("fp32")
        cells = [f"{one['start_seconds']:.1f}", f"{one['peak_memory_bytes'] / 2**20:,.0f}"]
        cells.append(f"{one['package_bytes'] / 2**20:,.0f}")
        lines.append(f"| {way_name(name)} | {' | '.join(errors + cells)} |")
    return lines


def of_gpu(run: str) -> list[dict]:
    """The rows of a run on a GPU."""
    (path,) = (ROOT / "bench" / "results").glob(f"gpu-*-{run}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gpu_lines() -> list[str]:
    """TFLOP/s at N 8192, forward and backward: ours, torch's best, and its FlashAttention-2."""
    rows = [row for row in of_gpu(H100) if row.get("n") == 8192 and "tflops" in row]
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
    rows = [row for row in of_gpu(H100) if row.get("case") == "tokens/s"]
    lines = []
    for name in (variant.name for variant in VARIANTS):
        by_mode = {row["mode"]: row for row in rows if row["provider"] == name}
        rates = [by_mode[mode]["tokens_per_s"] for mode in ("train", "infer")]
        padding = 100 * by_mode["train"]["padding_share"]
        shown = f"{rates[0]:,.0f} | {rates[1]:,.0f} | {padding:.1f} %"
        lines.append(f"| {way_name(name)} | {shown} |")
    return lines



def explanation_lines():
    """Returns the lines that say which backend serves an explanation; no rows are behind them."""
    return explanation_table().splitlines()[2:]


TABLES = {
    README: (explanation_lines, encoder_lines, gpu_encoder_lines, engine_lines),
    SPEED: (
        gpu_lines, cpu_lines, engine_cost_lines, against_lines, pretrained_lines, femr_lines,
        clinical_code_lines, memory_lines,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "page, lines", [(page, lines) for page, tables in TABLES.items() for lines in tables]
)
def test_tables_are_of_the_kept_rows(page, lines):
    assert lines()
    for line in lines():
        assert line in text(page).splitlines(), line


@pytest.mark.parametrize("page", [README, "docs/compared.md"])
def test_engines_have_their_names(page):
    head = f" | {' | '.join(map(way_name, ENGINES))} |"
    assert [line for line in text(page).splitlines() if line.endswith(head)]


@pytest.mark.parametrize("page", TABLES)
def test_every_line_of_a_table_is_of_the_kept_rows(page):
    """Beside its head a table has no line that was added by hand."""
    expected = [line for lines in TABLES[page] for line in lines()]
    shown = [line for line in text(page).splitlines() if line.startswith("| ")]
    heads = [line for line in shown if line not in expected]
    assert len(heads) == len(TABLES[page]), heads
    assert sorted(shown) == sorted(expected + heads)


def test_start_up_is_of_the_kept_rows():
    found = {
        benchmark["extra_info"]["way"]: benchmark["extra_info"]["seconds"]
        for benchmark in kept("suites")[-1]["benchmarks"]
        if benchmark["extra_info"]["kind"] == "startup"
    }
    of = lambda way, what: found[way][what]["median"]
    importing, torch_itself = of("clinattn", "import clinattn"), of("clinattn", "import torch")
    assert (
        f"`import clinattn` takes {1e3 * importing:.0f} ms after torch's {1e3 * torch_itself:.0f}, "
        f"and the first call {1e3 * of('clinattn', 'first call'):.0f} ms. Building the CPU kernels "
        f"on the two cores takes {of('build', 'build'):.0f} seconds."
    ) in words(SPEED)


def test_what_is_said_of_the_gpu_is_of_the_kept_rows():
    rows = of_gpu(H100)
    (product,) = (row for row in rows if row.get("case") == "bf16 product 8192^3")
    assert (
        f"reaches {product['tflops']:.0f} TFLOP/s on this card at first, and "
        f"{product['sustained_tflops']:.0f} when the card is hot"
    ) in words(SPEED)

    full = {
        (row["dim"], row["direction"]): row["tflops"]
        for row in rows
        if row["stage"] == "speed" and row.get("provider") == "clinattn-cuda"
        if (row["n"], row["mask"]) == (8192, "full")
    }
    at = lambda dim: f"{full[dim, 'forward']:.0f} / {full[dim, 'backward']:.0f} at"
    assert f"reach {at(64)} head dimension 64, and {at(128)} 128" in words(SPEED)

    def ratios(run: str, kind: str) -> list[float]:
        found = [row for row in of_gpu(run) if row["stage"] == "targets"]
        return [x["measured"] for x in found if x.get("case", "").startswith(f"ratio {kind}")]

    packed, window = ratios(H100, "packed note_discharge"), ratios(H100, "window 128")
    assert len(packed) == len(window) == 4
    assert f"{min(packed):.1f} to {max(packed):.1f} times as fast" in words(SPEED)
    assert f"{min(window):.0f} to {max(window):.0f} times" in words(SPEED)


def test_hardware_and_dates_are_those_of_the_rows():
    facts = kept("encoder")[-1]["environment"]
    day = facts["date"][:10]
    for word in ("Intel Xeon", "AMX", f"{facts['cpus']} cores", facts["torch"].split("+")[0], day):
        assert word in words(README)
    for page in (README, SPEED):
        facts = of_gpu(H100)[0]
        driver = facts["driver"].rsplit(".", 1)[0]
        cudnn = f"cuDNN {facts['cudnn'] // 10_000}.{facts['cudnn'] // 100 % 100}"
        named = (facts["gpu"], f"driver {driver}", f"torch {facts['torch']}")
        assert ", ".join((*named, f"Triton {facts['triton']}", cudnn)) in words(page)
        assert facts["date"][:10] in words(page)
    kinds = ("cpu-kernels", "against-transformers", "pretrained", "femr", "clinical-code")
    for kind in (*kinds, "engines"):
        for run in kept(kind):
            facts = run.get("environment") or run["rows"][0]
            assert facts["date"][:10] in words(SPEED) and facts["cpus"] == 2
