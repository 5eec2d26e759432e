"""Times and values of MEDS folders in training: which tokens have them, on what scale, in use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import DAY, write_events, write_measured_patients  # noqa: E402
from runs import rows_of  # noqa: E402

from clinattn.encoder import PRESETS  # noqa: E402
from clinattn.encoder.heads import IGNORE  # noqa: E402
from clinattn.training.batches import packed, padded  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_checkpoint, load_model  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.objectives import MaskedTokens  # noqa: E402
from clinattn.training.sequences import Tokens  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.training.standard import Standard  # noqa: E402
from clinattn.workloads import SPECIAL_TOKENS  # noqa: E402
from clinattn.workloads.seeds import is_held_out  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")

TRAINED = [p for p in range(1, 200) if not is_held_out(p, 0.2)]
HELD_OUT = [p for p in range(1, 200) if is_held_out(p, 0.2)]
NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_measured_patients(tmp_path_factory.mktemp("measured"))


@pytest.fixture
def settings(folder, tmp_path):
    def make(**changes) -> TrainingSettings:
        given = {"meds_dir": folder, "output": tmp_path / "out", "max_tokens": 32}
        given |= {"batch_tokens": 96, "steps": 2, "held_out": 0.2}
        return TrainingSettings(**given | changes)

    return make


def days_of(corpus, split="train") -> list[list[float]]:
    return [example.days.tolist() for example in getattr(corpus, split)]


def both(rows) -> list[tuple]:
    """The same events of a patient that is trained on and of one that is held out."""
    return [(p, *row) for p in (TRAINED[0], HELD_OUT[0]) for row in rows]


FACT, A, B = (None, "SEX"), (3 * DAY, "A"), (5 * DAY + DAY // 4, "B")


@pytest.mark.parametrize(
    ("events", "max_tokens", "expected"),
    [
        ([A, B], 9, [[0, 0, 2.25]]),
        ([FACT, A, B], 9, [[0, 0, 0, 2.25]]),
        ([FACT, (DAY, "MEDS_BIRTH"), A, B], 9, [[0, 0, 0, 2, 4.25]]),
        ([FACT, (DAY, "MEDS_BIRTH"), A, B], 4, [[0, 0, 0, 2], [4.25, 4.25, 4.25]]),
        ([A, (4 * DAY, "MEDS_BIRTH"), B], 9, [[-1, -1, 0, 1.25]]),
        ([(None, "MEDS_BIRTH"), A, B], 9, [[0, 0, 0, 2.25]]),
        ([A, (4 * DAY, "MEDS_BIRTH"), (5 * DAY, "MEDS_BIRTH")], 9, [[-1, -1, 0, 1]]),
        ([FACT], 9, [[0, 0]]),
    ],
    ids=[
        *("first_event", "static", "age", "windows", "before_birth", "birth_untimed"),
        *("born_twice", "no_events"),
    ],
)
def test_days_are_the_age_or_the_time_since_the_first_event(tmp_path, events, max_tokens, expected):
    folder = write_events(tmp_path, both(events))
    corpus = read_corpus(
        TrainingSettings(meds_dir=folder, max_tokens=max_tokens, batch_tokens=99, min_count=1),
        times=True,
    )
    assert days_of(corpus) == days_of(corpus, "held_out") == expected
    assert {example.days.dtype for example in corpus.train} == {torch.float64}


def test_age_is_known_where_its_code_is_rare(tmp_path):
    rows = [(p, t * DAY, "A") for p in (TRAINED[0], HELD_OUT[0]) for t in (8, 9)]
    rows.append((HELD_OUT[0], DAY, "MEDS_BIRTH"))
    corpus = read_corpus(TrainingSettings(meds_dir=write_events(tmp_path, rows)), times=True)
    assert days_of(corpus) == [[0, 0, 1]] and days_of(corpus, "held_out") == [[0, 0, 7, 8]]


def test_a_future_begins_where_its_latest_events_do(tmp_path):
    rows = both([FACT, *((t * DAY, "X" if t == 8 else f"E{t}") for t in range(1, 9))])
    rows += [(TRAINED[1], t * DAY, "E1") for t in range(8)]
    corpus = read_corpus(
        TrainingSettings(
            task="classify",
            meds_dir=write_events(tmp_path, rows),
            label_code="X",
            max_tokens=4,
            batch_tokens=9,
        ),
        times=True,
    )
    assert days_of(corpus, "held_out") == [[2, 2, 2, 3]]
    assert corpus.held_out[0].label == 1


V = len(SPECIAL_TOKENS)


def fit(ids, values, size):
    return Standard.fit(lambda: [(ids, values)], size)


@pytest.mark.parametrize(
    ("trained", "value", "expected"),
    [
        ([1.0, 3.0], 4.0, 2.0),
        ([1.0, 3.0, NAN, INF], 0.0, -2.0),
        ([0.1, 0.1, 0.1], 0.3, 0.2),
        ([7.0], 9.0, 2.0),
        ([], 9.0, NAN),
        ([1.0, 3.0], NAN, NAN),
        ([1.0, 3.0], -INF, NAN),
    ],
    ids=["scaled", "finite_only", "no_spread", "one", "none", "absent", "infinite"],
)
def test_a_value_is_put_on_the_scale_of_its_code(trained, value, expected):
    ids = torch.tensor([V] * len(trained) + [V + 1, V + 1])
    fitted = fit(ids, torch.tensor([*trained, 1e6, 1e7]), V + 2)
    found = fitted(torch.tensor([V]), torch.tensor([value]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([expected]), equal_nan=True)


def test_scales_are_those_of_all_parts_together():
    ids, values = torch.randint(V, V + 3, (99,)), torch.randn(99) * 9 + 1e3
    whole = fit(ids, values, V + 3)
    parts = Standard.fit(lambda: zip(ids.split(7), values.split(7), strict=True), V + 3)
    for one, other in zip(vars(whole).values(), vars(parts).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=0, equal_nan=True)


def test_special_tokens_have_no_values():
    """Least of all [UNK], which is codes of any unit."""
    ids = torch.arange(V)
    values = torch.ones(V)
    assert fit(ids, values, V)(ids, values).isnan().all()


def test_rounding_is_no_spread():
    ids = torch.full((3,), V)
    x = torch.tensor(98.6)
    values = torch.stack([x, x.nextafter(torch.tensor(99.0)), x])
    assert float(fit(ids, values, V + 1).scale[V]) == 1


def test_values_of_the_held_out_move_no_scale(tmp_path):
    def corpus(name, shift):
        rows = [(p, t * DAY, "A", float(t)) for p in TRAINED[:2] for t in range(5)]
        rows += [(p, t * DAY, "A", t + shift) for p in HELD_OUT[:2] for t in range(5)]
        return read_corpus(
            TrainingSettings(meds_dir=write_events(tmp_path / name, rows)), values=True
        )

    one, two = corpus("one", 0.0), corpus("two", 1e6)
    for a, b in zip(vars(one.standard).values(), vars(two.standard).values(), strict=True):
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
    z = torch.cat([example.values[1:] for example in two.train])
    assert abs(float(z.mean())) < 1e-6 and float(z.std(correction=0)) == pytest.approx(1)
    assert all(example.values[0].isnan() for example in two.train)  # [CLS]
    spread = 2**0.5
    for a, b in zip(one.held_out, two.held_out, strict=True):
        torch.testing.assert_close(b.values[1:] - a.values[1:], torch.full((5,), 1e6 / spread))


@pytest.mark.parametrize("field", ["days", "values"])
def test_the_fingerprint_covers_what_is_used(tmp_path, field):
    rows = [(p, t * DAY, "A", float(t)) for p in (TRAINED[0], HELD_OUT[0]) for t in range(5)]
    other = [(p, t * 2, c, v) if field == "days" else (p, t, c, v * v) for p, t, c, v in rows]
    folders = [write_events(tmp_path / n, r) for n, r in (("one", rows), ("two", other))]
    asked = {"times": field == "days", "values": field == "values"}
    prints = [
        [read_corpus(TrainingSettings(meds_dir=f), **given).fingerprint for f in folders]
        for given in ({}, asked)
    ]
    assert prints[0][0] == prints[0][1] and len({*prints[0], *prints[1]}) == 3


def altered(batch, **changes):
    return batch._replace(arguments=batch.arguments | changes)


def loss_of(model, batch) -> float:
    return float(batch.run(model).loss.detach())


@pytest.mark.parametrize(
    ("task", "preset"), [("clm", "timed-causal"), ("clm", "timed"), ("mlm", "timed")]
)
def test_times_reach_the_model(settings, task, preset):
    """As rotary positions: a shift changes nothing, another pace does. fp64."""
    trainer = Trainer(settings(task=task, preset=preset, dtype="float64"))
    model = trainer.model.eval()
    batch = trainer.objective.batch([0, 1], 0, CPU)
    days, loss = batch.arguments["positions"], loss_of(model, batch)
    assert days.dtype == torch.float64 and bool((days != days.round()).any()) is False
    assert "values" not in batch.arguments
    assert loss_of(model, altered(batch, positions=days + 64)) == pytest.approx(loss, rel=1e-9)
    slower = loss_of(model, altered(batch, positions=days * 3))
    assert abs(slower - loss) > 1e-7 * loss


@pytest.mark.parametrize("task", ["mlm", "clm"])
def test_values_reach_the_model(settings, task):
    trainer = Trainer(settings(task=task, preset="valued", dtype="float64"))
    model = trainer.model.eval()
    batch = trainer.objective.batch([0, 1], 0, CPU)
    values, loss = batch.arguments["values"], loss_of(model, batch)
    assert "positions" not in batch.arguments and len(values) == len(batch.ids)
    place = int((~values.isnan()).nonzero()[0])
    other = values.clone()
    other[place] += 1
    assert abs(loss_of(model, altered(batch, values=other)) - loss) > 1e-7 * loss


def test_padded_rows_are_the_same_sequences(settings, preset="timed-valued"):
    """With times and values, and lengths that differ."""
    trainer = Trainer(settings(task="classify", label_code="ALARM", preset=preset, dtype="float64"))
    model, examples = trainer.model.eval(), trainer.corpus.train[:5]
    assert len({len(example) for example in examples}) > 1
    logits = []
    for form in (packed, padded):
        ids, arguments = form(examples, CPU)
        assert {"positions", "values"} < arguments.keys()
        logits.append(model(ids, **arguments).logits)
    assert ids.shape == (5, max(map(len, examples)))
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


def test_a_masked_token_has_no_value(settings):
    """Whatever it was: batch and loss are the same; an unmasked one's makes a difference."""
    trainer = Trainer(settings(preset="valued", mask_share=0.5))
    objective, model = trainer.objective, trainer.model.eval()
    index = max(range(9), key=objective.lengths(0).__getitem__)
    example = trainer.corpus.train[index]
    known = ~example.values.isnan()
    seen, labels = objective.labelled(example, 0, index)
    changed = seen.ids != example.ids
    hidden = changed & known
    assert hidden.any() and (known & ~changed).any()
    assert not changed[labels == IGNORE].any()
    assert torch.equal(seen.values.isnan(), ~known | changed)
    assert torch.equal(seen.values[known & ~changed], example.values[known & ~changed])

    def loss_with(values):
        train = list(trainer.corpus.train)
        train[index] = replace(example, values=values)
        corpus = replace(trainer.corpus, train=train)
        return loss_of(model, replace(objective, corpus=corpus).batch([index], 0, CPU))

    loss = loss_with(example.values)
    assert loss_with(example.values + 9 * hidden) == loss
    assert loss_with(example.values + 9 * (known & ~changed)) != loss


def test_a_replaced_token_has_no_value_either(settings):
    corpus = Trainer(settings(preset="valued")).corpus
    ids = torch.full((4000,), V)
    tokens = Tokens(ids, None, torch.ones(4000))
    seen, labels = MaskedTokens(corpus, 0.5, 0).labelled(tokens, 0, 0)
    replaced = (labels != IGNORE) & (seen.ids != corpus.mask) & (seen.ids != ids)
    assert replaced.sum() > 50 and seen.values[replaced].isnan().all()


@pytest.mark.parametrize("preset", ["timed-causal", "valued"])
def test_classifiers_take_them_too(settings, preset):
    trainer = Trainer(settings(task="classify", label_code="ALARM", preset=preset, max_tokens=24))
    assert trainer.config.pooling == ("last" if preset == "timed-causal" else "first")
    batch = trainer.objective.batch([0, 1], 0, CPU)
    assert {"timed-causal": "positions", "valued": "values"}[preset] in batch.arguments
    assert trainer.run() == 0


def test_a_checkpoint_brings_its_scales(settings, tmp_path):
    first = settings(preset="valued", output=tmp_path / "first", min_count=1)
    trainer = Trainer(first)
    trainer.run()
    (path,) = checkpoints(tmp_path / "first")
    other = write_measured_patients(tmp_path / "other", seed=1)
    tuned = Trainer(settings(preset="valued", meds_dir=other, init=path))
    _, state = load_model(path)
    for found in (tuned.corpus.standard, Standard(**state["standard"])):
        for name, tensor in vars(trainer.corpus.standard).items():
            torch.testing.assert_close(getattr(found, name), tensor, rtol=0, atol=0, equal_nan=True)
    own = Trainer(settings(preset="valued", meds_dir=other, min_count=1)).corpus.standard
    assert not torch.equal(own.mean.nan_to_num(), tuned.corpus.standard.mean.nan_to_num())
    again = Trainer(replace(first, resume=True))
    assert again.step == 2 and again.corpus.fingerprint == trainer.corpus.fingerprint
    assert rows_of(tmp_path / "first")[-1]["split"] == "held_out"


def test_no_scales_are_kept_without_values(settings, tmp_path):
    Trainer(settings()).run()
    assert load_checkpoint(checkpoints(tmp_path / "out")[-1])["standard"] is None


@pytest.mark.parametrize(
    ("preset", "error", "message"),
    [
        ("timed", ValueError, "preset='timed' asks for times, which text_file has not: expected"),
        ("valued", ValueError, "preset='valued' asks for values, which text_file has not"),
        ("clmbr", ValueError, "preset='clmbr' asks for times, which text_file"),
        ("cehr-bert", ValueError, "preset='cehr-bert' asks for values, which text_file"),
        ("signal", NotImplementedError, r"asks for a signal \(channels=2\), which training does"),
    ],
)
def test_texts_have_neither_times_nor_values(settings, tmp_path, preset, error, message):
    """And are not read for it."""
    with pytest.raises(error, match=message):
        Trainer(settings(meds_dir=None, text_file=tmp_path / "absent.csv", preset=preset))
    assert not (tmp_path / "out").exists()


def test_signals_are_no_events_of_a_folder(settings):
    with pytest.raises(NotImplementedError, match="asks for a signal"):
        Trainer(settings(preset="signal"))


@pytest.mark.parametrize(
    ("preset", "task", "given"),
    [("clmbr", "clm", "positions"), ("cehr-bert", "mlm", "values")],
)
def test_published_presets_of_events_are_given_theirs(settings, monkeypatch, preset, task, given):
    """In small: CLMBR ages, and CEHR-BERT values, its positions left to count tokens."""
    published = PRESETS[preset]
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    small = replace(published, **sizes, windows=published.windows[:2])
    monkeypatch.setitem(PRESETS, preset, small)
    trainer = Trainer(settings(preset=preset, task=task))
    arguments = trainer.objective.batch([0], 0, CPU).arguments
    assert arguments.keys() == {"cu_seqlens", "max_seqlen", "labels", given}
    assert trainer.run() == 0  # a loss that is not finite raises
