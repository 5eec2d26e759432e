"""Encoder sizes: one frozen dataclass, and the published models as presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

NORMS = ("pre", "post")
POSITIONS = ("learned", "rotary")
ACTIVATIONS = ("gelu", "geglu")
ATTENTIONS = ("clinattn", "sdpa")


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    windows: per layer the half-width w of |i - j| <= w, or None for full attention; () = all full.
    max_positions: bounds the learned table; rotary positions are not bounded by it.
    first_norm: False leaves the first pre-norm layer without its attention norm (ModernBERT: the
        embedding has just been normalised).
    attention_dropout: applied in training only, and passed to the attention call as dropout_p.
    attention: "clinattn" or "sdpa" (torch's scaled_dot_product_attention on padded batches).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    norm: str = "pre"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    linear_bias: bool = False
    first_norm: bool = True
    positions: str = "rotary"
    rotary_base: float = 10_000.0
    rotary_base_window: float = 10_000.0
    activation: str = "geglu"
    windows: tuple[int | None, ...] = ()
    token_types: int = 0
    embedding_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "clinattn"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: expected a multiple of num_heads={self.num_heads}"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: rotary positions expect an even head_dim")
        for name, allowed in (
            ("norm", NORMS),
            ("positions", POSITIONS),
            ("activation", ACTIVATIONS),
            ("attention", ATTENTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries: expected one for each of the "
                f"num_layers={self.num_layers} layers, or () for full attention in all"
            )
        if any(window is not None and window < 0 for window in self.windows):
            raise ValueError(f"windows={self.windows}: expected None or at least 0 in each layer")
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 <= p < 1")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @classmethod
    def preset(cls, name: str, **overrides: object) -> EncoderConfig:
        """The published configuration `name`, with any field replaced.

        Raises ValueError for an unknown preset and TypeError for an unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is unknown: expected one of {sorted(PRESETS)}")
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"EncoderConfig has no field {sorted(unknown)}")
        return replace(PRESETS[name], **overrides)  # type: ignore[arg-type]


def _global_every_third(num_layers: int, window: int) -> tuple[int | None, ...]:
    return tuple(window if layer % 3 else None for layer in range(num_layers))


PRESETS = {
    # One period of ModernBERT's layers at a quarter of its width: for laptops and tests.
    "tiny": EncoderConfig(
        vocab_size=8192,
        hidden_size=192,
        num_layers=3,
        num_heads=3,
        intermediate_size=288,
        max_positions=8192,
        first_norm=False,
        rotary_base=160_000.0,
        windows=_global_every_third(3, 64),
    ),
    # huggingface.co/emilyalsentzer/Bio_ClinicalBERT config.json (BERT base cased)
    "clinicalbert": EncoderConfig(
        vocab_size=28_996,
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        intermediate_size=3072,
        max_positions=512,
        norm="post",
        norm_eps=1e-12,
        norm_bias=True,
        linear_bias=True,
        positions="learned",
        activation="gelu",
        token_types=2,
        embedding_dropout=0.1,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
    # github.com/lindvalllab/BioClinical-ModernBERT pretraining_resources/configs/phase1/
    # phase1_base.yaml; local_attention 128 means |i - j| <= 64.
    "bioclinical-modernbert-base": EncoderConfig(
        vocab_size=50_368,
        hidden_size=768,
        num_layers=22,
        num_heads=12,
        intermediate_size=1152,
        max_positions=8192,
        first_norm=False,
        rotary_base=160_000.0,
        windows=_global_every_third(22, 64),
    ),
}
