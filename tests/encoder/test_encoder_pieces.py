"""Layers on single tokens run in pieces without gradients, with the same results."""

from __future__ import annotations

import pytest
import torch
from encoders import CONFIGS, make_batch, seeded

from clinattn.encoder import Encoder, pieces
from clinattn.encoder.pieces import in_pieces


@pytest.fixture
def sizes_seen(monkeypatch):
    """Pieces of at most 7 tokens, and the tokens of each call of a feed-forward."""
    monkeypatch.setattr(pieces, "TOKENS", 7)
    seen: list[int] = []

    def watch(model: Encoder) -> list[int]:
        for layer in model.layers:
            layer.feed_forward.register_forward_pre_hook(
                lambda module, args: seen.append(args[0].shape[:-1].numel())
            )
        return seen

    return watch


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_come_to_the_same(sizes_seen, name, layout):
    model = seeded(Encoder, CONFIGS[name]).double().eval()
    ids, lengths = make_batch()
    whole = model(ids, lengths=lengths, layout=layout).detach()
    sizes = sizes_seen(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, lengths=lengths, layout=layout), whole)
    tokens = int(lengths.sum()) if layout == "packed" else ids.numel()
    assert max(sizes) == 7 and sum(sizes) == tokens * len(model.layers)


def test_gradients_take_it_whole(sizes_seen):
    model = seeded(Encoder, CONFIGS["modernbert"])
    sizes = sizes_seen(model)
    ids, lengths = make_batch()
    model(ids, lengths=lengths)
    assert sizes == [int(lengths.sum())] * len(model.layers)


@pytest.mark.parametrize("tokens", [0, 1, 6, 7, 8, 21])
def test_every_number_of_tokens(monkeypatch, tokens):
    monkeypatch.setattr(pieces, "TOKENS", 7)
    x, y = torch.randn(3, tokens, 4), torch.randn(3, tokens, 5)
    with torch.no_grad():
        found = in_pieces(lambda x, y: torch.cat((x, y), -1) * 2, x, y)
    assert torch.equal(found, torch.cat((x, y), -1) * 2)


def test_pieces_under_vmap(monkeypatch):
    monkeypatch.setattr(pieces, "TOKENS", 7)
    x = torch.randn(3, 20, 4)
    with torch.no_grad():
        found = torch.func.vmap(lambda x: in_pieces(torch.sin, x))(x)
    torch.testing.assert_close(found, x.sin())
