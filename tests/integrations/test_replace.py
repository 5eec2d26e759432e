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
        assert str(report).startswith(f"{len(names)} attention modules replaced, 0 kept")
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
