"""The command line in an empty folder, and a folder in MEDS layout."""

import pytest


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in an empty folder, with no MEDS folder in the environment."""
    from typer.testing import CliRunner

    from clinattn.tools.cli import app

    for name in ("MEDS_DIR", "CLINATTN_MEDS_DIR", "QUICK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return lambda *args, **env: CliRunner().invoke(app, [str(arg) for arg in args], env=env)


@pytest.fixture
def meds(tmp_path):
    """A MEDS folder of five patients with 10 to 50 events."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(p, f"CODE//{(7 * p + e) % 11}") for p in range(1, 6) for e in range(10 * p)]
    subject, code = zip(*rows, strict=True)
    table = pa.table(
        {
            "subject_id": pa.array(subject, pa.int64()),
            "time": pa.array(range(len(rows)), pa.timestamp("us")),
            "code": code,
        }
    )
    folder = tmp_path / "my_meds"
    (folder / "data").mkdir(parents=True)
    pq.write_table(table, folder / "data" / "0.parquet")
    return folder
