"""Batches as they reach attention: padding, masks of the caller, packed documents, windows."""

import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from parity_table import LENGTHS  # noqa: E402

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.integrations.transformers import documents as documents_of_rows  # noqa: E402
from clinattn.integrations.transformers import early_transformers  # noqa: E402
from clinattn.tools.model_report.architectures import find  # noqa: E402
from clinattn.tools.model_report.parity import CountedAttention, InDouble, judge  # noqa: E402

N_TOKENS = sum(LENGTHS)
# ModernBERT of transformers 5.0 makes its masks itself, from one of two dimensions.
MASKS_OF_ITS_OWN = ("modernbert",) if early_transformers.REPLACEMENTS else ()


@pytest.fixture(autouse=True)
def known(request):
    """Skips models that the installed transformers does not have."""
    name = getattr(request.node, "callspec", None)
    name = name and name.params.get("name")
    if name and not find(name).available():
        pytest.skip(f"transformers {transformers.__version__} has no {find(name).model}")


def built(name, implementation, dtype=torch.float32):
    model = find(name).build(dtype=dtype).eval()
    if implementation == "clinattn":
        replace_attention(model)
    return model


def three(name, run_eager, run_replaced):
    """Judges run_replaced(model) by run_eager(model), each (real tokens, C)."""
    with torch.no_grad():
        with InDouble():
            truth = run_eager(built(name, "eager", torch.float64))
        naive = run_eager(built(name, "eager"))
        with CountedAttention() as counted:
            actual = run_replaced(built(name, "clinattn"))
    as_quantity = lambda x: {"last_hidden_state": x.double()}
    actual, truth, naive = map(as_quantity, (actual, truth, naive))
    parity = judge(actual, truth, [naive], torch.float32, counted.calls)
    assert counted.calls == find(name).expected_calls("none")
    assert parity.passed, parity


def documents(vocabulary=103):
    torch.manual_seed(1)
    return [torch.randint(5, vocabulary, (length,)) for length in LENGTHS]


def one_by_one(model):
    return torch.cat([model(ids[None]).last_hidden_state[0] for ids in documents()])


def collated(**options):
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    batch = dict(collator([{"input_ids": ids.tolist()} for ids in documents()]))
    batch.pop("labels")
    return batch


PACKED = [
    *((name, True) for name in ("bert", "modernbert", "eurobert", "llama", "mistral")),
    *((name, False) for name in ("bert", "eurobert", "llama", "mistral")),
]


@pytest.mark.parametrize(
    "name, ends", PACKED, ids=[f"{n}-{'cu_seq_lens' if e else 'position_ids'}" for n, e in PACKED]
)
def test_packed_documents_do_not_see_each_other(name, ends):
    if name in MASKS_OF_ITS_OWN:
        pytest.skip("this release packs for flash-attn alone")
    # with a cache, positions that start over mean nothing to transformers
    words = collated(return_flash_attn_kwargs=ends) | {"use_cache": False}
    three(name, one_by_one, lambda model: model(**words).last_hidden_state[0])


@pytest.fixture
def not_yet_warned(monkeypatch):
    monkeypatch.setattr(documents_of_rows._Done, "warned", False)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral"])
def test_a_mask_of_ones_makes_a_row_one_document_and_a_warning_says_so(name, not_yet_warned):
    words = collated() | {"use_cache": False}
    words["attention_mask"] = torch.ones_like(words["input_ids"])
    run = lambda model: model(**words).last_hidden_state[0]
    with pytest.warns(UserWarning, match="attention_mask=None .* to keep documents apart"):
        three(name, run, run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(built(name, "clinattn"))


@pytest.mark.parametrize("kind", ["padded", "visits", "no mask", "one document", "cu_seq_lens"])
def test_other_rows_are_not_warned_of(kind, not_yet_warned):
    words = collated(return_flash_attn_kwargs=kind == "cu_seq_lens") | {"use_cache": False}
    ones = torch.ones_like(words["input_ids"])
    if kind == "padded":
        ones[:, -1] = 0
    elif kind == "visits":
        words["position_ids"] = torch.arange(N_TOKENS)[None] // 3
    elif kind == "one document":
        words["position_ids"] = torch.arange(N_TOKENS)[None]
    if kind != "no mask":
        words["attention_mask"] = ones
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built("llama", "clinattn")(**words)


def four_dimensional(kind, dtype):
    """Returns a random mask (B, 1, N, N) in which each token sees itself."""
    generator = torch.Generator().manual_seed(2)
    visible = torch.rand(len(LENGTHS), 1, 23, 23, generator=generator) < 0.7
    visible |= torch.eye(23, dtype=torch.bool)
    if kind == "bool":
        return visible
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_four_dimensions_are_used_as_they_are(name, kind):
    if name in MASKS_OF_ITS_OWN:
        pytest.skip("this release takes none")
    torch.manual_seed(1)
    ids = torch.randint(5, 103, (len(LENGTHS), 23))

    def run(kind):
        def run(model):
            mask = four_dimensional(kind, model.dtype)
            if name == "modernbert":  # takes one for each kind of its layers
                mask = dict.fromkeys(("full_attention", "sliding_attention"), mask)
            return model(ids, attention_mask=mask).last_hidden_state.flatten(0, 1)

        return run

    three(name, run("float"), run(kind))


@pytest.mark.parametrize("name", ["bert", "modernbert", "nomic_bert", "eurobert", "llama"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_nan_in_padding_reaches_no_token(name, padding):
    model = built(name, "clinattn")
    architecture = find(name)
    torch.manual_seed(1)
    (inputs, real) = architecture.batch(model.config, LENGTHS, padding)
    tokens = real["last_hidden_state"]
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()

    def run(filling):
        inputs["inputs_embeds"] = embeddings.masked_fill(~tokens[..., None], filling)
        return model(**inputs).last_hidden_state[tokens]

    assert torch.equal(run(torch.nan), run(0.0))
    assert run(torch.nan).isfinite().all()


WINDOWS = {
    # local_attention is both sides together
    "modernbert": ({"layer_types": ["sliding_attention"], "local_attention": 6}, -3, 3),
    # sliding_window counts the token itself
    "mistral": ({"sliding_window": 5}, -4, 0),
}


@pytest.mark.parametrize("implementation", ["eager", "clinattn"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_ends_where_it_should(name, implementation):
    """Checks which token's embedding changes which token's output, in a single layer."""
    if name in MASKS_OF_ITS_OWN:
        pytest.skip("the first layer of this release has no window")
    architecture = find(name)
    settings, first, last = WINDOWS[name]
    settings = dict(architecture.settings) | {"num_hidden_layers": 1} | settings
    config = getattr(transformers, architecture.model).config_class(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, architecture.model)(config).double().eval()
    model.set_attn_implementation("eager")
    if implementation == "clinattn":
        replace_attention(model)
    n = 17
    embeddings = torch.randn(1, n, config.hidden_size, dtype=torch.float64, requires_grad=True)
    output = model(inputs_embeds=embeddings).last_hidden_state[0]
    seen = torch.stack(
        [
            torch.autograd.grad(row.square().sum(), embeddings, retain_graph=True)[0][0].any(-1)
            for row in output
        ]
    )
    ahead = torch.arange(n) - torch.arange(n)[:, None]
    assert torch.equal(seen, (ahead >= first) & (ahead <= last))


def test_attention_weights_are_not_made_up():
    model = built("bert", "clinattn")
    ids = documents()[0][None]
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        output = model(ids, output_attentions=True)
    assert not any(x is not None for x in output.attentions or ())
    assert torch.equal(output.last_hidden_state, model(ids).last_hidden_state)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_taken_back_the_model_is_what_it_was(before, tmp_path):
    model = find("bert").build().eval()
    model.set_attn_implementation(before)
    ids = documents()[0][None]
    expected = model(ids).last_hidden_state
    report = replace_attention(model)
    assert model.config._attn_implementation == "clinattn"
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "clinattn" not in json.dumps(saved)
    report.undo()
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).last_hidden_state, expected)


def test_a_folder_is_loaded_with_clinattn(tmp_path):
    from clinattn.integrations.transformers.registry import register

    built("bert", "eager").save_pretrained(tmp_path)
    register()
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="clinattn").eval()
    ids = documents()[0][None]
    with CountedAttention() as counted:
        output = model(ids).last_hidden_state
    assert counted.calls == 2
    assert torch.equal(output, built("bert", "clinattn")(ids).last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients_pass_through_checkpoints(name):
    model = built(name, "clinattn").train()
    ids = documents()[0][None]

    def gradients():
        model.zero_grad()
        model(ids).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), expected))
