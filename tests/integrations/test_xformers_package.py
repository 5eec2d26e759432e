"""xformers.ops under its own name."""

import importlib
import importlib.util
import sys
import textwrap

import pytest
import torch
from xformers_calls import draw

from clinattn.integrations import xformers as xf

SCRIPT = """
    import xformers.ops
    import xformers.ops as xops
    import xformers.ops.fmha.attn_bias
    from xformers import __version__
    from xformers.ops import LowerTriangularMask, fmha, memory_efficient_attention_backward
    from xformers.ops.fmha import merge_attentions
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, _SeqLenInfo

    def attend(x, lengths):
        bias = xformers.ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths).make_causal()
        assert isinstance(bias, xformers.ops.AttentionBias)
        assert type(bias) is BlockDiagonalCausalMask
        op = xops.MemoryEfficientAttentionFlashAttentionOp
        return xops.memory_efficient_attention(x, x, x, attn_bias=bias, op=op)
"""


@pytest.fixture
def installed():
    xf.install(force=True)
    yield
    xf.uninstall()


def test_code_that_imports_xformers(installed, tmp_path, monkeypatch):
    (tmp_path / "model_with_xformers.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import model_with_xformers as model
    finally:
        sys.modules.pop("model_with_xformers", None)
    x = draw(1, 9, 2, 8)
    parts = [
        xf.memory_efficient_attention(y, y, y, model.LowerTriangularMask())
        for y in x.split([4, 5], 1)
    ]
    torch.testing.assert_close(model.attend(x, [4, 5]), torch.cat(parts, 1))
    assert importlib.util.find_spec("xformers").name == "xformers"
    with pytest.raises(ImportError, match="SwiGLU"):
        from xformers.ops import SwiGLU  # noqa: F401
    for name in ("xformers.components", "xformers.ops.swiglu_op"):
        with pytest.raises(ModuleNotFoundError, match=name):
            importlib.import_module(name)


def test_uninstall_leaves_nothing():
    there = lambda: {x: y for x, y in sys.modules.items() if x.split(".")[0] == "xformers"}
    before = there()
    undo = xf.install(force=True)
    assert xf.install() is undo and "xformers" in sys.modules and there() != before
    undo()
    assert there() == before
    undo()


def test_the_real_package_stays(tmp_path, monkeypatch):
    """Only force puts it aside, and it comes back."""
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("real = True")
    (tmp_path / "xformers" / "ops.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="xformers: the package is installed.*force=True"):
        xf.install()
    try:
        real = importlib.import_module("xformers.ops")
        undo = xf.install(force=True)
        assert not hasattr(importlib.import_module("xformers.ops"), "real")
        undo()
        assert importlib.import_module("xformers.ops") is real
    finally:
        for name in ("xformers", "xformers.ops"):
            sys.modules.pop(name, None)
