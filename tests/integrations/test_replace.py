"""What replace_attention reports of torch.nn's modules: attention, under the names it had."""

import pytest
from torch import nn

from clinattn import replace_attention

LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 3)


class Additive(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return src


class Renamed(nn.MultiheadAttention):
    pass


class SelfAttention(nn.Module):
    """Attention of an unknown class, as it might be written by hand."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))


class AttentionBlock(nn.Module):
    """Looks like attention by its name and its projections, and holds what computes it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.first, self.second = inner, nn.Linear(8, 8), nn.Linear(8, 8)


class Caller(AttentionBlock):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, self.inner(x))


@pytest.mark.parametrize(
    "make, names",
    [
        (encoder, [f"layers.{i}.self_attn" for i in range(3)]),
        (
            lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER), 1),
            ["layers.0.self_attn", "layers.0.multihead_attn"],
        ),
        (lambda: nn.MultiheadAttention(16, 2), [""]),
    ],
    ids=["encoder", "decoder", "attention"],
)
def test_attention_is_counted_and_containers_are_not(make, names):
    model = make()
    before = [(name, type(model.get_submodule(name)).__name__) for name in names]
    printed = repr(model)
    for _ in range(2):  # of a replaced model, too
        report = replace_attention(model)
        assert [(x.name, x.type) for x in report.replaced] == before
        assert not report.kept
        counted = "1 attention module" if len(names) == 1 else f"{len(names)} attention modules"
        assert str(report).startswith(f"{counted} replaced, 0 kept")
    assert repr(model) == printed
    report.undo()
    assert type(model) is type(make())


def test_a_subclass_keeps_its_name():
    report = replace_attention(nn.Sequential(Renamed(16, 2)))
    assert [(x.name, x.type) for x in report.replaced] == [("0", "Renamed")]


def test_a_layer_with_code_of_its_own_is_named_once():
    report = replace_attention(nn.TransformerEncoder(Additive(**LAYER), 1))
    assert [(x.name, x.type) for x in report.kept] == [("layers.0", "Additive")]
    assert report.kept[0].reason == "Additive has a forward of its own"


@pytest.mark.parametrize("block", [AttentionBlock, Caller])
@pytest.mark.parametrize("inner", [SelfAttention, lambda: nn.MultiheadAttention(8, 2)])
@pytest.mark.filterwarnings("ignore:no attention was replaced")
def test_of_unknown_attention_the_innermost_is_named(block, inner):
    for model, root in ((block(inner()), ""), (nn.Sequential(block(inner())), "0")):
        report = replace_attention(model)
        named = {x.name: x.type for x in [*report.replaced, *report.kept]}
        expected = {f"{root}.inner".strip("."): type(inner()).__name__}
        if block is Caller:  # computes attention besides what it holds
            expected[root] = "Caller"
        assert named == expected
