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
    doubts,
    facts_in,
    load_in,
    marked,
    of_rate,
    percent,
    quartiles,
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
        facts=facts(result),
        load=load_in(rows) if measured else "",
        warnings=warnings(result),
        figures=[
            Figure(times(gain.ratio), f"{gain.what}, in {pass_name(gain.mode)}")
            for gain in gains(rows)
            if gain.what in (KERNELS[0], PACKING[0])
        ],
        charts=charts(result),
        tables=[table for table in tables(result) if table.rows],
        notes=NOTES if measured else (),
    )


def conclusion(rows: list[Record]) -> str:
    """How many times the tokens of torch's fastest way clinattn's fastest processes, by mode."""
    if not rows:
        return "Nothing was measured."
    found = best_gains(rows)
    if not found:
        return f"Measured alone, without a rival: {', '.join(names(rows))}."
    parts = []
    for gain in found:
        much = f"{times(gain.ratio)} as many tokens a second"
        if not gain.apart:
            much = f"as many tokens a second ({times(gain.ratio)}, within the scatter of rounds)"
        parts.append(
            f"in {pass_name(gain.mode)}, {way_name(gain.way)}, processes {much} as "
            f"{way_name(gain.over)}"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}. Each is the fastest of its side."


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
    for title, facts in (("Encoder", result.get("encoder")), ("Settings", result["settings"])):
        if facts:
            cells = [(name.replace("_", " "), short(value)) for name, value in facts.items()]
            found.append(Table(title, ("name", "value"), cells, labels=2))
    return found


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
                short(memory_of(row)),
                marked(f"{row['cpu_share']:.0%}", row) if "cpu_share" in row else "not available",
                "not available" if row.get("other_cpus") is None else f"{row['other_cpus']:.2f}",
            )
            for row in rows
        ],
        labels=2,
    )  # fmt: skip


def memory_of(row: Record) -> int | None:
    peak = row["peak_memory_bytes"]
    return None if peak is None else round(peak / MEBIBYTE)


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
        ("gain", "of", *(pass_name(mode) for mode in modes)),
        [
            (what, f"{way_name(way)}, over {way_name(over)}", *(c.get(m, "-") for m in modes))
            for (what, way, over), c in lines.items()
        ],
        labels=2,
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


def facts(result: Record) -> Record:
    return facts_in(result["environment"])


def settings(result: Record) -> Record:
    """What the figures depend on beside the machine; a run that ended early has no workload."""
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
