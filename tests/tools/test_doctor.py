"""The diagnosis as a whole: its last line and status, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

for package in ("typer", "rich"):
    pytest.importorskip(package)

from clinattn.backends import select  # noqa: E402
from clinattn.backends.backend import Backend  # noqa: E402
from clinattn.backends.compiled import compiled_module  # noqa: E402
from clinattn.tools import doctor, doctor_tables, readiness  # noqa: E402
from clinattn.tools.instruction_sets import NAMES  # noqa: E402
from clinattn.tools.readiness import Readiness  # noqa: E402

CPU = torch.device("cpu")
BUILT = pytest.mark.skipif(compiled_module() is None, reason="the compiled backend is not built")


@pytest.fixture
def doctor_here(cli, monkeypatch):
    """Runs doctor as on a machine without a GPU; returns what it printed and its status."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for variable in (select.VARIABLE, "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)

    def run(*options, **environ):
        done = cli("doctor", *options, **environ)
        assert isinstance(done.exception, SystemExit | None), done.exception
        return done.stdout, done.exit_code

    return run


def started_anew(folder, isa):
    """Returns the output and the status of doctor in a process with CLINATTN_CPU_ISA set."""
    environ = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CLINATTN_CPU_ISA": isa}
    kept = {x: y for x, y in os.environ.items() if not x.startswith(("CLINATTN_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-m", "clinattn", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=kept | environ,
        check=False,
    )
    return json.loads(done.stdout), done.returncode


@BUILT
def test_a_set_that_was_chosen_is_in_force(tmp_path):
    found, status = started_anew(tmp_path, "scalar")
    assert found["verdict"] == "ready: cpu kernels (scalar), 1 thread" and status == 0
    assert [x["name"] for x in found["instruction_sets"] if x["in_force"]] == ["scalar"]


@BUILT
def test_a_set_that_is_refused_is_not_ready(tmp_path):
    found, status = started_anew(tmp_path, "vmx")
    usable = ", ".join(compiled_module().instruction_sets())
    assert found["verdict"] == (
        "not ready: CLINATTN_CPU_ISA: instruction set 'vmx' is not usable here; usable: "
        f"{usable}; unset CLINATTN_CPU_ISA"
    )
    assert status == 1 and not any(x["in_force"] for x in found["instruction_sets"])


@BUILT
@pytest.mark.parametrize(
    ("backend", "start"),
    [
        ("reference", "CLINATTN_BACKEND=reference leaves every call to the slow reference"),
        ("cuda", "backend 'cuda' cannot be used: "),
        ("tpu", "backend: got 'tpu', expected one of "),
    ],
)
def test_a_backend_that_does_not_serve_is_not_ready(doctor_here, backend, start):
    printed, status = doctor_here(CLINATTN_BACKEND=backend)
    last = printed.splitlines()[-1]
    assert last.startswith(f"not ready: {start}")
    assert last.endswith("; unset CLINATTN_BACKEND") and status == 1


@BUILT
def test_json_has_the_status_too(doctor_here):
    found, status = doctor_here("--json", CLINATTN_BACKEND="reference")
    found = json.loads(found)
    assert found["ready"] is False and status == 1
    assert found["verdict"] == f"not ready: {found['what']}; {found['remedy']}"


@BUILT
def test_what_is_printed_is_what_json_has(doctor_here):
    text, status = doctor_here("--json", TORCH_NUM_THREADS="99")
    found = json.loads(text)
    printed, status_of_text = doctor_here(TORCH_NUM_THREADS="99")
    assert status == status_of_text == 0 and found["ready"] is True and found["remedy"] is None
    assert printed.splitlines()[-1] == found["verdict"]
    in_force = compiled_module().instruction_set()
    assert found["verdict"].startswith(f"ready: cpu kernels ({in_force}), ")
    rows = {x["name"]: x for x in found["instruction_sets"]}
    shown = {line.split()[0]: line for line in printed.splitlines() if "│" in line}
    flat = " ".join(printed.split())
    for name, row in rows.items():
        cells = [cell.strip() for cell in shown[name].split("│")]
        words = ["yes" if row[key] else "no" for key in ("built", "usable")]
        assert cells[:4] == [name, *words, "yes" if row["in_force"] else ""]
        assert (cells[4] == "-") == (row["peak"] is None)
        assert row["usable"] or f"{name} is not usable: {row['reason']}" in flat
    assert "instruction_set" not in found["environment"]  # said once
    assert [x for x in rows if rows[x]["usable"]] == compiled_module().instruction_sets()
    assert "slower TORCH_NUM_THREADS=99 has no effect" in flat
    assert found["backends"]["reference"] == {"usable": True, "reasons": [], "notes": []}
    assert found["backends"]["cuda"]["reasons"] and not found["backends"]["cuda"]["usable"]


@pytest.fixture
def without_kernels(monkeypatch):
    """A CPU backend that cannot run; calls take the reference."""
    before = select.register(Backend("cpu", lambda device: ["not built"], lambda: None))
    monkeypatch.setattr(readiness.installation, "kernels", lambda: "missing: no such file")
    monkeypatch.setattr(readiness.installation, "compiler", lambda: None)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    yield
    select.register(before)


def test_no_kernels_are_not_ready(without_kernels):
    assert str(readiness.readiness(CPU, None, None)) == (
        "not ready: the slow reference computes every call on cpu (kernels missing: no such file); "
        "install a C++ compiler (Debian: apt install g++), then: make ext"
    )


@BUILT
def test_kernels_that_fail_in_a_call_are_not_ready(monkeypatch):
    def fails(*args, **words):
        raise RuntimeError("out of\nmemory")

    monkeypatch.delenv(select.VARIABLE, raising=False)
    monkeypatch.setattr(readiness, "fused_attention", fails)
    expected = Readiness(False, "out of memory", "install clinattn again")
    assert readiness.readiness(CPU, "avx2", None) == expected


def test_interpreted_triton_is_not_ready(monkeypatch):
    monkeypatch.setattr(readiness, "_tried", lambda device: "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = readiness.readiness(CPU, None, None)
    assert not found.ready and found.remedy == "unset TRITON_INTERPRET"


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(readiness, "_tried", lambda device: "triton")
    monkeypatch.setattr(readiness, "triton_interpreter", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    found = readiness.readiness(torch.device("cuda"), None, None)
    assert str(found) == "ready: triton kernels on NVIDIA H100"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never\n", "madvise"), ("always madvise [never]\n", "never"), ("", None)],
)
def test_the_setting_of_huge_pages(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(doctor, "HUGE_PAGES", tmp_path / "enabled")
    assert doctor.huge_pages() is None
    (tmp_path / "enabled").write_text(text)
    assert doctor.huge_pages() == expected


def test_packages_that_a_benchmark_lacks(monkeypatch):
    monkeypatch.setattr(doctor, "OF_BENCH", ("json", "absent_package"))
    assert doctor.missing_packages() == [
        "clinattn bench needs absent_package: pip install 'clinattn[bench]'"
    ]


def test_an_untested_torch_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.installation, "untested_torch", lambda: "torch 9.0 is newer")
    assert doctor.warnings() == ["torch 9.0 is newer"]


@pytest.mark.parametrize(
    ("cpus", "shown"),
    [
        ((4, 4, None), "4"),
        ((8, 4, None), "8, two to a core: 4 cores"),
        ((8, 8, 2.5), "8, limited to the time of 2.5"),
    ],
)
def test_how_cpus_are_shown(cpus, shown):
    assert doctor_tables.shown_cpus(*cpus) == shown


def test_the_table_of_sets_is_narrow():
    """80 columns hold it, with the rates of a fast machine."""
    from rich.console import Console

    rate = {"fp32": 1e12, "bf16": 1e13}
    row = {"built": True, "usable": True, "in_force": True, "peak": rate, "attention": rate}
    table = doctor_tables.instruction_sets([{"name": name, **row} for name in NAMES])
    assert Console(width=200).measure(table).maximum <= 80
