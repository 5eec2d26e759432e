"""Sizes of torch.nn's modules, such a module on clinattn, and what its attention is called with."""

import copy

from clinattn import fused_attention
from clinattn.integrations.torch import multihead
from clinattn.integrations.torch.modules import adapt

BATCH, NQ, NK, EMBED, HEADS = 3, 13, 17, 24, 2


def adapted(module):
    other = copy.deepcopy(module)
    assert adapt(other).replaced
    return other


def spied(monkeypatch):
    """The keywords of every call of fused_attention from here on."""
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return fused_attention(*args, **kwargs)

    monkeypatch.setattr(multihead, "fused_attention", spy)
    return seen
