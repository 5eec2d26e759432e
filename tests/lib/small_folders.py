"""Folders of small models of transformers with a WordPiece tokenizer, for texts of a few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the patient has seps ##is and fever no cough . , mg".split()
CLASSES = ("no", "yes", "maybe")
MOST = 24  # tokens that the tokenizer cuts to


def tokenizer(words: Sequence[str] = WORDS) -> Tokenizer:
    """words: those of WordPiece, the five special ones first."""
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.add_special_tokens(list(words[:5]))
    return made


def save(folder, model, fast=True):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    if fast:
        names = {f"{x}_token": f"[{x.upper()}]" for x in ("pad", "unk", "cls", "sep", "mask")}
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer(), model_max_length=MOST, **names
        ).save_pretrained(folder)
    return folder


def configured(kind, **known):
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }
    return kind(**sizes | known)


def save_families(root: Path) -> None:
    """Classifiers bert, modernbert and several (of classes that exclude none), and an encoder."""
    torch.manual_seed(0)
    save(root / "bert", BertForSequenceClassification(configured(BertConfig)))
    several = configured(BertConfig, problem_type="multi_label_classification")
    save(root / "several", BertForSequenceClassification(several))
    ids = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    modern = ModernBertForSequenceClassification(configured(ModernBertConfig, **ids))
    save(root / "modernbert", modern)
    save(root / "encoder", BertModel(configured(BertConfig)))
