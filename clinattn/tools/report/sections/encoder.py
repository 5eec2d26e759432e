"""`clinattn bench`: an encoder's four ways, and the gains of kernels and of packing apart."""

from __future__ import annotations

from clinattn.tools.gains import KERNELS, PACKING, best_gains, gains
from clinattn.tools.report.charts import Bar, bar_chart, histogram
from clinattn.tools.report.colors import bar_color
from clinattn.tools.report.section import (
    MEBIBYTE,
    Case,
    Figure,
    Record,
    Section,
    Table,
    closed,
    doubts,
    load_in,
    marked,
    of_environment,
    of_rate,
    percent,
    quartiles,
    scaled,
    short,
    times,
)
from clinattn.tools.ways import pass_name, way_name

NOTES = (
    "All ways run one set of weights on the same sequences in one process, in interleaved rounds "
    "whose order rotates. Figures are medians over the rounds, with quartiles.",
    "Before anything is timed, outputs and gradients of every way are compared with torch SDPA in "
    "fp64.",
    "Tokens are real ones: padding is computed by the padded ways and counted for none.",
    "A training step goes from token ids to updated weights: batching, masked-language-model loss "
    "on 30% of the tokens, backward, AdamW. Inference goes from token ids to hidden states.",
    "The ways of clinattn use its kernels for attention and, on a CPU, for linear layers; those of "
    "torch use torch's for both.",
    "SDPA gets its mask ready-made in its own form once per batch, and none where a batch has no "
    "padding. It has no window: in local layers it computes every pair and masks.",
    "Peak memory is what the heaviest batch needed above the model and what the process already "
    "held.",
    "CPU share is process time over wall time, of the CPUs that the threads can have. Less than "
    "all is other work, or threads that had nothing to do.",
)


def section(result: Record) -> Section:
    rows = result["rows"]
    measured = bool(rows)
    return Section(
        title="Encoder throughput on clinical sequences",
        conclusion=conclusion(rows),
        facts=of_environment(result),
        load=load_in(rows) if measured else "",
        warnings=warnings(result),
        figures=[
            Figure(f"{gain.ratio:.2f}\u00d7", f"by {gain.what}, in {pass_name(gain.mode)}")
            for gain in gains(rows)
            if gain.what in (KERNELS[0], PACKING[0])
        ],
        charts=charts(result),
        tables=[table for table in tables(result) if table.rows],
        notes=NOTES if measured else (),
        backing=backing(result),
    )


def conclusion(rows: list[Record]) -> str:
    """Says by mode how many times as fast clinattn's fastest way is as torch's fastest."""
    if not rows:
        return "Nothing was measured."
    pairs: dict[tuple[str, str], list[str]] = {}
    for gain in best_gains(rows):
        much = f"{times(gain.ratio)} as fast in {pass_name(gain.mode)}"
        much += "" if gain.apart else ", within the scatter of rounds,"
        pairs.setdefault((way_name(gain.way), way_name(gain.over)), []).append(much)
    if not pairs:
        return f"Measured without a rival: {'; '.join(names(rows))}."
    return " ".join(
        f"{closed(way)} is {' and '.join(found)} as {closed(over)} the fastest way of torch."
        for (way, over), found in pairs.items()
    )


def names(rows: list[Record]) -> list[str]:
    return list(dict.fromkeys(way_name(row["variant"]) for row in rows))


def warnings(result: Record) -> list[str]:
    found = doubts(result["rows"], result["interrupted"])
    if result.get("time_over"):
        found.append("The time was over before all was measured: these are the results so far.")
    if result.get("backend") == "reference":
        found.append(
            "clinattn ran on its slow reference backend: no compiled kernel was usable. The "
            "command clinattn doctor says why."
        )
    return found


def tables(result: Record) -> list[Table]:
    found = [results_table(result["rows"]), gains_table(result["rows"])]
    if "workload" in result:
        found.append(lengths_table(result["workload"]))
    if result.get("agreement"):
        found.append(agreement_table(result["agreement"]))
    return found


def backing(result: Record) -> list[Table]:
    return [
        Table(
            title,
            ("name", "value"),
            [(name.replace("_", " "), short(value)) for name, value in facts.items()],
            labels=2,
        )
        for title, facts in (("Encoder", result.get("encoder")), ("Settings", result["settings"]))
        if facts
    ]


def results_table(rows: list[Record]) -> Table:
    return Table(
        "Results",
        ("way", "pass", "tokens/s", "quartiles", "rounds", "padding", "peak MiB", "CPU share",
         "other work, CPUs"),
        [
            (
                way_name(row["variant"]),
                pass_name(row["mode"]),
                f"{row['tokens_per_s']['median']:,.0f}",
                quartiles(row["tokens_per_s"]),
                f"{row['rounds']:,}",
                percent(row["padding_share"]),
                scaled(row["peak_memory_bytes"], 1 / MEBIBYTE),
                marked(f"{row['cpu_share']:.0%}", row) if "cpu_share" in row else "-",
                scaled(row.get("other_cpus"), 1.0, 2),
            )
            for row in rows
        ],
        labels=2,
    )  # fmt: skip


def gains_table(rows: list[Record]) -> Table:
    """A line for each part of the gain, a column for each mode."""
    found = gains(rows)
    modes = list(dict.fromkeys(gain.mode for gain in found))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for gain in found:
        cell = times(gain.ratio) + ("" if gain.apart else " (within the scatter)")
        lines.setdefault((gain.what, gain.way, gain.over), {})[gain.mode] = cell
    return Table(
        "Where the gain comes from",
        ("gain", *(pass_name(mode) for mode in modes), "of", "over"),
        [
            (what, *(c.get(m, "-") for m in modes), way_name(way), way_name(over))
            for (what, way, over), c in lines.items()
        ],
        note="The gain of the kernels, both sides padded, times the gain of packing is the gain of "
        "both together. Below 1 time is a loss.",
    )


def lengths_table(work: Record) -> Table:
    names = (*work["quantiles"], "mean")
    values = (*work["quantiles"].values(), work["mean_length"])
    return Table(
        "Lengths of the sequences",
        ("quantile", *names),
        [("tokens", *(f"{value:,.0f}" for value in values))],
        note=f"{work['source']}. {work['sequences']:,} of {work['available']:,} sequences were "
        f"run, chosen at even steps of length: {work['real_tokens']:,} tokens. The vocabulary has "
        f"{work['vocab_size']:,}.",
    )


def agreement_table(agreement: Record) -> Table:
    names = tuple(agreement["errors"]["allowed"])
    return Table(
        "Agreement before timing",
        ("way", *names),
        [
            (way_name(way), *(f"{errors[n]:.2g}" if n in errors else "-" for n in names))
            for way, errors in agreement["errors"].items()
        ],
        note="Largest error against torch SDPA in fp64, on "
        f"{agreement['sequences']:,} sequences with {agreement['tokens']:,} tokens. Allowed is "
        "twice the larger error of the two ways of torch plus two rounding units. Gradients are "
        "relative to the largest entry of each parameter's gradient.",
    )


def charts(result: Record) -> list[Record]:
    """Throughput with quartiles and, if it was read, memory of each mode; padding, alike in all."""
    modes: dict[str, list[Record]] = {}
    for row in result["rows"]:
        modes.setdefault(row["mode"], []).append(row)
    drawn = []
    for mode, own in modes.items():
        bars = [bar(row, *middle(row["tokens_per_s"])) for row in own]
        title = f"Speed in {pass_name(mode)}"
        drawn.append(bar_chart(title, bars, "tokens a second; median and quartiles", "{:,.0f}"))
    for mode, own in modes.items():
        if all(row["peak_memory_bytes"] is not None for row in own):
            bars = [bar(row, row["peak_memory_bytes"] / MEBIBYTE) for row in own]
            title = f"Peak memory in {pass_name(mode)}"
            drawn.append(bar_chart(title, bars, "MiB, of the heaviest batch", "{:,.0f}"))
    for own in list(modes.values())[:1]:
        bars = [bar(row, 100 * row["padding_share"]) for row in own]
        drawn.append(bar_chart("Padding", bars, "% of the tokens computed", "{:.1f}%"))
    if "workload" in result:
        work = result["workload"]["histogram"]
        drawn.append(histogram("Lengths of all sequences", work["edges"], work["counts"]))
    return drawn


def middle(rate: Record) -> tuple[float, tuple[float, float]]:
    """Median, and quartiles."""
    return rate["median"], (rate["q1"], rate["q3"])


def bar(row: Record, value: float, spread: tuple[float, float] | None = None) -> Bar:
    return Bar(way_name(row["variant"]), value, bar_color(row["variant"]), spread)


def settings(result: Record) -> Record:
    """Returns settings that figures depend on; a run that ended early has no workload."""
    work = result.get("workload", {})
    named = {name: work[name] for name in ("source", "sequences", "real_tokens") if name in work}
    depends = ("preset", "max_tokens", "full_attention", "dtype", "device", "batch_size", "seed")
    return {name: result["settings"].get(name) for name in depends} | named


def cases(result: Record) -> list[Case]:
    found = []
    for row in result["rows"]:
        key = pass_name(row["mode"]), way_name(row["variant"])
        found.append(of_rate(key, row["tokens_per_s"], row))
        if row["peak_memory_bytes"]:
            found.append(Case(key, "MiB", row["peak_memory_bytes"] / MEBIBYTE))
    return found
