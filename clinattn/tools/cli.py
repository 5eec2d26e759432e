"""The command line: doctor, bench, report, profile, report-model, prepare, train, and the rest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from clinattn.files.disk import require_writable, require_writable_folder, write_text
from clinattn.tools.benchmark.settings import QUICK, BenchmarkSettings, ProfileSettings
from clinattn.tools.console import (
    INTERRUPTED,
    default_device,
    err,
    one_line_errors,
    out,
    progress_bar,
)
from clinattn.tools.evaluate import evaluate
from clinattn.tools.evaluation.settings import EvaluateSettings
from clinattn.tools.explain import explain
from clinattn.tools.explanation.settings import ExplainSettings
from clinattn.tools.export import export
from clinattn.tools.exporting.settings import ExportSettings
from clinattn.tools.model_report.settings import ReportSettings
from clinattn.tools.options import listing, takes
from clinattn.tools.predict import predict
from clinattn.tools.prediction.settings import PredictionSettings
from clinattn.tools.prepare import PrepareSettings, prepare
from clinattn.tools.train import train
from clinattn.tools.ways import dtype_name, pass_name, way_name
from clinattn.training.settings import TrainingSettings

OUTPUT = Path("bench/out")

# The packages of a command are in this extra of clinattn, or else in "bench".
EXTRAS = {"report-model": "integrations", "export": "integrations"}


class Commands(TyperGroup):
    """All commands, behind one boundary."""

    def main(self, *args: Any, **options: Any) -> Any:
        with one_line_errors():
            return super().main(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors(lambda: EXTRAS.get(ctx.invoked_subcommand or "", "bench")):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def show_version(asked: bool) -> None:
    """Prints the versions of clinattn and torch, and ends the program."""
    if asked:
        from clinattn.tools.environment import versions

        print(versions())
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=show_version, is_eager=True, help="Print versions and exit."
        ),
    ] = False,
) -> None:
    """Exact attention for clinical models: diagnose, measure, report, train, predict."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="What the Triton kernels compile to; needs no GPU."),
    ] = False,
    card: Annotated[
        list[int] | None,
        typer.Option(help="With --kernels: 80, 90 or 100; repeatable. (default: all)"),
    ] = None,
) -> None:
    """Tells what can run here and why the rest cannot, what is slower than need be, and a verdict.

    The last line says "ready" or "not ready" and why. Ends with status 1 if not ready.
    """
    if card and not kernels:
        raise typer.BadParameter("it goes with --kernels", param_hint="--card")
    if kernels:
        show_kernels(card, as_json)
        return
    from clinattn.tools.doctor import diagnose

    found = diagnose()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from clinattn.tools.doctor_tables import tables

        for part in tables(found):
            out.print(part)
        style = "bold green" if found["ready"] else "bold red"
        out.print(found["verdict"], style=style, soft_wrap=True)
    if not found["ready"]:
        raise typer.Exit(1)


def show_kernels(cards: list[int] | None, as_json: bool) -> None:
    """A table of the shipped kernels, or one JSON object a line, as they are compiled."""
    from clinattn.tools.compiled.kernel_table import kernel_rows, kernel_tables

    with progress_bar() as progress:
        rows = []
        for row in kernel_rows(cards, progress):
            rows.append(row)
            if as_json:
                print(json.dumps(row), flush=True)
    if not as_json:
        out.print(*kernel_tables(rows))


@app.command(cls=listing(BenchmarkSettings))
@takes(BenchmarkSettings, environment=True)
def bench(
    given: dict[str, Any],
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            envvar="QUICK",
            help=f"A minute: --budget {QUICK['budget_s']:g} --max-tokens {QUICK['max_tokens']}.",
        ),
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for JSON, plots and report.")] = OUTPUT,
) -> None:
    """Encoder tokens/s: torch SDPA padded and bucketed against clinattn padded and packed."""
    from clinattn.tools.benchmark.agreement import Disagreement
    from clinattn.tools.benchmark.run import Benchmark
    from clinattn.tools.report import page, plots  # noqa: F401  (missing packages show first)

    settings = BenchmarkSettings(**{"device": default_device()} | (QUICK if quick else {}) | given)
    require_writable_folder(output)
    for name in ("results.json", "report.html") if output.is_dir() else ():
        require_writable(output / name)
    with progress_bar() as progress:
        try:
            result = Benchmark(settings, progress, err.print).run()
        except Disagreement as error:
            err.print(f"error: {error}", style="red", soft_wrap=True)
            raise typer.Exit(1) from None
    try:
        show(result)
    finally:  # neither a full disk nor a reader that has gone loses the run
        write_results(result, output)
    if result["interrupted"]:
        err.print(f"interrupted: the results so far are in {output}", style="yellow")
        raise typer.Exit(INTERRUPTED)
    out.print(f"wrote {output}/results.json, plots and {output}/report.html", soft_wrap=True)
    if result["time_over"] and not result["rows"]:
        raise typer.Exit(1)


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="JSON of clinattn bench, or of a benchmark in bench/; several."),
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON of an earlier run, to compare with."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="(default: report.html beside the first)")
    ] = None,
) -> None:
    """Writes one self-contained HTML page from the JSON of benchmarks."""
    from clinattn.tools.report.page import load_result, write_report

    loaded = [load_result(result) for result in results]
    earlier = None if baseline is None else load_result(baseline, "baseline")
    path = output or results[0].with_name("report.html")
    require_writable(path)
    for section in write_report(loaded, path, earlier):
        out.print(f"{section.title}: {section.conclusion}", soft_wrap=True)
        for warning in section.warnings:
            err.print(warning, style="yellow", soft_wrap=True)
    out.print(f"wrote {path}", soft_wrap=True)


@app.command("profile", cls=listing(ProfileSettings))
@takes(ProfileSettings)
def profile_command(
    given: dict[str, Any],
    trace: Annotated[
        bool, typer.Option("--trace", help="On CUDA: torch.profiler's trace, without nsys.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder for the trace.")] = OUTPUT,
) -> None:
    """A few warmed steps of the encoder, in ranges named by layer and pass.

    On CUDA they are NVTX ranges in a window for nsys, whose command lines are printed; elsewhere,
    or with --trace, torch.profiler writes a Chrome trace, and its tables are printed.
    """
    from clinattn.tools.profiling import nsys_lines, run_for_nsys, trace_steps, warmed_step

    settings = ProfileSettings(**{"device": default_device()} | given)
    steps, path = settings.steps, output / f"{settings.variant}-{settings.mode}"
    require_writable_folder(output)
    step = warmed_step(settings)
    if settings.device == "cuda" and not trace:
        output.mkdir(parents=True, exist_ok=True)
        run_for_nsys(step, steps)
        out.print("The window is open to nsys. To record it, and to sum it up:")
        for line in nsys_lines(sys.argv[1:], path):
            print(f"\n    {line}")
        return
    path = path.with_suffix(".trace.json")
    ranges, operators, write = trace_steps(step, steps, settings.device)
    by_range = Table("range", show_edge=False)
    for name in ("calls", "ms", "of the steps"):
        by_range.add_column(name, justify="right")
    whole = ranges[0].milliseconds
    for found in ranges:
        share = f"{found.milliseconds / whole:.1%}" if whole else "-"
        by_range.add_row(found.name, str(found.calls), f"{found.milliseconds:,.2f}", share)
    out.print(by_range, "")
    print(operators)
    write(path)
    out.print(f"wrote {path}: open it in a Chrome trace viewer", soft_wrap=True)


@app.command("report-model", cls=listing(ReportSettings))
@takes(ReportSettings)
def report_model_command(
    given: dict[str, Any],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder with config.json, a config.json, or a model type such as bert.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """A transformers model before and after its attention is replaced: parity, speed, memory.

    Nothing is downloaded. Ends with status 1 if results are not those of the model's own attention.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    settings = ReportSettings(source=model, **{"device": default_device()} | given)
    import torch

    from clinattn.tools.model_report.report import report_model, summary

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with progress_bar() as progress:
        result = report_model(settings, progress)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        for line in summary(result):
            out.print(line, soft_wrap=True)
    if not result["passed"]:
        raise typer.Exit(1)


app.command(cls=listing(PrepareSettings))(prepare)
app.command(cls=listing(TrainingSettings))(train)
app.command(cls=listing(ExplainSettings))(explain)
app.command(cls=listing(PredictionSettings))(predict)
app.command(cls=listing(EvaluateSettings))(evaluate)
app.command(cls=listing(ExportSettings))(export)


def write_results(result: dict[str, Any], folder: Path) -> None:
    """results.json first, so that a plot that fails loses nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, default=str)
    write_text(folder / "results.json", text + "\n")
    from clinattn.tools.report.page import write_report
    from clinattn.tools.report.plots import write_plots

    result = json.loads(text)
    write_plots(result, folder)
    write_report(result, folder / "report.html")


def show(result: dict[str, Any]) -> None:
    """The table, what to know about it, and the speed-ups."""
    from clinattn.tools.gains import gains
    from clinattn.tools.other_work import disturbance

    if result["rows"]:
        work = result["workload"]
        out.print(
            f"{work['source']}: {work['sequences']} of {work['available']} sequences, "
            f"{work['real_tokens']:,} tokens; {result['settings']['preset']}, "
            f"{dtype_name(result['settings']['dtype'])}, {result['backend']} backend, "
            f"{result['environment']['threads']} threads",
        )
    table = Table("pass", "way", show_edge=False)
    for name in ("tokens/s", "quartiles", "rounds", "padding", "peak MiB", "CPU share"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        rate, memory = row["tokens_per_s"], row["peak_memory_bytes"]
        table.add_row(
            pass_name(row["mode"]),
            way_name(row["variant"]),
            f"{rate['median']:,.0f}",
            f"{rate['q1']:,.0f} to {rate['q3']:,.0f}",
            str(row["rounds"]),
            f"{row['padding_share']:.1%}",
            "-" if memory is None else f"{memory / 2**20:,.0f}",
            f"{row['cpu_share']:.0%}" + "*" * row["disturbed"],
        )
    if result["rows"]:
        out.print(table)
    if note := disturbance(result["rows"]):
        err.print(f"* {note}", style="yellow", soft_wrap=True)
    if result["time_over"]:
        err.print(
            f"the {result['settings']['budget_s']:g} s were over before all was measured: "
            "--budget gives it more",
            style="yellow",
        )
    for failed in result.get("out_of_memory", []):
        err.print(
            f"{pass_name(failed['mode'])}: {way_name(failed['variant'])} ran out of memory; "
            "--batch-size makes it less",
            style="yellow",
        )
    for gain in gains(result["rows"]):
        out.print(
            f"{pass_name(gain.mode)}: {gain.ratio:.2f} times by {gain.what} "
            f"({way_name(gain.way)}, over {way_name(gain.over)})",
            soft_wrap=True,
        )
    if result.get("backend") == "reference":
        err.print(
            "clinattn ran on its slow reference backend: clinattn doctor says why", style="yellow"
        )


def main() -> None:
    app()
