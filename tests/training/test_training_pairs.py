"""Next-sentence pairs: what they hold, what they are labelled, and the model trained on them."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pyarrow")

from patients import write_measured_patients, write_patients  # noqa: E402
from runs import SMALL, rows_of  # noqa: E402

from clinattn.encoder import MaskedLanguageModel, PretrainingModel  # noqa: E402
from clinattn.encoder.heads import IGNORE  # noqa: E402
from clinattn.training.checkpoint import checkpoints, load_model  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.examples import Listed  # noqa: E402
from clinattn.training.loop import Trainer  # noqa: E402
from clinattn.training.objectives import HELD_OUT_EPOCH  # noqa: E402
from clinattn.training.pairs import FOLLOWS, RANDOM, Pairs  # noqa: E402
from clinattn.training.sequences import Tokens, sequence  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.workloads.vocabulary import CLS, SEP  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_presets")

CPU = torch.device("cpu")
NAN = float("nan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_patients(tmp_path_factory.mktemp("meds"), patients=60)


@pytest.fixture
def settings(folder, tmp_path):
    def make(**changes) -> TrainingSettings:
        given = {"meds_dir": folder, "output": tmp_path / "out", "max_tokens": 24, "nsp": True}
        given |= {"batch_tokens": 96, "steps": 2}
        return TrainingSettings(**given | changes)

    return make


def told(subject: int, begin: int, size: int):
    """A sequence whose ids tell whose they are, and where they stood in the timeline."""
    static = torch.arange(subject % 3) + 10
    place = torch.arange(begin, begin + size)
    days = torch.zeros(len(static), dtype=torch.float64), 3.0 * place.double() + 1000 * subject
    values = torch.full((len(static),), NAN), place.float()
    return sequence(
        CLS,
        Tokens(static, days[0], values[0]),
        Tokens(1000 * (subject + 1) + place, days[1], values[1]),
        subject=subject,
    )


SIZES = [(0, 0, 9), (0, 9, 4), (1, 0, 7), (1, 7, 1), (2, 0, 12), (3, 0, 2), (3, 2, 0), (4, 0, 5)]


@pytest.fixture
def pairs():
    return Pairs("here", Listed([told(*size) for size in SIZES]), SEP)


@pytest.mark.parametrize("index", range(len(SIZES)), ids=lambda i: "-".join(map(str, SIZES[i])))
def test_a_pair_is_labelled_as_it_is_made(pairs, index):
    example = pairs.examples[index]
    content = example.ids[example.start :]
    labels = set()
    for seed in range(60):
        tokens, types, label = pairs.draw(index, seed)
        assert len(tokens) == len(types) == pairs.lengths[index]
        seps = (tokens.ids == SEP).nonzero().squeeze(1).tolist()
        assert seps[-1] == len(tokens) - 1 and tokens.values[seps].isnan().all()
        assert torch.equal(tokens.ids[: seps[0]], example.ids[: seps[0]])
        if len(content) < 2:
            assert label == IGNORE and len(seps) == 1 and not types.any()
            assert torch.equal(tokens.ids[:-1], example.ids)
            continue
        labels.add(label)
        second = tokens.ids[seps[0] + 1 : -1]
        first = tokens.ids[example.start : seps[0]]
        assert torch.equal(types, (torch.arange(len(types)) > seps[0]).long())
        assert torch.equal(second.diff(), torch.ones(len(second) - 1, dtype=torch.int64))
        assert len(first) - len(second) in (0, 1) or SIZES[index] == (2, 0, 12)
        if label == FOLLOWS:
            assert int(second[0]) == int(first[-1]) + 1
        else:
            (owner,) = set((second // 1000 - 1).tolist())
            assert label == RANDOM and owner != example.subject
            own = [s for s in SIZES if s[0] == owner]
            places = (second % 1000).tolist()
            assert any(b <= places[0] and places[-1] < b + n for _, b, n in own)
        assert torch.equal(tokens.values[seps[0] + 1 : -1], (second % 1000).float())
        place = example.start + len(first)
        days = tokens.days
        assert float(days[seps[0] + 1]) == float(example.days[place])  # random or not
        assert torch.equal(days[seps[0] + 1 : -1].diff(), torch.full((len(second) - 1,), 3.0))
        assert days[seps[0]] == days[seps[0] - 1] and days[-1] == days[-2]
    assert labels == ({FOLLOWS, RANDOM} if len(content) > 1 else set())


def test_the_length_of_a_second_part_tells_nothing():
    """Nobody else has as many events as the half of the longest."""
    pairs = Pairs("here", Listed([told(0, 0, 20), told(1, 0, 4)]), SEP)
    sizes = {label: set() for label in (FOLLOWS, RANDOM)}
    for seed in range(20):
        tokens, types, label = pairs.draw(0, seed)
        sizes[label].add((len(tokens), int(types.sum())))
    assert sizes == {FOLLOWS: {(17, 5)}, RANDOM: {(17, 5)}}  # [CLS], 10, [SEP], 4, [SEP]


def test_half_of_the_pairs_follow_and_any_other_subject_may_be_drawn(pairs):
    drawn = [pairs.draw(3 + 1, seed) for seed in range(2000)]
    labels = torch.tensor([label for *_, label in drawn])
    assert abs(float((labels == FOLLOWS).double().mean()) - 0.5) < 5 * 0.5 / 2000**0.5
    owners = {int(t.ids[-2]) // 1000 - 1 for t, _, label in drawn if label == RANDOM}
    assert owners == {0, 1}  # the others have fewer than six events in one sequence


@pytest.mark.parametrize(
    "sizes",
    [[(0, 0, 9), (0, 9, 9)], [(0, 0, 9), (1, 0, 0)], [(0, 0, 1), (1, 0, 1)]],
    ids=["one_subject", "others_empty", "too_short"],
)
def test_a_split_without_pairs_is_refused(sizes):
    with pytest.raises(ValueError, match="here: no pairs for nsp in a split, expected sequences"):
        Pairs("here", Listed([told(*size) for size in sizes]), SEP)


def test_pairs_are_drawn_anew_each_epoch_and_once_for_the_held_out(settings):
    objective = Trainer(settings()).objective
    drawn = [objective.batch(list(range(8)), epoch, CPU) for epoch in (0, 1, 0, -1, -1)]
    labels = [batch.arguments["next_labels"].tolist() for batch in drawn]
    assert torch.equal(drawn[0].ids, drawn[2].ids) and labels[0] == labels[2] != labels[1]
    assert torch.equal(drawn[3].ids, drawn[4].ids) and labels[3] == labels[4]
    assert drawn[0].labels[1] == sum(label != IGNORE for label in labels[0])


@pytest.mark.parametrize("source", ["meds", "text"])
@pytest.mark.parametrize("max_tokens", [6, 7, 24])
def test_budgets_hold_for_pairs(settings, tmp_path, source, max_tokens):
    changes = {"max_tokens": max_tokens, "batch_tokens": 50}
    if source == "text":
        path = tmp_path / "a.jsonl"
        rows = [{"text": "word " * (i % 40 + 1), "subject_id": i} for i in range(90)]
        path.write_text("\n".join(map(json.dumps, rows)))
        changes |= {"meds_dir": None, "text_file": path}
    trainer = Trainer(settings(**changes))
    assert max(trainer.objective.lengths(0)) == max_tokens
    for _ in range(40):
        epoch, indices = trainer.batches.next()
        batch = trainer.objective.batch(indices, epoch, CPU)
        assert len(batch.ids) == sum(trainer.objective.lengths(epoch)[i] for i in indices) <= 50
        assert batch.arguments["max_seqlen"] <= max_tokens


def test_a_row_of_one_word_is_no_pair(settings, tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["alone", *(f"row {i % 5} of many" for i in range(60))]
    rows = [{"text": text, "subject_id": i} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    trainer = Trainer(settings(meds_dir=None, text_file=path))
    short = [n == 3 for n in trainer.objective.lengths(0)]
    assert sum(short) == 1
    index = short.index(True)
    batch = trainer.objective.batch([index], 0, CPU)
    assert batch.ids[0] == CLS and batch.ids[2] == SEP
    assert batch.arguments["next_labels"].tolist() == [IGNORE] and batch.labels[1] == 0
    assert float(batch.run(trainer.model).next_loss.detach()) == 0


@pytest.mark.parametrize("sep", ["[SEP]", "</s>", None])
def test_a_tokenizer_has_its_separator(tmp_path, sep):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[CLS]", "[MASK]", "?", "a", "b", *([sep] if sep else [])]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a b", "subject_id": i}) for i in range(30)))
    given = {"text_file": path, "tokenizer": tmp_path / "t.json"}
    if sep is None:
        with pytest.raises(ValueError, match=r"has none of \('\[SEP\]', '</s>'\)"):
            read_corpus(TrainingSettings(**given, nsp=True))
    else:
        corpus = read_corpus(TrainingSettings(**given, nsp=True))
        assert corpus.sep == 5 and corpus.special == {0, 1, 5}
    assert read_corpus(TrainingSettings(**given)).sep is None


@pytest.mark.parametrize(("preset", "typed"), [("tiny", False), ("typed", True), ("valued", False)])
def test_an_encoder_of_two_token_types_is_given_them(settings, tmp_path, preset, typed):
    trainer = Trainer(settings(preset=preset))
    assert ("token_types" in trainer.objective.batch([0, 1], 0, CPU).arguments) == typed
    assert trainer.run() == 0
    found = rows_of(tmp_path / "out")[-1]
    assert found["loss"] == pytest.approx(found["mlm_loss"] + found["nsp_loss"])


def test_the_held_out_figures_are_those_of_the_whole_split(settings, tmp_path):
    trainer = Trainer(settings(preset="typed"))
    trainer.run()
    last = rows_of(tmp_path / "out")[-1]
    model, _ = load_model(checkpoints(tmp_path / "out")[-1])
    whole = trainer.objective.batch(list(range(len(trainer.corpus.held_out))), HELD_OUT_EPOCH, CPU)
    output, labels = whole.run(model), whole.arguments["next_labels"]
    known = labels != IGNORE
    right = (output.next_logits.argmax(1) == labels)[known].double().mean()
    follows = float((labels[known] == FOLLOWS).double().mean())
    assert last["nsp_accuracy"] == pytest.approx(float(right))
    assert last["nsp_base_rate"] == pytest.approx(max(follows, 1 - follows))
    assert last["nsp_loss"] == pytest.approx(float(output.next_loss.detach()), rel=1e-5)
    assert last["mlm_loss"] == pytest.approx(float(output.masked_loss.detach()), rel=1e-5)


def test_fine_tuning_takes_the_encoder_out_of_pretraining_and_back(settings, tmp_path):
    Trainer(settings(output=tmp_path / "pairs", min_count=1)).run()
    (path,) = checkpoints(tmp_path / "pairs")
    trained, _ = load_model(path)
    assert type(trained) is PretrainingModel and type(trained.masked) is MaskedLanguageModel
    for task in ({"task": "classify", "label_code": "ALARM*", "nsp": False}, {}):
        tuned = Trainer(settings(init=path, **task))
        for name, weight in trained.encoder.state_dict().items():
            assert torch.equal(weight, tuned.model.encoder.state_dict()[name]), name


def test_pairs_of_measured_events_keep_times_and_values(settings, tmp_path):
    folder = write_measured_patients(tmp_path / "measured")
    for preset, name in (("timed", "positions"), ("valued", "values")):
        trainer = Trainer(settings(preset=preset, meds_dir=folder, output=tmp_path / preset))
        batch = trainer.objective.batch([0, 1], 0, CPU)
        assert len(batch.arguments[name]) == len(batch.ids)
        assert trainer.run() == 0


def make_model():
    torch.manual_seed(0)
    return PretrainingModel(SMALL).eval().double()


IDS = torch.randint(5, 100, (3, 9))
LENGTHS = torch.tensor([9, 4, 6])
LABELS = IDS.masked_fill(torch.rand(3, 9) < 0.6, IGNORE).masked_fill(
    torch.arange(9) >= LENGTHS[:, None], IGNORE
)


def test_both_losses_are_means_over_their_labels():
    model = make_model()
    next_labels = torch.tensor([1, IGNORE, 0])
    out = model(IDS, lengths=LENGTHS, labels=LABELS, next_labels=next_labels)
    masked = model.masked(IDS, lengths=LENGTHS, labels=LABELS)
    hidden = model.encoder(IDS, lengths=LENGTHS)[:, 0]
    logits = model.next_sentence(model.pooler(hidden))
    torch.testing.assert_close(out.next_logits, logits)
    torch.testing.assert_close(out.masked_loss, masked.loss, rtol=0, atol=0)
    torch.testing.assert_close(out.next_loss, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0])))
    torch.testing.assert_close(out.loss, out.masked_loss + out.next_loss, rtol=0, atol=0)
    none = model(IDS, lengths=LENGTHS, labels=LABELS, next_labels=torch.full((3,), IGNORE))
    assert float(none.next_loss.detach()) == 0 and torch.equal(none.loss, masked.loss)
    bare = model(IDS, lengths=LENGTHS)
    assert bare.loss is None and torch.equal(bare.next_logits, out.next_logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": LABELS}, "next_labels: got None beside labels, expected both or neither"),
        ({"next_labels": torch.zeros(3).long()}, "labels: got None beside next_labels"),
    ],
    ids=["labels", "next_labels"],
)
def test_labels_of_one_kind_alone_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_model()(IDS, lengths=LENGTHS, **given)
