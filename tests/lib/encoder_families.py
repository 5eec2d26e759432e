"""Small models of transformers, of the families that encoders read."""

from __future__ import annotations

import torch
import transformers

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
}
BERT = {"max_position_embeddings": 30, "hidden_dropout_prob": 0.2, "pad_token_id": 0}
ROBERTA = BERT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
MODERN = {"local_attention": 6, "pad_token_id": 0, "max_position_embeddings": 30}
TYPES = {
    "bert": ("Bert", BERT | {"classifier_dropout": 0.3}),
    "roberta": ("Roberta", ROBERTA),
    "longformer": ("Longformer", ROBERTA | {"attention_window": [4, 6, 8, 4]}),
    "megatron-bert": ("MegatronBert", BERT),
    "modernbert": ("ModernBert", MODERN | {"classifier_pooling": "mean"}),
    "modernbert-bias": (
        "ModernBert",
        MODERN
        | dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    ),
}


def make_theirs(name, task="Model", **more):
    """Random weights large enough for attention and norms to matter."""
    stem, settings = TYPES[name]
    if task == "ForSequenceClassification":
        more["num_labels"] = 3
    config = getattr(transformers, f"{stem}Config")(**SIZES | settings | more)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = getattr(transformers, stem + task)(config).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            x.copy_(torch.randn_like(x) * (0.3 if x.dim() == 2 else 0.2))
            if x.dim() == 1 and "weight" in key:
                x.add_(1)
    return model
