"""Any model type of transformers at a size for tests, by the names that configurations share.

architectures.py has types whose features are chosen by hand; here a type gets small numbers for the
names in SMALL that its configuration has, and its own defaults for all others.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from clinattn.tools.model_report import example_inputs
from clinattn.tools.model_report.architectures import EITHER_SIDE, RIGHT, WITHOUT, Architecture

HIDDEN, INNER, HEADS, LAYERS, EXPERTS = 48, 56, 4, 2, 4

SMALL: dict[str, Any] = {
    "vocab_size": 103,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    "num_key_value_heads": HEADS // 2,
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim"), HIDDEN // HEADS),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 128),
    "embedding_size": 24,
    "sliding_window": 5,
    "layer_types": None,  # made anew for so few layers
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    # each expert serves each token: which is the best one may be a matter of rounding
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("moe_num_experts", "num_experts_per_tok", "moe_k", "moe_topk"), EXPERTS),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "image_size": 24,
    "patch_size": 8,
    # sound
    "conv_dim": (24, 32),
    "conv_kernel": (6, 3),
    "conv_stride": (4, 2),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "cls_token_id": 3,
    "sep_token_id": 4,
}
# The kink of a ReLU turns one rounding unit into a whole derivative.
SMOOTH = {"relu": "gelu", "relu2": "gelu", "gated-relu": "gated-gelu"}


class NotServed(ValueError):
    """Says why a type has no small model here."""


def model_types() -> list[str]:
    """The types that AutoModel knows."""
    return sorted(set(MODEL_MAPPING_NAMES) & set(CONFIG_MAPPING))


def small_architecture(model_type: str) -> Architecture:
    """Architecture of a type that AutoModel knows; how often it computes attention is not known.

    Raises NotServed with the reason for a type whose inputs nothing here makes.
    """
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs:
        raise NotServed("made of several models, most of which are types of their own")
    names = MODEL_MAPPING_NAMES[model_type]
    name = names if isinstance(names, str) else names[0]
    model: Any = getattr(transformers, name)
    defaults = config_class()
    inputs = {
        "input_ids": (example_inputs.text, EITHER_SIDE),
        "pixel_values": (example_inputs.image, WITHOUT),
        "input_values": (example_inputs.waveform, RIGHT),
    }
    if model.main_input_name not in inputs:
        raise NotServed(f"takes {model.main_input_name}, which nothing here makes")
    batch, paddings = inputs[model.main_input_name]
    if batch is example_inputs.text and defaults.is_encoder_decoder:
        batch = example_inputs.text_to_text
    # T5's scores have no factor: it is in the weights
    spread = not hasattr(defaults, "relative_attention_num_buckets")
    return Architecture(
        model_type, name, small_settings(defaults), None, None, batch, paddings, spread
    )


def small_settings(defaults: PretrainedConfig) -> dict[str, Any]:
    """What a configuration class is given, from its defaults."""
    settings = {name: value for name, value in SMALL.items() if hasattr(defaults, name)}
    for name, value in vars(defaults).items():
        if isinstance(value, str) and value in SMOOTH:
            settings[name] = SMOOTH[value]
    return settings
