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
from clinattn.tools.model_report.example_inputs import MakeBatch, Padding

HIDDEN, INNER, HEADS, LAYERS, EXPERTS = 64, 72, 4, 2, 4  # heads of 16: a quarter may be rotated

SMALL: dict[str, Any] = {
    "vocab_size": 103,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), INNER),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    "num_key_value_heads": HEADS // 2,
    **dict.fromkeys(("head_dim", "d_kv"), HIDDEN // HEADS),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions"), 128),
    "embedding_size": 24,
    "sliding_window": 5,
    "layer_types": None,  # made anew for so few layers
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "v_head_dim": 12,
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


# Model types whose comparison says nothing, with the reasons.
NOT_JUDGED = {
    "data2vec-audio": "has, in bf16, gradients by plain attention that are off by half their size "
    "in the median, and by twice it at worst",
    "deepseek_v4": "has a gradient of one number, a sum whose terms cancel: 2.03 of what is "
    "allowed in fp32 with padding on the right"
}


class NotServed(ValueError):
    """Says why a type has no small model here."""


def model_types() -> list[str]:
    """The types that AutoModel knows."""
    return sorted(set(MODEL_MAPPING_NAMES) & set(CONFIG_MAPPING))


def small_architecture(model_type: str) -> Architecture:
    """Architecture of a type that AutoModel knows; how often it computes attention is not known.

    Raises NotServed with the reason for a type whose inputs nothing here makes.
    """
    if model_type in NOT_JUDGED:
        raise NotServed(NOT_JUDGED[model_type])
    config_class = CONFIG_MAPPING[model_type]
    if config_class.sub_configs:
        raise NotServed("made of several models, most of which are types of their own")
    names = MODEL_MAPPING_NAMES[model_type]
    name = names if isinstance(names, str) else names[0]
    model: Any = getattr(transformers, name)
    defaults = config_class()
    check_stages(defaults)
    batch, paddings = inputs_of(model.main_input_name, defaults)
    # T5's scores have no factor: it is in the weights
    spread = not hasattr(defaults, "relative_attention_num_buckets")
    settings = small_settings(defaults)
    return Architecture(model_type, name, settings, None, None, batch, paddings, spread)


def inputs_of(name: str, defaults: PretrainedConfig) -> tuple[MakeBatch, tuple[Padding, ...]]:
    """Returns what makes the input of this name; some need numbers of the configuration."""
    text = example_inputs.text_to_text if defaults.is_encoder_decoder else example_inputs.text
    made: dict[str, tuple[MakeBatch, tuple[Padding, ...], tuple[str, ...]]] = {
        "input_ids": (text, EITHER_SIDE, ("vocab_size",)),
        "pixel_values": (example_inputs.image, WITHOUT, ("image_size", "num_channels")),
        "input_values": (example_inputs.waveform, RIGHT, ("conv_kernel", "conv_stride")),
    }
    batch, paddings, needed = made.get(name, (text, (), ("-",)))
    if not all(hasattr(defaults, number) for number in needed):
        raise NotServed("takes other inputs than token ids, square images or sampled sound")
    return batch, paddings


def small_settings(defaults: PretrainedConfig) -> dict[str, Any]:
    """Returns the settings for a configuration class with these defaults."""
    settings: dict[str, Any] = {"pad_token_id": 0}
    for name, value in SMALL.items():
        if can_set(defaults, name):
            settings[name] = value
    for name, value in vars(defaults).items():
        if isinstance(value, str) and value in SMOOTH:
            settings[name] = SMOOTH[value]
    kinds = getattr(defaults, "layer_types", None) or ()
    if "linear_attention" in kinds:  # two layers would have no other
        settings["layer_types"] = ["linear_attention", "full_attention"]
    if "qk_rope_head_dim" in settings:  # latent attention, which has all heads
        settings |= {"head_dim": settings["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    rope = getattr(defaults, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        pairs = int(HIDDEN // HEADS * rope.get("partial_rotary_factor", 1.0)) // 2
        sections = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        settings["rope_parameters"] = rope | {"mrope_section": sections}
    if hasattr(defaults, "_experts_implementation"):
        settings["experts_implementation"] = "eager"  # others have no fp64
    return settings


def can_set(defaults: PretrainedConfig, name: str) -> bool:
    """Returns whether a configuration has the name and takes another value for it."""
    own = getattr(type(defaults), defaults.attribute_map.get(name, name), None)
    return hasattr(defaults, name) and not (isinstance(own, property) and own.fset is None)


def check_stages(defaults: PretrainedConfig) -> None:
    """Refuses a type that has a list where others have one number: stages of several sizes."""
    for name, value in SMALL.items():
        if isinstance(value, int) and isinstance(getattr(defaults, name, None), list | tuple):
            if name != "image_size":
                raise NotServed("has stages of several sizes, which are not made small here")
