"""The inputs of clinattn train: splits, vocabularies, labels of the future, text files, batches."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pyarrow")

from patients import write_events, write_patients  # noqa: E402

from clinattn.encoder import Encoder, EncoderConfig  # noqa: E402
from clinattn.encoder.heads import IGNORE  # noqa: E402
from clinattn.training.batches import Batches, consecutive  # noqa: E402
from clinattn.training.corpus import read_corpus  # noqa: E402
from clinattn.training.masking import mask_tokens  # noqa: E402
from clinattn.training.sequences import Tokens, windows  # noqa: E402
from clinattn.training.settings import TrainingSettings  # noqa: E402
from clinattn.training.windows import notes_of  # noqa: E402
from clinattn.workloads import SPECIAL_TOKENS, read_meds  # noqa: E402
from clinattn.workloads.meds_torch import from_meds_torch  # noqa: E402
from clinattn.workloads.seeds import derived_seed, is_held_out  # noqa: E402
from clinattn.workloads.vocabulary import CLS, MASK, UNK  # noqa: E402

TRAINED = [p for p in range(1, 200) if not is_held_out(p, 0.2)]
HELD_OUT = [p for p in range(1, 200) if is_held_out(p, 0.2)]


def names(corpus, example) -> list[str]:
    return [corpus.tokens[i] for i in example.ids]


def test_a_subject_stays_on_its_side_whoever_else_is_there():
    assert HELD_OUT[:8] == [p for p in range(1, 60) if is_held_out(str(p), 0.2)][:8]
    assert set(HELD_OUT) <= {p for p in range(1, 200) if is_held_out(p, 0.5)}
    share = sum(is_held_out(p, 0.2) for p in range(20_000)) / 20_000
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 20_000) ** 0.5


def test_patients_are_held_out_whole_and_give_no_words_to_the_vocabulary(tmp_path):
    rows = [(p, i, f"OF//{p}") for p in (*TRAINED[:3], *HELD_OUT[:2]) for i in range(5)]
    corpus = read_corpus(TrainingSettings(meds_dir=write_events(tmp_path, rows), max_tokens=4))
    assert set(corpus.tokens) == {*SPECIAL_TOKENS, *(f"OF//{p}" for p in TRAINED[:3])}
    assert len(corpus.train) == 6 and len(corpus.held_out) == 4  # 5 events: 3 and 2 after [CLS]
    assert all(set(names(corpus, e)) == {"[CLS]", "[UNK]"} for e in corpus.held_out)


def test_stretches_hold_every_event_once_behind_the_static_facts(tmp_path):
    folder = write_patients(tmp_path)
    corpus = read_corpus(TrainingSettings(meds_dir=folder, max_tokens=9, min_count=1))
    dataset = read_meds(folder)
    static = {i for i, token in enumerate(corpus.tokens) if token.startswith("SEX")}
    examples = [*corpus.train, *corpus.held_out]
    assert all(e.ids[0] == CLS and int(e.ids[1]) in static and len(e.ids) <= 9 for e in examples)
    assert sum(len(e.ids) - 2 for e in examples) == len(dataset.token_ids) - len(dataset)


@pytest.mark.parametrize(
    ("static", "events", "sizes"),
    [(0, 0, [1]), (3, 0, [4]), (2, 6, [8, 4]), (99, 5, [8, 5]), (1, 6, [8])],
)
def test_windows_leave_room_for_events(static, events, sizes):
    facts, dynamic = torch.full((static,), 7), torch.arange(10, 10 + events)
    pieces = windows(Tokens(facts), Tokens(dynamic), CLS, 8)
    assert [len(piece) for piece in pieces] == sizes
    assert all(int((piece.ids < 10).sum()) == piece.start for piece in pieces)
    found = torch.cat([piece.ids for piece in pieces])
    assert found[found >= 10].tolist() == list(range(10, 10 + events))


@pytest.mark.parametrize(
    ("cuts", "max_tokens", "expected"),
    [
        (1, 64, [("A B C", 1)]),
        (2, 64, [("A", 0), ("A B C", 1)]),  # the second falls between X and E, at one time
        (3, 64, [("A", 0), ("A B C", 1), ("A B C E", 0)]),
        (3, 3, [("A", 0), ("B C", 1), ("C E", 0)]),
    ],
    ids=["half", "tie", "quarters", "cut"],
)
def test_labels_come_from_the_future_and_their_codes_are_not_seen(
    tmp_path, cuts, max_tokens, expected
):
    events = [(0, "A"), (1, "X//1"), (2, "B"), (2, "C"), (5, "X//2"), (5, "E"), (6, "F"), (7, "G")]
    rows = [(p, t, c) for p in (TRAINED[0], HELD_OUT[0]) for t, c in events]
    rows += [(TRAINED[1], t, "Y") for t in range(20)]
    settings = TrainingSettings(
        task="classify",
        meds_dir=write_events(tmp_path, rows),
        label_code="X//*",
        cuts=cuts,
        max_tokens=max_tokens,
        min_count=1,
    )
    corpus = read_corpus(settings)
    for examples in (corpus.held_out, corpus.train[: len(expected)]):
        assert [(" ".join(names(corpus, e)[1:]), e.label) for e in examples] == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("NONE*", "matches no code: expected a pattern"), ("STEP*", "the same class: expected both")],
)
def test_labels_that_say_nothing_are_refused(tmp_path, pattern, message):
    settings = TrainingSettings(
        task="classify", meds_dir=write_patients(tmp_path), label_code=pattern
    )
    with pytest.raises(ValueError, match=message):
        read_corpus(settings)


def test_nobody_held_out_is_an_error(tmp_path):
    folder = write_events(tmp_path, [(TRAINED[0], i, "A") for i in range(5)])
    with pytest.raises(ValueError, match="no sequence is in the split 'held_out'"):
        read_corpus(TrainingSettings(meds_dir=folder))


TEXTS = [(f"Patient {i} has a {'fever' if i % 3 else 'cough'}.", f"c{i % 2}") for i in range(40)]


def write_text(path, rows):
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": t, "label": label}) for t, label in rows]
    else:
        lines = ["text,label", *(f'"{t}",{label}' for t, label in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_and_jsonl_read_alike(tmp_path):
    one, two = (
        read_corpus(TrainingSettings(task="classify", text_file=write_text(tmp_path / name, TEXTS)))
        for name in ("a.csv", "a.jsonl")
    )
    assert one.fingerprint == two.fingerprint
    assert one.classes == ("c0", "c1") and len(one.train) + len(one.held_out) == 40
    assert names(one, one.train[0])[:2] == ["[CLS]", "patient"]
    assert names(one, one.train[0])[2] == "[UNK]"  # a number seen once
    held = {t for t, _ in TEXTS if is_held_out(t, 0.2)}
    assert len(one.held_out) == len(held)


def test_rows_of_a_subject_are_in_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"row {i}", "subject_id": p} for p in HELD_OUT[:1] + TRAINED[:4] for i in "ab"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = read_corpus(TrainingSettings(text_file=path, min_count=1))
    assert len(corpus.held_out) == 2 and len(corpus.train) == 8
    rows = [{"text": f"row {i}", "subject_id": None} for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = read_corpus(TrainingSettings(text_file=path))
    assert len(corpus.held_out) == sum(is_held_out(f"row {i}", 0.2) for i in range(40)) > 0


def test_long_texts_are_pieces_for_a_language_model_and_windows_for_a_classifier(tmp_path):
    path = write_text(tmp_path / "a.csv", [(f"{t} a b c d e f g", label) for t, label in TEXTS])
    pieces = read_corpus(TrainingSettings(text_file=path, max_tokens=5))
    assert pieces.train[0].label == IGNORE and [e.part for e in pieces.train[:5]] == [0, 1, 2, 3, 0]
    assert [len(e) for e in pieces.train[:4]] == [5, 5, 5, 2]  # 13 words, 4 a piece
    labelled = TrainingSettings(task="classify", text_file=path, max_tokens=5, overlap=0.5)
    corpus = read_corpus(labelled)
    notes = notes_of(corpus.train)
    assert all(len(corpus.train[at]) == 6 for at in notes)  # from words 0, 2, 4, 6, 8 and 9 on
    assert {len(e) for e in corpus.train} == {5}
    assert all(len({(e.label, e.subject) for e in corpus.train[at]}) == 1 for at in notes)
    first = read_corpus(replace(labelled, pool="first"))
    firsts = [corpus.train[at.start] for at in notes]
    assert [e.ids.tolist() for e in first.train] == [e.ids.tolist() for e in firsts]


def test_a_tokenizer_of_ones_own(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<s>", "<mask>", "<pad>", "?", "patient", "has", "a", "fever", "cough", "."]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "<mask>", "<pad>"])
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_text(tmp_path / "a.csv", TEXTS)
    corpus = read_corpus(TrainingSettings(text_file=path, tokenizer=tmp_path / "tokenizer.json"))
    assert corpus.tokens == tuple(words) and corpus.special == {0, 1, 2} and corpus.mask == 1
    fever = next(e for e in corpus.train if 7 in e.ids.tolist())
    assert names(corpus, fever) == ["<s>", "patient", "?", "has", "a", "fever", "."]

    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    bare.save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match=r"has none of \('\[CLS\]', '<s>'\)"):
        read_corpus(TrainingSettings(text_file=path, tokenizer=tmp_path / "bare.json"))
    (tmp_path / "torn.json").write_text('{"model"')
    with pytest.raises(ValueError, match="torn.json' cannot be read"):
        read_corpus(TrainingSettings(text_file=path, tokenizer=tmp_path / "torn.json"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "text\n", "expected a .csv or .tsv file with a header, or"),
        ("absent.csv", None, "cannot be read"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "note,label\nx,1\n", r"line 2 has no 'text' \(it has \['label', 'note'\]\)"),
        ("a.csv", "text,label\nx,1\ny\n", "line 3 has no 'label'"),
        ("a.csv", "text,label\nx,1\n,1\n", "line 3 has no 'text'"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text"\n', "line 2: Expecting"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("a.csv", "text,label\n" + "".join(f"t{i},1\n" for i in range(30)), "expected two or more"),
        ("a.csv", b"text,label\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_bad_text_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_corpus(TrainingSettings(task="classify", text_file=path))


def test_a_label_only_held_out_is_refused(tmp_path):
    held = next(f"t{i}" for i in range(99) if is_held_out(f"t{i}", 0.2))
    others = [(f"u{i}", f"{i % 2}") for i in range(30)]
    path = write_text(tmp_path / "a.csv", [*others, (held, "rare")])
    with pytest.raises(ValueError, match=r"held out, \['rare'\]"):
        read_corpus(TrainingSettings(task="classify", text_file=path))


def test_masking_is_eighty_ten_ten_of_the_share_and_spares_special_tokens():
    vocab, n = 1000, 200_000
    ordinary = torch.arange(vocab) >= len(SPECIAL_TOKENS)
    ids = torch.randint(0, vocab, (n,))
    seen, labels = mask_tokens(ids, 0.3, MASK, ordinary, seed=1)
    chosen = labels != IGNORE
    content = ordinary[ids]
    assert not (chosen & ~content).any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(seen[~chosen], ids[~chosen])
    masked = chosen & (seen == MASK)
    kept = chosen & (seen == ids)
    replaced = chosen & ~masked & ~kept
    assert ordinary[seen[replaced]].all() and seen[replaced].unique().numel() > 0.9 * vocab
    for part, whole, p in (
        (chosen, content, 0.3),
        (masked, chosen, 0.8),
        (replaced, chosen, 0.1),
        (kept, chosen, 0.1),
    ):
        count = int(whole.sum())
        assert abs(int(part.sum()) / count - p) < 5 * (p * (1 - p) / count) ** 0.5
    assert torch.equal(seen, mask_tokens(ids, 0.3, MASK, ordinary, seed=1)[0])
    assert not torch.equal(seen, mask_tokens(ids, 0.3, MASK, ordinary, seed=2)[0])


def test_an_epoch_takes_each_sequence_once_in_another_order():
    lengths = torch.randint(1, 60, (50,)).numpy()
    batches = Batches(50, lengths.__getitem__, 64, seed=3)
    epochs: dict[int, list[list[int]]] = {}
    while batches.epoch < 3:
        epoch, indices = batches.next()
        epochs.setdefault(epoch, []).append(indices)
        assert sum(lengths[i] for i in indices) <= 64
    whole = [epochs[e] for e in range(3)]
    assert all(sorted(sum(found, [])) == list(range(50)) for found in whole)
    assert whole[0] != whole[1] != whole[2]

    again = Batches(50, lengths.__getitem__, 64, seed=3)
    again.seek(1, 4)
    assert [again.next()[1] for _ in range(len(whole[1]) - 4)] == whole[1][4:]
    assert Batches(50, lengths.__getitem__, 64, seed=4).next()[1] != whole[0][0]


def test_consecutive_fills_to_the_brim():
    assert [*consecutive(enumerate([3, 5, 1, 8]), 8)] == [[0, 1], [2], [3]]


def test_unigram_entropy_is_that_of_the_held_out_content(tmp_path):
    rows = [(p, i, "AB"[i % 2]) for p in (TRAINED[0], HELD_OUT[0]) for i in range(8)]
    corpus = read_corpus(TrainingSettings(meds_dir=write_events(tmp_path, rows), min_count=1))
    assert corpus.unigram_entropy == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_seeds_differ_by_every_name():
    seeds = [derived_seed(*n) for n in ((1, 2), (2, 1), (1, 2, 0), (12,), ("1", 2), (1, -2))]
    assert len(set(seeds)) == 6 and all(0 <= s < 2**63 for s in seeds)


NAN = float("nan")
CODES = torch.tensor([[4, 9, 9, 2], [8, 3, 0, 0], [0, 0, 0, 0]])
DELTAS = torch.tensor([[NAN, 0.5, 0, 2], [7, 1, NAN, NAN], [0, NAN, 0, -9]])
VALUES = torch.tensor([[1.5, NAN, 2.5, 7], [0, 3.5, NAN, 1], [1, 1, 1, 1]])
KNOWN = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
STATIC = torch.tensor([[5, 0], [6, 7], [0, 0]])
MEDS_TORCH = {
    "code": CODES,
    "time_delta_days": DELTAS,
    "numeric_value": VALUES,
    "numeric_value_mask": KNOWN,
}
STATIC_FIELDS = {
    "static_code": STATIC,
    "static_numeric_value": torch.tensor([[9.5, NAN], [NAN, 8.5], [1, 1]]),
    "static_numeric_value_mask": torch.tensor([[1, 0], [0, 1], [0, 1]]),
}


@pytest.mark.parametrize("form", [dict, lambda **fields: SimpleNamespace(**fields)])
@pytest.mark.parametrize(
    ("static", "cls", "ids", "days", "values"),
    [
        (
            {"static_code": None},
            None,
            [[4, 9, 9, 2], [8, 3], []],
            [[0, 0.5, 0.5, 2.5], [0, 1], []],
            [[1.5, NAN, 2.5, NAN], [NAN, 3.5], []],
        ),
        (
            STATIC_FIELDS,
            None,
            [[5, 4, 9, 9, 2], [6, 7, 8, 3], []],
            [[0, 0, 0.5, 0.5, 2.5], [0, 0, 0, 1], []],
            [[9.5, 1.5, NAN, 2.5, NAN], [NAN, 8.5, NAN, 3.5], []],
        ),
        (
            {"static_code": STATIC},
            99,
            [[99, 5, 4, 9, 9, 2], [99, 6, 7, 8, 3], [99]],
            [[0, 0, 0, 0.5, 0.5, 2.5], [0, 0, 0, 0, 1], [0]],
            [[NAN, NAN, 1.5, NAN, 2.5, NAN], [NAN, NAN, NAN, NAN, 3.5], [NAN]],
        ),
    ],
    ids=["plain", "static", "static_cls"],
)
def test_batches_of_meds_torch_data(form, static, cls, ids, days, values):
    batch = form(**MEDS_TORCH, **static)
    found_ids, found = from_meds_torch(batch, cls=cls, values=True)
    found_values = found.pop("values")
    assert found["lengths"].tolist() == [len(row) for row in ids]
    for row, length in enumerate(found["lengths"]):
        assert found_ids[row, :length].tolist() == ids[row]
        assert found["positions"][row, :length].tolist() == days[row]
        torch.testing.assert_close(
            found_values[row, :length], torch.tensor(values[row]), rtol=0, atol=0, equal_nan=True
        )
    assert found["positions"].isfinite().all()
    plain_ids, plain = from_meds_torch(batch, cls=cls)
    assert torch.equal(plain_ids, found_ids) and plain.keys() == {"lengths", "positions"}
    assert (
        Encoder(EncoderConfig.preset("tiny", vocab_size=100))(plain_ids, **plain).isfinite().all()
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": CODES[None]}, r"code has shape \(1, 3, 4\): expected a batch in SM mode"),
        ({"code": CODES.flip(1)}, "code has padding before or between its codes"),
        ({"time_delta_days": None}, r"time_delta_days has shape None: expected \(3, 4\)"),
        ({"time_delta_days": DELTAS[:2]}, r"time_delta_days has shape \(2, 4\)"),
        ({"time_delta_days": -DELTAS}, "negative days"),
        ({"numeric_value_mask": None}, "numeric_value_mask has shape None"),
        ({"static_code": STATIC[0]}, r"static_code has shape \(2,\): expected \(3, static codes\)"),
        ({"static_code": STATIC.flip(1)}, "static_code has padding before or between"),
    ],
    ids=[
        *("sem", "left", "no_times", "times_shape", "negative", "no_value_mask"),
        *("static_shape", "static_left"),
    ],
)
def test_other_forms_of_meds_torch_data_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_meds_torch(MEDS_TORCH | fields)


def test_unknown_words_are_no_target(tmp_path):
    corpus = read_corpus(TrainingSettings(meds_dir=write_patients(tmp_path)))
    assert not corpus.ordinary()[UNK] and int(corpus.ordinary().sum()) == len(corpus.tokens) - 5
