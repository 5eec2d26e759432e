"""Models as ETHOS-ARES, CEHR-GPT and MEDS-EIC-AR build them compute the same with clinattn."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from clinical_code import CEHR_GPT, CODES, ETHOS, block_causal  # noqa: E402

from clinattn.tools.model_report.example_inputs import ExampleInputs  # noqa: E402
from clinattn.tools.model_report.parity import (  # noqa: E402
    CountedAttention,
    InDouble,
    judge,
    quantities,
)

LAYERS, HEADS, WIDTH = 2, 4, 48
LENGTHS = {"ETHOS-ARES": (2048,), "CEHR-GPT": (131, 1, 64, 300), "MEDS-EIC-AR": (200, 90, 31)}
by_name = pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)


def built(code, replaced):
    torch.manual_seed(0)
    model = code.build(replaced, LAYERS, HEADS, WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.train()


def batch_of(code):
    torch.manual_seed(1)
    batch = code.batch(LENGTHS[code.name], WIDTH)
    return ExampleInputs(batch, {code.output: code.real(batch)})


def three(code, run):
    """run(model, batch) in fp64 and fp32 without clinattn, and in fp32 with it; the calls."""
    batch = batch_of(code)
    with InDouble(), code.before():
        truth = run(nn.Module.double(built(code, False)), batch.to(torch.float64, "cpu"))
    with code.before():
        naive = run(built(code, False), batch)
    with CountedAttention() as counted, code.after():
        actual = run(built(code, True), batch)
    return actual, truth, naive, counted.calls


@by_name
def test_outputs_and_gradients_are_those_without_clinattn(code):
    # CEHR-GPT attends in bf16 whatever its weights are
    dtype = torch.bfloat16 if code.name == "CEHR-GPT" else torch.float32
    run = lambda model, batch: quantities(model, batch, dtype, True)
    actual, truth, naive, calls = three(code, run)
    parity = judge(actual, truth, [naive], dtype, calls)
    assert calls == LAYERS
    assert parity.passed, parity


def test_a_patient_of_a_packed_row_is_alone():
    torch.manual_seed(0)
    layer = CEHR_GPT.PackedAttention(WIDTH, HEADS)
    mask = torch.cat([torch.tensor([1.0] * n + [0.0]) for n in (9, 14)])[None]
    x, times = torch.randn(1, 25, WIDTH), torch.rand(1, 25).cumsum(1)
    both = layer(x, mask, times)
    alone = layer(x[:, 10:], mask[:, 10:], times[:, 10:])
    assert torch.equal(both[:, 10:], alone)


def test_rotation_is_that_of_pairs_by_time():
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    times = torch.tensor([[0.0, 1.0, 40.5]], dtype=torch.float64)
    turned = CEHR_GPT.turned(x, times)
    for i in range(4):
        angle = times[0] / 10_000 ** (2 * i / 3)
        pair = torch.view_as_complex(x[0].view(3, 4, 2))[:, i]
        expected = torch.view_as_real(pair * torch.polar(torch.ones(3).double(), angle))
        torch.testing.assert_close(turned[0, :, 2 * i : 2 * i + 2], expected, rtol=1e-6, atol=1e-6)


def test_the_yardstick_of_packed_rows_hides_what_it_should():
    q, k, v = torch.randn(3, 7, 2, 4).unbind(0)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    whole = block_causal(q, k, v, ends, ends, 4, 4, causal=True)
    for start, end in ((0, 3), (3, 7)):
        parts = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        torch.testing.assert_close(whole[start:end], o[0].transpose(0, 1))


def test_ethos_outside_of_the_block_is_torchs():
    with CountedAttention() as counted:
        ETHOS.Block(16, 2)(torch.randn(1, 9, 16))
    assert counted.calls == 0
