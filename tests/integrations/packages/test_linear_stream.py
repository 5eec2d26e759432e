"""The fp32 residual stream of bf16 encoders of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted import assert_no_worse
from replaced_models import COMPILED, MODELS, SHAPES, make_inputs, make_model
from torch import nn

from clinattn.integrations.replace import replace_attention
from clinattn.integrations.transformers import stream

pytestmark = [COMPILED, pytest.mark.usefixtures("any_size")]


def test_hooks_of_children_run_in_bfloat16():
    model = make_model("bert").eval().bfloat16()
    inputs, valid = make_inputs()
    naive, truth = model(**inputs)[0], copy.deepcopy(model).double()(**inputs)[0]
    replace_attention(model, linear=True)
    seen = []
    for child in (model.encoder.layer[0].output.LayerNorm, model.encoder.layer[1].output.dropout):
        child.register_forward_hook(lambda *_: seen.append(1))
    actual = model(**inputs)[0]
    assert len(seen) == 2
    found = [{"o": x.detach()[valid]} for x in (actual, truth, naive)]
    assert_no_worse(found[0], found[1], found[2:], torch.bfloat16)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_leave_a_stream_in_the_dtype_of_the_model(name):
    model = make_model(name).eval().bfloat16()
    inputs, valid = make_inputs()
    asked = {"output_hidden_states": True}
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(**inputs, **asked).hidden_states
        naive = model(**inputs, **asked).hidden_states
        replace_attention(model, linear=True)
        output = model(**inputs, **asked)
        as_tuple = model(**inputs, return_dict=False)
        plain = model(**inputs).last_hidden_state
    assert plain.dtype == as_tuple[0].dtype == torch.bfloat16
    assert torch.equal(plain, output.last_hidden_state) and torch.equal(plain, as_tuple[0])
    assert len(output.hidden_states) == len(truth) == 3
    errors = []
    for states in (output.hidden_states, naive):
        assert all(x.dtype == torch.bfloat16 for x in states)
        errors.append((states[-1][valid] - truth[-1][valid]).norm())
    assert errors[0] < 0.9 * errors[1]


def test_layers_added_later_end_the_stream():
    """A layer that does not take fp32 beside its weights of bf16 gets bf16."""
    model = make_model("bert").eval().bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    expected = model(**inputs)[0]
    attention = model.encoder.layer[1].attention.self
    plain = nn.Linear(24, 24).bfloat16()
    plain.load_state_dict(attention.query.state_dict())
    attention.query = plain
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=0.05, atol=0.05)


def test_what_is_written_into_is_not_what_it_was_rounded_from():
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x = torch.randn(5, 6)
            y = stream.rounded(x, torch.bfloat16)
            assert stream.unrounded(y) is x
            assert stream.unrounded(y.clone()) is None
            y[0, 0] += 1
            assert stream.unrounded(y) is None


def test_what_was_rounded_is_kept_no_longer_than_the_result():
    model = make_model("bert").bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    before = len(stream._unrounded)
    for _ in range(2):
        hidden = model(**inputs)[0]
        hidden.sum().backward()
    assert len(stream._unrounded) == before + 1
    del hidden
    assert len(stream._unrounded) == before


@pytest.mark.parametrize("name", SHAPES)
def test_a_hook_of_a_layer_changes_what_the_next_one_gets(name):
    model = make_model(name).eval().bfloat16()
    inputs, _ = make_inputs()
    replace_attention(model, linear=True)
    layers = [m for m in model.modules() if isinstance(m, stream.Layer)]
    seen = []

    def emptied(module, args, y):
        seen.append((y[0] if isinstance(y, tuple) else y).dtype)
        return (y[0] * 0, *y[1:]) if isinstance(y, tuple) else y * 0

    layers[0].register_forward_hook(emptied)
    layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    model(**inputs)
    assert seen == [torch.bfloat16, 0]
