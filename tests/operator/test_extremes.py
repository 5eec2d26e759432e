"""Scores, masks, biases and softcaps as large as their type holds; see extremes.py."""


import pytest
import torch
from extremes import EXTREMES, ExtremeProblem
from instruction_sets import BUILT, SETS, forced
from support import dtype_id

SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_reference(case, dtype):
    ExtremeProblem(case, dtype).check("reference")


@BUILT
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", EXTREMES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_instruction_sets(case, dtype, instruction_set):
    with forced(instruction_set):
        ExtremeProblem(case, dtype).check("cpu")


@BUILT
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_fp64(case):
    ExtremeProblem(case, torch.float64).check("cpu")
