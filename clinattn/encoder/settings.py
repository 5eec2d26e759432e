"""The config.json of transformers' model types, to and from EncoderConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import EncoderConfig

ModelConfig = Mapping[str, Any]


def _expect(settings: ModelConfig, **allowed: Any) -> None:
    """Raise unless each setting, where there is one, has the value that clinattn computes."""
    for name, value in allowed.items():
        if settings.get(name, value) != value:
            raise ValueError(f"config.json: {name}={settings[name]!r}: expected {value!r}")


def read_bert(settings: ModelConfig, **differing: Any) -> EncoderConfig:
    _expect(
        settings,
        hidden_act="gelu",
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
    )
    s: dict[str, Any] = {
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "max_position_embeddings": 512,
    } | dict(settings)
    words: dict[str, Any] = {
        "vocab_size": s["vocab_size"],
        "hidden_size": s["hidden_size"],
        "num_layers": s["num_hidden_layers"],
        "num_heads": s["num_attention_heads"],
        "intermediate_size": s["intermediate_size"],
        "max_positions": s["max_position_embeddings"],
        "token_types": s["type_vocab_size"],
        "norm": "post",
        "norm_eps": s["layer_norm_eps"],
        "norm_bias": True,
        "linear_bias": True,
        "positions": "learned",
        "activation": "gelu",
        "classifier": "tanh",
        "embedding_dropout": s["hidden_dropout_prob"],
        "hidden_dropout": s["hidden_dropout_prob"],
        "attention_dropout": s["attention_probs_dropout_prob"],
        "classifier_dropout": s.get("classifier_dropout"),
    }
    return EncoderConfig(**words | differing)


def write_bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.classifier_dropout,
        "pad_token_id": None,
    }


def read_megatron(settings: ModelConfig) -> EncoderConfig:
    return read_bert(settings, embedding_norm=False, norm="pre", classifier_dropout=None)


def _first_row(settings: ModelConfig) -> int:
    """RoBERTa's positions follow the padding id, whose own row stands for padding."""
    padding = settings.get("pad_token_id", 1)
    if padding is None:
        raise ValueError("config.json: pad_token_id=None: expected the row that positions follow")
    return padding + 1


def read_roberta(settings: ModelConfig) -> EncoderConfig:
    return read_bert(settings, position_offset=_first_row(settings))


def write_roberta(config: EncoderConfig) -> dict[str, Any]:
    return write_bert(config) | {"pad_token_id": config.position_offset - 1}


def read_longformer(settings: ModelConfig) -> EncoderConfig:
    windows = settings.get("attention_window", 512)
    if isinstance(windows, int):
        windows = [windows] * settings["num_hidden_layers"]
    if any(window % 2 or window < 1 for window in windows):
        raise ValueError(f"config.json: attention_window={windows}: expected even and positive")
    return read_bert(
        settings,
        position_offset=_first_row(settings),
        windows=tuple(window // 2 for window in windows),
        global_prefix=1,
        global_projections=True,
        classifier_dropout=None,
    )


def write_longformer(config: EncoderConfig) -> dict[str, Any]:
    windows = [2 * window if window else 2 for window in config.windows]
    return write_roberta(config) | {"attention_window": windows}


def read_modernbert(settings: ModelConfig) -> EncoderConfig:
    s: dict[str, Any] = {
        "norm_eps": 1e-5,
        "norm_bias": False,
        "attention_bias": False,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "embedding_dropout": 0.0,
        "classifier_dropout": 0.0,
        "classifier_pooling": "cls",
        "max_position_embeddings": 8192,
    } | dict(settings)
    _expect(
        s,
        hidden_activation="gelu",
        classifier_activation="gelu",
        attention_dropout=0.0,
        mlp_dropout=0.0,
        mlp_bias=s["attention_bias"],
        classifier_bias=s["attention_bias"],
        decoder_bias=True,
    )
    pooling = {"cls": "first", "mean": "mean"}.get(s["classifier_pooling"])
    if pooling is None:
        given = s["classifier_pooling"]
        raise ValueError(f"config.json: classifier_pooling={given!r}: expected 'cls' or 'mean'")
    everywhere, local = _modernbert_bases(s)
    return EncoderConfig(
        vocab_size=s["vocab_size"],
        hidden_size=s["hidden_size"],
        num_layers=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"],
        intermediate_size=s["intermediate_size"],
        max_positions=s["max_position_embeddings"],
        norm_eps=s["norm_eps"],
        norm_bias=s["norm_bias"],
        linear_bias=s["attention_bias"],
        first_norm=False,
        rotary_base=everywhere,
        rotary_base_window=local,
        windows=tuple(
            None if kind == "full_attention" else s["local_attention"] // 2
            for kind in _modernbert_layers(s)
        ),
        embedding_dropout=s["embedding_dropout"],
        classifier_dropout=s["classifier_dropout"],
        pooling=pooling,
    )


def _modernbert_layers(s: ModelConfig) -> list[str]:
    kinds = s.get("layer_types") or [
        "sliding_attention" if layer % s["global_attn_every_n_layers"] else "full_attention"
        for layer in range(s["num_hidden_layers"])
    ]
    if set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"config.json: layer_types={kinds}: expected full or sliding attention")
    return kinds


def _modernbert_bases(s: ModelConfig) -> tuple[float, float]:
    """Returns the rotary bases of full and sliding layers, as transformers 4 or 5 writes them."""
    rope = s.get("rope_parameters") or {}
    bases = []
    for kind, old, default in (
        ("full_attention", "global_rope_theta", 160_000.0),
        ("sliding_attention", "local_rope_theta", 10_000.0),
    ):
        parameters = rope.get(kind) or {}
        if parameters.get("rope_type", "default") != "default" or s.get("rope_scaling"):
            raise ValueError(
                f"config.json: rope {parameters or s['rope_scaling']}: expected the default type"
            )
        bases.append(float(parameters.get("rope_theta") or s.get(old) or default))
    return bases[0], bases[1]


def write_modernbert(config: EncoderConfig) -> dict[str, Any]:
    windows = {window for window in config.windows if window is not None} or {64}
    bases = {
        "full_attention": config.rotary_base,
        "sliding_attention": config.rotary_base_window,
    }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.linear_bias,
        "mlp_bias": config.linear_bias,
        "classifier_bias": config.linear_bias,
        "local_attention": 2 * min(windows),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in config.windows
        ],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
        "embedding_dropout": config.embedding_dropout,
        "classifier_dropout": config.classifier_dropout or 0.0,
        "classifier_pooling": "mean" if config.pooling == "mean" else "cls",
        **dict.fromkeys(
            ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        ),
    }
