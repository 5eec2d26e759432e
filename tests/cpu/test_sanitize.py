"""The random calls of `make sanitize`, a few, on the installed module; a fault is named."""

import ctypes
import faulthandler
import multiprocessing
import signal

import pytest
import torch
from guarded import PAGE, guarded, spaced
from sanitize import emulated, run_calls

import clinattn
from clinattn import _C

compiled = pytest.mark.skipif(
    not clinattn.backends()["cpu"], reason="the compiled backend is not built here"
)
FAULTY = """
import os
build_info = dict
instruction_sets = lambda: ["scalar"]
set_instruction_set = lambda name: os.abort()
"""


@compiled
def test_random_calls_between_guard_pages():
    assert run_calls(seed=3, first=0, calls=30) is None


@compiled
def test_sets_that_this_machine_lacks_are_emulated():
    here = _C.instruction_sets()
    assert "avx2" not in here or {*emulated(), *here} >= {"avx512", "avx512_bf16", "amx"}


def test_a_call_that_ends_the_process_is_named(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    named = run_calls(3, 7, 2, "--module", str(tmp_path / "faulty.py"))
    assert named is not None and named.startswith("7 scalar ")


def read(at_end, offset):
    faulthandler.disable()
    x = guarded(torch.ones(5, 3), at_end)
    ctypes.string_at(x.data_ptr() + offset, 1)


@pytest.mark.parametrize(
    ("at_end", "offset", "status"),
    [(True, 59, 0), (True, 60, -signal.SIGSEGV), (False, 0, 0), (False, -1, -signal.SIGSEGV)],
)
def test_guard_pages(at_end, offset, status):
    process = multiprocessing.get_context("fork").Process(target=read, args=(at_end, offset))
    process.start()
    process.join()
    assert process.exitcode == status


@pytest.mark.parametrize("at_end", [True, False])
def test_guarded_tensors_keep_values_and_strides(at_end):
    x = torch.randn(3, 40, 50).to(torch.bfloat16)
    for given in (x, x.mT, x[:, 3:, :7], x[:1].expand(4, 40, 50), x[:0], spaced(x, 3)):
        copy = guarded(given, at_end)
        assert torch.equal(copy, given)
        assert copy.stride() == given.stride()
        if given.numel():
            assert (copy.data_ptr() % PAGE == 0) != at_end
