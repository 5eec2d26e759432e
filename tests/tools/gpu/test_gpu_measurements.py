"""The stages of bench/gpu/run.py that measure ceilings, the encoder and counters, without a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from places import BENCH

pytest.importorskip("pyarrow")

NAMES = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Block Size", "Grid Size")
METRICS = {
    "gpu__time_duration.sum": ("nsecond", "1,234,567"),
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed": ("%", "21.5"),
    "launch__registers_per_thread": ("register/thread", "251"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "12"),
    "nobody__knows.this": ("", "n/a"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "48.25"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "3"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "5.50"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "0.01"),
    "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio": ("inst", "1"),
}
KERNELS = ("_forward_kernel", "forward_kernel", "dq_kernel", "dkdv_kernel")


def csv_line(words):
    return ",".join(f'"{word}"' for word in words)


def raw_page():
    """Returns what ncu --csv --page raw writes for a launch of each kernel."""
    lines = ["==PROF== Connected to process 7 (/usr/bin/python3.12)", "what the program printed"]
    lines.append(csv_line([*NAMES, *METRICS]))
    lines.append(csv_line([""] * len(NAMES) + [unit for unit, _ in METRICS.values()]))
    for i, kernel in enumerate(KERNELS):
        facts = (i, 7, "python3.12", "127.0.0.1", kernel, "(256, 1, 1)", "(2048, 1, 1)")
        lines.append(csv_line([*facts, *(value for _, value in METRICS.values())]))
    return "\n".join([*lines, "==PROF== Disconnected from process 7", ""])


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs module.function of bench/ on the CPU and returns its rows."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = []
    run = SimpleNamespace(
        row=lambda **fields: rows.append(json.loads(json.dumps(fields))),
        dryrun=True,
        device=torch.device("cpu"),
        backends=["reference"],
        enough_time=lambda seconds, what: True,
        left=lambda: 100.0,
        path=tmp_path / "rows.jsonl",
    )

    def perform(name):
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)(run)
        return rows

    return perform


def install(folder, name, text):
    tool = folder / name
    tool.write_text(text)
    tool.chmod(0o755)


def test_ceilings(stage):
    copy, product = stage("gpu.ceilings:ceilings")
    assert copy["gb_per_s"] > 0 and product["tflops"] > 0
    assert copy["ms_low"] <= copy["ms"] <= copy["ms_high"]


def test_the_card_is_read_without_fields_that_its_driver_lacks(stage, tmp_path, monkeypatch):
    answer = "case $1 in *throttle*) echo '1980, 2619, [N/A], 41, 0x4';; *) exit 2;; esac\n"
    install(tmp_path, "nvidia-smi", "#!/bin/sh\n" + answer)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.syspath_prepend(BENCH)
    state = importlib.import_module("gpu.ceilings").card_state()
    assert state["sm_mhz"] == 1980 and state["clock_limited_by"] == "0x4"
    assert state["watts"] == "[N/A]"


def test_the_encoder_in_five_ways(stage):
    rows = stage("gpu.encoder:encoder")
    assert all(row.get("ok", True) for row in rows)
    medians = {(x["mode"], x["provider"]): x for x in rows if x.get("case") == "tokens/s"}
    ways = {f"clinattn_{x}" for x in ("packed", "padded", "bucketed")}
    ways |= {f"sdpa_{x}" for x in ("padded", "bucketed")}
    assert set(medians) == {(mode, way) for mode in ("infer", "train") for way in ways}
    for mode in ("infer", "train"):
        packed = medians[mode, "clinattn_packed"]
        assert packed["padding_share"] == 0 < medians[mode, "sdpa_padded"]["padding_share"]
        (target,) = [x for x in rows if "target" in x and f"encoder {mode}" in x["case"]]
        ratio = packed["tokens_per_s"] / medians[mode, "sdpa_padded"]["tokens_per_s"]
        assert target["measured"] == pytest.approx(ratio)
        assert target["met"] == (ratio >= target["target"])
        shares = {x["provider"] for x in rows if "attention_share" in x and x["mode"] == mode}
        assert shares == {"clinattn_packed", "sdpa_padded"}
    assert all(0 < x["attention_share"] < 1 for x in rows if "attention_share" in x)
    assert "settings" not in {field for row in rows for field in row}  # run.py reads that one


def test_what_does_not_fit_costs_one_way(stage, monkeypatch):
    variants = importlib.import_module("clinattn.tools.benchmark.variants")
    honest = variants.Runner.run

    def run(self, mode, variant, examples):
        if variant.name == "sdpa_padded":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")
        if variant.name == "clinattn_padded" and mode == "train":
            raise RuntimeError("no such kernel")
        honest(self, mode, variant, examples)

    monkeypatch.setattr(variants.Runner, "run", run)
    rows = stage("gpu.encoder:encoder")
    failed = {(x["mode"], x["provider"], x["failed"]): x.get("ok") for x in rows if "failed" in x}
    assert failed == {
        ("infer", "sdpa_padded", "out of memory"): None,
        ("train", "sdpa_padded", "out of memory"): None,
        ("train", "clinattn_padded", "first pass"): False,
    }
    measured = {(x["mode"], x["provider"]) for x in rows if x.get("case") == "tokens/s"}
    assert len(measured) == 10 - len(failed) and not any("target" in x for x in rows)


def test_kernels_of_attention_are_told_by_their_names(stage, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    attention = importlib.import_module("gpu.encoder").ATTENTION
    for name in (
        *KERNELS,
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_12_64x128x128_1x3x1",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<64, 128> >",
        "void cudnn::fusion::compute_dot_do_o_specialized<false, 128, 8>(...)",
    ):
        assert attention.search(name), name
    for name in (
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16>",
        "rotary_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float>",
        "void at::native::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>",
    ):
        assert not attention.search(name), name


def test_seconds_of_kernels_are_read_from_a_trace(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    trace = importlib.import_module("gpu.kernel_seconds")
    events = [
        {"ph": "X", "cat": "kernel", "name": "dq_kernel", "ts": 1.0, "dur": 1500.0},
        {"ph": "X", "cat": "kernel", "name": "dq_kernel", "ts": 9.0, "dur": 500},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0.5, "dur": 7.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "step", "ts": 1.0, "dur": 9000.0},
        {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)", "ts": 30.0, "dur": 1.0},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 0.5},
        {"ph": "M", "name": "process_name"},
    ]
    found = trace.by_name(events, trace.DEVICE_WORK)
    assert found == {"dq_kernel": 2e-3, "Memset (Device)": 1e-6}


def test_counters_of_each_kernel(stage, tmp_path, monkeypatch):
    (tmp_path / "page.csv").write_text(raw_page())
    copy = 'while [ "$1" != --log-file ]; do shift; done; cp {page} "$2"\n'
    install(tmp_path, "ncu", "#!/bin/sh\n" + copy.format(page=tmp_path / "page.csv"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rows = [row for row in stage("gpu.profilers:profile") if row.get("tool") == "ncu"]
    assert [row["kernel"] for row in rows] == ["forward", "forward", "dq", "dkdv"]
    assert [row["name"] for row in rows] == list(KERNELS)
    for row in rows:
        assert row["microseconds"] == pytest.approx(1234.567)
        assert (row["tensor_pct"], row["shared_pct"], row["registers"]) == (48.25, 21.5, 251)
        assert list(row["stalls_pct"].items())[:2] == [("gmma", 57.8), ("barrier", 31.5)]
        assert "long_scoreboard" not in row["stalls_pct"]  # below 1 %
        assert (tmp_path / row["log"]).read_text() == raw_page()


def test_an_older_ncu_is_asked_again_without_the_metrics_it_does_not_know(
    stage, tmp_path, monkeypatch
):
    (tmp_path / "page.csv").write_text(raw_page())
    text = (
        "#!/bin/sh\n"
        'case "$*" in *--metrics*) echo "==ERROR== Failed to find metric x"; exit 1;; esac\n'
        f'while [ "$1" != --log-file ]; do shift; done; cp {tmp_path / "page.csv"} "$2"\n'
    )
    install(tmp_path, "ncu", text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rows = stage("gpu.profilers:profile")
    assert len([row for row in rows if row.get("tool") == "ncu"]) == len(KERNELS)


def test_a_refused_ncu_is_a_row_with_its_reason(stage, tmp_path, monkeypatch):
    words = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"
    install(tmp_path, "ncu", f"#!/bin/sh\necho '{words}'\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rows = stage("gpu.profilers:profile")
    (skipped,) = [row for row in rows if row.get("skipped", "").startswith("ncu")]
    assert "LibraryNotLoaded" in skipped["reason"] and skipped["exit"] == 1
    assert any(row.get("tool") == "torch.profiler" for row in rows)


def test_both_pages_of_ncu_are_read(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    profile = importlib.import_module("gpu.profilers")
    names = [*NAMES, "Section Name", "Metric Name", "Metric Unit", "Metric Value"]
    facts = (0, 7, "python3.12", "127.0.0.1", "dq_kernel", "(256, 1, 1)", "(2048, 1, 1)")
    details = [
        ("GPU Speed Of Light Throughput", "Duration", "us", "1,234.50"),
        ("GPU Speed Of Light Throughput", "L2 Cache Throughput", "%", "12.00"),
        ("Launch Statistics", "Registers Per Thread", "register/thread", "251"),
        ("Occupancy", "Achieved Occupancy", "%", "12.40"),
    ]
    lines = [csv_line(names), *(csv_line([*facts, *line]) for line in details)]
    ((kernel, metrics),) = profile.parse("\n".join(lines))
    assert kernel == "dq_kernel"
    assert profile.readings(metrics) == {
        "microseconds": 1234.5,
        "l2_pct": 12.0,
        "registers": 251.0,
        "occupancy_pct": 12.4,
    }
    assert profile.parse("") == profile.parse("==ERROR== no kernels were profiled\n") == []


def test_a_capture_of_nsys_is_looked_into(stage, tmp_path, monkeypatch):
    """The tool records the very command that clinattn profile prints, and cannot make a report."""
    text = (
        'while [ "$1" != -o ]; do shift; done; target=$2; shift 4\n'
        f"[ $1 = {sys.executable} ] && [ $3 = clinattn ] && [ $4 = profile ] || exit 1\n"
        "printf 'QD\\0clinattn layer 3 backward\\0clinattn profile --mode\\0clinattn step' "
        "> $target.qdstrm; echo 'Importer not found'; exit 1\n"
    )
    install(tmp_path, "nsys", "#!/bin/sh\n" + text)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (row,) = [row for row in stage("gpu.profilers:profile") if "captured" in row]
    assert row["captured"] and row["exit"] == 1 and list(row["bytes"]) == [".qdstrm"]
    assert row["ranges"] == ["clinattn layer 3 backward", "clinattn step"]
    assert "Importer not found" in row["said"]


def test_the_program_that_ncu_runs(stage, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    importlib.import_module("gpu.profilers").main("reference", 16, 32)
