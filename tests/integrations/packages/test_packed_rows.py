"""PackingCollator: documents of a row are apart, and give what they give in padded batches."""

import copy
from contextlib import nullcontext

import pytest
import torch

transformers = pytest.importorskip("transformers")

import packed_rows  # noqa: E402
from packed_rows import LENGTHS, features, padded  # noqa: E402
from support import assert_close  # noqa: E402

import clinattn  # noqa: E402
from clinattn.integrations.trainer import PackingCollator, per_sequence  # noqa: E402
from clinattn.tools.model_report.architectures import find  # noqa: E402
from clinattn.tools.model_report.parity import CountedAttention, InDouble  # noqa: E402

HEADS = ("MaskedLM", "TokenClassification", "SequenceClassification")
CASES = [
    *(("bert", head, {}) for head in HEADS),
    *(("modernbert", head, {}) for head in HEADS),
    ("modernbert", "SequenceClassification", {"classifier_pooling": "mean"}),
    ("modernbert", "MaskedLM", {"sparse_prediction": True}),
    *(("roberta", head, {}) for head in HEADS),
    ("bert", "PreTraining", {}),
    ("bert", "", {}),
]
IDS = [f"{name}-{head or 'base'}-{'-'.join(map(str, more.values()))}" for name, head, more in CASES]


def rows_of(name, head):
    rows = features(head, types=name == "bert")
    if head == "PreTraining":
        for i, row in enumerate(rows):
            row["next_sentence_label"] = i % 2
    return rows


def results(model, batch, context):
    """Outputs per real token or sequence, the loss, and gradients, in fp64."""
    with context:
        outputs = model(**batch)
        if "loss" in outputs:
            loss = outputs.loss
        else:  # of half of the features: the norm makes sums over all of them the same
            x = outputs.last_hidden_state
            real = batch["attention_mask"].bool() if "attention_mask" in batch else ...
            loss = x[real][..., ::2].square().mean()
        loss.backward()
    found = {"loss": loss.detach()[None]}
    for output, x in outputs.items():
        if output in ("loss", "attentions"):
            continue
        if "attention_mask" not in batch:
            parts = [row[output] for row in per_sequence({output: x}, batch)]
        elif x.shape[1:2] == batch["attention_mask"].shape[1:]:
            parts = [y[: int(m.sum())] for y, m in zip(x, batch["attention_mask"], strict=True)]
        else:
            parts = list(x)
        found[output] = torch.cat([y.reshape(-1) for y in parts]).detach()
    return found | gradients(model)


def gradients(model):
    """By module, weight and bias in one: a key's bias has none but what cancels in it."""
    found = {}
    for name, x in model.named_parameters():
        if x.grad is not None:
            found.setdefault(f"gradient of {name.rpartition('.')[0]}", []).append(x.grad.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("name, head, more", CASES, ids=IDS)
def test_a_packed_row_gives_what_padded_rows_give(name, head, more):
    """Outputs, loss and every gradient, against eager attention on the padded batch in fp64."""
    rows = rows_of(name, head)
    batch = padded(rows, packed_rows.MORE[name].get("pad_token_id", 0))
    make = lambda *args: packed_rows.model(name, head, *args, **more)
    # of a sparse prediction there are outputs for tokens with labels alone
    get = _loss_and_gradients if more.get("sparse_prediction") else results
    truth = get(make(False, torch.float64), batch, InDouble())
    naive = get(make(False), batch, nullcontext())
    model = make()
    packed = PackingCollator(model)(rows)
    with CountedAttention() as counted:
        actual = get(model, packed, nullcontext())
    assert counted.calls == 2
    assert actual.keys() == truth.keys() == naive.keys()
    for quantity, x in actual.items():
        assert_close(quantity, x, truth[quantity].double(), naive[quantity])


def _loss_and_gradients(model, batch, context):
    with context:
        loss = model(**batch).loss
        loss.backward()
    return {"loss": loss.detach()[None]} | gradients(model)


def by_positions(name, head):
    """Returns whether position_ids alone tell a model where sequences begin."""
    return name != "modernbert" and head != "SequenceClassification"


TOLD = [
    (*case, told)
    for case in CASES[:7]
    for told in ("all", "without position_ids", "position_ids alone")
    if told != "position_ids alone" or by_positions(*case[:2])
]


@pytest.mark.parametrize("name, head, more, told", TOLD)
def test_no_sequence_sees_another(name, head, more, told):
    """Another third sequence, and the others keep their bits."""
    positions = {"max_position_embeddings": sum(LENGTHS)}  # those of a row, where nobody says
    model = packed_rows.model(name, head, **positions | more).eval()
    collate = PackingCollator(model)
    rows = features(head)
    changed = [dict(row) for row in rows]
    changed[3]["input_ids"] = [4 + i % 9 for i in range(LENGTHS[3])]

    def run(rows):
        batch = collate(rows)
        batch.pop("labels")
        ends = dict(batch)
        if told == "without position_ids":
            batch.pop("position_ids")
        elif told == "position_ids alone":
            batch = {x: y for x, y in batch.items() if "seq_len" not in x and "max_" not in x}
        with torch.no_grad():
            return [x["logits"] for x in per_sequence(model(**batch), ends)]

    for i, (one, other) in enumerate(zip(run(rows), run(changed), strict=True)):
        assert torch.equal(one, other) == (i != 3)


def test_a_batch_is_what_the_docstring_says():
    collate = PackingCollator(packed_rows.model("roberta", "TokenClassification"))
    rows = [
        {"input_ids": [5, 6, 7], "labels": [0, -100, 2], "note": "left out"},
        {"input_ids": [8, 9, 0], "labels": [1, 3, -100], "attention_mask": [1, 1, 0], "note": ""},
    ]
    batch = collate(rows)
    ends = torch.tensor([0, 3, 5], dtype=torch.int32)
    expected = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[0, -100, 2, 1, 3]]),
        "position_ids": torch.tensor([[2, 3, 4, 2, 3]]),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
    }
    assert batch.pop("max_length_q") == batch.pop("max_length_k") == 3
    assert batch.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(batch[name], x) and batch[name].dtype == x.dtype, name


def test_a_collator_that_pads_goes_before():
    """The tokens and labels that it draws are those of the padded batch."""
    from small_folders import tokenizer

    words = [f"w{i}" for i in range(40)]
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]),
        pad_token="[PAD]", mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip
    masking = transformers.DataCollatorForLanguageModeling(fast, mlm_probability=0.3)
    rows = [{"input_ids": x["input_ids"]} for x in features("")]
    torch.manual_seed(0)
    padded_batch = masking([dict(row) for row in rows])
    collate = PackingCollator(packed_rows.model("bert", "MaskedLM"), masking)
    torch.manual_seed(0)
    batch = collate(rows)
    real = padded_batch["attention_mask"].bool()
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name][0], padded_batch[name][real])
    assert "attention_mask" not in batch and (batch["labels"] != -100).any()


def test_a_padded_batch_without_a_mask_is_refused():
    bare = lambda rows: {"input_ids": torch.zeros(len(rows), 9, dtype=torch.long)}
    collate = PackingCollator(packed_rows.model("bert", "MaskedLM"), bare)
    with pytest.raises(ValueError, match="collator: its batch has input_ids, expected attention_m"):
        collate(features(""))


@pytest.mark.parametrize("labels", ["numbers", "several"])
def test_labels_of_sequences(labels):
    """(S,) and (S, C), also where C is the length of a sequence."""
    kind = {"problem_type": "multi_label_classification"} if labels == "several" else {}
    model = packed_rows.model("bert", "SequenceClassification", **kind)
    given = [1, 4] if labels == "numbers" else [[0.0, 1.0, 0.0, 0.0, 1.0]] * 2
    rows = [{"input_ids": [3] * 5, "label": x} for x in given]
    batch = PackingCollator(model)(rows)
    assert batch["labels"].tolist() == given
    assert model(**batch).logits.shape == (2, 5) and model(**batch).loss.isfinite()


def test_long_sequences_are_cut_where_asked():
    model = packed_rows.model("bert", "TokenClassification")
    row = {"input_ids": list(range(3, 50)) * 2, "labels": [1] * 94}
    with pytest.raises(ValueError, match="got 94 tokens for 64 positions"):
        PackingCollator(model)([row])
    batch = PackingCollator(model, max_length=10)([row, row])
    assert batch["input_ids"].tolist() == [row["input_ids"][:10] * 2]
    assert batch["labels"].shape == (1, 20)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "features: got none"),
        ([{"labels": [1]}], "features: got labels, expected input_ids"),
        ([{"input_ids": []}], r"input_ids: got shape \(0,\)"),
        ([{"input_ids": [[3]]}], r"input_ids: got shape \(1, 1\)"),
        ([{"input_ids": [3], "labels": [1, 2]}], r"labels: got shape \(2,\) for 1 input_ids"),
        ([{"input_ids": [3], "position_ids": [0]}], "position_ids: got one in the features"),
        ([{"input_ids": [3], "attention_mask": [1, 1]}], r"attention_mask: got shape \(2,\)"),
        ([{"input_ids": [3], "attention_mask": [0]}], "hides all tokens"),
        ([{"input_ids": [3], "labels": [1]}, {"input_ids": [3]}], "labels: 1 of 2 features"),
    ],
)
def test_bad_features_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(packed_rows.model("bert", "TokenClassification"))(rows)


def test_models_that_do_not_keep_sequences_apart_are_refused():
    model = packed_rows.model("bert", "MaskedLM", replaced=False)
    with pytest.raises(NotImplementedError, match=r"or call clinattn.replace_attention\(model\)"):
        PackingCollator(model)
    with torch.no_grad():
        for weight in model.cls.parameters():
            weight.zero_()  # a new head gives the same for everything
    with pytest.raises(NotImplementedError, match="does not take packed rows"):
        PackingCollator(model)
    for head, reason in (("QuestionAnswering", "start and end"), ("MultipleChoice", "choices")):
        with pytest.raises(NotImplementedError, match=f"{reason}.*give it padded batches"):
            PackingCollator(packed_rows.model("bert", head))
    with pytest.raises(TypeError, match="got Linear, expected a model of transformers"):
        PackingCollator(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weights on the meta device"):
        PackingCollator(packed_rows.model("bert", "MaskedLM").to("meta"))
    with pytest.raises(ValueError, match="labels: got 'rows'"):
        PackingCollator(model, labels="rows")


PASS = (
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "esm", "modernbert",
    "eurobert", "nomic_bert",
)  # fmt: skip
REFUSED = ("longformer", "megatron-bert", "mpnet", "roformer", "big_bird", "deberta-v2")


@pytest.mark.parametrize("name", [*PASS, *REFUSED])
def test_families_pass_or_are_refused_as_the_guide_says(name):
    family = find(name)
    if not family.available():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = family.build(dtype=torch.float32)
    clinattn.replace_attention(model)
    if name in PASS:
        assert PackingCollator(model).position_start in (0, 2)
    else:
        with pytest.raises(NotImplementedError, match="give it padded batches"):
            PackingCollator(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_positions_are_found_in_few_digits_too(dtype):
    """Fresh position embeddings are small: numbered from 0 RoBERTa is nearly as close."""
    config = transformers.RobertaConfig(**packed_rows.SIZES | packed_rows.MORE["roberta"])
    torch.manual_seed(0)
    model = transformers.RobertaForMaskedLM(config).to(dtype)
    clinattn.replace_attention(model)
    assert PackingCollator(model).position_start == 2


def test_a_model_is_as_before_after_it_was_tried():
    model = packed_rows.model("modernbert", "SequenceClassification").train()
    model.model.eval()
    before = {name: x.training for name, x in model.named_modules()}
    state = torch.get_rng_state()
    PackingCollator(model)
    assert torch.equal(state, torch.get_rng_state())
    assert before == {name: x.training for name, x in model.named_modules()}
    assert all(x.grad is None for x in model.parameters())
    # rows that are not packed go as they went
    rows = features("SequenceClassification")
    fresh = packed_rows.model("modernbert", "SequenceClassification").eval()
    with torch.no_grad():
        batch = padded(rows)
        assert torch.equal(model.eval()(**batch).logits, fresh(**batch).logits)


def test_a_second_collator_and_a_copy_of_the_model_are_no_matter():
    model = packed_rows.model("bert", "SequenceClassification").eval()
    rows = features("SequenceClassification")
    with torch.no_grad():
        first = model(**PackingCollator(model)(rows)).logits
        batch = PackingCollator(model)(rows)
        assert torch.equal(first, model(**batch).logits)
        other = copy.deepcopy(model)
        assert torch.equal(first, other(**batch).logits)
        assert torch.equal(first, other(**PackingCollator(other)(rows)).logits)
        assert torch.equal(first, model(**batch).logits)


def test_lora_of_peft_takes_packed_rows():
    peft = pytest.importorskip("peft")
    model = packed_rows.model("bert", "SequenceClassification")
    tuned = peft.get_peft_model(model, peft.LoraConfig("SEQ_CLS", target_modules=["query"]))
    rows = features("SequenceClassification")
    batch = PackingCollator(tuned)(rows)
    logits = tuned.eval()(**batch).logits
    alone = packed_rows.model("bert", "SequenceClassification", False).eval()
    with torch.no_grad():
        exact = packed_rows.model("bert", "SequenceClassification", False, torch.float64).eval()
        truth = exact(**padded(rows)).logits
        assert_close("logits", logits.detach(), truth, alone(**padded(rows)).logits)
