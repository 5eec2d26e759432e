"""The counts of `clinattn doctor --kernels` in compiled kernels, and their table."""

import dataclasses

import pytest

pytest.importorskip("triton")
pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from clinattn.tools.cli import app  # noqa: E402
from clinattn.tools.compiled import kernel_table  # noqa: E402
from clinattn.tools.compiled.kernel_report import CARDS, KernelReport  # noqa: E402
from clinattn.tools.compiled.sass import Loop, loops  # noqa: E402

SASS = """
        /*0000*/                   MUFU.EX2 R1, R1 ;
.L_x_1:
        /*0010*/                   LDG.E R4, [R2.64] ;
.L_x_0:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/              @!P0 FFMA R4, R4, R5, R6 ;
        /*0060*/                   MUFU.EX2 R7, R4 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""


def test_innermost_loops_are_counted():
    hopper = frozenset({"HGMMA"})
    loop = Loop(tensor=2, exp=1, fma=1, other=2, waits=1, barriers=0, families=hopper)
    assert loops(SASS) == [loop]
    assert loop.instructions == 6
    assert not loop.serialized
    barrier = SASS.replace("FFMA R4, R4, R5, R6", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert loops(barrier)[0].barriers == 1
    spilled = SASS.replace("FFMA R4, R4, R5, R6", "STL [R1], R4")
    assert loops(spilled)[0].local == 1
    wait = """
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R1] ;
        /*00b0*/              @!P2 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_4) ;
"""
    after_product = "        /*0060*/                   MUFU.EX2"
    assert loops(SASS.replace(after_product, f".L_x_4:\n{after_product}") + wait) == [loop]
    waiting = SASS.replace("FFMA R4, R4, R5, R6", "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert loops(waiting)[0].serialized


def report(**changes):
    """A forward kernel of sm_90, 128 x 64, D 64, with round numbers."""
    hopper = frozenset({"HGMMA"})
    loop = Loop(tensor=8, exp=32, fma=32, other=168, waits=1, barriers=0, families=hopper)
    fields = dict(
        name="forward", capability=90, block_m=128, block_n=64, block_d=64, itemsize=2, num_warps=8,
        num_stages=2, registers=128, local=0, shared=65_536, loops=[loop], ttgir="",
    )  # fmt: skip
    return KernelReport(**(fields | changes))


def test_cycles_of_a_tile():
    kernel = report()
    assert kernel.matrix_cycles == 4 * 128 * 64 * 64 / 4096
    assert kernel.exp_cycles == 128 * 64 / 16
    assert kernel.issue_cycles == 8 * 240 / 4
    assert kernel.ceiling == 1.0
    assert kernel.blocks == 2


@pytest.mark.parametrize(
    "changes, warps, ceiling",
    [
        ({}, 8, 1.0),  # two blocks of two groups each
        ({"barriers": 1}, 8, 512 / ((512 + 512) / 2)),  # their blocks alone overlap
        ({"barriers": 1}, 4, 512 / ((512 + 256) / 4)),
        ({"barriers": 1, "waits": 0}, 8, 1.0),
    ],
)
def test_softmax_overlaps_with_products_of_other_groups(changes, warps, ceiling):
    kernel = report(num_warps=warps)
    loop = dataclasses.replace(kernel.loops[0], **changes)
    kernel = dataclasses.replace(kernel, loops=[loop])
    assert kernel.ceiling == pytest.approx(min(1.0, ceiling))


def test_a_block_in_step_reaches_no_peak():
    loop = dataclasses.replace(report().loops[0], barriers=2)
    kernel = report(loops=[loop], registers=255)
    assert kernel.blocks == 1
    assert kernel.ceiling == pytest.approx(512 / (512 + 512))


@pytest.mark.parametrize(
    "changes, blocks",
    [
        ({"registers": 129}, 1),  # 136 registers are taken for each of 256 threads
        ({"registers": 64, "shared": 100_000}, 2),
        ({"num_warps": 4, "registers": 32, "shared": 0}, 16),
    ],
)
def test_resident_blocks(changes, blocks):
    assert report(**changes).blocks == blocks


def test_both_loops_of_wide_heads_count():
    """dV and dK one after the other: five products, in two loops over full tiles."""
    kernel = report(name="dkdv", block_d=256, loops=report().loops * 4)
    assert kernel.full_loop.instructions == 2 * 240
    assert kernel.matrix_cycles == 10 * 128 * 64 * 256 / 4096


def test_doctor_shows_the_kernels(monkeypatch):
    monkeypatch.setattr(kernel_table, "shipped_reports", lambda card: [("plain", [report()])])
    done = CliRunner().invoke(app, ["doctor", "--kernels", "--card", "90", "--json"])
    assert done.exit_code == 0, done.output
    assert '"ceiling": 1.0' in done.stdout
    done = CliRunner().invoke(app, ["doctor", "--kernels"])
    assert done.stdout.count("128x64") == len(CARDS)
    assert "HGMMA" in done.stdout


@pytest.mark.parametrize("options", [["--kernels", "--card", "75"], ["--card", "90"]])
def test_a_wrong_card_is_named(options):
    done = CliRunner().invoke(app, ["doctor", *options])
    assert done.exit_code == 2
    assert "card" in done.output
