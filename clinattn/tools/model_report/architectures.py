"""Small models of many architectures, with random weights, to try an attention on.

Sizes are odd on purpose, and every feature of an architecture that attention has to do with is on:
grouped heads, sliding windows that alternate with full attention, rotary positions, position
biases, cross-attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from clinattn.tools.model_report import example_inputs
from clinattn.tools.model_report.example_inputs import MakeBatch, Padding

EITHER_SIDE: tuple[Padding, ...] = ("none", "left", "right")
WITHOUT: tuple[Padding, ...] = ("none",)
RIGHT: tuple[Padding, ...] = ("none", "right")


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers at a size for tests.

    name: the model type. model: its class. settings: what its configuration is given.
    attentions: the modules that compute attention, None where that is not known. calls: how often
    they do in a forward pass, if that is another number, by padding if that decides. batch: makes
    inputs. paddings: those that the architecture knows.
    spread: its weights are drawn anew by spread_weights.
    """

    name: str
    model: str
    settings: Mapping[str, Any]
    attentions: int | None = 2
    calls: int | Mapping[Padding, int] | None = None
    batch: MakeBatch = example_inputs.text
    paddings: tuple[Padding, ...] = EITHER_SIDE
    spread: bool = True

    def expected_calls(self, padding: Padding) -> int | None:
        if isinstance(self.calls, Mapping):
            return self.calls[padding]
        return self.attentions if self.calls is None else self.calls

    def available(self) -> bool:
        """Returns whether the installed transformers has the model's class."""
        return hasattr(transformers, self.model)

    def config(self, dropout: float = 0.0) -> transformers.PretrainedConfig:
        """Configuration of the model. dropout: of every kind that a configuration knows."""
        cls = getattr(transformers, self.model).config_class
        config = cls(**self.settings)
        return with_dropout(config, dropout)

    def build(
        self, dropout: float = 0.0, dtype: torch.dtype = torch.float32, head: str | None = None
    ) -> transformers.PreTrainedModel:
        """The model with the same weights in every call and eager attention, in training mode.

        head: another class for the same configuration, such as one that generates.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = getattr(transformers, head or self.model)._from_config(
                self.config(dropout), attn_implementation="eager"
            )
            if self.spread:
                spread_weights(model)
            return model.to(dtype).train()


def with_dropout(
    config: transformers.PretrainedConfig, dropout: float
) -> transformers.PretrainedConfig:
    """`config` with every probability of dropping elements at `dropout`, and no layer dropped."""
    for name, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            with_dropout(value, dropout)
        elif name.endswith("layerdrop"):
            setattr(config, name, 0.0)
        elif type(value) in (int, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, dropout)
    return config


def spread_weights(model: transformers.PreTrainedModel) -> None:
    """Draw weights anew so that no layer leaves its input as small as usual initialisation does.

    With standard deviations of 0.02 all scores are nearly 0, and attention is an average whatever
    its scale, softcap or bias. Here a matrix keeps the size of what it is given.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _encoder(hidden: int = 48, heads: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 103,
        "hidden_size": hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 56,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    } | more


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}


def _decoder(**more: Any) -> dict[str, Any]:
    """Grouped heads: two query heads share one of keys and values."""
    return _encoder(heads=4, **({"num_key_value_heads": 2} | SPECIAL | more))


def _translator(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 103,
        "d_model": 40,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 56,
        "decoder_ffn_dim": 56,
        "pad_token_id": 0,
        "decoder_start_token_id": 1,
    } | (SPECIAL | more)


def _vision(**more: Any) -> dict[str, Any]:
    """9 patches and a class token."""
    own = {"image_size": 24, "patch_size": 8, "num_channels": 3}
    return {
        name: value
        for name, value in (_encoder() | own | more).items()
        if name not in ("vocab_size", "max_position_embeddings", "pad_token_id")
    }


def _forecaster(**more: Any) -> dict[str, Any]:
    return {
        "prediction_length": 5,
        "context_length": 13,
        "lags_sequence": [1, 2, 7],
        "num_time_features": 2,
        "d_model": 40,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 4,
    } | more


_WINDOWED_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}

REPLACED = (
    Architecture("bert", "BertModel", _encoder()),
    Architecture("roberta", "RobertaModel", _encoder(pad_token_id=1)),
    Architecture("xlm-roberta", "XLMRobertaModel", _encoder(pad_token_id=1)),
    Architecture("camembert", "CamembertModel", _encoder(pad_token_id=1)),
    Architecture(
        "distilbert",
        "DistilBertModel",
        {"vocab_size": 103, "dim": 36, "hidden_dim": 56, "n_layers": 2, "n_heads": 3},
    ),
    Architecture("electra", "ElectraModel", _encoder(embedding_size=24)),
    # one layer whose weights serve both
    Architecture("albert", "AlbertModel", _encoder(embedding_size=24), attentions=1, calls=2),
    Architecture(
        "esm",
        "EsmModel",
        _encoder(
            vocab_size=33, hidden=40, heads=2, position_embedding_type="rotary", mask_token_id=32
        ),
    ),
    Architecture(
        "mobilebert",
        "MobileBertModel",
        _encoder(
            embedding_size=24,
            intra_bottleneck_size=36,
            true_hidden_size=36,
            num_feedforward_networks=1,
        ),
    ),
    # a window of two tokens to either side, and every other layer full
    Architecture(
        "modernbert",
        "ModernBertModel",
        _encoder(
            num_hidden_layers=3,
            local_attention=4,
            global_attn_every_n_layers=2,
            rope_parameters=_WINDOWED_ROPE,
            cls_token_id=3,
            sep_token_id=4,
            **SPECIAL,
        ),
        attentions=3,
    ),
    Architecture("mpnet", "MPNetModel", _encoder(pad_token_id=1)),
    Architecture("roformer", "RoFormerModel", _encoder(hidden=40, heads=2)),
    Architecture("megatron-bert", "MegatronBertModel", _encoder()),
    Architecture("nomic_bert", "NomicBertModel", _encoder(hidden=40, heads=2)),
    Architecture("eurobert", "EuroBertModel", _decoder(mask_token_id=3)),
    Architecture(
        "longformer",
        "LongformerModel",
        _encoder(attention_window=[4, 8], max_position_embeddings=130, pad_token_id=1),
        # a layer's window, its global queries, and where they are not the first tokens their keys
        calls={"none": 4, "left": 6, "right": 4},
        batch=example_inputs.text_with_global_token,
    ),
    Architecture("vit", "ViTModel", _vision(), batch=example_inputs.image, paddings=WITHOUT),
    Architecture("dinov2", "Dinov2Model", _vision(), batch=example_inputs.image, paddings=WITHOUT),
    Architecture(
        "clip_text_model",
        "CLIPTextModel",
        _encoder(**SPECIAL),
    ),
    Architecture(
        "wav2vec2",
        "Wav2Vec2Model",
        _encoder(
            conv_dim=(24, 32),
            conv_kernel=(6, 3),
            conv_stride=(4, 2),
            feat_extract_norm="layer",
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=4,
            apply_spec_augment=False,
        ),
        batch=example_inputs.waveform,
        paddings=RIGHT,
    ),
    Architecture(
        "whisper",
        "WhisperModel",
        _translator(num_mel_bins=9, max_source_positions=19, max_target_positions=48),
        attentions=6,
        batch=example_inputs.spectrogram_to_text,
    ),
    Architecture(
        "bart",
        "BartModel",
        _translator(max_position_embeddings=128),
        attentions=6,
        batch=example_inputs.text_to_text,
    ),
    # gated as T5 1.1 is: the kink of a ReLU turns one rounding unit into a whole derivative
    Architecture(
        "t5",
        "T5Model",
        {
            "feed_forward_proj": "gated-gelu",
            "vocab_size": 103,
            "d_model": 40,
            "d_kv": 12,
            "d_ff": 56,
            "num_layers": 2,
            "num_heads": 3,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
        },
        attentions=6,
        batch=example_inputs.text_to_text,
        spread=False,  # scores have no factor: it is in the weights, and they are large already
    ),
    Architecture("llama", "LlamaModel", _decoder()),
    Architecture("mistral", "MistralModel", _decoder(sliding_window=5)),
    Architecture("qwen3", "Qwen3Model", _decoder(head_dim=20)),
    # scores are capped, and every other layer sees five tokens
    Architecture(
        "gemma2",
        "Gemma2Model",
        _decoder(head_dim=20, attn_logit_softcapping=2.0, sliding_window=5),
    ),
    Architecture(
        "gpt2",
        "GPT2Model",
        {"vocab_size": 103, "n_positions": 128, "n_embd": 48, "n_layer": 2, "n_head": 3} | SPECIAL,
    ),
    # a layer attends over patches and then, with the same module, over channels
    Architecture(
        "patchtst",
        "PatchTSTModel",
        {
            "num_input_channels": 3,
            "context_length": 39,
            "patch_length": 4,
            "patch_stride": 3,
            "num_hidden_layers": 2,
            "d_model": 36,
            "num_attention_heads": 3,
            "ffn_dim": 56,
            "channel_attention": True,
        },
        calls=4,
        batch=example_inputs.patched_series,
        paddings=WITHOUT,
    ),
    Architecture(
        "patchtsmixer",
        "PatchTSMixerModel",
        {
            "num_input_channels": 3,
            "context_length": 39,
            "patch_length": 4,
            "patch_stride": 3,
            "num_layers": 2,
            "d_model": 36,
            "self_attn": True,
            "self_attn_heads": 3,
        },
        batch=example_inputs.patched_series,
        paddings=WITHOUT,
    ),
    Architecture(
        "time_series_transformer",
        "TimeSeriesTransformerModel",
        _forecaster(),
        attentions=6,
        batch=example_inputs.observed_series,
        paddings=WITHOUT,
    ),
    Architecture(
        "timesfm",
        "TimesFmModel",
        {
            "patch_length": 4,
            "context_length": 96,
            "num_hidden_layers": 2,
            "hidden_size": 40,
            "intermediate_size": 56,
            "head_dim": 20,
            "num_attention_heads": 2,
        },
        batch=example_inputs.padded_series,
    ),
)

# Attention of their own, which is not softmax attention over the keys that a mask leaves.
KEPT = (
    Architecture(
        "deberta-v2",
        "DebertaV2Model",
        _encoder(
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            type_vocab_size=0,
        ),
    ),
    Architecture(
        "big_bird",
        "BigBirdModel",
        _encoder(attention_type="block_sparse", block_size=2, num_random_blocks=1),
    ),
)

ARCHITECTURES = REPLACED + KEPT


def find(name: str) -> Architecture:
    """The architecture of a model type, with - and _ alike. Raises ValueError for unknown types."""
    for architecture in ARCHITECTURES:
        if architecture.name.replace("-", "_") == name.replace("-", "_"):
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ValueError(f"model type: got {name!r}, expected one of {known}")
