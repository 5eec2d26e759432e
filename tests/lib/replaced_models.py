"""Small models of transformers whose linear layers are replaced, by family."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from adapted import randomized

from clinattn.encoder import linear
from clinattn.integrations.transformers import around_linear

transformers = pytest.importorskip("transformers")
COMPILED = pytest.mark.skipif(not linear.serves(), reason="needs the compiled linear layers")


SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
    "intermediate_size": 20, "max_position_embeddings": 64, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "pad_token_id": 1,
}  # fmt: skip


BERT = {"PostNorm", "Activated"}


# Configuration, what it is made with besides, and families.
MODELS = {
    "bert": ("Bert", {}, BERT),
    "bert-tanh": ("Bert", {"hidden_act": "gelu_new"}, BERT),
    "bert-relu": ("Bert", {"hidden_act": "relu"}, BERT),
    "bert-silu": ("Bert", {"hidden_act": "silu"}, BERT),
    "bert-chunks": ("Bert", {"chunk_size_feed_forward": 1}, BERT),
    "bert-generation": ("BertGeneration", {}, BERT),
    "big-bird": ("BigBird", {"attention_type": "original_full"}, BERT),
    "camembert": ("Camembert", {}, BERT),
    "data2vec-text": ("Data2VecText", {}, BERT),
    "distilbert": (
        "DistilBert",
        {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 20, "dropout": 0.0,
         "attention_dropout": 0.0},
        {"FeedForward"},
    ),
    "electra": ("Electra", {"embedding_size": 16}, BERT),
    "ernie": ("Ernie", {}, BERT),
    "layoutlm": ("LayoutLM", {}, BERT),
    "longformer": ("Longformer", {"attention_window": 8}, BERT),
    "markuplm": ("MarkupLM", {"max_depth": 5}, BERT),
    "megatron-bert": ("MegatronBert", {}, {"AddedInOrder", "AddedToResidual", "Activated"}),
    "modernbert": (
        "ModernBert",
        {"global_attn_every_n_layers": 2, "local_attention": 16, "mlp_dropout": 0.0},
        {"Gated"},
    ),
    "modernbert-silu": ("ModernBert", {"hidden_activation": "silu"}, {"Gated"}),
    "rembert": ("RemBert", {"input_embedding_size": 16}, BERT),
    "roberta": ("Roberta", {}, BERT),
    "roc-bert": (
        "RoCBert",
        {"pronunciation_vocab_size": 9, "shape_vocab_size": 9, "pronunciation_embed_dim": 8,
         "shape_embed_dim": 8},
        BERT,
    ),
    "roformer": ("RoFormer", {"embedding_size": 24}, BERT),
    "splinter": ("Splinter", {}, BERT),
    "tapas": ("Tapas", {}, BERT),
    "visual_bert": ("VisualBert", {"visual_embedding_dim": 8}, BERT),
    "xlm-roberta": ("XLMRoberta", {}, BERT),
}  # fmt: skip


SHAPES = ["bert", "longformer", "modernbert", "distilbert", "megatron-bert"]


# fp32, weights of bf16, and autocast
NUMBERS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
}


def make_model(name, **changed):
    prefix, more, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, prefix + "Config")(**{**SMALL, **more, **changed})
    cls = getattr(transformers, prefix + ("Encoder" if name == "bert-generation" else "Model"))
    return randomized(cls(config))


def make_inputs(n=29):
    torch.manual_seed(1)
    valid = torch.ones(3, n, dtype=torch.bool)
    valid[1, n // 2 :] = valid[2, -1:] = False
    return {"input_ids": torch.randint(3, 50, (3, n)), "attention_mask": valid.long()}, valid


def around(model):
    """The families in a model."""
    found = (type(m) for m in model.modules() if isinstance(m, around_linear.AroundLinear))
    return {cls.__mro__[1].__name__ for cls in found}


@contextmanager
def watched_calls():
    """Calls of the compiled layers: activation, gate, whether a residual and a norm follow."""
    seen = []
    real = linear._computed

    def watched(form, layer, x, dropout, residual, norm):
        seen.append((form.activation, form.gated, residual is not None, norm is not None))
        return real(form, layer, x, dropout, residual, norm)

    with mock.patch.object(linear, "_computed", watched):
        yield seen
