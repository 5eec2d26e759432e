"""Compiled linear layers against torch's, by product: y, gelu(y), dx and dweight.

    pytest bench/suites/bench_linear.py --benchmark-only
    pytest bench/suites/bench_linear.py --benchmark-only --sizes large   the products of BERT base
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clinattn.backends.cpu import instruction_set
from clinattn.encoder.linear import WITHOUT_LAYERS
from clinattn.encoder.linear_op import Form, run

# tokens, features in, features out
SIZES = {
    "small": [(512, 256, 256)],
    "large": [(2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768), (8192, 768, 2304)],
}
PRODUCTS = {
    "y": lambda x, weight, dy: (x, weight),
    "gelu": lambda x, weight, dy: (x, weight),
    "dx": lambda x, weight, dy: (dy, weight.t()),
    "dweight": lambda x, weight, dy: (dy.t(), x.t()),
}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("size", SIZES[metafunc.config.getoption("--sizes")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_linear(race, size, product, dtype):
    if instruction_set() in WITHOUT_LAYERS:
        pytest.skip("linear layers are torch's without the compiled module and AVX2")
    tokens, depth, features = size
    torch.manual_seed(0)
    numbers = getattr(torch, dtype)
    x, weight = torch.randn(tokens, depth), torch.randn(features, depth) / depth**0.5
    operands = PRODUCTS[product](x, weight, torch.randn(tokens, features))
    a, b = (operand.to(numbers) for operand in operands)
    activation = "gelu" if product == "gelu" else None
    form = Form(activation, False, numbers == torch.bfloat16, numbers)
    follow = F.gelu if activation else lambda y: y
    wanted = follow(a.double() @ b.double().t())
    units = (64 if dtype == "float32" else 2) * torch.finfo(numbers).eps
    assert (run(form, a, b, None)[0] - wanted).abs().max() <= units * wanted.abs().max()
    race(
        lambda: run(form, a, b, None),
        lambda: follow(a @ b.t()),
        group=f"linear {dtype} {tokens}x{depth}x{features} {product}",
        tokens=tokens,
        dtype=numbers,
        flops=2 * tokens * depth * features,
        rounds=21,
        kind="linear",
        way="clinattn",
        case=f"{dtype} {tokens}x{depth}x{features}",
        passes=product,
    )
