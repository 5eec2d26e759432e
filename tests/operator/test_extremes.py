"""Scores, masks, biases and softcaps as large as their type holds; see extremes.py."""

import importlib

import pytest
import torch
from extremes import EXTREMES, ExtremeProblem
from support import dtype_id

import clinattn

_C = importlib.import_module("clinattn._C") if clinattn.backends()["cpu"] else None
SETS = _C.instruction_sets() if _C else []
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_reference(case, dtype):
    ExtremeProblem(case, dtype).check("reference")


@pytest.mark.skipif(_C is None, reason="the compiled backend is not built here")
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=dtype_id)
@pytest.mark.parametrize("case", EXTREMES, ids=str)
@pytest.mark.parametrize("instruction_set", SETS)
def test_instruction_sets(case, dtype, instruction_set):
    _C.set_instruction_set(instruction_set)
    try:
        ExtremeProblem(case, dtype).check("cpu")
    finally:
        _C.set_instruction_set("")


@pytest.mark.skipif(_C is None, reason="the compiled backend is not built here")
@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_fp64(case):
    ExtremeProblem(case, torch.float64).check("cpu")
