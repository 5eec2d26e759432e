"""Layers as FEMR (CLMBR, MOTOR) builds them, with the N x N scores it has on CPUs, and without.

In FEMR itself it is one line, and one before the import of femr where xformers is not installed:
    clinattn.integrations.xformers.install()
    femr.models.xformers.memory_efficient_attention_wrapper = memory_efficient_attention
"""

import torch
import torch.nn.functional as F

from clinattn.integrations.xformers import BlockDiagonalMask, memory_efficient_attention

HEADS, HIDDEN, PATIENTS = 4, 64, [300, 20, 150]  # the events of each patient, in one row


def attention(q, k, v, attn_bias):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = attn_bias.materialize((1, HEADS, q.shape[2], k.shape[2]))
    return (torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + bias, -1) @ v).transpose(1, 2)


def transformer(x):
    for first, last in layers:
        features, qkv = first(F.rms_norm(x, [HIDDEN])).split([4 * HIDDEN, 3 * HIDDEN], -1)
        q, k, v = qkv.reshape(1, len(x), 3, HEADS, -1).unbind(2)
        pairs = (torch.view_as_complex(y.unflatten(-1, (-1, 2))) for y in (q, k))
        q, k = (torch.view_as_real(y * turns).flatten(-2) for y in pairs)
        x = x + last(torch.cat((attention(q, k, v, bias).reshape(x.shape), F.gelu(features)), -1))
    return x


days = torch.cat([9000 + 30 * torch.rand(n).cumsum(0) for n in PATIENTS])  # the age at each event
turns = torch.exp(1j * days[:, None, None] / 10000 ** torch.linspace(0, 2, HIDDEN // HEADS // 2))
bias = BlockDiagonalMask.from_seqlens(PATIENTS).make_local_attention(48)
layers = [[torch.nn.Linear(a * HIDDEN, b * HIDDEN) for a, b in ((1, 7), (5, 1))] for _ in range(2)]
before = transformer(events := torch.randn(sum(PATIENTS), HIDDEN))
attention = memory_efficient_attention  # noqa: F811  the one line
print(f"difference {(transformer(events) - before).abs().max():.1e} in {before.abs().max():.1f}")
