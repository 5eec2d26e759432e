"""bert_padding, and flash_attn under its own name."""

import importlib.util
import sys
import textwrap

import pytest
import torch
from flash_inputs import draw

from clinattn.integrations import flash_attn as fa
from clinattn.integrations.flash_attn import bert_padding


def test_padding_round_trip():
    hidden = draw(3, 5, 2).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    tokens, indices, ends, longest, used = bert_padding.unpad_input(hidden, mask, unused)
    both = (mask + unused).bool()
    assert torch.equal(tokens, hidden[both])
    assert indices.tolist() == both.flatten().nonzero().flatten().tolist()
    assert ends.tolist() == [0, 3, 3, 7] and ends.dtype == torch.int32
    assert longest == 4 and type(longest) is int
    assert used.tolist() == [2, 0, 3] and used.dtype == torch.int32
    back = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(back, torch.where(both[..., None], hidden, 0))
    (grad,) = torch.autograd.grad(back.sum(), [hidden])
    assert torch.equal(grad, both[..., None].expand_as(grad).float())
    assert len(bert_padding.unpad_input(hidden, mask)) == 5


def test_concatenated_sequences():
    hidden = draw(3, 6, 2)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    tokens, indices, ends, longest = bert_padding.unpad_input_for_concatenated_sequences(
        hidden, lengths
    )
    assert ends.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(tokens, torch.cat([hidden[0, :5], hidden[1, :5], hidden[2]]))
    assert torch.equal(bert_padding.index_first_axis(hidden.flatten(0, 1), indices), tokens)
    rows = bert_padding.index_put_first_axis(tokens, indices, 18)
    assert torch.equal(rows.view(3, 6, 2)[:2, 5:], torch.zeros(2, 1, 2))




@pytest.fixture
def installed():
    fa.install()
    yield
    fa.uninstall()


SCRIPT = """
    from flash_attn import __version__, flash_attn_func
    from flash_attn.bert_padding import IndexFirstAxis, pad_input, unpad_input
    from flash_attn.flash_attn_interface import FlashAttnVarlenFunc, flash_attn_varlen_func
    from flash_attn.flash_attn_interface import _flash_attn_forward, _wrapped_flash_attn_forward

    def attend(x, mask):
        tokens, indices, ends, longest, _ = unpad_input(x, mask)
        tokens = flash_attn_varlen_func(tokens, tokens, tokens, ends, ends, longest, longest)
        return pad_input(tokens, indices, *mask.shape)
"""


def test_code_that_imports_flash_attn(installed, tmp_path, monkeypatch):
    (tmp_path / "model_with_flash.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        from model_with_flash import attend, flash_attn_func
    finally:
        sys.modules.pop("model_with_flash", None)
    x, mask = draw(2, 5, 2, 8), torch.ones(2, 5)
    torch.testing.assert_close(attend(x, mask), flash_attn_func(x, x, x))
    assert importlib.util.find_spec("flash_attn").name == "flash_attn"
    with pytest.raises(ModuleNotFoundError, match="flash_attn.layers"):
        importlib.import_module("flash_attn.layers")


def test_uninstall_leaves_nothing():
    undo = fa.install()
    assert fa.install() is undo and "flash_attn" in sys.modules
    undo()
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    undo()


def test_the_real_package_stays(tmp_path, monkeypatch):
    """Only force puts it aside, and it comes back."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="force=True"):
        fa.install()
    try:
        real = importlib.import_module("flash_attn")
        undo = fa.install(force=True)
        assert not hasattr(importlib.import_module("flash_attn"), "real")
        undo()
        assert importlib.import_module("flash_attn") is real
    finally:
        sys.modules.pop("flash_attn", None)
