import fresh_memory
import pytest
import torch


@pytest.mark.skipif(not fresh_memory.fill_with_nan(), reason="libc has no mallopt with M_PERTURB")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_unwritten_element_is_nan(dtype):
    """Results of the kernels are allocated as these are."""
    for count in (1, 5, 100, 10_000, 10_000_000):
        assert torch.empty(count, dtype=dtype).isnan().all()
