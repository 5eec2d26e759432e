"""Masks of clinattn in the hands of others: a copy of one hides what the original hides."""

import copy
import io
import pickle

import pytest
import torch
from transformers import BertConfig, BertModel
from transformers_inputs import MASKS, PADDING, config

from clinattn import replace_attention
from clinattn.integrations.transformers.masks import attention_mask, parts_of
from clinattn.integrations.transformers.pattern_mask import PatternMask
from clinattn.integrations.transformers.registry import attention

KINDS = [kind for kind, (_, _, linear) in MASKS.items() if linear]


def made(kind):
    function, words, _ = MASKS[kind]
    return attention_mask(
        2, 13, 13, mask_function=function, attention_mask=PADDING, config=config(), **words
    )


def saved(mask):
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.inference_mode()
def in_inference_mode(mask):
    return mask.detach().clone()


COPIES = {
    "detach": lambda mask: mask.detach(),
    "clone": lambda mask: mask.clone(),
    "data": lambda mask: mask.data,
    "contiguous": lambda mask: mask.contiguous(memory_format=torch.contiguous_format),
    "to": lambda mask: mask.to("cpu", torch.bool, copy=True),
    "pickle": lambda mask: pickle.loads(pickle.dumps(mask)),
    "save": saved,
    "deepcopy": copy.deepcopy,
    "inference": in_inference_mode,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_the_pattern(kind, copied):
    mask = made(kind)
    again = copied(mask)
    ours, theirs = parts_of(again)[1], parts_of(mask)[1]
    assert ours[:3] == theirs[:3] and ours.padded and torch.equal(again, mask)
    assert torch.equal(ours.prepared.kv_end, theirs.prepared.kv_end)


def test_another_device_keeps_the_pattern():
    mask = made("packed").to("meta")
    assert mask.is_meta and mask.keys.is_meta and mask.segment_ids.is_meta


READERS = {
    "slice": lambda mask: mask[:1, :, 2:, :5],
    "expand": lambda mask: mask.expand(2, 4, 13, 13),
    "float": lambda mask: mask.float(),
    "not": lambda mask: ~mask,
    "and": lambda mask: PADDING[:, None, None] & mask,
    "where": lambda mask: torch.where(mask, 0.0, -torch.inf),
    "cat": lambda mask: torch.cat([mask, mask]),
    "split": lambda mask: mask.chunk(2)[1],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_others_read_the_complete_mask(kind, read):
    mask = made(kind)
    plain = read(mask)
    assert type(plain) is torch.Tensor and torch.equal(plain, read(mask.dense()))


def fill(mask):
    mask.masked_fill_(PADDING[:, None, None], False)
    return mask


def write_to_a_row(mask):
    mask[:, :, 3] = True
    return mask


def write_over(mask):
    mask.copy_(PADDING[:, None, None])
    return mask


@pytest.mark.parametrize("write", [fill, write_to_a_row, write_over])
@pytest.mark.parametrize("kind", ["causal", "packed"])
def test_what_is_written_counts(kind, write):
    q, k, v = torch.randn(3, 2, 2, 13, 16).unbind()
    mask = made(kind)
    expected = write(mask.dense().clone())
    written = write(mask.clone())
    assert torch.equal(written, expected) and not torch.equal(written, mask)
    for x in (written, written.clone(), copy.deepcopy(written), saved(written)):
        o, o_expected = (attention(torch.nn.Identity(), q, k, v, m)[0] for m in (x, expected))
        assert torch.equal(o, o_expected)


def bert(checkpointing):
    torch.manual_seed(1)
    settings = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    model = BertModel(settings, add_pooling_layer=False).train()
    replace_attention(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    return model


def packed_gradients(model, **words):
    torch.manual_seed(2)
    ids = torch.randint(1, 99, (1, 24))
    positions = torch.cat((torch.arange(9), torch.arange(15)))[None]
    o = model(input_ids=ids, position_ids=positions, **words).last_hidden_state
    o.backward(torch.randn(o.shape))
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_recomputes_the_same_attention(reentrant):
    model = bert(reentrant)
    model.enable_input_require_grads()
    ours = packed_gradients(model)
    assert all(map(torch.equal, ours, packed_gradients(bert(None))))


def test_masks_on_the_way_between_devices():
    """As hooks of accelerate move the arguments of a layer."""
    model, moved = bert(None), []

    def move(module, args, kwargs):
        again = [x.to("cpu", copy=True) if isinstance(x, PatternMask) else x for x in args]
        moved.extend(x for x in again if isinstance(x, PatternMask))
        return tuple(again), kwargs

    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(move, with_kwargs=True)
    assert all(map(torch.equal, packed_gradients(model), packed_gradients(bert(None))))
    assert len(moved) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.unpoisoned
def test_compiled_layers_take_masks_made_outside(kind):
    torch._dynamo.reset()

    class Layer(torch.nn.Module):
        is_causal = False

        def forward(self, x, mask):
            return attention(self, x, x, x, mask)[0]

    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x, mask = torch.randn(2, 2, 13, 16), made(kind)
        torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-6, atol=1e-6)
