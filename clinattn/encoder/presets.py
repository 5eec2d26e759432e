"""The published clinical models as encoder shapes, each with its source."""

from __future__ import annotations

from dataclasses import replace

from .config import PRESETS, EncoderConfig


def _global_every_third(num_layers: int, window: int) -> tuple[int | None, ...]:
    return tuple(window if layer % 3 else None for layer in range(num_layers))


# A period of ModernBERT's layers at a quarter of its width: for laptops and tests.
TINY = EncoderConfig(
    vocab_size=8192,
    hidden_size=192,
    num_layers=3,
    num_heads=3,
    intermediate_size=288,
    max_positions=8192,
    first_norm=False,
    rotary_base=160_000.0,
    windows=_global_every_third(3, 64),
)

# huggingface.co/emilyalsentzer/Bio_ClinicalBERT config.json (BERT base cased)
CLINICALBERT = EncoderConfig(
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
    classifier="tanh",
    token_types=2,
    embedding_dropout=0.1,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)

# huggingface.co/UFNLP/gatortron-base config.json. Megatron-BERT: the embedding has no norm, each
# half of a layer has one before it, and one follows the last layer.
GATORTRON_BASE = replace(
    CLINICALBERT,
    vocab_size=50_176,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    intermediate_size=4096,
    embedding_norm=False,
    norm="pre",
    windows=(),
)

# huggingface.co/yikuan8/Clinical-Longformer, by the config.json of its fine-tunes. A window of 512
# is 256 tokens each side; 4,098 positions less RoBERTa's two that stand for padding are 4,096.
CLINICAL_LONGFORMER = replace(
    CLINICALBERT,
    vocab_size=50_265,
    max_positions=4098,
    position_offset=2,
    norm_eps=1e-5,
    token_types=1,
    windows=(256,) * 12,
    global_prefix=1,
    global_projections=True,
)

# github.com/lindvalllab/BioClinical-ModernBERT pretraining_resources/configs/phase1/
# phase1_base.yaml and phase1_large.yaml; local_attention 128 means |i - j| <= 64.
BIOCLINICAL_MODERNBERT_BASE = EncoderConfig(
    vocab_size=50_368,
    hidden_size=768,
    num_layers=22,
    num_heads=12,
    intermediate_size=1152,
    max_positions=8192,
    first_norm=False,
    rotary_base=160_000.0,
    windows=_global_every_third(22, 64),
)
BIOCLINICAL_MODERNBERT_LARGE = replace(
    BIOCLINICAL_MODERNBERT_BASE,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    intermediate_size=2624,
    windows=_global_every_third(28, 64),
)

# github.com/cumc-dbmi/cehrbert src/cehrbert/models/hf_models/config.py, defaults; BERT's layers.
# Differences: CEHR-BERT joins sines of learned frequency of age and date to the code's embedding
# by a dense layer, and adds the visit segment after it; here value, segment (as token type) and
# sinusoidal position, such as the number of the visit, are added.
CEHR_BERT = replace(
    CLINICALBERT,
    vocab_size=20_000,
    hidden_size=128,
    num_heads=8,
    intermediate_size=2048,
    positions="sinusoidal",
    numeric_values=True,
    token_types=3,
    embedding_norm=False,
    embedding_dropout=0.0,
)

# github.com/som-shahlab/femr src/femr/models/{config,transformer}.py, defaults: rotary at age in
# days, each token sees itself and 495 before it. FEMR's frequencies are 10000 ** -(2 i / 31) for
# the 32 pairs i, which is the base below. Differences: a block's two fused linear layers are
# four here (the same function), and pairs are (i, i + 32) instead of neighbours (the same up to
# the order of features).
CLMBR = EncoderConfig(
    vocab_size=32_768,
    hidden_size=768,
    num_layers=6,
    num_heads=12,
    intermediate_size=3072,
    max_positions=16_384,
    norm_kind="rms",
    norm_eps=1e-6,
    linear_bias=True,
    parallel=True,
    positions="rotary_time",
    rotary_base_window=10_000.0 ** (64 / 31),
    activation="gelu",
    windows=(495,) * 6,
    causal=True,
    pooling="last",
)

# By name: the shape, and what it is in a few words
PUBLISHED = {
    "tiny": (TINY, "three narrow layers of ModernBERT's kinds, for laptops and tests"),
    "clinicalbert": (CLINICALBERT, "Bio_ClinicalBERT: notes of up to 512 tokens"),
    "gatortron-base": (GATORTRON_BASE, "GatorTron: notes of up to 512 tokens, 24 layers"),
    "clinical-longformer": (CLINICAL_LONGFORMER, "notes of up to 4,096 tokens, windows of 512"),
    "bioclinical-modernbert-base": (
        BIOCLINICAL_MODERNBERT_BASE,
        "notes of up to 8,192 tokens, windows in two of three layers",
    ),
    "bioclinical-modernbert-large": (
        BIOCLINICAL_MODERNBERT_LARGE,
        "the same with 28 layers, 1,024 wide",
    ),
    "cehr-bert": (CEHR_BERT, "CEHR-BERT: visits of codes with values"),
    "clmbr": (CLMBR, "CLMBR of FEMR: causal timelines, positions by age"),
}
PRESETS.update({name: config for name, (config, _) in PUBLISHED.items()})
DESCRIPTIONS = {name: description for name, (_, description) in PUBLISHED.items()}
