"""The numbers of a Case: inputs, masks, visibility and cotangents, and a call of the package."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from cases import Case
from features import SEED, Features, make_layout
from plain import gradients
from torch import Tensor

import clinattn

# Inputs with gradients besides q, k and v, and their keywords.
PARAMETERS = {
    "mask": "attn_mask",
    "decay": "time_decay",
    "slopes": "alibi_slopes",
    "relative": "relative_bias",
}


class Drawn:
    """A Case with numbers: q k v do dlse as the package gets them, and the same without NaN.

    Dense tensors are (B, H, N, D). Packed ones are seen by plain maths as one long sequence,
    (1, H, T, D), whose visibility is block diagonal.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.random = torch.Generator().manual_seed(seed)
        nq, nk = case.nq, case.nq if case.nk is None else case.nk
        self.lengths_q, self.lengths_k = nq, nk
        self.batch = 1 if case.packed else case.batch
        self.nq = sum(nq) + case.tail if isinstance(nq, tuple) else nq
        self.nk = sum(nk) + case.tail if isinstance(nk, tuple) else nk
        self.heads, self.kv_heads = case.heads, case.kv_heads or case.heads
        self.scale = case.dim**-0.5 if case.scale is None else case.scale
        self.mask = self.make_mask()
        self.bias = None
        if self.mask is not None and self.mask.dtype != torch.bool:
            self.bias = torch.where(self.mask == -float("inf"), 0, self.mask)
        layout = make_layout(case, self.first_keys())
        self.features = Features(case, layout, self.heads, dtype, self.random, device)
        self.visible = self.make_visible()  # (batch, heads or 1, nq, nk)
        leaf = None
        if case.mask_grad:
            leaf, self.bias = torch.where(self.leaf == -float("inf"), 0, self.leaf), None
        self.terms = self.features.terms(leaf).to(device)
        self.q = self.draw(self.heads, self.nq)
        self.k = self.draw(self.kv_heads, self.nk)
        self.v = self.draw(self.kv_heads, self.nk, case.width_of_v)
        if case.rising:  # five plateaus
            height = torch.linspace(0, 4.99, self.nk).floor()[:, None]
            self.q = self.q.abs()
            self.k = (self.k / 8 + height.to(self.k)).to(dtype)
        if case.logits is not None and self.nq and self.nk:
            groups = self.heads // self.kv_heads
            s = self.scale * self.q.double() @ self.k.double().repeat_interleave(groups, 1).mT
            self.q = (self.q * (case.logits / s.abs().max())).to(dtype)
        self.make_cotangents()

    def draw(self, heads: int, tokens: int, dim: int | None = None) -> Tensor:
        dim = self.case.dim if dim is None else dim
        x = torch.randn(self.batch, heads, tokens, dim, generator=self.random)
        return x.to(self.device, self.dtype)

    def make_mask(self) -> Tensor | None:
        if self.case.mask is None:
            return None
        kind, letters = self.case.mask.split(":")
        full = {"b": self.batch, "h": self.heads, "q": self.nq, "k": self.nk, "1": 1}
        shape = [full[letter] for letter in letters]
        draw = torch.rand(shape, generator=self.random)
        if kind in ("left", "right"):  # the sequences lose 0, 1/3, 2/3, ... of their keys
            lost = torch.arange(shape[0]) * self.nk // max(shape[0], 1)
            ahead = torch.arange(self.nk)
            kept = ahead >= lost[:, None] if kind == "left" else ahead < self.nk - lost[:, None]
            mask = kept[:, None, None]
        elif kind == "none":
            mask = torch.zeros(shape, dtype=torch.bool)
        elif kind == "bool":
            mask = draw < 0.7
        else:
            mask = torch.randn(shape, generator=self.random).masked_fill(draw > 0.8, -float("inf"))
            mask = mask.to(self.dtype)
        if self.case.mask_grad:
            self.leaf = mask.to(self.device)
        if self.case.expand_mask:
            mask = mask.expand(self.batch, self.heads, self.nq, self.nk)
        return mask.to(self.device)

    @property
    def allowed(self) -> Tensor:
        """The pairs that the mask allows: bool, 4-D."""
        allowed = self.mask if self.mask.dtype == torch.bool else self.mask != -float("inf")
        return allowed[(None,) * (4 - allowed.dim())].cpu()

    def first_keys(self) -> Tensor:
        """Returns the first valid key of each row (batch,), as a mask of the keys alone says."""
        none = torch.zeros(self.batch, dtype=torch.long)
        if self.mask is None or any(x in self.case.mask.split(":")[1][:-1] for x in "hq"):
            return none
        if not self.nq or not self.nk:  # an expanded mask has no rows then
            return none
        allowed = self.allowed[:, 0, 0].expand(self.batch, self.nk)
        return torch.where(allowed.any(-1), allowed.int().argmax(-1), 0)

    def make_visible(self) -> Tensor:
        case, at = self.case, self.features.layout
        ahead = (at.at_k[:, None] - at.at_q[..., None])[:, None]
        left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if case.causal:
            visible &= ahead <= 0
        if left is not None:
            visible &= ahead >= -left
        if right is not None:
            visible &= ahead <= right
        visible = self.features.visible(visible)
        if self.mask is not None:
            visible = visible & self.allowed
        return visible.to(self.device)

    def make_cotangents(self) -> None:
        shape, kind = (*self.q.shape[:-1], self.v.shape[-1]), self.case.cotangent
        self.do = torch.randn(shape, generator=self.random).to(self.device, self.dtype)
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.lse_like = torch.empty(shape[:-1], dtype=lse_dtype, device=self.device)
        self.dlse = torch.randn(shape[:-1], generator=self.random).to(self.lse_like)
        if kind == "expanded":
            self.do = torch.full((), 0.5, dtype=self.dtype, device=self.device).expand(shape)
            self.dlse = self.lse_like.new_full((), -0.5).expand(shape[:-1])
        if kind == "o":
            self.dlse = None
        if kind == "lse":
            self.do = None

    # The call of the package

    @cached_property
    def arguments(self) -> tuple[list[Tensor], dict]:
        """(query, key, value) in the strides of the case, NaN in their padding, and keywords."""
        case = self.case
        q, k, v = (self.to_strides(x) for x in (self.q, self.k, self.v))
        self.poison(q, k, v)
        keywords = {
            "is_causal": case.causal,
            "window": case.window,
            "scale": case.scale,
            "enable_gqa": self.heads != self.kv_heads,
            "return_lse": True,
        }
        if case.packed:
            cu_seqlens = [
                torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
                for lengths in (self.lengths_q, self.lengths_k)
            ]
            names = ("cu_seqlens_q", "cu_seqlens_k")
            keywords |= dict(zip(names, cu_seqlens, strict=True))
        else:
            keywords["attn_mask"] = self.mask
            for name in ("q_lengths", "kv_lengths"):
                lengths = getattr(case, name)
                if lengths is not None:
                    keywords[name] = torch.tensor(lengths, device=self.device)
        for name, x in self.features.keywords.items():
            keywords[name] = x.to(self.device) if isinstance(x, Tensor) else x
        self.leaves = {}
        for name in self.terms.parameters:
            given = self.leaf if name == "mask" else keywords[PARAMETERS[name]]
            leaf = given.detach().clone().requires_grad_()
            self.leaves[name] = keywords[PARAMETERS[name]] = leaf
        if case.mask_grad and case.expand_mask:
            keywords["attn_mask"] = self.leaves["mask"].expand(self.mask.shape)
        return [self.given(x).detach().requires_grad_() for x in (q, k, v)], keywords

    def given(self, x: Tensor) -> Tensor:
        """(1, H, T, D) -> (T, H, D) in the packed layout."""
        return x[0].transpose(0, 1) if self.case.packed else x

    def to_strides(self, x: Tensor) -> Tensor:
        """The same values in the strides of the case, always in memory of their own."""
        kind = self.case.strides
        # "transposed" is (B, N, H, D) or (H, T, D) in memory: not the layout the package is given.
        if (kind == "transposed") != self.case.packed:
            return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        if kind == "sliced":
            return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
        if kind == "reversed":
            return x.mT.clone(memory_format=torch.contiguous_format).mT
        if kind == "expanded" and x is not self.q:
            return x[:, :1].clone().expand(x.shape)
        return x.clone()

    def poison(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes NaN to queries that see nothing and keys that nothing sees, inf to values."""
        if self.case.strides == "expanded":
            return
        q[~self.alive_q] = math.nan
        k[~self.alive_k] = math.nan
        v[~self.alive_k] = math.inf

    @cached_property
    def alive_q(self) -> Tensor:
        return self.visible.any(-1).expand(self.batch, self.heads, self.nq)

    @cached_property
    def alive_k(self) -> Tensor:
        seen = self.visible.any(-2).expand(self.batch, self.heads, self.nk)
        return seen.unflatten(1, (self.kv_heads, -1)).any(2)

    def cotangents(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns (do, dlse) as the package gets them; NaN where they belong to padding."""
        do, dlse = self.do, self.dlse
        if self.case.cotangent != "expanded":
            dead = ~self.alive_q
            do = do if do is None else torch.where(dead[..., None], math.nan, do)
            dlse = dlse if dlse is None else torch.where(dead, math.inf, dlse)
        if self.case.packed:
            do = do if do is None else do[0].transpose(0, 1)
            dlse = dlse if dlse is None else dlse[0]
        return do, dlse

    def run(self, backend: str | None = None, **changed) -> dict[str, Tensor]:
        inputs, keywords = self.arguments
        call = clinattn.fused_attention_varlen if self.case.packed else clinattn.fused_attention
        torch.manual_seed(SEED)
        o, lse = call(*inputs, **{**keywords, "backend": backend, **changed})
        return gradients(o, lse, *self.cotangents(), inputs, self.leaves)
