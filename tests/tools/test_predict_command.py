"""clinattn predict on timelines: what training saw, the files, going on, and errors."""

from __future__ import annotations

import re
import shutil
import stat

import numpy as np
import pytest
import torch

for package in ("pyarrow", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from patients import DAY, write_events, write_measured_patients, write_splits  # noqa: E402
from predicted import bits_of, facts_of, trained  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.tools.prediction import predict as prediction  # noqa: E402
from clinattn.tools.prediction.job import read_job  # noqa: E402
from clinattn.tools.prediction.models import ROWS, filler  # noqa: E402
from clinattn.tools.prediction.settings import PredictionSettings  # noqa: E402
from clinattn.training.objectives import HELD_OUT_EPOCH, Classification  # noqa: E402
from clinattn.training.sequences import Tokens  # noqa: E402
from clinattn.training.start import make_corpus  # noqa: E402
from clinattn.workloads import open_source  # noqa: E402

CUTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("meds"))


@pytest.fixture(scope="module")
def valued(folder, tmp_path_factory):
    """A classifier of codes and values, with three cuts of a timeline."""
    return trained(
        tmp_path_factory.mktemp("valued"), preset="valued", meds_dir=folder, cuts=CUTS
    )


@pytest.fixture(scope="module")
def masked(folder, tmp_path_factory):
    """A masked language model."""
    return trained(tmp_path_factory.mktemp("masked"), "mlm", meds_dir=folder)


@pytest.fixture
def run(cli, folder, valued, masked, small_presets, threads):
    threads(1)
    names = {"VALUED": valued[1], "MASKED": masked[1], "MEDS": f"meds:{folder}"}
    return lambda *args: cli("predict", *(names.get(arg, arg) for arg in args))


GIVEN = ["VALUED", "--data", "MEDS"]
OUT, ALL = ["--output", "p.parquet"], ["--split", "all"]


@pytest.mark.parametrize("preset", ["valued", "timed", "timed-causal"])
def test_predictions_are_those_of_evaluation(
    preset, folder, valued, tmp_path, small_presets, threads
):
    """Ids, days, values, outcomes and probabilities, of all cuts of the patients held out."""
    threads(1)
    settings, path = valued
    if preset != "valued":
        settings, path = trained(tmp_path / "run", preset=preset, meds_dir=folder, cuts=CUTS)
    corpus = make_corpus(settings, None)
    given = PredictionSettings(str(path), data=f"meds:{folder}", output=tmp_path / "p.parquet")
    job = read_job(given)
    assert len(job.rows) == len(corpus.held_out) > 10
    for row, example in enumerate(corpus.held_out):
        (tokens,) = job.rows.sequences(row)
        for name in ("ids", "days", "values"):
            mine, theirs = getattr(tokens, name), getattr(example, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert [int(x) for x in job.rows.outcomes] == [x.label for x in corpus.held_out]
    objective = Classification(corpus)
    every = list(range(len(corpus.held_out)))
    batch = objective.batch(every, HELD_OUT_EPOCH, torch.device("cpu"))
    with torch.inference_mode():
        logits = batch.run(job.model.module).logits.double()
    prediction.run(job, given, lambda *_: None)
    table = pq.read_table(given.output)
    found = table["predicted_boolean_probability"].to_numpy()
    np.testing.assert_allclose(found, logits.softmax(1)[:, 1], rtol=1e-5)
    assert table["predicted_boolean_value"].to_pylist() == (found > 0.5).tolist()
    assert facts_of(given.output)["checkpoint"]["preset"] == preset


def test_the_file_is_by_the_schema_of_meds(run, tmp_path, folder):
    meds, evaluation = (pytest.importorskip(x) for x in ("meds", "meds_evaluation.schema"))
    done = run(*GIVEN, "--output", "p.parquet")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "p.parquet")
    assert evaluation.PredictionSchema.align(table).schema.equals(table.schema)
    labels = table.select(["subject_id", "prediction_time", "boolean_value"])
    meds.LabelSchema.align(labels)
    moments = list(zip(*(table[x].to_pylist() for x in table.column_names[:2]), strict=True))
    assert moments == sorted(moments) and len(set(moments)) == len(moments)
    assert stat.S_IMODE((tmp_path / "p.parquet").stat().st_mode) == 0o600
    assert not list(tmp_path.glob("*.partial")) and len(list(tmp_path.iterdir())) == 1
    at_end = run(*GIVEN, "--output", "end.parquet", "--at-end", "--split", "all")
    assert at_end.exit_code == 0, at_end.output
    ends = pq.read_table(tmp_path / "end.parquet")
    assert evaluation.PredictionSchema.align(ends).num_rows == 40
    assert "boolean_value" not in ends.column_names
    source = open_source(f"meds:{folder}")
    assert ends["prediction_time"].cast(pa.int64()).to_numpy().tolist() == [
        source.times[source.bounds(i)[2] - 1] for i in range(40)
    ]
    assert "known:" not in at_end.stdout and "known: " in done.stdout


def test_a_prediction_is_before_its_outcome(run, tmp_path):
    """The time is that of the last event before the cut, and an ALARM after it counts alone."""
    rows = [(1, None, "SEX//F", None)]
    codes = ["STEP//0", "STEP//1", "ALARM", "STEP//2", "STEP//3", "STEP//4", "ALARM", "STEP//5"]
    rows += [(1, day * DAY, code, None) for day, code in enumerate(codes)]
    write_events(tmp_path / "one", rows)
    done = run("VALUED", "--data", "meds:one", "--split", "all", "--output", "p.parquet")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "p.parquet")
    days = table["prediction_time"].cast(pa.int64()).to_numpy() // DAY
    assert days.tolist() == [1, 3, 5]
    assert table["boolean_value"].to_pylist() == [True, False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("preset", ["valued", "timed-causal"])
def test_the_bits_of_a_row_do_not_depend_on_its_batch(
    dtype, preset, run, folder, tmp_path, valued
):
    """Alone, in small batches, and all at once."""
    model = "VALUED"
    if preset != "valued":
        model = trained(tmp_path / "run", preset=preset, meds_dir=folder, cuts=CUTS)[1]
    found = []
    for tokens in (1, 200, 100_000):
        files = [f"p{tokens}.parquet", f"e{tokens}.parquet"]
        given = ["--output", files[0], "--embeddings", files[1], "--dtype", dtype]
        done = run(model, "--data", "MEDS", *given, "--batch-tokens", tokens, "--split", "all")
        assert done.exit_code == 0, done.output
        found.append([bits_of(tmp_path / name) for name in files])
    for table, states in found[1:]:
        assert table.equals(found[0][0]) and states.equals(found[0][1])
    p = found[0][0]["predicted_boolean_probability"].to_numpy()
    assert len(set(p.tolist())) > 20 and len(p) > 100


def test_a_filler_makes_whole_multiples_and_is_no_longer_than_the_longest():
    for lengths in ([1], [3, 2], [ROWS], [ROWS - 1], [70, 5, 1], [ROWS + 1, 2]):
        sequences = [Tokens(torch.arange(n) + 7) for n in lengths]
        added = filler(sequences)
        assert (sum(lengths) + sum(map(len, added))) % ROWS == 0
        assert all(1 <= len(x) <= max(lengths) and (x.ids == 7).all() for x in added)


@pytest.mark.parametrize("model", ["VALUED", "MASKED"])
def test_embeddings_are_means_of_the_last_states(model, run, tmp_path, valued, masked, folder):
    done = run(model, "--data", "MEDS", "--embeddings", "e.parquet", "--at-end")
    assert done.exit_code == 0, done.output
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table.column_names == ["subject_id", "prediction_time", "embedding"]
    assert stat.S_IMODE((tmp_path / "e.parquet").stat().st_mode) == 0o600
    path = {"VALUED": valued, "MASKED": masked}[model][1]
    job = read_job(
        PredictionSettings(
            str(path), data=f"meds:{folder}", at_end=True, embeddings=tmp_path / "f.parquet"
        )
    )
    for row in (0, len(table) - 1):
        (tokens,) = job.rows.sequences(row)
        known = {} if tokens.values is None else {"values": tokens.values[None]}
        with torch.inference_mode():
            states = job.model.module.encoder(tokens.ids[None], **known)[0]
        found = torch.tensor(table["embedding"][row].as_py())
        torch.testing.assert_close(found, states.mean(0), rtol=1e-4, atol=1e-5)


def test_the_split_is_the_owners(run, folder, tmp_path):
    """Held-out patients, else tuning, else an error; all of them with a line on those seen."""
    of = dict(zip(range(1, 41), ["train", "train", "tuning", "held_out"] * 10, strict=True))
    ward = write_splits(shutil.copytree(folder, tmp_path / "ward"), of)
    model = trained(tmp_path / "run", meds_dir=ward, cuts=CUTS, steps=1)[1]

    def predicted(*more):
        (tmp_path / "p.parquet").unlink(missing_ok=True)
        done = run(model, "--data", f"meds:{ward}", *OUT, *more)
        assert done.exit_code == 0, done.output
        subjects = set(pq.read_table(tmp_path / "p.parquet")["subject_id"].to_pylist())
        return subjects, flat(done.stderr)

    subjects, said = predicted()
    assert subjects == {x for x in of if of[x] == "held_out"} and "trained on" not in said
    assert "split held_out: 30 predictions" in said
    subjects, said = predicted("--split", "all")
    assert subjects == set(of) and "20 of 40 are subjects that the model was trained on" in said
    write_splits(ward, {x: "tuning" if x % 2 else "train" for x in of})
    subjects, said = predicted()
    assert subjects == {x for x in of if x % 2} and "split tuning" in said
    assert "whether the model was trained on these subjects is not known" in said
    write_splits(ward, dict.fromkeys(of, "train"))
    done = run(model, "--data", f"meds:{ward}", "--output", "q.parquet")
    assert done.exit_code == 2 and "split: got none, and meds_dir=" in done.stderr


def interrupted_after(monkeypatch, batches: int) -> None:
    """SIGINT comes while the batch of that number is computed."""
    import signal

    honest, count = prediction.compute, 0

    def compute(job, settings, parts, progress, stop):
        def shown(message, done, total):
            nonlocal count
            count += 1
            if count == batches:
                signal.raise_signal(signal.SIGINT)
            progress(message, done, total)

        return honest(job, settings, parts, shown, stop)

    monkeypatch.setattr(prediction, "compute", compute)


def test_an_interrupted_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    files = ["--output", "p.parquet", "--embeddings", "e.parquet", "--split", "all"]
    whole = ["--output", "w.parquet", "--embeddings", "v.parquet", "--split", "all"]
    assert run(*GIVEN, *whole).exit_code == 0
    for batches in (2, 12, 1):
        with monkeypatch.context() as patch:
            interrupted_after(patch, batches)
            resume = [] if batches == 2 else ["--resume"]
            done = run(*GIVEN, *files, "--batch-tokens", "100", *resume)
        assert done.exit_code == 130, done.output
        assert "interrupted: --resume goes on from row" in flat(done.stderr)
        assert not (tmp_path / "p.parquet").exists()
    folder = tmp_path / "p.parquet.partial"
    kept = sorted(folder.glob("part-*.npz"))
    assert len(kept) >= 2
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in folder.iterdir()
               if path.name != ".lock")  # fmt: skip
    again = run(*GIVEN, *files)
    assert again.exit_code == 2 and "expected resume, or that folder removed" in flat(again.stderr)
    kept[1].write_bytes(kept[1].read_bytes()[:100])  # damaged: it is computed again
    done = run(*GIVEN, *files, "--batch-tokens", "5000", "--resume")
    assert done.exit_code == 0, done.output
    assert bits_of(tmp_path / "p.parquet").equals(bits_of(tmp_path / "w.parquet"))
    assert bits_of(tmp_path / "e.parquet").equals(bits_of(tmp_path / "v.parquet"))
    assert not folder.exists()
    again = run(*GIVEN, *files, "--resume")
    assert again.exit_code == 0 and again.stdout.startswith("nothing is left to do: p.parquet and")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (["--dtype", "float64"], "dtype"),
        (["--embeddings", "e.parquet"], "files"),
        (["--split", "train"], "data"),
        (["--at-end"], "data"),
        (["OTHER"], "checkpoint"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_another_run_is_not_gone_on_with(
    run, tmp_path, monkeypatch, changes, name, valued, folder
):
    given = [*GIVEN, "--output", "p.parquet", "--batch-tokens", "100"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        assert run(*given).exit_code == 130
    if changes == ["OTHER"]:
        other = trained(tmp_path / "run", preset="valued", meds_dir=folder, cuts=CUTS, seed=1)[1]
        done = run(other, *given[1:], "--resume")
    else:
        done = run(*given, *changes, "--resume")
    assert done.exit_code == 2 and f"resume: {name} is " in flat(done.stderr)
    assert run(*given, "--resume").exit_code == 0
    done = run(*given, "--dtype", "bfloat16", "--resume")
    assert done.exit_code == 2 and "resume: dtype is 'bfloat16'" in flat(done.stderr)


def test_a_folder_of_a_run_is_its_newest_checkpoint(run, valued, tmp_path):
    assert run(*GIVEN, "--output", "p.parquet").exit_code == 0
    assert run(valued[1].parent, *GIVEN[1:], "--output", "q.parquet").exit_code == 0
    one, two = (facts_of(tmp_path / name)["checkpoint"] for name in ("p.parquet", "q.parquet"))
    assert one == two and one["name"] == valued[1].name and len(one["sha256"]) == 64
    facts = facts_of(tmp_path / "p.parquet")
    assert facts["split"] == "held_out" and facts["classes"] == ["absent", "present"]
    assert facts["environment"]["torch"] == torch.__version__ and str(tmp_path) not in str(facts)


def test_a_run_says_what_it_reads_and_found(run, folder):
    done = run(*GIVEN, "--output", "p.parquet")
    said = flat(done.stderr)
    assert f"MEDS folder {folder.name}, split held_out: " in said
    assert "each timeline is predicted at the cuts of training" in said
    assert re.search(r"predicted: \w+ \d+\.\d%.* known: \w+ \d+\.\d%", flat(done.stdout))
    assert re.search(r"tokens in [\d.]+ s: [\d,]+ tokens/s", flat(done.stdout))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["VALUED", *OUT], "data: got none, expected meds:DIR, meds-torch:DIR or text:FILE"),
        (["VALUED", *OUT, "--data", "x"], "data='x': expected meds:DIR"),
        (["VALUED", *OUT, "--data", "profile:fixed"], "data='profile:fixed': expected meds:DIR,"),
        (["VALUED", *OUT, "--data", "meds:x"], "meds_dir='x' does not exist"),
        (["VALUED", *OUT, "--data", "text:t.csv"], "trained on timelines: expected data meds:DIR"),
        (["VALUED", *OUT, "--data", "meds:calm", *ALL], "label_code='ALARM*' matches no code"),
        (["VALUED", *OUT, "--data", "meds:new", "--at-end"], "knows none of its codes or words"),
        (["VALUED", *OUT, "--data", "meds:calm", "--tokenizer", "t.json"], "tokenizer: expected"),
        (["MASKED", *OUT, "--data", "MEDS"], "predicts nothing: expected embeddings alone"),
        (["absent.pt", *OUT, "--data", "MEDS"], "checkpoint 'absent.pt' cannot be read: No such"),
        ([".", *OUT, "--data", "MEDS"], "checkpoint='.' holds neither step-*.pt nor config.json"),
        (["t.csv", *OUT, "--data", "MEDS"], "checkpoint 't.csv' cannot be read: it is damaged"),
        (GIVEN, "output: got none, expected a file for predictions, or embeddings"),
        ([*GIVEN, "--output", "no/p"], "output='no/p': 'no' is no folder"),
        ([*GIVEN, "--embeddings", "."], "embeddings='.' is a folder: expected a file"),
        ([*GIVEN, *OUT, "--embeddings", "./p.parquet"], "output and embeddings: got 'p.parquet' f"),
        ([*GIVEN, "--output", "t.csv"], "output='t.csv' is there: expected another file"),
        ([*GIVEN, *OUT, "--resume"], "resume: 'p.parquet.partial' is not there"),
        ([*GIVEN, "--output", "t.csv", "--resume"], "'t.csv' cannot be read"),
        ([*GIVEN, *OUT, "--split", "x"], "split='x': meds_dir="),
        ([*GIVEN, *OUT, "--batch-tokens", "0"], "batch_tokens=0: expected at least 1"),
        ([*GIVEN, *OUT, "--at-end", "--data", "text:t.csv"], "at_end: expected only with timel"),
    ],
    ids=lambda x: None if isinstance(x, list) else re.sub(r"\W+", "-", x)[:40],
)
def test_bad_input_is_one_line_before_any_work(run, tmp_path, monkeypatch, given, message):
    (tmp_path / "t.csv").write_text("text,label\nFever,1\n")
    events = [(1, None, "SEX//F", None), *((1, i * DAY, f"STEP//{i}", 1.0) for i in range(9))]
    write_events(tmp_path / "calm", events)
    write_events(tmp_path / "new", [(1, i * DAY, f"X//{i}", 1.0) for i in range(9)])
    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(prediction, "run", None)
    done = run(*given)
    assert done.exit_code == 2, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and message in line and not done.stdout
    assert {path.name for path in tmp_path.iterdir()} == before


def test_the_device_is_checked(run):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run(*GIVEN, *OUT, "--device", "cuda")
    assert done.exit_code == 2 and "expected a CUDA device, and torch sees none" in done.stderr
