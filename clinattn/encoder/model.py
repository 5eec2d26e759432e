"""A transformer whose tokens stay packed from the embedding to the head.

BERT (post-norm, learned positions, GELU), ModernBERT (pre-norm, rotary, GeGLU, local layers),
Longformer (global tokens) and CLMBR (causal, rotary at age) are settings of the same few lines;
see config.py and presets.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from clinattn.operator import ranges
from clinattn.operator.rotary import Angles, check_positions, frequencies_of, steps_of, turned

from .checkpoints import Pretrained
from .config import EncoderConfig
from .embeddings import Embeddings, make_norm
from .inputs import check_indices, check_inputs, check_rows
from .layout import Batch, Layout, make_layout
from .linear import by_torch, linear, normalise, serves_stream
from .pieces import in_pieces


def linear_of(config: EncoderConfig) -> Callable[..., Tensor]:
    """Function that calls a linear layer: torch's where attention is torch's, else ours."""
    return linear if config.attention == "clinattn" else by_torch


class Turns:
    """The angles of a batch's tokens in full layers and in windowed ones, worked out once.

    An object of its own: FSDP casts the tensors among a layer's arguments to the layer's dtype.
    """

    def __init__(self, config: EncoderConfig, positions: Tensor, layout: Layout, x: Tensor):
        check_positions(positions, (x.shape[-2:-1], x.shape[:-1]), x.device)
        steps = steps_of(positions, layout.cu_seqlens, x.dtype)
        self.full, self.windowed = (
            Angles(steps, frequencies_of(theta, config.head_dim, x.device, x.dtype))
            for theta in (config.rotary_base, config.rotary_base_window)
        )


class Attention(nn.Module):
    """Attention up to its last layer, `out`, which the block calls with what follows it."""

    def __init__(self, config: EncoderConfig, window: int | None):
        super().__init__()
        self.heads = (3, config.num_heads, config.head_dim)
        self.window = window
        self.linear = linear_of(config)
        self.dropout_p = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, config.linear_bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, config.linear_bias)
        self.from_prefix = PrefixAttention(config) if config.global_projections else None

    def forward(self, x: Tensor, layout: Layout, turns: Turns | None) -> Tensor:
        q, k, v = layout.heads(self.linear(self.qkv, x).unflatten(-1, self.heads))
        if turns is not None:
            q, k = turned(q, k, turns.full if self.window is None else turns.windowed)
        dropout_p = self.dropout_p if self.training else 0.0
        o = layout.attend(q, k, v, self.window, dropout_p)
        if self.from_prefix is not None:
            o = self.from_prefix(x, o, layout, dropout_p)
        return o.flatten(-2)


class PrefixAttention(nn.Module):
    """Attention of global tokens by weights of their own; others see them by the shared weights."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads = (-1, config.num_heads, config.head_dim)
        self.q = nn.Linear(config.hidden_size, config.hidden_size, config.linear_bias)
        self.kv = nn.Linear(config.hidden_size, 2 * config.hidden_size, config.linear_bias)

    def forward(self, x: Tensor, o: Tensor, layout: Layout, dropout_p: float) -> Tensor:
        (q,) = layout.heads(linear(self.q, layout.prefix(x)).unflatten(-1, self.heads))
        k, v = layout.heads(linear(self.kv, x).unflatten(-1, self.heads))
        return layout.attend_from_prefix(o, q, k, v, dropout_p)


class FeedForward(nn.Module):
    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.gated = config.activation == "geglu"
        self.linear = linear_of(config)
        inner = config.intermediate_size * (2 if self.gated else 1)
        self.up = nn.Linear(config.hidden_size, inner, config.linear_bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, config.linear_bias)

    def forward(self, x: Tensor, **what_follows: Any) -> Tensor:
        """what_follows: dropout, residual and norm, as `linear` takes them."""
        x = self.linear(self.up, x, activation="gelu", gated=self.gated)
        return self.linear(self.down, x, **what_follows)


class Block(nn.Module):
    def __init__(self, config: EncoderConfig, index: int):
        super().__init__()
        self.pre_norm, self.parallel = config.norm == "pre", config.parallel
        bare = self.pre_norm and index == 0 and not config.first_norm
        self.attention_norm = nn.Identity() if bare else make_norm(config)
        self.attention = Attention(config, config.windows[index])
        self.feed_forward_norm = nn.Identity() if config.parallel else make_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, layout: Layout, turns: Turns | None) -> Tensor:
        seen = normalise(self.attention_norm, x) if self.pre_norm else x
        return in_pieces(self.by_token, x, seen, self.attention(seen, layout, turns))

    def by_token(self, x: Tensor, seen: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer, from its input, what attention saw and what it gave."""
        out = partial(self.attention.linear, self.attention.out, attended)
        if self.parallel:
            return x + self.dropout(self.feed_forward(seen, residual=out()))
        if self.pre_norm:
            x = out(dropout=self.dropout, residual=x)
            seen = normalise(self.feed_forward_norm, x)
            return self.feed_forward(seen, dropout=self.dropout, residual=x)
        x = out(dropout=self.dropout, residual=x, norm=self.attention_norm)
        return self.feed_forward(x, dropout=self.dropout, residual=x, norm=self.feed_forward_norm)


class Encoder(Pretrained):
    """A transformer encoder, or with causal=True a decoder, that returns hidden states."""

    task = "encoder"

    def __init__(self, config: EncoderConfig):
        super().__init__()
        EncoderConfig.check(config)
        self.config = config
        self.embeddings = Embeddings(config)
        blocks = [Block(config, index) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.final_norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.apply(init_weights)
        if config.norm == "pre":
            for block in blocks:  # a residual stream of 2L sums keeps unit scale (GPT-2)
                for linear in (block.attention.out, block.feed_forward.down):
                    nn.init.normal_(linear.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def forward(self, inputs: Tensor, **batch: Unpack[Batch]) -> Tensor:
        """Hidden states, (T, hidden) or (B, N, hidden) as inputs; the arguments are encode's."""
        hidden, layout = self.encode(inputs, **batch)
        return layout.restore(hidden)

    def encode(
        self,
        inputs: Tensor,
        *,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        values: Tensor | None = None,
        layout: str | None = None,
    ) -> tuple[Tensor, Layout]:
        """Hidden states as they lie in memory, and the layout that says how: what heads work on.

        inputs: token ids or codes, (T,) with int32 cu_seqlens (S + 1,), or (B, N) with lengths
            (B,), None = all N. Or with channels a signal, (T, channels) or (B, N, channels).
        attention_mask: in place of lengths, (B, N), bool or integers, 1 = a token: the tokens of a
            row are one run, with padding on the left or right. Positions count from its first.
        max_seqlen: bounds the lengths of packed sequences; left out, it is read from cu_seqlens,
            and under torch.compile, where lengths have no values, T or N stands in.
        positions: like the tokens, int64, default 0, 1, ... in each sequence; fp32 or fp64 (days)
            unless they are learned. token_types: like the tokens, default all 0.
        values: like the tokens, floating, NaN where an event has none; with numeric_values.
        layout: for (B, N). "packed" drops the padding before the embedding, and restore puts
            zeros in its place; "padded" computes on it, and what stands there means nothing.
            Default "packed", and "padded" for attention="sdpa", which has no other. Opacus takes
            the first dimension for the samples, so that private training needs "padded".
        Raises ValueError or TypeError for bad arguments.
        """
        tokens = check_inputs(self.config, inputs, positions, token_types, values)
        padding = lengths, attention_mask
        chosen = make_layout(tokens, *padding, cu_seqlens, max_seqlen, layout, self.config)
        if wants_per_sample_gradients(self) and chosen.cu_seqlens is not None:
            raise ValueError(
                "per-sample gradients (Opacus) would be those of tokens where sequences are "
                "packed: expected inputs (B, N) and layout='padded'"
            )
        if positions is None:
            check_indices(self.config, chosen.max_seqlen)
        at = chosen.positions() if positions is None else chosen.pack(positions)
        types, values = (None if x is None else chosen.pack(x) for x in (token_types, values))
        inputs = chosen.pack(inputs)
        check_rows(self.config, inputs, None if positions is None else at, types)
        x = self.embeddings(inputs, at, types, values)
        turns = Turns(self.config, at, chosen, x) if self.config.rotary else None
        dtype = x.dtype
        if self.config.attention == "clinattn" and serves_stream(x):
            x = x.float()
        for i, layer in enumerate(self.layers):
            args = (x, chosen, turns)
            x = ranges.run_layer(i, layer, *args) if ranges.on else layer(*args)
        return normalise(self.final_norm, x).to(dtype), chosen


def wants_per_sample_gradients(module: nn.Module) -> bool:
    """Returns whether Opacus collects gradients of the module's parameters, sample by sample."""
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
