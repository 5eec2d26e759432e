"""Cohorts that meds-torch-data's own MTD_preprocess writes, read as its own dataset reads them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("meds_torchdata", exc_type=ImportError)
pq = pytest.importorskip("pyarrow.parquet")

from patients import DAY, write_events, write_labels, write_splits  # noqa: E402
from runs import rows_of, small_run  # noqa: E402

from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.workloads import open_source  # noqa: E402
from clinattn.workloads.code_names import code_descriptions  # noqa: E402
from clinattn.workloads.meds_torch import from_meds_torch  # noqa: E402

OF = {p: "tuning" if p % 5 == 0 else "held_out" if p % 7 == 0 else "train" for p in range(1, 25)}
BARE = 24  # has static facts alone; before others, the package's dataset takes theirs for its own
PROGRAM = shutil.which("MTD_preprocess", path=Path(sys.executable).parent)


def events_of(patient: int) -> list[tuple]:
    """Static facts, and events of which some are at one time, with values for some codes."""
    rng = np.random.default_rng(patient)
    rows = [(patient, None, f"SEX//{'FM'[patient % 2]}", None)]
    if patient % 4 == 0:
        rows.append((patient, None, "WEIGHT", float(rng.normal(70, 9))))
    if patient == BARE:
        return rows
    time = patient * DAY
    for _ in range(int(rng.integers(5, 12))):
        time += int(rng.integers(3)) * 3_600_000_000 * 7
        code = f"LAB//{rng.integers(3)}//_Q_1"
        rows.append((patient, time, code, float(rng.normal(5, 2)) if rng.random() < 0.7 else None))
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The MEDS folder, and the cohort that the package makes of it."""
    root = tmp_path_factory.mktemp("mtd")
    meds = root / "meds"
    for split in ("train", "tuning", "held_out"):
        rows = [row for p, own in OF.items() if own == split for row in events_of(p)]
        write_events(root / split, rows)
        (meds / "data" / split).mkdir(parents=True)
        (root / split / "data" / "0.parquet").rename(meds / "data" / split / "0.parquet")
    write_splits(meds, OF)
    (meds / "metadata" / "dataset.json").write_text("{}")
    codes = {"code": ["WEIGHT"], "description": ["weight, kg"], "parent_codes": [["LOINC/29463-7"]]}
    import pyarrow as pa

    pq.write_table(pa.table(codes), meds / "metadata" / "codes.parquet")
    if PROGRAM is None:
        pytest.skip("MTD_preprocess is not beside this Python")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    command = [PROGRAM, f"MEDS_dataset_dir={meds}", f"output_dir={root / 'cohort'}"]
    done = subprocess.run(
        command, cwd=root, env={"PATH": path, "HOME": str(root)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return meds, root / "cohort"


def events(source, index):
    """(code, microseconds, value) of the events of a sequence."""
    at = slice(*source.bounds(index)[::2])
    codes = [source.vocabulary.tokens[i] for i in source.ids[at]]
    return codes, source.times[at].tolist(), source.values[at]


def test_a_cohort_is_the_timelines_that_it_was_made_of(folders):
    """Codes, times and order are those of the MEDS folder; a value is on its code's scale."""
    meds, cohort = (
        open_source(f"{kind}:{f}") for kind, f in zip(("meds", "meds-torch"), folders, strict=True)
    )
    assert cohort.subjects == meds.subjects and cohort.splits == meds.splits
    assert cohort.splits_digest == meds.splits_digest
    train: dict[str, list[float]] = {}
    for index, split in enumerate(meds.splits):
        if split == "train":
            codes, _, values = events(meds, index)
            for code, value in zip(codes, values, strict=True):
                train.setdefault(code, []).extend([value] if np.isfinite(value) else [])
    for index in range(len(meds)):
        codes, times, values = events(meds, index)
        own_codes, own_times, own_values = events(cohort, index)
        assert codes == own_codes and times == own_times
        for code, value, own in zip(codes, values, own_values, strict=True):
            known = train[code]
            scaled = (value - np.mean(known)) / np.std(known) if np.isfinite(value) else np.nan
            assert own == pytest.approx(scaled, rel=1e-3, abs=1e-4, nan_ok=True)


def test_sequences_are_those_of_the_packages_dataset(folders):
    from meds_torchdata import MEDSPytorchDataset, MEDSTorchDataConfig

    cohort = open_source(f"meds-torch:{folders[1]}")
    config = MEDSTorchDataConfig(
        tensorized_cohort_dir=str(folders[1]),
        max_seq_len=64,
        seq_sampling_strategy="to_end",
        static_inclusion_mode="include",
    )
    for split in ("train", "tuning", "held_out"):
        theirs = MEDSPytorchDataset(config, split=split)
        subjects = [subject for subject, _ in theirs.index]
        seen = [i for i, subject in enumerate(subjects) if subject != BARE]
        batch = theirs.collate([theirs[i] for i in seen])
        ids, arguments = from_meds_torch(batch, values=True)
        for row, i in enumerate(seen):
            index = cohort.subjects.index(subjects[i])
            at = slice(*cohort.bounds(index)[::2])
            days = cohort.days(index, cohort.times[at])
            length = int(arguments["lengths"][row])
            # an id here stands behind five special tokens, and the package's begin with 1
            assert (ids[row, :length] + 4).tolist() == cohort.ids[at].tolist()
            close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}
            torch.testing.assert_close(
                arguments["values"][row, :length], torch.from_numpy(cohort.values[at]), **close
            )
            torch.testing.assert_close(
                arguments["positions"][row, :length], torch.from_numpy(days), **close
            )


def test_a_cohort_trains_with_task_labels_and_is_benchmarked(folders, tmp_path, small_presets):
    from clinattn.tools.benchmark.run import open_workload
    from clinattn.tools.benchmark.settings import BenchmarkSettings

    data = f"meds-torch:{folders[1]}"
    rows = [(p, p * DAY + DAY, p % 2 == 0) for p in OF]
    labels = write_labels(tmp_path / "l.parquet", rows)
    settings = small_run(
        "classify", data=data, labels=labels, label_code=None, steps=2, output=tmp_path / "out",
        preset="valued",
    )  # fmt: skip
    trainer = Trainer(settings)
    trainer.run()
    assert rows_of(tmp_path / "out")[-1]["split"] == "tuning"
    assert len(trainer.corpus.train) == sum(split == "train" for split in OF.values())
    Trainer(small_run(data=data, steps=1, output=tmp_path / "mlm")).run()
    source = open_workload(BenchmarkSettings(data=data)).source
    assert source.title == "meds-torch-data cohort cohort, split train"
    assert code_descriptions(folders[1]) == {"WEIGHT": "weight, kg"}


def test_a_cohort_is_predicted_for(folders, tmp_path, small_presets):
    from clinattn.tools.prediction.job import read_job
    from clinattn.tools.prediction.settings import PredictionSettings

    data = f"meds-torch:{folders[1]}"
    labels = write_labels(tmp_path / "l.parquet", [(p, p * DAY + DAY, p % 2 == 0) for p in OF])
    given = {"label_code": None, "labels": labels, "steps": 1, "output": tmp_path / "out"}
    Trainer(small_run("classify", data=data, preset="valued", **given)).run()
    known = {"data": data, "labels": labels, "output": tmp_path / "p.parquet"}
    rows = read_job(PredictionSettings(str(tmp_path / "out"), **known)).rows
    held_out = [p for p, split in OF.items() if split == "held_out"]
    assert rows.columns["subject_id"].tolist() == held_out
    assert list(rows.outcomes) == [p % 2 == 0 for p in held_out]
