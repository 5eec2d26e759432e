"""clinattn explain as a command: what training sees, the table, files and errors."""

from __future__ import annotations

import json
import re
import shutil
import stat

import numpy as np
import pytest
import torch

for package in ("pyarrow", "jinja2", "rich", "typer"):
    pytest.importorskip(package)

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from pages import read  # noqa: E402
from patients import DAY, write_labels, write_measured_patients, write_splits  # noqa: E402
from runs import SMALL_PRESETS, small_run  # noqa: E402
from terminal import flat  # noqa: E402

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.tools.explanation import explain  # noqa: E402
from clinattn.tools.explanation.settings import METHODS, ExplainSettings  # noqa: E402
from clinattn.training.batches import packed  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_model  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.objectives import HELD_OUT_EPOCH, Classification  # noqa: E402
from clinattn.training.start import make_corpus  # noqa: E402
from clinattn.workloads import open_source  # noqa: E402
from clinattn.workloads.seeds import is_held_out  # noqa: E402

CUTS, SMALL_TOKENS = 3, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Patients with values, and a meaning for one code."""
    root = write_measured_patients(tmp_path_factory.mktemp("meds"))
    (root / "metadata").mkdir()
    table = {
        "code": ["STEP//3", "STEP//4", "STEP//5", "ALARM"],
        "description": ["Blood\n  pressure <b>", None, None, "an alarm"],
        "parent_codes": [None, None, ["LOINC/8480-6", "STEP//3"], None],
    }
    pq.write_table(pa.table(table), root / "metadata" / "codes.parquet")
    return root


def trained(root, **changes):
    """The settings and the checkpoint of a run of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in SMALL_PRESETS.items():
            patch.setitem(PRESETS, name, config)
        settings = small_run("classify", **{"steps": 2, "threads": 1} | changes, output=root)
        Trainer(settings).run()
    return settings, checkpoints(root)[-1]


@pytest.fixture(scope="module")
def valued(folder, tmp_path_factory):
    """A classifier of codes and values, with three cuts of a timeline."""
    root = tmp_path_factory.mktemp("valued")
    return trained(root, preset="valued", meds_dir=folder, cuts=CUTS)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A classifier of texts by words."""
    root = tmp_path_factory.mktemp("texts")
    rows = [
        {"text": f"Fever, cough and {'SEPSIS' if i % 2 else 'rest'} no. {i % 5}", "label": i % 2}
        for i in range(40)
    ]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return trained(root / "out", text_file=root / "t.jsonl", label_code=None, max_tokens=12)


@pytest.fixture
def run(cli, folder, valued, texts, small_presets, threads, tmp_path):
    threads(1)
    text = "Fever, cough and sepsis\u0130 of no. 3. <i>Rest</i> is late."
    (tmp_path / "note.txt").write_text(text)
    names = {"VALUED": valued[1], "TEXTS": texts[1], "MEDS": f"meds:{folder}"}
    return lambda *args: cli("explain", *(names.get(arg, arg) for arg in args))


PATIENT = ["VALUED", "--data", "MEDS", "--patient", "7"]
NOTE = ["TEXTS", "--text", "note.txt"]


@pytest.mark.parametrize("preset", ["valued", "timed", "timed-causal"])
def test_a_patient_is_what_training_and_evaluation_see(
    preset, folder, tmp_path, valued, small_presets, threads
):
    """Ids, days, values, label, and the bits of the logits, at every cut of patients."""
    threads(1)
    settings, path = valued
    if preset != "valued":
        settings, path = trained(tmp_path, preset=preset, meds_dir=folder, cuts=CUTS)
    corpus = make_corpus(settings, None)
    objective = Classification(corpus)
    order = [x for x in range(1, 41) if is_held_out(x, 0.2)]
    assert len(corpus.held_out) >= len(order) >= 5
    by_subject: dict[int, list] = {}
    for i, example in enumerate(corpus.held_out):
        by_subject.setdefault(example.subject, []).append(i)
    assert len(by_subject) == len(order)
    for patient, indices in list(zip(order, by_subject.values(), strict=True))[:3]:
        for number, i in enumerate(indices, 1):
            example = corpus.held_out[i]
            given = ExplainSettings(
                str(path), data=f"meds:{folder}", patient=str(patient), cut=number
            )
            case = explain.read_case(given)
            for name in ("ids", "days", "values"):
                mine, theirs = getattr(case.model.example, name), getattr(example, name)
                assert (mine is None) == (theirs is None), name
                if mine is not None:
                    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
            assert case.facts["what followed in the record"] == corpus.classes[example.label]
            batch = objective.batch([i], HELD_OUT_EPOCH, torch.device("cpu"))
            with torch.inference_mode():
                theirs = batch.run(case.model.module).logits[0]
            mine = case.model.logits([torch.arange(len(example))])[0]
            assert torch.equal(mine, theirs.double())
            names = [unit.name for unit in case.units]
            ids = {token: i for i, token in enumerate(corpus.tokens)}
            assert [ids.get(name, 1) for name in names] == example.ids[1:].tolist()


def test_a_note_is_what_training_sees(texts, tmp_path, small_presets):
    settings, path = texts
    corpus = make_corpus(settings, None)
    lines = (path.parents[1] / "t.jsonl").read_text().splitlines()
    rows = [json.loads(line)["text"] for line in lines]
    known = {tuple(x.ids.tolist()) for x in (*corpus.train, *corpus.held_out)}
    for row in rows[:6]:
        (tmp_path / "n.txt").write_text(row)
        case = explain.read_case(ExplainSettings(str(path), text=tmp_path / "n.txt"))
        ids = case.model.example.ids.tolist()
        assert tuple(ids) in known
        read = [unit.name.lower() if unit.known else "[UNK]" for unit in case.units]
        assert read == [corpus.tokens[i] for i in ids[1:]]


def test_the_last_cut_is_the_default_and_zero_is_the_end(folder, valued, small_presets):
    given = {"data": f"meds:{folder}", "patient": "7"}
    read = lambda **known: explain.read_case(ExplainSettings(str(valued[1]), **given, **known))
    last, third, end = read(), read(cut=CUTS), read(cut=0)
    assert torch.equal(last.model.example.ids, third.model.example.ids)
    assert f"cut {CUTS} of {CUTS}" in last.facts["prediction at"]
    assert "the end of the timeline" in end.facts["prediction at"]
    assert "what followed in the record" not in end.facts
    assert not any(unit.name.startswith("ALARM") for unit in end.units)
    assert last.groups[0].title == "Static facts" and last.groups[1].title == "Visit 1"
    assert len(last.groups) == 1 + sum(unit.name.startswith("STEP") for unit in last.units)
    assert last.units[0].value == "" and any(unit.value for unit in last.units)
    assert len(read(visit_gap=49).groups) == 2


def test_the_end_is_the_last_event(folder, valued, small_presets):
    """Patients with an ALARM at the end, which is not read, and without."""
    source = open_source(f"meds:{folder}")
    ends = set()
    for patient in range(1, 9):
        known = {"data": f"meds:{folder}", "patient": str(patient), "cut": 0}
        units = explain.read_case(ExplainSettings(str(valued[1]), **known)).units
        start, _, stop = source.bounds(source.subjects.index(patient))
        codes = [source.vocabulary.tokens[i] for i in source.ids[start:stop]]
        ends.add(codes[-1] == "ALARM")
        assert len(codes) < SMALL_TOKENS
        assert [unit.name for unit in units] == [code for code in codes if code != "ALARM"]
    assert ends == {True, False}


def test_a_birth_is_a_fact_and_begins_no_visit(folder, valued, small_presets):
    """Before 1970 and after."""
    for patient in range(1, 6):
        known = {"data": f"meds:{folder}", "patient": str(patient)}
        case = explain.read_case(ExplainSettings(str(valued[1]), **known))
        assert [unit.name[:4] for unit in case.units if unit.group == 0] == ["SEX/", "MEDS"]


def test_a_baseline_has_no_codes_and_no_values(folder, valued, small_presets):
    known = {"data": f"meds:{folder}", "patient": "7"}
    model = explain.read_case(ExplainSettings(str(valued[1]), **known)).model
    ids, values = model.baseline["inputs"], model.baseline["values"]
    assert ids[0, 0] == model.vocabulary.cls and bool((ids[0, 1:] == model.vocabulary.mask).all())
    assert bool(values.isnan().all()) and not bool(model.example.values.isnan().all())


def test_a_patient_prints_tables_and_writes_files(run, tmp_path):
    done = run(*PATIENT, "--output", "p.html", "--json", "p.json", "--top", "99")
    assert done.exit_code == 0, done.output
    said = flat(done.stdout)
    assert said.startswith("patient 7: Probability of ") and "rank correlation over all" in said
    assert "AttnLRP: removing the 5 % (" in said and "Rollout: removing the 5 % (" in said
    assert "“present” means that a code like ALARM* (an alarm) follows before the next cut;" in said
    assert "Blood pressure <b>" in said and "STEP//3" not in said  # what the code means
    record = json.loads((tmp_path / "p.json").read_text())
    by_parents = {unit["description"] for unit in record["units"] if unit["name"] == "STEP//5"}
    assert by_parents == {"under LOINC/8480-6; Blood pressure <b>"}
    for column in range(2):
        shares = [unit["scores"][column] for unit in record["units"]]
        assert sum(map(abs, shares)) == pytest.approx(1)
        by_visit = sum(group["scores"][column] for group in record["groups"])
        assert by_visit == pytest.approx(sum(shares))
    assert sum(record["classes"].values()) == pytest.approx(1)
    assert record["probability"] == max(record["classes"].values())
    for name in ("p.html", "p.json"):
        path = tmp_path / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert f"wrote {name}" in said
    page = (tmp_path / "p.html").read_text()
    assert "Blood pressure &lt;b&gt;" in page and read(page).all("h1")
    trained_on = "The model was trained on this patient" in flat(done.stderr)
    assert trained_on == (not is_held_out(7, 0.2))
    again = run(*PATIENT, "--output", "q.html", "--json", "q.json", "--top", "99")
    assert (tmp_path / "q.html").read_bytes() == (tmp_path / "p.html").read_bytes()
    assert (tmp_path / "q.json").read_bytes() == (tmp_path / "p.json").read_bytes()
    assert flat(again.stdout).split("wrote")[0] == said.split("wrote")[0]


@pytest.mark.parametrize("split", ["train", "tuning", "held_out"])
def test_a_patient_stands_to_training_as_the_owner_lists(run, folder, tmp_path, split):
    of = dict(zip(range(1, 41), ["train", "train", "tuning", "held_out"] * 10, strict=True))
    ward = write_splits(shutil.copytree(folder, tmp_path / "ward"), of)
    _, checkpoint = trained(tmp_path / "listed", meds_dir=ward, cuts=CUTS, steps=1)
    patient = next(p for p, own in of.items() if own == split)
    rest = ["--data", f"meds:{ward}", "--patient", str(patient), "--draws", "2"]
    done = run(checkpoint, *rest)
    assert done.exit_code == 0, done.output
    words = {"train": "trained on", "tuning": "not trained on, but", "held_out": "held out, not"}
    assert f"this patient in training: {words[split]}" in flat(done.stdout)
    assert ("was trained on this patient" in flat(done.stderr)) == (split == "train")


def labelled(folder, root, values, column):
    """A checkpoint of task labels, at the day after the tenth of each patient's events."""
    source = open_source(f"meds:{folder}")
    times = [int(source.times[source.bounds(i)[1] + 9]) + DAY for i in range(len(source))]
    rows = list(zip(source.subjects, times, values, strict=True))
    path = write_labels(root / "labels.parquet", rows, column)
    return trained(root / "run", meds_dir=folder, label_code=None, labels=path, preset="timed")


def test_a_prediction_of_task_labels_is_explained_at_a_time(run, folder, tmp_path):
    values = [i % 2 == 0 for i in range(40)]
    settings, checkpoint = labelled(folder, tmp_path, values, "boolean_value")
    corpus = make_corpus(settings, None)
    index = next(i for i in range(40) if is_held_out(i + 1, 0.2))
    source = open_source(f"meds:{folder}")
    _, timed, end = source.bounds(index)
    given = [checkpoint, "--data", "MEDS", "--patient", str(index + 1), "--draws", "2", "--json"]
    moment = str(np.datetime64(int(source.times[timed + 9]), "us"))
    done = run(*given, "e.json", "--at", moment)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "e.json").read_text())
    assert len(record["units"]) == timed - source.bounds(index)[0] + 10
    assert record["classes"].keys() == {"false", "true"}
    ids, arguments = packed([corpus.held_out[0]], torch.device("cpu"))
    expected = load_model(checkpoint)[0](ids, **arguments).logits.softmax(-1)[0, 1].detach()
    assert record["classes"]["true"] == pytest.approx(expected.item(), abs=1e-6)
    assert "The classes are those of boolean_value in the task labels" in flat(done.stdout)
    assert "until " + moment[:16].replace("T", " ") in flat(done.stdout)
    done = run(*given, "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())
    assert len(whole["units"]) == min(end - source.bounds(index)[0], SMALL_TOKENS - 1)
    assert "the end of the timeline" in flat(done.stdout)
    done = run(*given, "no.json", "--cut", "1")
    assert "cut=1: expected none with a checkpoint of task labels" in flat(done.stderr)
    done = run(*PATIENT, "--at", moment)
    assert "expected only with a checkpoint of task labels" in flat(done.stderr)


def test_a_prediction_of_a_number_is_refused(run, folder, tmp_path):
    _, checkpoint = labelled(folder, tmp_path, [float(i) for i in range(40)], "float_value")
    done = run(checkpoint, *PATIENT[1:])
    assert done.exit_code == 2
    assert "predicts a number (float_value): expected one that" in flat(done.stderr)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_patients_and_notes(run, method):
    for given in (PATIENT, NOTE):
        done = run(*given, "--method", method, "--draws", "2")
        assert done.exit_code == 0, done.output
        assert METHODS[method].title in done.stdout


def test_a_note_is_cut_and_shown_to_its_end(run, tmp_path):
    done = run(*NOTE, "--output", "n.html", "--target", "1")
    assert done.exit_code == 0, done.output
    assert "reads the first 10 of " in flat(done.stderr)
    assert "sepsis\u0130" in done.stdout and "[UNK]" in done.stdout
    page = read((tmp_path / "n.html").read_text())
    (text,) = (x for x in page.all("p") if x.has_class("note-text"))
    assert "is late." in text.all("span")[-1].text and text.all("span")[-1].has_class("unread")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["VALUED"], "got neither data and patient nor text: expected one of them"),
        (["VALUED", "--data", "MEDS"], "patient: got none, expected the subject_id of one in data"),
        (["VALUED", "--patient", "7"], "data=None: expected meds:DIR or meds-torch:DIR"),
        (["VALUED", "--data", "x", "--patient", "7"], "data='x': expected meds:DIR"),
        (["VALUED", "--data", "meds:x", "--patient", "7"], "meds_dir='x' does not exist"),
        (PATIENT[:-1] + ["77"], "patient='77' is none of the 40 patients of meds_dir="),
        ([*PATIENT, "--cut", "4"], "cut=4: the timeline of patient 7 has 3 cuts of training"),
        ([*PATIENT, "--text", "note.txt"], "data and text: got both, expected a patient or a text"),
        ([*PATIENT, "--target", "x"], "target='x': expected one of ['absent', 'present']"),
        ([*PATIENT, "--method", "x"], "method='x': expected one of ('attnlrp', 'rollout', "),
        ([*PATIENT, *["--method", "rollout"] * 2], "expected one or two different ones"),
        ([*PATIENT, "--output", "no/p.html"], "output='no/p.html': 'no' is no folder"),
        ([*PATIENT, "--json", "."], "json='.' is a folder: expected a file"),
        ([*PATIENT, "--visit-gap", "0"], "visit_gap=0.0: expected more than 0 hours"),
        ([*PATIENT, "--at", "noon"], "at='noon': expected a time such as 2150-03-01T12:00"),
        ([*PATIENT, "--at", "2150-03-01T12:00Z"], "expected a time such as 2150-03-01T12:00, with"),
        ([*PATIENT, "--at", "2150-03-01", "--cut", "1"], "cut and at: got both, expected one of"),
        ([*PATIENT, "--draws", "1"], "draws=1: expected at least 2"),
        (["absent.pt", *PATIENT[1:]], "checkpoint 'absent.pt' cannot be read: No such file"),
        ([".", *PATIENT[1:]], "checkpoint='.' holds neither step-*.pt nor config.json"),
        (["note.txt", *PATIENT[1:]], "checkpoint 'note.txt' cannot be read: it is damaged"),
        (["VALUED", "--text", "note.txt"], "was trained on timelines: expected data and patient"),
        (["TEXTS", *PATIENT[1:]], "was trained on texts: expected text"),
        (["TEXTS", "--text", "absent"], "text='absent' cannot be read: No such file"),
        (["TEXTS", "--text", "empty.txt"], "text='empty.txt' is empty: expected the text of a"),
        (["TEXTS", "--text", "latin.txt"], "text='latin.txt' cannot be read: byte"),
        (["TEXTS", "--text", "t.csv"], "text='t.csv' is a table: expected a file with the text"),
    ],
    ids=lambda x: None if isinstance(x, list) else re.sub(r"\W+", "-", x)[:40],
)
def test_bad_input_is_one_line_before_any_work(run, tmp_path, monkeypatch, given, message):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"Fi\xe8vre")
    monkeypatch.setattr(explain, "explained", None)
    done = run(*given)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if not re.match(r"\[ *\d+ s\]", line)]
    assert message in line and not done.stdout


def test_a_checkpoint_of_another_task_is_refused(run, folder, tmp_path):
    with pytest.MonkeyPatch.context():
        Trainer(small_run(meds_dir=folder, steps=1, output=tmp_path / "mlm")).run()
    path = checkpoints(tmp_path / "mlm")[-1]
    done = run(path, *PATIENT[1:])
    assert done.exit_code == 2
    assert "was trained with task='mlm': expected 'classify'" in flat(done.stderr)


def test_a_method_is_joined_by_another():
    known = {"data": "meds:x", "patient": "1"}
    assert ExplainSettings("c", **known).methods == ("attnlrp", "rollout")
    assert ExplainSettings("c", ("rollout",), **known).methods == ("rollout", "attnlrp")
    assert ExplainSettings("c", ("attnlrp",), **known).methods == ("attnlrp", "rollout")


def test_ctrl_c_leaves_no_file(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(explain, "deletion", interrupted)
    done = run(*PATIENT, "--output", "p.html", "--json", "p.json")
    assert done.exit_code == 130 and flat(done.stderr).endswith("interrupted")
    assert not list(tmp_path.glob("*p.*"))


def test_help_says_what_is_chosen(cli):
    done = cli("explain", "--help", COLUMNS="200", TERMINAL_WIDTH="200")
    said = flat(re.sub("[│\n]", " ", done.stdout))
    assert "attnlrp, rollout, integrated_gradients" in said and "(default: attnlrp and" in said
    assert "--meds-dir" not in said and "mode 0600" in said
