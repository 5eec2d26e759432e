"""pytest-benchmark's JSON of bench/suites: speed by group, memory by length, and starts."""

from __future__ import annotations

from clinattn.tools.report.charts import Points, line_chart
from clinattn.tools.report.section import (
    MEBIBYTE,
    Case,
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
    set_against,
)
from clinattn.tools.ways import dtype_name, pass_name, way_name

SPEED = ("attention", "encoder")
PEERS = {"attention": way_name("sdpa"), "encoder": way_name("sdpa_bucketed")}


def section(result: Record) -> Section:
    rows = extras(result)
    return Section(
        title="Suites of bench/",
        conclusion=conclusion(result),
        facts=facts(result),
        load=load_in(rows),
        warnings=doubts(rows),
        charts=charts(rows),
        tables=tables(result),
        notes=(
            "Before each round of a way its rival runs, so that a change of clock or load meets "
            "both. Every way is checked against fp64 before it is timed.",
        ),
    )


def extras(result: Record) -> list[Record]:
    """Returns the notes of each benchmark on itself, with its name and group."""
    return [
        {"way": benchmark["name"], "group": benchmark.get("group")} | benchmark["extra_info"]
        for benchmark in result["benchmarks"]
    ]


def of_kind(rows: list[Record], *kinds: str) -> list[Record]:
    return [row for row in rows if row.get("kind") in kinds]


def conclusion(result: Record) -> str:
    """Says the result of the most telling kind of benchmark among those that ran."""
    rows = extras(result)
    for kind, peer in PEERS.items():
        ratios = [
            (f"{way_name(row['way'])} in {row['group']}", row["ratio_to_peer"])
            for row in of_kind(rows, kind)
            if row["way"].startswith("clinattn") and row.get("ratio_to_peer") is not None
        ]
        if ratios:
            return set_against("clinattn", ratios, peer)
    if peaks := of_kind(rows, "memory"):
        last = peaks[-1]["passes"]
        longest = max((int(n) for row in peaks for n in row["peak_bytes"]), default=0)
        text = ", ".join(
            f"{way_name(row['way'])} {row['peak_bytes'][str(longest)] / MEBIBYTE:,.0f} MiB"
            for row in peaks
            if row["passes"] == last and str(longest) in row["peak_bytes"]
        )
        return f"At {longest:,} tokens attention takes, {pass_name(last)}, at its peak: {text}."
    return f"{len(rows)} benchmarks ran."


def tables(result: Record) -> list[Table]:
    rows = extras(result)
    found = []
    for kind, peer in PEERS.items():
        own = of_kind(rows, kind)
        header = ("way", "tokens/s", "times as fast", "quartiles", "% of peak", "padding")
        for title in dict.fromkeys(row["group"] for row in own):
            cells = [speed_cells(row) for row in own if row["group"] == title]
            found.append(Table(title, header, cells, note=f"Times as fast: as {peer}."))
    found += [memory_table(title, points) for title, points in memory(rows).items()]
    if linear := [linear_cells(row) for row in of_kind(rows, "linear")]:
        columns = ("product", "pass", "GFLOP/s", "times as fast", "% of peak")
        note = "Times as fast: as torch's."
        found.append(Table("Linear layers", columns, linear, labels=2, note=note))
    starts = [
        (row["way"], part, f"{1e3 * q['median']:,.1f}")
        for row in of_kind(rows, "startup")
        for part, q in row["seconds"].items()
    ]
    if starts:
        found.append(Table("Start of a program", ("program", "part", "ms"), starts, labels=2))
    return found


def linear_cells(row: Record) -> tuple[str, ...]:
    rate, ratio, peak = (row[x] for x in ("gflop_per_s", "ratio_to_peer", "of_peak"))
    share = "-" if peak is None else percent(peak)
    return row["case"], row["passes"], marked(f"{rate:,.0f}", row), f"{ratio:.2f}", share


def speed_cells(row: Record) -> tuple[str, ...]:
    rate = row["tokens_per_s"]
    ratio, peak, padding = (row.get(x) for x in ("ratio_to_peer", "of_peak", "padding_share"))
    return (
        way_name(row["way"]),
        marked(f"{rate['median']:,.0f}", row),
        "1" if ratio is None else f"{ratio:.2f}",
        quartiles(rate),
        "-" if peak is None else percent(peak),
        "-" if padding is None else percent(padding),
    )


def memory(rows: list[Record]) -> dict[str, Points]:
    """Peak MiB by length of each way, under a title for each pass."""
    found: dict[str, Points] = {}
    for row in of_kind(rows, "memory"):
        title = f"Peak memory by length, {pass_name(row['passes'])}"
        points = found.setdefault(title, {}).setdefault(way_name(row["way"]), [])
        points += [(int(n), peak / MEBIBYTE) for n, peak in row["peak_bytes"].items()]
    return found


def memory_table(title: str, points: Points) -> Table:
    lengths = sorted({length for own in points.values() for length, _ in own})
    rows = []
    for way, own in points.items():
        at = dict(own)
        rows.append((way, *(f"{at[n]:,.1f}" if n in at else "-" for n in lengths)))
    note = "MiB that a call needs above its inputs. A column is a number of tokens."
    return Table(title, ("way", *(f"{n:,.0f} tokens" for n in lengths)), rows, note=note)


def charts(rows: list[Record]) -> list[Record]:
    speed: dict[str, Points] = {}
    for row in of_kind(rows, "attention"):
        if row.get("window") is None:
            title = f"Attention, {dtype_name(row['dtype'])}, {pass_name(row['passes'])}"
            points = speed.setdefault(title, {}).setdefault(way_name(row["way"]), [])
            points.append((row["longest"], row["tokens_per_s"]["median"]))
    drawn = [
        *(line_chart(t, p, "tokens of a sequence", "peak MiB") for t, p in memory(rows).items()),
        *(
            line_chart(t, p, "tokens of the longest sequence", "tokens a second")
            for t, p in speed.items()
        ),
    ]
    return [chart for chart in drawn if chart]


def facts(result: Record) -> Record:
    found = result["machine_info"].get("clinattn", {}) | {"date": result["datetime"][:19]}
    return facts_in(found)


def cases(result: Record) -> list[Case]:
    found = []
    for row in extras(result):
        kind, disturbed = row.get("kind"), bool(row.get("disturbed"))
        if kind in SPEED:
            found.append(of_rate((row["group"], way_name(row["way"])), row["tokens_per_s"], row))
        elif kind == "memory":
            key = pass_name(row["passes"]), way_name(row["way"])
            found += [
                Case((*key, f"{int(n):,} tokens"), "MiB", peak / MEBIBYTE)
                for n, peak in row["peak_bytes"].items()
            ]
        elif kind == "linear":
            key = row["case"], row["passes"]
            found.append(Case(key, "GFLOP/s", row["gflop_per_s"], disturbed=disturbed))
        elif kind == "startup":
            found += [
                Case((row["way"], part), "ms", 1e3 * q["median"], disturbed=disturbed)
                for part, q in row["seconds"].items()
            ]
    return found
