"""Stage of run.py that looks into the kernels: ncu, torch.profiler, and whether nsys captures.

    python bench/gpu/profilers.py triton 128 8192

runs forward and backward at D 128 and N 8192, the last round of a few between cudaProfilerStart and
-Stop, for ncu to measure that one.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import re
import shlex
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clinattn import fused_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, which holds the package gpu
from gpu.dense_shapes import Shape
from gpu.jobs import output_of
from gpu.kernel_seconds import kernel_seconds
from gpu.rows import Run
from gpu.training import gradients

DIMS, N, WIDTH = (128, 64), 8192, 2048  # WIDTH is heads times head_dim, as in the stage speed
BATCH, ROUNDS = 2, 3
KERNEL = re.compile("(forward|dq|dkdv)_kernel")
NCU_SECONDS, NSYS_SECONDS = 45, 60
NAMES = 12  # of ranges that a row holds

SECTIONS = (
    "SpeedOfLight WarpStateStats ComputeWorkloadAnalysis MemoryWorkloadAnalysis Occupancy "
    "LaunchStats"
).split()
# Beside the sections, under Hopper's names; wgmma counts as hmma.
METRICS = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
)
# Readings kept of a few hundred metrics: of each list the first pattern that finds one, by ncu's
# names (--page raw) or by the names of ncu's report (--page details).
READINGS = {
    "tensor_pct": [
        r"^sm__pipe_tensor_cycles_active\.avg\.pct",
        r"^sm__pipe_tensor_op_[hg]mma_cycles_active\.avg\.pct",
        r"^sm__inst_executed_pipe_tensor(_op_[hg]mma)?\.(avg|sum)\.pct",
    ],
    "shared_pct": [
        r"^l1tex__data_pipe_lsu_wavefronts_mem_shared\.(avg|sum)\.pct",
        r"^l1tex__data_pipe_lsu_wavefronts\.(avg|sum)\.pct",
    ],
    "shared_reads_pct": [r"^l1tex__data_bank_reads\.avg\.pct"],
    "l1_pct": [r"^l1tex__throughput\.avg\.pct", r"^L1/TEX Cache Throughput$"],
    "l2_pct": [r"^lts__throughput\.avg\.pct", r"^L2 Cache Throughput$"],
    "l2_hit_pct": [r"^lts__t_sector_hit_rate\.pct", r"^L2 Hit Rate$"],
    "dram_pct": [r"^(gpu__)?dram__?throughput\.avg\.pct", r"^DRAM Throughput$"],
    "sm_pct": [r"^sm__throughput\.avg\.pct", r"^Compute \(SM\) Throughput$"],
    "issue_pct": [
        r"^sm__inst_issued\.(avg|sum)\.pct",
        r"^smsp__issue_active\.avg\.pct",
        r"^Issue Slots Busy$",
    ],
    "ipc": [r"^sm__inst_executed\.avg\.per_cycle_active$", r"^Executed Ipc Active$"],
    "xu_pct": [r"^sm__inst_executed_pipe_xu\.(avg|sum)\.pct"],
    "fma_pct": [r"^sm__pipe_fma_cycles_active\.avg\.pct", r"^sm__inst_executed_pipe_fma\..*pct"],
    "alu_pct": [r"^sm__pipe_alu_cycles_active\.avg\.pct", r"^sm__inst_executed_pipe_alu\..*pct"],
    "lsu_pct": [r"^sm__inst_executed_pipe_lsu\.(avg|sum)\.pct"],
    "registers": [r"^launch__registers_per_thread$", r"^Registers Per Thread$"],
    "shared_bytes": [
        r"^launch__shared_mem_per_block_dynamic$",
        r"^Dynamic Shared Memory Per Block$",
    ],
    "threads": [r"^launch__block_size$", r"^Block Size$"],
    "blocks": [r"^launch__grid_size$", r"^Grid Size$"],
    "waves": [r"^launch__waves_per_multiprocessor$", r"^Waves Per SM$"],
    "occupancy_pct": [r"^sm__warps_active\.avg\.pct", r"^Achieved Occupancy$"],
    "sm_hz": [r"^(sm|smsp|gpc)__cycles_elapsed\.avg\.per_second$", r"^SM Frequency$"],
}
DURATION = re.compile(r"^gpu__time_duration\.sum$|^Duration$")
UNITS = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3}
UNITS |= {"second": 1e6, "s": 1e6, "": 1e-3}  # to microseconds; ncu's base unit is the nanosecond
# Names of a warp's reasons not to issue, in two forms, of which a report holds one.
STALLS = (
    re.compile(r"average_warps_issue_stalled_(\w+)(?<!_not_issued)_per_issue_active\.ratio$"),
    re.compile(r"warp_issue_stalled_(\w+)(?<!_not_issued)_per_warp_active\.pct$"),
)
RANGE = re.compile(r"clinattn (?:step|layer \d+ \w+|attention \w+, \w+)")
REFUSALS = re.compile(r"LibraryNotLoaded|ERR_NVGPUCTRPERM|==ERROR==[^\n]*|not done after [^\n]*")

Metrics = dict[str, tuple[float, str]]  # value and unit by name


def profile(run: Run) -> None:
    """Rows of each kernel's counters and seconds, and of what nsys records."""
    dims = DIMS if not run.dryrun else (16,)
    tool = find_tool("ncu", "/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
    if tool is None:
        run.row(skipped="ncu: not found")
    for backend, dim in itertools.product(run.backends, dims):
        if tool is None or not run.enough_time(15, f"ncu {backend} D {dim}"):
            break
        if not counters(tool, backend, dim, run):
            break
    if run.enough_time(10, "kernels apart"):
        for backend, dim, causal in itertools.product(run.backends, dims, (False, True)):
            apart(backend, dim, causal, run)
    if run.enough_time(NSYS_SECONDS, "nsys"):
        nsys(run)


def find_tool(name: str, *patterns: str) -> str | None:
    """Path of a tool: on PATH, or the newest of the first pattern with one; None without a tool."""
    found = shutil.which(name)
    if found:
        return found
    for pattern in patterns:
        for path in sorted(Path("/").glob(pattern.lstrip("/")), reverse=True):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


# The work


def inputs_of(dim: int, n: int, device: torch.device | str) -> list[torch.Tensor]:
    shape = (BATCH, WIDTH // dim, n, dim) if n > 1024 else (1, 1, n, dim)
    return [torch.randn(shape, device=device).bfloat16() for _ in range(4)]


def main(backend: str, dim: int, n: int) -> None:
    """Rounds that warm up, then one that a profiler sees."""
    on_card = torch.cuda.is_available()
    q, k, v, do = inputs_of(dim, n, "cuda" if on_card else "cpu")
    for _ in range(ROUNDS - 1):
        gradients(fused_attention, q, k, v, do, backend=backend)
    with torch.cuda.profiler.profile() if on_card else contextlib.nullcontext():
        gradients(fused_attention, q, k, v, do, backend=backend)
        if on_card:
            torch.cuda.synchronize()


# ncu


def counters(tool: str, backend: str, dim: int, run: Run) -> bool:
    """Rows of forward, dq and dkdv in one process under ncu; False where ncu refuses."""
    n = N if not run.dryrun else 32
    log = run.path.parent / f"ncu-{backend}-bf16-d{dim}-n{n}.csv"
    began = time.monotonic()
    for metrics in (METRICS, ()):  # in case this ncu does not know one of the names
        log.unlink(missing_ok=True)
        seconds = min(NCU_SECONDS, max(5.0, run.left()))
        command = ncu_command(tool, log, metrics, [backend, str(dim), str(n)])
        code, output = output_of(command, seconds, {"OMP_NUM_THREADS": "1"})
        text = log.read_text(errors="replace") if log.exists() else ""
        kernels = parse(text)
        if kernels or "metric" not in (text + output).lower():
            break
    seconds = round(time.monotonic() - began, 1)
    case = f"bf16 D {dim} full N {n}"
    if not kernels:
        said = text + output
        why = REFUSALS.findall(said)
        run.row(
            skipped=f"ncu {case}",
            backend=backend,
            reason=" ".join(why)[:300] or said.strip()[-300:],
            exit=code,
            seconds=seconds,
        )
        return False
    for name, metrics_of_kernel in kernels:
        known = KERNEL.search(name)
        run.row(
            tool="ncu",
            backend=backend,
            case=case,
            kernel=known[1] if known else name,
            name=name,
            **readings(metrics_of_kernel),
            log=log.name,
            seconds=seconds,
        )
    return True


def ncu_command(tool: str, log: Path, metrics: tuple[str, ...], arguments: list[str]) -> list[str]:
    """Command that profiles what the program brackets, each kernel once, at the clocks as found."""
    command = [tool, "--clock-control", "none", "--cache-control", "none"]
    command += ["--target-processes", "application-only"]
    command += ["--kernel-name", f"regex:{KERNEL.pattern}"]
    command += ["--profile-from-start", "off"]
    for section in SECTIONS:
        command += ["--section", section]
    command += ["--metrics", ",".join(metrics)] if metrics else []
    command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
    return [*command, sys.executable, __file__, *arguments]


def parse(text: str) -> list[tuple[str, Metrics]]:
    """(kernel, metrics) of each launch in ncu's CSV: --page raw, or --page details.

    Raw: a line of names, one of units, one for each launch. Details: a line for each metric.
    Lines of ncu itself begin with ==, and what the program prints may stand before the names.
    """
    lines = [line for line in text.splitlines() if not line.startswith("==")]
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), None)
    if start is None:
        return []
    names, *rest = csv.reader(io.StringIO("\n".join(lines[start:])))
    rest = [line for line in rest if len(line) == len(names)]
    at = {name: i for i, name in enumerate(names)}
    if "Kernel Name" not in at:
        return []
    if {"Metric Name", "Metric Value"} <= at.keys():
        return parse_details(at, rest)
    units = rest[0] if rest and not rest[0][0].strip() else [""] * len(names)
    return [
        (
            line[at["Kernel Name"]],
            {
                name: (value, units[i])
                for i, name in enumerate(names)
                if (value := number(line[i])) is not None
            },
        )
        for line in rest
        if line[0].strip()
    ]


def parse_details(at: dict[str, int], lines: list[list[str]]) -> list[tuple[str, Metrics]]:
    launches: dict[str, tuple[str, Metrics]] = {}
    for line in lines:
        _, metrics = launches.setdefault(line[0], (line[at["Kernel Name"]], {}))
        value = number(line[at["Metric Value"]])
        if value is not None:
            unit = line[at["Metric Unit"]] if "Metric Unit" in at else ""
            metrics.setdefault(line[at["Metric Name"]], (value, unit))
    return list(launches.values())


def number(text: str) -> float | None:
    """1,234.5 as ncu writes it; None for n/a and words."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def readings(metrics: Metrics) -> dict[str, Any]:
    """The telling metrics: duration, shares of peak, stalls as shares of a warp's time."""
    found: dict[str, Any] = {}
    for name, (value, unit) in metrics.items():
        if DURATION.search(name):
            found["microseconds"] = value * UNITS.get(unit, 1e-3)
    for reading, patterns in READINGS.items():
        value = next(first_of(metrics, patterns), None)
        if value is not None:
            found[reading] = value
    by_name = (
        {m[1]: value for name, (value, _) in metrics.items() if (m := stall.search(name))}
        for stall in STALLS
    )
    stalls: dict[str, float] = next(filter(None, by_name), {})
    total = sum(stalls.values())
    if total:
        largest = sorted(stalls.items(), key=lambda item: -item[1])
        found["stalls_pct"] = {
            name: round(100 * value / total, 1) for name, value in largest if value >= total / 100
        }
        found["cycles_per_issue"] = total  # of a warp, the one in which it issues among them
    return found


def first_of(metrics: Metrics, patterns: list[str]) -> Iterator[float]:
    for pattern in patterns:
        for name, (value, _) in metrics.items():
            if re.search(pattern, name):
                yield value


# torch.profiler


def apart(backend: str, dim: int, causal: bool, run: Run) -> None:
    """Seconds of forward, dq and dkdv in one call each, from one trace of a few calls."""
    n, calls = (N, 5) if not run.dryrun else (32, 1)
    q, k, v, do = inputs_of(dim, n, run.device)

    def work() -> None:
        for _ in range(calls):
            gradients(fused_attention, q, k, v, do, is_causal=causal, backend=backend)

    work()
    by_kernel = kernel_seconds(work, run.device)
    shape = Shape(q.shape[0], q.shape[1], n, dim, "causal" if causal else "full")
    products = {"forward": 2, "dq": 3, "dkdv": 4}  # of 2D for each visible pair
    other = 0.0
    found: dict[str, float] = {}
    for name, seconds in by_kernel.items():
        known = KERNEL.search(name)
        if known:
            found[known[1]] = found.get(known[1], 0.0) + seconds / calls
        else:
            other += seconds / calls
    fields: dict[str, Any] = {}
    for kernel, seconds in found.items():
        fields[f"{kernel}_ms"] = 1e3 * seconds
        fields[f"{kernel}_tflops"] = shape.flops() / 2 * products[kernel] / seconds / 1e12
    case = f"bf16 D {dim} {shape.mask} N {n}"
    fields |= {"other_ms": 1e3 * other}
    run.row(tool="torch.profiler", backend=backend, case=case, **fields)


# nsys


def nsys(run: Run) -> None:
    """Runs the line that `clinattn profile` prints; a row tells which of our ranges it captures.

    The nsys in Nsight Compute's folder records and cannot import: its .qdstrm is then all there is.
    """
    try:
        from clinattn.tools.profiling import nsys_lines
    except ImportError as error:  # pyarrow
        run.row(skipped=f"nsys: {error}")
        return
    places = "/opt/nvidia/nsight-compute/*/host/target-linux-x64/nsys"
    tool = find_tool("nsys", "/opt/nvidia/nsight-systems/*/bin/nsys", places)
    if tool is None:
        run.row(skipped="nsys: not found")
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "clinattn_packed-train")
        preset = "bioclinical-modernbert-base" if not run.dryrun else "tiny"  # kernels compiled
        options = ["--preset", preset, "--dtype", "bfloat16", "--max-tokens", "128"]
        options += ["--batch-size", "2", "--steps", "1", "--output", folder]
        line, _ = nsys_lines(["profile", *options], target)
        command = [sys.executable if word == "python" else word for word in shlex.split(line)]
        command[0] = tool
        code, output = output_of(command, NSYS_SECONDS, {"OMP_NUM_THREADS": "1"})
        found = sorted(target.parent.glob(f"{target.name}.*"))
        captures = {path.suffix: path.stat().st_size for path in found}
        left = NSYS_SECONDS - (time.monotonic() - began)
        named = ranges_in(target, tool, left)
    run.row(
        tool=tool,
        case="nsys records clinattn profile",
        captured=any(size for name, size in captures.items() if name != ".json"),
        bytes=captures,
        ranges=named,
        exit=code,
        said=output.strip()[-300:],
        seconds=round(time.monotonic() - began, 1),
    )


def ranges_in(target: Path, tool: str, seconds: float) -> list[str] | None:
    """Names of our NVTX ranges in a capture: by nsys's export to SQLite, or else by its bytes."""
    report, database = target.with_suffix(".nsys-rep"), target.with_suffix(".sqlite")
    if report.exists() and seconds > 3:
        export = [tool, "export", "--type", "sqlite", "--output", str(database), str(report)]
        output_of(export, seconds, {})
        if database.exists():
            try:
                with sqlite3.connect(database) as db:
                    rows = db.execute("select value from StringIds where value like 'clinattn %'")
                    return sorted({row[0] for row in rows if RANGE.fullmatch(row[0])})[:NAMES]
            except sqlite3.Error:
                pass
    for suffix in (".nsys-rep", ".qdstrm"):
        capture = target.with_suffix(suffix)
        if capture.exists():
            return sorted(set(RANGE.findall(capture.read_bytes().decode("latin-1"))))[:NAMES]
    return None


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]))
