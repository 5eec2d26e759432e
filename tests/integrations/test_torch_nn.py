"""torch.nn's layers and stacks after adapt: meaning, parameters, hooks and files stay."""

import copy
import io
import pickle

import pytest
import torch
from pairwise import pairwise
from torch import nn
from torch.nn.utils import parametrizations
from torch_nn_modules import BATCH, EMBED, HEADS, NK, NQ, adapted, spied

from clinattn.integrations.torch import modules as torch_nn
from clinattn.integrations.torch.modules import adapt, restore

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched", "ignore:enable_nested_tensor", "ignore:The PyTorch API of nes"
)


@pytest.fixture
def calls(monkeypatch):
    return spied(monkeypatch)


def test_nan_in_padding_reaches_no_other_token():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0), 2)
    model = adapted(model)
    x = torch.randn(NQ, BATCH, EMBED)
    hidden = torch.arange(NQ) >= torch.tensor([[NQ], [5], [1]])
    clean, dirty = (
        model(x.masked_fill(hidden.T[..., None], fill), src_key_padding_mask=hidden)[~hidden.T]
        for fill in (0.0, float("nan"))
    )
    assert torch.equal(clean, dirty)


def encoder(**options):
    norm = nn.LayerNorm(EMBED)
    nn.init.normal_(norm.bias)
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, 0.0, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, norm)


LAYER = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "sequence first": {"batch_first": False},
}


PADDING = {
    "none": None,
    "right": torch.arange(NQ) >= torch.tensor([[NQ], [5], [1]]),
    "left": torch.arange(NQ) < torch.tensor([[0], [5], [1]]),
}


HIDDEN = [
    ("none", "none"), ("none", "right"), ("none", "left"), ("causal", "none"),
    ("causal", "right"), ("other", "none"), ("other", "right"), ("other", "left"),
]  # fmt: skip
MODES = [("train", True), ("train", False), ("eval", True), ("eval", False)]


@pytest.mark.parametrize("options, hidden, mode", pairwise([*LAYER], HIDDEN, MODES), ids=str)
def test_encoder_is_that_of_torch(options, hidden, mode, calls):
    """In every mode, zeros in padding included; the attention is ours where torch fuses it."""
    (mask, padding), (training, gradients) = hidden, mode
    model = encoder(**LAYER[options]).double().train(training == "train")
    x = torch.randn(BATCH, NQ, EMBED, dtype=torch.float64)
    x = x if LAYER[options].get("batch_first", True) else x.transpose(0, 1)
    other = torch.rand(NQ, NQ) < 0.4
    other[:, [0, -1]] = False
    masks = {"none": None, "causal": torch.ones(NQ, NQ).triu(1).bool(), "other": other}
    keywords = {"mask": masks[mask], "src_key_padding_mask": PADDING[padding]}
    with torch.set_grad_enabled(gradients):
        expected, actual = (m(x, **keywords) for m in (model, adapted(model)))
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    assert len(calls) == 2
    assert all(c["is_causal"] == (mask == "causal") for c in calls)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
def test_transformer_with_all_masks(batch_first, calls):
    model = nn.Transformer(EMBED, HEADS, 2, 2, 32, 0.0, batch_first=batch_first).double()
    src, tgt = torch.randn(BATCH, NK, EMBED).double(), torch.randn(BATCH, NQ, EMBED).double()
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    lengths = torch.tensor([[NQ], [5], [1]])
    masks = {
        "src_mask": torch.rand(NK, NK) < 0.3,
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(NQ).double(),
        "memory_mask": torch.rand(NQ, NK) < 0.3,
        "src_key_padding_mask": torch.arange(NK) >= lengths,
        "tgt_key_padding_mask": torch.arange(NQ) >= lengths,
        "memory_key_padding_mask": torch.arange(NK) >= lengths,
    }
    for name in ("src_mask", "memory_mask"):
        masks[name][:, 0] = False
    results = []
    for m in (model, adapted(model)):
        leaves = [src.detach().requires_grad_(), tgt.detach().requires_grad_()]
        o = m(*leaves, **masks)
        grads = torch.autograd.grad(o.pow(2).sum(), [*leaves, *m.parameters()])
        results.append([o, *grads])
    assert len(calls) == 2 + 2 * 2
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_layer_of_another_kind_still_gets_floating_masks():
    class Additive(nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            assert src_key_padding_mask.is_floating_point()
            return src + src_key_padding_mask[..., None].exp()

    model = nn.TransformerEncoder(Additive(EMBED, HEADS, 32, batch_first=True), 2)
    outcome = adapt(model)
    assert not outcome.replaced and "layers.0: Additive has a forward of its own" in outcome.detail
    x, hidden = torch.randn(BATCH, NQ, EMBED), PADDING["right"]
    torch.testing.assert_close(model(x, src_key_padding_mask=hidden), x + 2.0 * ~hidden[..., None])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=["strided", "jagged"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nested_tensors(layout, training):
    model = adapted(encoder()).train(training)
    parts = [torch.randn(n, EMBED) for n in (NQ, 1, 5)]
    expected = [model(x[None])[0] for x in parts]
    nested = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    actual = model(nested)
    assert actual.is_nested and actual.layout == layout
    for x, y in zip(actual.unbind(), expected, strict=True):
        torch.testing.assert_close(x, y)
    sum(x.sum() for x in actual.unbind()).backward()
    assert nested.grad.is_nested


def test_state_dicts_go_both_ways():
    theirs = nn.Transformer(EMBED, HEADS, 1, 1, 32)
    ours = copy.deepcopy(theirs)
    before = list(ours.named_parameters())
    assert adapt(ours).replaced
    assert all(a is b for (_, a), (_, b) in zip(before, ours.named_parameters(), strict=True))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for a, b in ((theirs, ours), (ours, theirs)):
        for x in a.parameters():
            nn.init.normal_(x)
        b.load_state_dict(a.state_dict())
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved, copy.copy],
    ids=["deepcopy", "pickle", "torch.save", "copy"],
)  # fmt: skip
def test_copies_use_clinattn_too(copied, calls):
    model = adapted(encoder())
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    x = torch.randn(BATCH, NQ, EMBED)
    assert torch.equal(other(x), model(x))
    assert len(calls) == 4


def test_hooks_run_once_and_do_not_turn_clinattn_off(calls):
    model = encoder().eval()
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
            module.register_forward_hook(lambda *_, name=name: seen.append(f"after {name}"))
            module.register_full_backward_hook(lambda *_, name=name: seen.append(f"grad {name}"))
    adapt(model)
    x = torch.randn(BATCH, NQ, EMBED, requires_grad=True)
    with torch.no_grad():
        model(x)
    layer = ("before {}", "before {}.self_attn", "after {}.self_attn", "after {}")
    forward = [word.format(f"layers.{i}") for i in (0, 1) for word in layer]
    assert seen == forward and len(calls) == 2
    model(x).sum().backward()
    layers = ("layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn")
    assert sorted(seen[8:]) == sorted([*forward, *(f"grad {name}" for name in layers)])


def test_restore_gives_the_old_classes_back(calls):
    model = nn.Transformer(EMBED, HEADS, 1, 1, 32, batch_first=True)
    before = [type(m) for m in model.modules()]
    assert adapt(model) == adapt(model)
    assert [type(m) for m in model.modules()] != before
    restore(model)
    assert [type(m) for m in model.modules()] == before
    model(torch.randn(BATCH, NK, EMBED), torch.randn(BATCH, NQ, EMBED))
    assert not calls


@pytest.mark.unpoisoned
@pytest.mark.parametrize("mode", ["train", "eval without gradients"])
def test_compiles_into_one_graph(mode):
    model = adapted(encoder()).train(mode == "train")
    x, hidden = torch.randn(BATCH, NQ, EMBED), PADDING["left"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(mode == "train"):
        for masks in ({}, {"src_key_padding_mask": hidden}):
            torch.testing.assert_close(compiled(x, **masks), model(x, **masks))


class Renamed(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(EMBED, HEADS)


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnBlock(nn.TransformerEncoderLayer):
    def _sa_block(self, x, *args, **kwargs):
        return x


def replaced_on_the_instance():
    module = nn.MultiheadAttention(EMBED, HEADS)
    module.forward = lambda *args, **kwargs: None
    return module


def test_subclass_that_keeps_forward_is_adapted(calls):
    module = Renamed()
    assert adapt(module).replaced and isinstance(module, Renamed)
    other = copy.deepcopy(module)
    assert type(other) is type(module)
    other(*[torch.randn(NQ, EMBED)] * 3, need_weights=False)
    assert len(calls) == 1
    restore(module)
    assert type(module) is Renamed


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: OwnForward(EMBED, HEADS), "OwnForward has a forward of its own"),
        (lambda: OwnBlock(EMBED, HEADS), "OwnBlock has a _sa_block of its own"),
        (replaced_on_the_instance, "forward was replaced on this MultiheadAttention"),
        (lambda: nn.MultiheadAttention(600, 2), "head_dim is 300, at most 256"),
        (lambda: parametrizations.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
         "ParametrizedMultiheadAttention is parametrized"),
        (lambda: torch.jit.script(nn.MultiheadAttention(8, 2)), "compiled by torch.jit"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(8, 2), "has a forward of its own"),
    ],
    ids=["forward", "_sa_block", "instance", "head_dim", "parametrized", "scripted", "quantizable"],
)  # fmt: skip
def test_what_cannot_be_replaced_is_said_and_left(make, why):
    module = make()
    before = type(module)
    outcome = adapt(module)
    assert not outcome.replaced and why in outcome.detail
    assert type(module) is before


def test_parametrized_afterwards_cannot_be_restored_before_that_is_undone():
    module = adapted(nn.MultiheadAttention(8, 2))
    parametrizations.weight_norm(module, "in_proj_weight")
    with pytest.raises(ValueError, match="expected that to be undone first"):
        restore(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "in_proj_weight")
    restore(module)
    assert type(module) is nn.MultiheadAttention


@pytest.mark.parametrize("module", [nn.Linear(2, 2), nn.Sequential(nn.MultiheadAttention(8, 2))])
def test_others_are_none_of_its_business(module):
    assert adapt(module) is None
    assert not any(isinstance(m, torch_nn.FusedMultiheadAttention) for m in module.modules())
