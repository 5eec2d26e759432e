"""The model types of transformers that an encoder can be, and their names for its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .config import EncoderConfig
from .settings import (
    ModelConfig,
    read_bert,
    read_longformer,
    read_megatron,
    read_modernbert,
    read_roberta,
    write_bert,
    write_longformer,
    write_modernbert,
    write_roberta,
)

Names = Mapping[str, str | tuple[str, ...]]  # our module -> theirs, several where ours fuses them


@dataclass(frozen=True)
class Family:
    """A model type: to and from EncoderConfig, and its names for the modules of an encoder.

    prefix: stands before the encoder's tensors in a model with a head. tied: the decoder's weight,
    which is the embedding. heads and classes: by task, "encoder", "masked" or "classifier".
    """

    model_type: str
    read: Callable[[ModelConfig], EncoderConfig]
    write: Callable[[EncoderConfig], dict[str, Any]]
    prefix: str
    layers: str
    modules: Names
    in_layer: Names
    heads: Mapping[str, Names]
    tied: str
    classes: Mapping[str, str]

    def names(self, ours: str) -> tuple[str, ...]:
        """Names in this family, without prefix, of a tensor of an Encoder."""
        module, _, parameter = ours.rpartition(".")
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        if layer is None:
            stem, theirs = "", self.modules[module]
        else:
            stem, theirs = f"{self.layers}.{layer[1]}.", self.in_layer[layer[2]]
        return tuple(f"{stem}{x}.{parameter}" for x in _several(theirs))

    def head_names(self, task: str, ours: str) -> tuple[str, ...]:
        """Full names in this family of a tensor of a head."""
        module, _, parameter = ours.rpartition(".")
        return tuple(f"{x}.{parameter}" for x in _several(self.heads[task][module]))


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


BERT_EMBEDDINGS: Names = {
    "embeddings.tokens": "embeddings.word_embeddings",
    "embeddings.positions": "embeddings.position_embeddings",
    "embeddings.types": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
BERT_LAYER: Names = {
    "attention.qkv": tuple(f"attention.self.{x}" for x in ("query", "key", "value")),
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_norm": "output.LayerNorm",
}
BERT_HEADS: Mapping[str, Names] = {
    "masked": {
        "head.0": "cls.predictions.transform.dense",
        "head.2": "cls.predictions.transform.LayerNorm",
        "decoder": "cls.predictions",
    },
    "classifier": {"head.0": "bert.pooler.dense", "classifier": "classifier"},
}
ROBERTA_HEADS: Mapping[str, Names] = {
    "masked": {"head.0": "lm_head.dense", "head.2": "lm_head.layer_norm", "decoder": "lm_head"},
    "classifier": {"head.0": "classifier.dense", "classifier": "classifier.out_proj"},
}


def _classes(stem: str) -> dict[str, str]:
    return {
        "encoder": f"{stem}Model",
        "masked": f"{stem}ForMaskedLM",
        "classifier": f"{stem}ForSequenceClassification",
    }


FAMILIES = (
    Family(
        model_type="bert",
        read=read_bert,
        write=write_bert,
        prefix="bert.",
        layers="encoder.layer",
        modules=BERT_EMBEDDINGS,
        in_layer=BERT_LAYER,
        heads=BERT_HEADS,
        tied="cls.predictions.decoder.weight",
        classes=_classes("Bert"),
    ),
    Family(
        model_type="roberta",
        read=read_roberta,
        write=write_roberta,
        prefix="roberta.",
        layers="encoder.layer",
        modules=BERT_EMBEDDINGS,
        in_layer=BERT_LAYER,
        heads=ROBERTA_HEADS,
        tied="lm_head.decoder.weight",
        classes=_classes("Roberta"),
    ),
    Family(
        model_type="longformer",
        read=read_longformer,
        write=write_longformer,
        prefix="longformer.",
        layers="encoder.layer",
        modules=BERT_EMBEDDINGS,
        in_layer={
            **BERT_LAYER,
            "attention.from_prefix.q": "attention.self.query_global",
            "attention.from_prefix.kv": (
                "attention.self.key_global",
                "attention.self.value_global",
            ),
        },
        heads=ROBERTA_HEADS,
        tied="lm_head.decoder.weight",
        classes=_classes("Longformer"),
    ),
    Family(
        model_type="megatron-bert",
        read=read_megatron,
        write=write_bert,
        prefix="bert.",
        layers="encoder.layer",
        modules={**BERT_EMBEDDINGS, "final_norm": "encoder.ln"},
        in_layer={**BERT_LAYER, "attention_norm": "attention.ln", "feed_forward_norm": "ln"},
        heads=BERT_HEADS,
        tied="cls.predictions.decoder.weight",
        classes=_classes("MegatronBert"),
    ),
    Family(
        model_type="modernbert",
        read=read_modernbert,
        write=write_modernbert,
        prefix="model.",
        layers="layers",
        modules={
            "embeddings.tokens": "embeddings.tok_embeddings",
            "embeddings.norm": "embeddings.norm",
            "final_norm": "final_norm",
        },
        in_layer={
            "attention_norm": "attn_norm",
            "attention.qkv": "attn.Wqkv",
            "attention.out": "attn.Wo",
            "feed_forward_norm": "mlp_norm",
            "feed_forward.up": "mlp.Wi",
            "feed_forward.down": "mlp.Wo",
        },
        heads={
            "masked": {"head.0": "head.dense", "head.2": "head.norm", "decoder": "decoder"},
            "classifier": {
                "head.0": "head.dense",
                "head.2": "head.norm",
                "classifier": "classifier",
            },
        },
        tied="decoder.weight",
        classes=_classes("ModernBert"),
    ),
)


class Own(Family):
    """The model type of encoders that transformers has not: names and fields are ours."""

    def names(self, ours: str) -> tuple[str, ...]:
        return (ours,)

    def head_names(self, task: str, ours: str) -> tuple[str, ...]:
        return (ours,)


def read_own(settings: ModelConfig) -> EncoderConfig:
    try:
        return EncoderConfig(**settings["encoder"])
    except TypeError as error:  # no mapping, or an unknown field
        raise ValueError(f"config.json: encoder: {error}") from None


OWN = Own(
    model_type="clinattn",
    read=read_own,
    write=lambda config: {"encoder": asdict(config)},
    prefix="encoder.",
    layers="",
    modules={},
    in_layer={},
    heads={},
    tied="decoder.weight",
    classes={
        "encoder": "Encoder",
        "masked": "MaskedLanguageModel",
        "causal": "CausalLanguageModel",
        "classifier": "SequenceClassifier",
    },
)


def family_of(settings: ModelConfig) -> Family:
    for family in (*FAMILIES, OWN):
        if family.model_type == settings.get("model_type"):
            return family
    known = sorted(family.model_type for family in (*FAMILIES, OWN))
    raise ValueError(
        f"config.json: model_type={settings.get('model_type')!r}: expected one of {known}"
    )


# Fields that no config.json has, and fields that matter to a classifier alone.
OURS_ALONE = {"attention"}
OF_CLASSIFIERS = {"pooling", "classifier", "classifier_dropout"}


def family_for(config: EncoderConfig, task: str) -> Family:
    """The family whose settings lose nothing of config."""
    ignored = OURS_ALONE if task == "classifier" else OURS_ALONE | OF_CLASSIFIERS
    lost = {}
    for family in FAMILIES:
        back = _words(family.read(family.write(config)))
        differing = {n for n, x in _words(config).items() if back[n] != x} - ignored
        if not differing:
            return family
        lost[family.model_type] = sorted(differing)
    nearest = min(lost, key=lambda name: len(lost[name]))
    raise ValueError(
        f"no model type of transformers has this shape: {nearest!r} has another "
        f"{', '.join(lost[nearest])}"
    )


def _words(config: EncoderConfig) -> dict[str, Any]:
    words = asdict(config)
    if config.classifier_dropout is None:
        words["classifier_dropout"] = config.hidden_dropout
    return words
