"""A transformer encoder whose tokens stay packed from the embedding to the head.

BERT (post-norm, learned positions, GELU) and ModernBERT (pre-norm, rotary, GeGLU, local layers)
are two settings of the same few lines; see config.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from clinattn.rotary import rotary

from .config import EncoderConfig
from .layout import Batch, Layout, make_layout


class BiaslessLayerNorm(nn.LayerNorm):
    """A type of its own: Opacus takes a bias for granted in nn.LayerNorm, and vmaps what is not."""


def layer_norm(config: EncoderConfig) -> nn.LayerNorm:
    kind = nn.LayerNorm if config.norm_bias else BiaslessLayerNorm
    return kind(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.types = (
            nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        )
        self.norm = layer_norm(config)
        self.dropout = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """Every table is read by its module and for each sample: per-sample gradients need both."""
        x = self.tokens(input_ids)
        if self.positions is not None:
            x = x + self.positions(positions.expand(input_ids.shape).contiguous())
        if self.types is not None:
            if token_types is None:
                token_types = input_ids.new_zeros(*input_ids.shape[:-1], 1)
            x = x + self.types(token_types)
        return self.dropout(self.norm(x))


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig, window: int | None):
        super().__init__()
        self.heads = (3, config.num_heads, config.head_dim)
        self.window = window
        self.theta = config.rotary_base if window is None else config.rotary_base_window
        self.rotary = config.positions == "rotary"
        self.dropout_p = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, config.linear_bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, config.linear_bias)

    def forward(self, x: Tensor, layout: Layout, positions: Tensor) -> Tensor:
        q, k, v = layout.heads(self.qkv(x).unflatten(-1, self.heads))
        if self.rotary:
            q, k = rotary(q, k, positions, theta=self.theta, cu_seqlens=layout.cu_seqlens)
        o = layout.attend(q, k, v, self.window, self.dropout_p if self.training else 0.0)
        return self.out(o.flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.gated = config.activation == "geglu"
        inner = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, inner, config.linear_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.down(F.gelu(x) * gate)
        return self.down(F.gelu(x))


class Block(nn.Module):
    def __init__(self, config: EncoderConfig, index: int):
        super().__init__()
        self.pre_norm = config.norm == "pre"
        bare = self.pre_norm and index == 0 and not config.first_norm
        self.attention_norm = nn.Identity() if bare else layer_norm(config)
        self.attention = Attention(config, config.windows[index])
        self.feed_forward_norm = layer_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, layout: Layout, positions: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), layout, positions))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, layout, positions)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        blocks = [Block(config, index) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.final_norm = layer_norm(config) if config.norm == "pre" else nn.Identity()
        self.apply(init_weights)
        if config.norm == "pre":
            for block in blocks:  # a residual stream of 2L sums keeps unit scale (GPT-2)
                for linear in (block.attention.out, block.feed_forward.down):
                    nn.init.normal_(linear.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def forward(self, input_ids: Tensor, **batch: Unpack[Batch]) -> Tensor:
        """Hidden states, (T, hidden) or (B, N, hidden) as input_ids; the arguments are encode's."""
        hidden, layout = self.encode(input_ids, **batch)
        return layout.restore(hidden)

    def encode(
        self,
        input_ids: Tensor,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        layout: str | None = None,
    ) -> tuple[Tensor, Layout]:
        """Hidden states as they lie in memory, and the layout that says how: what heads work on.

        input_ids: (T,) with int32 cu_seqlens (S + 1,), or (B, N) with lengths (B,), None = all N.
        max_seqlen: bounds the lengths of packed sequences; left out, it is read from cu_seqlens,
            and under torch.compile, where lengths have no values, T or N stands in.
        positions: like input_ids, int64, default 0, 1, ... in each sequence; fp32 or fp64 (days)
            if they are rotary. token_types: like input_ids, default all 0.
        layout, for (B, N): "packed" drops the padding before the embedding, and restore puts
            zeros in its place; "padded" computes on it, and what stands there means nothing.
            Default "packed", and "padded" for attention="sdpa", which has no other. Opacus takes
            the first dimension for the samples, so that private training needs "padded".
        Raises ValueError or TypeError for bad arguments.
        """
        chosen = make_layout(
            input_ids, lengths, cu_seqlens, max_seqlen, layout, self.config.attention
        )
        if wants_per_sample_gradients(self) and chosen.cu_seqlens is not None:
            raise ValueError(
                "per-sample gradients (Opacus) would be those of tokens where sequences are "
                "packed: expected input_ids (B, N) and layout='padded'"
            )
        at = chosen.positions() if positions is None else chosen.pack(positions)
        if self.config.positions == "learned":
            self._check_learned(at, chosen.max_seqlen, given=positions is not None)
        types = None if token_types is None else chosen.pack(token_types)
        x = self.embeddings(chosen.pack(input_ids), at, types)
        for layer in self.layers:
            x = layer(x, chosen, at)
        return self.final_norm(x), chosen

    def _check_learned(self, positions: Tensor, max_seqlen: int, given: bool) -> None:
        if positions.is_floating_point():
            raise TypeError(
                f"positions has dtype {positions.dtype}: learned positions expect integers; "
                "real-valued ones need positions='rotary'"
            )
        if not given and max_seqlen > self.config.max_positions:
            raise ValueError(
                f"a sequence of {max_seqlen} tokens: expected at most "
                f"max_positions={self.config.max_positions} with learned positions"
            )


def wants_per_sample_gradients(module: nn.Module) -> bool:
    """Whether Opacus waits for gradients of the module's parameters, sample by sample."""
    return (
        module.training
        and torch.is_grad_enabled()
        and any(hasattr(p, "grad_sample") for p in module.parameters())
    )


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
