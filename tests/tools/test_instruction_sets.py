"""The one table of instruction sets, on stand-ins for the processor, the build and the kernel."""

import errno
import os
from types import SimpleNamespace

import pytest
from building import flags

from clinattn.backends.compiled import compiled_module
from clinattn.tools import instruction_sets as table
from clinattn.tools.instruction_sets import FLAGS, NAMES, instruction_sets
from clinattn.tools.peaks import Measured

BUILT = pytest.mark.skipif(compiled_module() is None, reason="the compiled backend is not built")


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Gives the processor the features of these sets, and others."""

    def has(*names, others=""):
        words = " ".join(" ".join(FLAGS[name]) for name in names)
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nflags\t\t: fpu {words} {others}\nbugs\t\t: none\n")
        monkeypatch.setattr(table, "CPUINFO", path)

    return has


def module(built, usable):
    """A compiled module of these sets."""
    return SimpleNamespace(
        build_info=lambda: {"instruction_sets": " ".join(built), "compiler": "9.4.0"},
        instruction_sets=lambda: list(usable),
    )


def rows(built, usable, in_force=None, measured=None):
    return {x.name: x for x in instruction_sets(module(built, usable), in_force, measured)}


def test_a_processor_that_lacks_a_set(processor):
    processor("avx2")
    found = rows(NAMES, NAMES[:2], "avx2")
    assert list(found) == list(NAMES)
    assert found["avx2"] == table.InstructionSet("avx2", True, True, True)
    assert found["scalar"].usable and not found["scalar"].in_force
    assert found["avx512"].reason == (
        "the processor lacks avx512f, avx512bw, avx512vl, avx512dq"
    )
    assert found["amx"].lacking == FLAGS["amx"] and not found["amx"].usable


def test_a_hypervisor_is_named(processor):
    processor("avx2", others="hypervisor")
    reason = rows(NAMES, NAMES[:2])["avx512_bf16"].reason
    assert reason == "the processor, as its hypervisor shows it, lacks avx512_bf16"


def test_a_set_whose_ground_is_missing(processor):
    processor("avx2", "amx")
    found = rows(NAMES, NAMES[:2])["amx"]
    assert found.lacking == ("avx512f", "avx512bw", "avx512vl", "avx512dq")


def test_a_compiler_that_is_too_old(processor):
    processor(*NAMES)
    found = rows(NAMES[:3], NAMES[:3])["amx"]
    assert not found.built and found.lacking == ()
    assert found.reason == "the compiler of this build (9.4.0) does not know it"


def test_a_kernel_that_refuses_amx(processor, monkeypatch):
    processor(*NAMES)
    monkeypatch.setattr(table, "tile_refusal", lambda: "Invalid argument")
    found = rows(NAMES, NAMES[:-1])["amx"]
    assert found.built and not found.usable and found.lacking == ()
    assert found.reason == (
        "the kernel refuses its registers to this process (Invalid argument)"
    )
    monkeypatch.setattr(table, "tile_refusal", lambda: None)
    assert rows(NAMES, NAMES[:-1])["amx"].reason == "the system does not offer it"
    assert rows(NAMES, NAMES)["amx"].reason is None


class Libc:
    """A C library whose calls of the system end with an error, or 0 for none."""

    def __init__(self, error):
        self.error, self.calls = error, []

    def syscall(self, *numbers):
        self.calls.append([x.value for x in numbers])
        return -1 if self.error else 0


@pytest.mark.parametrize("error", [0, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM])
def test_the_question_that_linux_is_asked(monkeypatch, error):
    libc = Libc(error)
    monkeypatch.setattr(table.sys, "platform", "linux")
    monkeypatch.setattr(table.ctypes, "CDLL", lambda name, use_errno: libc)
    monkeypatch.setattr(table.ctypes, "get_errno", lambda: error)
    assert table.tile_refusal() == (os.strerror(error) if error else None)
    assert libc.calls == [[158, 0x1023, 18]]  # as csrc/cpu/dispatch.cpp asks
    monkeypatch.setattr(table.sys, "platform", "darwin")
    assert table.tile_refusal() is None and len(libc.calls) == 1


def test_measured_rates_are_beside_their_set(processor):
    processor(*NAMES[:3])
    peak, attention = {"fp32": 2e11, "bf16": 2e11}, {"fp32": 1e11, "bf16": 1e11}
    found = rows(NAMES, NAMES[:3], "avx512", Measured({"avx512": peak}, {"avx512": attention}))
    assert (found["avx512"].peak, found["avx512"].attention) == (peak, attention)
    assert found["scalar"].peak is None and found["amx"].attention is None


def test_no_module_has_no_sets_and_another_processor_its_own(monkeypatch, tmp_path):
    assert instruction_sets(None, None, None) == []
    monkeypatch.setattr(table, "CPUINFO", tmp_path / "absent")
    assert list(rows(["scalar"], ["scalar"])) == ["scalar"]  # no x86
    assert rows(NAMES, NAMES[:2])["avx512"].reason == "the system does not offer it"


def test_the_names_are_those_of_the_build():
    assert tuple(flags.ISA_FLAGS) == NAMES


@BUILT
def test_this_machine_agrees_with_itself():
    found = instruction_sets(compiled_module(), compiled_module().instruction_set(), None)
    assert [x.name for x in found if x.usable] == compiled_module().instruction_sets()
    assert [x.name for x in found if x.in_force] == [compiled_module().instruction_set()]
    for one in found:
        assert one.usable == (one.reason is None) and (one.built or not one.usable)
        if one.usable:  # what the library asks the processor for is what Linux lists
            assert not table._lacking(one.name, table.processor_flags())


def test_a_set_that_is_refused_gives_way_to_the_best():
    chosen = []

    def instruction_set():
        raise ValueError("instruction set 'amx' is not usable here; usable: scalar")

    refusing = SimpleNamespace(
        instruction_set=instruction_set, set_instruction_set=chosen.append
    )
    assert table.refusal(refusing).startswith("instruction set 'amx' is not usable")
    assert chosen == [""]
    assert table.refusal(None) is None
    assert table.refusal(SimpleNamespace(instruction_set=lambda: "avx2")) is None
