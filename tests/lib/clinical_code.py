"""Models as public clinical code builds them, from examples/: before and after clinattn.

ETHOS-ARES calls torch's attention, CEHR-GPT flash-attn's packed call, MEDS-EIC-AR chooses a name in
transformers. Without clinattn each computes with what such code has on a CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from places import ROOT
from torch import Tensor, nn

from clinattn.integrations.sdpa import sdpa
from clinattn.integrations.transformers import register


def example(name: str) -> ModuleType:
    """A program of examples/ as a module; what it does when run is not done."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ETHOS, CEHR_GPT, MEDS_EIC_AR = map(example, ("ethos_ares", "cehr_gpt", "meds_eic_ar"))


class Named(nn.Module):
    """Gives the output of a stack of layers a name, as models of transformers do."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, **words: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x, **words)
        return {"last_hidden_state": x}


class Residual(nn.Module):
    """A layer of CEHR-GPT's attention alone, after a norm, beside its input."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), CEHR_GPT.PackedAttention(width, heads)

    def forward(self, x: Tensor, mask: Tensor, times: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), mask, times)


def block_causal(q, k, v, ends, _, longest, __, *, causal):
    """flash_attn_varlen_func with all scores of a row at once, (H, T, T), in the dtype of q."""
    document = torch.bucketize(torch.arange(len(q)), ends[1:], right=True)
    seen = (document[:, None] == document) & torch.ones(len(q), len(q), dtype=torch.bool).tril()
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)


@contextmanager
def plain_varlen():
    with mock.patch.object(CEHR_GPT, "flash_attn_varlen_func", block_causal):
        yield


@dataclass(frozen=True)
class Code:
    """A model of public code. build(replaced, sizes), batch(sizes) of tokens and lengths.

    before: what is entered around a pass without clinattn. after: with it.
    """

    name: str
    build: Callable[..., nn.Module]
    batch: Callable[..., dict[str, Tensor]]
    real: Callable[[dict[str, Tensor]], Tensor | None]
    output: str = "last_hidden_state"
    before: Callable[[], AbstractContextManager[Any]] = nullcontext
    after: Callable[[], AbstractContextManager[Any]] = nullcontext


def ethos(replaced: bool, layers: int, heads: int, width: int) -> nn.Module:
    return Named([ETHOS.Block(width, heads) for _ in range(layers)])


def cehr_gpt(replaced: bool, layers: int, heads: int, width: int) -> nn.Module:
    return Named([Residual(width, heads) for _ in range(layers)])


def meds_eic_ar(replaced: bool, layers: int, heads: int, width: int) -> nn.Module:
    register()
    name = "clinattn" if replaced else "sdpa"
    return MEDS_EIC_AR.llama(name, layers, heads, positions=4096, head_dim=width // heads)


def one_timeline(lengths: Sequence[int], width: int) -> dict[str, Tensor]:
    """ETHOS cuts a long record into rows of one length: there is no padding."""
    return {"x": torch.randn(len(lengths), max(lengths), width)}


def packed(lengths: Sequence[int], width: int) -> dict[str, Tensor]:
    """Returns a row of packed patients, an empty place behind each; times in days."""
    mask = torch.cat([torch.tensor([1.0] * n + [0.0]) for n in lengths])[None]
    times = (torch.rand(mask.shape) * 9).cumsum(1)
    return {"x": torch.randn(*mask.shape, width), "mask": mask, "times": times}


def padded_codes(lengths: Sequence[int], width: int) -> dict[str, Tensor]:
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    codes = torch.randint(1, 64, real.shape).masked_fill(~real, 0)
    return {"input_ids": codes, "attention_mask": real}


CODES = (
    Code("ETHOS-ARES", ethos, one_timeline, lambda batch: None, after=sdpa),
    Code(
        "CEHR-GPT", cehr_gpt, packed, lambda batch: batch["mask"].bool(), before=plain_varlen
    ),
    Code(
        "MEDS-EIC-AR", meds_eic_ar, padded_codes, lambda batch: batch["attention_mask"], "logits"
    ),
)  # fmt: skip
