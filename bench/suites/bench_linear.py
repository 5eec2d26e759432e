"""Linear layers in fp32 on AMX tiles against torch's, by product: y, dx and dweight.

    pytest bench/suites/bench_linear.py --benchmark-only
    pytest bench/suites/bench_linear.py --benchmark-only --sizes large   the products of BERT base
"""

from __future__ import annotations

import pytest
import torch

import clinattn.encoder.linear  # noqa: F401  defines the op
from clinattn.backends.cpu import instruction_set

# tokens, features in, features out
SIZES = {
    "small": [(512, 256, 256)],
    "large": [(2048, 768, 768), (2048, 768, 3072), (2048, 3072, 768), (8192, 768, 2304)],
}
PRODUCTS = {
    "y": lambda x, weight, dy: (x, weight),
    "dx": lambda x, weight, dy: (dy, weight.t()),
    "dweight": lambda x, weight, dy: (dy.t(), x.t()),
}


def pytest_generate_tests(metafunc):
    metafunc.parametrize("size", SIZES[metafunc.config.getoption("--sizes")])


@pytest.mark.parametrize("product", PRODUCTS)
def test_linear(race, size, product):
    if instruction_set() != "amx":
        pytest.skip("AMX multiplies fp32 in bf16 parts; without it linear layers are torch's")
    tokens, depth, features = size
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, depth), torch.randn(features, depth)
    a, b = PRODUCTS[product](x, weight, torch.randn(tokens, features))
    ours = torch.ops.clinattn.cpu_linear
    torch.testing.assert_close(ours(a, b, None), a @ b.t(), rtol=1e-4, atol=1e-2)
    race(
        lambda: ours(a, b, None),
        lambda: a @ b.t(),
        group=f"linear {tokens}x{depth}x{features} {product}",
        tokens=tokens,
        dtype=torch.float32,
        flops=2 * tokens * depth * features,
        rounds=21,
        kind="linear",
        way="clinattn",
        case=f"{tokens}x{depth}x{features}",
        passes=product,
    )
