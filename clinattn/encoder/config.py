"""The shape of an encoder: one frozen dataclass. presets.py holds the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from clinattn.operator.words.scalars import FAR, as_flag, as_float, as_int, at_most_far, limits

CHOICES = {
    "norm": ("pre", "post"),
    "norm_kind": ("layer", "rms"),
    "positions": ("learned", "sinusoidal", "rotary", "rotary_time"),
    "activation": ("gelu", "geglu"),
    "pooling": ("first", "mean", "last"),
    "classifier": ("norm", "tanh"),
    "attention": ("clinattn", "sdpa"),
}


READ: dict[str, Callable[[str, Any], Any]] = {"int": as_int, "float": as_float, "bool": as_flag}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    channels: features of each token of a continuous signal; it takes the place of vocab_size.
    numeric_values: tokens are events, each of a code and a value which may be absent.
    first_norm: False leaves the first pre-norm layer without its attention norm (ModernBERT: the
        embedding has just been normalised).
    parallel: attention and feed-forward read the same norm, and their sum is added (pre-norm).
    max_positions: rows of the learned table; other positions are not bounded by it.
    position_offset: the row of a sequence's first token (RoBERTa counts on from its padding id).
    positions: "rotary" turns by index or by what is given; "rotary_time" asks for times.
    rotary_base: of full layers, and of sinusoidal positions; rotary_base_window: of windowed ones.
    windows: per layer the half-width w of |i - j| <= w, or None for full attention; () = all full.
    causal: tokens see themselves and what came before, within the layer's window.
    global_prefix: the first so many tokens see all and are seen by all, in windowed layers too.
    global_projections: they do so by their own query, key and value weights (Longformer).
    pooling: what a classifier sees of a sequence. classifier: what it puts before its last layer,
        dense, GELU, norm (ModernBERT) or dense, tanh (BERT).
    attention_dropout: applied in training only, and passed to the attention call as dropout_p.
    classifier_dropout: None for hidden_dropout.
    attention: "clinattn" or "sdpa" (torch's scaled_dot_product_attention on padded batches).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    channels: int = 0
    numeric_values: bool = False
    token_types: int = 0
    embedding_norm: bool = True
    norm: str = "pre"
    norm_kind: str = "layer"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    linear_bias: bool = False
    first_norm: bool = True
    parallel: bool = False
    positions: str = "rotary"
    position_offset: int = 0
    rotary_base: float = 10_000.0
    rotary_base_window: float = 10_000.0
    activation: str = "geglu"
    windows: tuple[int | None, ...] = ()
    causal: bool = False
    global_prefix: int = 0
    global_projections: bool = False
    pooling: str = "first"
    classifier: str = "norm"
    embedding_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None
    attention: str = "clinattn"

    def __post_init__(self) -> None:
        self._check_types()
        self._check_sizes()
        for name, allowed in CHOICES.items():
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        if not self.windows:
            self._set("windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries: expected one for each of the "
                f"num_layers={self.num_layers} layers, or () for full attention in all"
            )
        if any(window is not None and window < 0 for window in self.windows):
            raise ValueError(f"windows={self.windows}: expected None or at least 0 in each layer")
        for name in (
            "embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"
        ):  # fmt: skip
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 <= p < 1")
        self._check_combinations()

    def _check_types(self) -> None:
        """Every field as its annotation says, and no longer of numpy."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind, _, optional = str(field.type).partition(" | ")
            if kind in READ and not (optional and value is None):
                self._set(field.name, READ[kind](field.name, value))
        if not isinstance(self.windows, (tuple, list)):
            raise TypeError(f"windows: got {type(self.windows).__name__}, expected a tuple")
        windows = (None if x is None else at_most_far(as_int("windows", x)) for x in self.windows)
        self._set("windows", tuple(windows))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_sizes(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for field in fields(self):
            if field.type == "int" and getattr(self, field.name) > FAR:
                given = getattr(self, field.name)
                raise ValueError(f"{field.name}={given}: expected at most {FAR}")
        fp32 = limits(torch.float32)
        for name in ("norm_eps", "rotary_base", "rotary_base_window"):
            if not fp32.tiny <= getattr(self, name) <= fp32.max:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number > 0 of fp32")
        for name in ("channels", "token_types", "position_offset", "global_prefix"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 0")
        if self.channels and self.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size}: expected 0 for a signal of channels")
        if not self.channels and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size}: expected at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: expected a multiple of num_heads={self.num_heads}"
            )

    def _check_combinations(self) -> None:
        if self.rotary and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions expect an even head_dim")
        if self.positions == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size}: sinusoidal positions expect it even")
        if self.positions == "learned" and self.max_positions <= self.position_offset:
            raise ValueError(
                f"max_positions={self.max_positions}: expected more than "
                f"position_offset={self.position_offset} with learned positions"
            )
        if self.position_offset and self.positions != "learned":
            raise ValueError(f"position_offset={self.position_offset}: expected learned positions")
        if self.numeric_values and self.channels:
            raise ValueError("numeric_values: expected codes (vocab_size), not channels")
        if self.norm_kind == "rms" and self.norm_bias:
            raise ValueError("norm_bias=True: an RMS norm has none")
        if self.parallel and self.norm != "pre":
            raise ValueError("parallel=True: expected norm='pre'")
        if self.causal and self.global_prefix:
            raise ValueError(
                f"global_prefix={self.global_prefix}: its tokens see all, expected causal=False"
            )
        if self.global_projections and (
            not self.global_prefix or self.rotary or None in self.windows
        ):
            raise ValueError(
                "global_projections=True: expected a global_prefix, a window in every layer and "
                "positions that are not rotary"
            )

    @staticmethod
    def check(config: object) -> None:
        """Raise TypeError unless a model can be made of config."""
        if not isinstance(config, EncoderConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected an EncoderConfig")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rotary(self) -> bool:
        return self.positions in ("rotary", "rotary_time")

    @classmethod
    def preset(cls, name: str, **overrides: object) -> EncoderConfig:
        """The published configuration `name`, with any field replaced.

        Raises ValueError for an unknown preset and TypeError for an unknown field.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: expected one of {sorted(PRESETS)}")
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"EncoderConfig has no field {sorted(unknown)}")
        return replace(PRESETS[name], **overrides)  # type: ignore[arg-type]


PRESETS: dict[str, EncoderConfig] = {}
"""The published configurations by name; presets.py enters them."""
