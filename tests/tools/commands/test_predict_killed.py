"""clinattn predict killed outright, and gone on with by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import runs

for package in ("pyarrow", "rich", "typer", "filelock"):
    pytest.importorskip(package)

from patients import write_measured_patients  # noqa: E402
from predicted import bits_of, trained  # noqa: E402


def run(*given, **options):
    command = [sys.executable, runs.__file__, "predict", *map(str, given)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    folder = write_measured_patients(tmp_path / "meds", patients=400)
    path = trained(tmp_path / "run", preset="timed", meds_dir=folder, cuts=4, steps=1)[1]
    whole, killed = tmp_path / "w.parquet", tmp_path / "p.parquet"
    given = [path, "--data", f"meds:{folder}", "--split", "all", "--threads", "1", "--output"]
    with run(*given, whole) as process:
        assert process.wait() == 0
    parts = tmp_path / "p.parquet.partial"
    given += [killed, "--batch-tokens", "64"]
    kept: list[int] = []
    for more in ([], ["--resume"]):
        with run(*given, *more) as process:
            before = len(list(parts.glob("part-*")))
            while len(list(parts.glob("part-*"))) < before + 3 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and not killed.exists()
        kept.append(len(list(parts.glob("part-*.npz"))))
    assert 3 <= kept[0] < kept[1]
    with run(*given, "--resume") as process:
        said = process.communicate()[1]
    assert process.returncode == 0, said
    assert bits_of(killed).equals(bits_of(whole)) and not parts.exists()
