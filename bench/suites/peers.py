"""The ways of bench_attention.py: ours by backend, and everybody else's that can run here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import clinattn
from clinattn.backends.triton import triton_interpreter
from suites.problem import AttentionCase, Dense, OursDense, OursPacked, Sdpa, Way

Make = Callable[[AttentionCase, list[Tensor]], Way]


# First words of torch's errors where the kernels that are left cannot serve.
NO_KERNEL = ("No available kernel", "No viable backend")


class Unavailable(Exception):
    """Raised where a way cannot run a case; the message says why."""


class Eager(Sdpa):
    """Scores, softmax and the sum of values, each a call of its own."""

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if self.mask is not None:
            if self.mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.mask, float("-inf"))
            else:
                scores = scores + self.mask
        return scores.softmax(-1) @ v


class PinnedSdpa(Sdpa):
    """torch's SDPA held to one of its kernels."""

    backend: SDPBackend

    def forward(self) -> Tensor:
        with sdpa_kernel(self.backend):
            try:
                return super().forward()
            except RuntimeError as error:
                if not str(error).startswith(NO_KERNEL):
                    raise
                raise Unavailable(f"torch has no {self.backend.name} kernel for this") from None


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


class Flex(Dense):
    """Compiled flex_attention with a block mask of lengths and window."""

    def __init__(self, case: AttentionCase, qkv: list[Tensor]):
        from torch.nn.attention.flex_attention import create_block_mask

        super().__init__(case, qkv)
        self.block_mask = None
        if not (case.ragged or case.window is not None or case.is_causal):
            return
        longest, device = max(case.lengths), qkv[0].device
        lengths = torch.tensor(case.lengths, device=device)
        window = longest if case.window is None else case.window
        ahead = 0 if case.is_causal else window

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j < lengths[b]) & (i - j <= window) & (j - i <= ahead)

        self.block_mask = create_block_mask(
            visible, len(lengths), None, longest, longest, device=device.type
        )

    def forward(self) -> Tensor:
        q, k, v = self.inputs
        if q.device.type == "cpu":
            if torch.is_grad_enabled():
                raise Unavailable("flex_attention has no gradients on the CPU")
            q, k, v = (x.detach() for x in (q, k, v))
        return compiled_flex()(q, k, v, block_mask=self.block_mask)


class TransformersSdpa(Sdpa):
    """transformers' attention function "sdpa"."""

    module = "transformers.integrations.sdpa_attention", "sdpa_attention_forward"

    def __init__(self, case: AttentionCase, qkv: list[Tensor]):
        super().__init__(case, qkv)
        file, name = self.module
        self.function = getattr(importlib.import_module(file), name)
        self.owner = nn.Module()
        self.owner.is_causal = case.is_causal

    def forward(self) -> Tensor:
        o, _ = self.function(self.owner, *self.inputs, self.mask, is_causal=self.case.is_causal)
        return o.transpose(1, 2)


class TransformersFlash(TransformersSdpa):
    """transformers' attention function "flash_attention_2", on the padded batch."""

    module = "transformers.integrations.flash_attention", "flash_attention_forward"


def of_backend(name: str) -> Make:
    """Ours, held to a backend."""

    def make(case: AttentionCase, qkv: list[Tensor]) -> Way:
        reasons = clinattn.backends()[name].reasons
        if reasons:
            raise Unavailable("; ".join(reasons))
        if name == "triton" and triton_interpreter():
            raise Unavailable("Triton's interpreter is not timed")
        return (OursPacked if case.ragged else OursDense)(case, qkv, backend=name)

    return make


def pinned(backend: SDPBackend) -> Make:
    return type(f"Sdpa{backend.name}", (PinnedSdpa,), {"backend": backend})


def with_package(package: str, make: Make) -> Make:
    def checked(case: AttentionCase, qkv: list[Tensor]) -> Way:
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"the package {package} is not installed")
        return make(case, qkv)

    return checked


WAYS: dict[str, Make] = {
    **{f"clinattn-{name}": of_backend(name) for name in clinattn.backends()},
    "sdpa": Sdpa,
    "sdpa-math": pinned(SDPBackend.MATH),
    "sdpa-flash": pinned(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": pinned(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
    "eager": Eager,
    "flex": Flex,
    "transformers-sdpa": with_package("transformers", TransformersSdpa),
    "transformers-flash": with_package(
        "flash_attn", with_package("transformers", TransformersFlash)
    ),
}
