"""A small call of every public function with all of its arguments, and what may be wrong there."""

import numpy as np
import torch
from torch import nn

import clinattn
from clinattn import encoder
from clinattn.integrations import flash_attn as fa
from clinattn.integrations import xformers as xf
from clinattn.integrations.flash_attn import bert_padding, flash_attn_interface
from clinattn.integrations.torch.modules import adapt
from clinattn.operator import packing

Q, T, D = torch.randn(2, 4, 5, 8), torch.randn(10, 4, 8), torch.randn(2, 5, 4, 8)
X = torch.randn(2, 5, 32)
ENDS = torch.tensor([0, 6, 10], dtype=torch.int32)
LENGTHS = torch.tensor([5, 3])
TIMES = torch.arange(5.0).repeat(2, 1)
ONES, TABLE = torch.ones(4), torch.ones(4, 3)
CACHE = torch.randn(2, 9, 4, 8)
PAGES = torch.randn(4, 4, 4, 8)
BLOCKS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
IDS = torch.randint(0, 20, (2, 5))
TYPES, POSITIONS = torch.zeros_like(IDS), torch.arange(5).repeat(2, 1)
ROWS, PLACES = torch.randn(4, 3), torch.arange(4)

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16,
    "max_positions": 32,
}  # fmt: skip


def config(**changed):
    return encoder.EncoderConfig(**SIZES | changed)


LEARNED = encoder.Encoder(config(positions="learned", token_types=2))
TIMED = encoder.Encoder(config(positions="rotary_time"))
VALUED = encoder.Encoder(config(numeric_values=True))
MASKED = encoder.MaskedLanguageModel(config())
CAUSAL = encoder.CausalLanguageModel(config(causal=True))
CLASSIFIER = encoder.SequenceClassifier(config(), 3)
PRETRAINING = encoder.PretrainingModel(config())
MULTIHEAD = nn.MultiheadAttention(32, 4, batch_first=True)
adapt(MULTIHEAD)


def multihead(**words):
    return MULTIHEAD(**words, need_weights=False)


SCORES = {
    "dropout_p": 0.0, "is_causal": False, "scale": 0.5, "enable_gqa": False, "window": 2,
    "bottom_right": False, "time_window": 1.0, "time_decay": ONES, "alibi_slopes": ONES,
    "relative_bias": TABLE, "softcap": 5.0, "global_prefix": 1, "return_lse": False,
    "backend": "reference",
}  # fmt: skip
FLASH = {
    "dropout_p": 0.0, "softmax_scale": 0.5, "causal": False, "window_size": (2, 2), "softcap": 0.0,
    "alibi_slopes": ONES, "return_attn_probs": False,
}  # fmt: skip
HOOK = {
    "dropout_p": 0.0, "softmax_scale": 0.5, "causal": False, "window_size_left": -1,
    "window_size_right": 2, "softcap": 0.0, "alibi_slopes": ONES, "return_softmax": False,
}  # fmt: skip
PACKED = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 6, "max_seqlen_k": 6}

CALLS = {
    "fused_attention": (clinattn.fused_attention, {
        "query": Q, "key": Q, "value": Q, "attn_mask": torch.ones(5, 5).bool(),
        "kv_lengths": LENGTHS, "q_lengths": LENGTHS, "segment_ids": TYPES, "times": TIMES, **SCORES,
    }),
    "fused_attention_varlen": (clinattn.fused_attention_varlen, {
        "query": T, "key": T, "value": T, "times": torch.arange(10.0), **PACKED, **SCORES,
    }),
    "FusedAttention.apply": (clinattn.FusedAttention.apply, {
        "q": Q, "k": Q, "v": Q, "mask": torch.ones(5, 5).bool(), "q_lengths": LENGTHS.int(),
        "kv_start": TYPES[:, 0].int(), "kv_end": LENGTHS.int(), "slopes": ONES[None],
        "relative": TABLE, "scale": 0.5, "window_left": 2, "window_right": 2,
        "bottom_right": False, "max_seqlen_q": 5, "max_seqlen_k": 5, "softcap": 0.0,
        "global_prefix": 0, "dropout_p": 0.0, "backend": "reference", "return_lse": False,
    }),
    "rotary": (clinattn.rotary, {
        "q": Q, "k": Q, "positions": POSITIONS, "theta": 1e4, "rotary_dim": 8,
        "interleaved": False, "backend": "reference",
    }),
    "rotary packed": (clinattn.rotary, {
        "q": T, "k": T, "positions": torch.arange(10), "cu_seqlens": ENDS,
    }),
    "t5_relative_bias": (clinattn.t5_relative_bias, {
        "weight": torch.randn(32, 4), "bidirectional": True, "max_distance": 128,
    }),
    "replace_attention": (clinattn.replace_attention, {"model": nn.MultiheadAttention(8, 2)}),
    "multihead": (multihead, {
        "query": X, "key": X, "value": X, "key_padding_mask": TYPES.bool(),
        "attn_mask": torch.zeros(5, 5).bool(), "is_causal": False,
    }),
    "flash_attn_func": (fa.flash_attn_func, {"q": D, "k": D, "v": D, **FLASH}),
    "flash_attn_varlen_func": (fa.flash_attn_varlen_func, {
        "q": T, "k": T, "v": T, **PACKED, **FLASH,
    }),
    "flash_attn pages": (fa.flash_attn_varlen_func, {
        "q": T, "k": PAGES, "v": PAGES, "block_table": BLOCKS, **PACKED,
    }),
    "flash_attn_qkvpacked_func": (fa.flash_attn_qkvpacked_func, {
        "qkv": torch.randn(2, 5, 3, 4, 8),
    }),
    "flash_attn_kvpacked_func": (fa.flash_attn_kvpacked_func, {
        "q": D, "kv": torch.randn(2, 5, 2, 4, 8),
    }),
    "flash_attn_with_kvcache": (fa.flash_attn_with_kvcache, {
        "q": D, "k_cache": CACHE, "v_cache": CACHE.clone(), "k": D, "v": D,
        "rotary_cos": torch.rand(9, 4), "rotary_sin": torch.rand(9, 4),
        "cache_seqlens": torch.tensor([1, 2], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([1, 0]), "cache_leftpad": torch.zeros(2).int(),
        "softmax_scale": 0.5, "causal": True, "window_size": (2, 2), "softcap": 0.0,
        "rotary_interleaved": True, "alibi_slopes": ONES, "num_splits": 0,
        "return_softmax_lse": False,
    }),
    "flash_attn cache of pages": (fa.flash_attn_with_kvcache, {
        "q": D, "k_cache": PAGES, "v_cache": PAGES.clone(), "block_table": BLOCKS,
        "cache_seqlens": torch.tensor([5, 6], dtype=torch.int32),
    }),
    "_flash_attn_forward": (flash_attn_interface._flash_attn_forward, {
        "q": D, "k": D, "v": D, **HOOK,
    }),
    "_flash_attn_varlen_forward": (flash_attn_interface._flash_attn_varlen_forward, {
        "q": T, "k": T, "v": T, **PACKED, **HOOK,
    }),
    "_flash_attn_backward": (flash_attn_interface._flash_attn_backward, {
        "dout": D, "q": D, "k": D, "v": D, "out": D, "softmax_lse": torch.zeros(2, 4, 5),
        "dq": D.clone(), "dk": D.clone(), "dv": D.clone(), "dropout_p": 0.1, "softmax_scale": 0.5,
        "causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "alibi_slopes": None, "deterministic": False, "rng_state": torch.zeros(1).long(),
    }),
    "unpad_input": (bert_padding.unpad_input, {
        "hidden_states": X, "attention_mask": 1 - TYPES, "unused_mask": 1 - TYPES,
    }),
    "unpad_input_for_concatenated_sequences": (
        bert_padding.unpad_input_for_concatenated_sequences,
        {"hidden_states": X, "attention_mask_in_length": torch.tensor([[2, 1, 0, 0, 0]] * 2)},
    ),
    "index_first_axis": (bert_padding.index_first_axis, {"input": ROWS, "indices": PLACES}),
    "index_put_first_axis": (bert_padding.index_put_first_axis, {
        "values": ROWS, "indices": PLACES, "first_axis_dim": 5,
    }),
    "memory_efficient_attention": (xf.memory_efficient_attention, {
        "query": D, "key": D, "value": D, "attn_bias": torch.zeros(2, 4, 5, 5), "p": 0.0,
        "scale": 0.5,
    }),
    "memory_efficient_attention_backward": (xf.memory_efficient_attention_backward, {
        "grad": D, "output": D, "lse": torch.randn(2, 4, 5), "query": D, "key": D, "value": D,
        "attn_bias": torch.zeros(2, 4, 5, 5), "p": 0.0, "scale": 0.5,
    }),
    "memory_efficient_attention_partial": (xf.memory_efficient_attention_partial, {
        "query": D, "key": D, "value": D, "p": 0.0,
    }),
    "merge_attentions": (xf.merge_attentions, {
        "attn_split": torch.randn(2, 2, 5, 4, 8), "lse_split": torch.randn(2, 2, 4, 5),
    }),
    "BlockDiagonalMask": (xf.attn_bias.BlockDiagonalMask.from_seqlens, {
        "q_seqlen": [2, 3], "kv_seqlen": [3, 2],
    }),
    "BlockDiagonalPaddedKeysMask": (xf.attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens, {
        "q_seqlen": [2, 3], "kv_padding": 4, "kv_seqlen": [3, 2],
    }),
    "BlockDiagonalGappyKeysMask": (xf.BlockDiagonalGappyKeysMask.from_seqlens, {
        "q_seqlen": [2, 3], "kv_seqstarts": [1, 4, 7], "kv_seqlen": [3, 2],
    }),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (
        xf.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local, {
            "q_seqlen": [2, 3], "kv_padding": 4, "kv_seqlen": [3, 2], "window_left": 1,
            "window_right": 0,
        },
    ),
    "PagedBlockDiagonalPaddedKeysMask": (xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens, {
        "q_seqlen": [2, 3], "kv_seqlen": [3, 2], "block_tables": BLOCKS, "page_size": 4,
    }),
    "PagedBlockDiagonalGappyKeysMask": (xf.PagedBlockDiagonalGappyKeysMask.from_seqlens, {
        "q_seqlen": [2, 3], "kv_seqstarts": [1, 0], "kv_seqlen": [3, 2], "block_tables": BLOCKS,
        "page_size": 4,
    }),
    "make_paged": (
        xf.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 4, [3, 2]).make_paged, {
            "block_tables": BLOCKS, "page_size": 4,
            "paged_type": xf.PagedBlockDiagonalPaddedKeysMask,
        },
    ),
    "make_paged of gaps": (
        xf.BlockDiagonalGappyKeysMask.from_seqlens([2, 3], [1, 8, 16], [3, 2]).make_paged, {
            "block_tables": BLOCKS, "page_size": 4, "notional_padding": 8,
            "paged_type": xf.PagedBlockDiagonalGappyKeysMask,
        },
    ),
    "from_seqlens_inplace": (
        xf.BlockDiagonalMask.from_seqlens([2, 3]).q_seqinfo.from_seqlens_inplace,
        {"seqlens": [1, 2]},
    ),
    "LocalAttentionFromBottomRightMask": (xf.attn_bias.LocalAttentionFromBottomRightMask, {
        "window_left": 1, "window_right": 2,
    }),
    "cu_seqlens_from_lengths": (packing.cu_seqlens_from_lengths, {"lengths": LENGTHS}),
    "cu_seqlens_from_mask": (packing.cu_seqlens_from_mask, {"mask": 1 - TYPES}),
    "mask_from_lengths": (packing.mask_from_lengths, {"lengths": LENGTHS, "seqlen": 5}),
    "unpad": (packing.unpad, {"padded": X, "lengths": LENGTHS}),
    "unpad by mask": (packing.unpad, {"padded": X, "mask": 1 - TYPES}),
    "take": (packing.take, {"padded": X, "indices": PLACES}),
    "pad": (packing.pad, {"values": ROWS, "indices": PLACES, "batch": 2, "seqlen": 3}),
    "batch_by_tokens": (packing.batch_by_tokens, {
        "lengths": [3, 4], "max_tokens": 9, "padded": False,
    }),
    "EncoderConfig": (config, {
        **SIZES, "channels": 0, "numeric_values": False, "token_types": 2, "embedding_norm": True,
        "norm": "pre", "norm_kind": "layer", "norm_eps": 1e-5, "norm_bias": False,
        "linear_bias": False, "first_norm": True, "parallel": False, "positions": "learned",
        "position_offset": 1, "rotary_base": 1e4, "rotary_base_window": 1e4, "activation": "gelu",
        "windows": (2,), "causal": False, "global_prefix": 0, "global_projections": False,
        "pooling": "first", "classifier": "norm", "embedding_dropout": 0.0, "hidden_dropout": 0.0,
        "attention_dropout": 0.0, "classifier_dropout": 0.0, "attention": "clinattn",
    }),
    "EncoderConfig.preset": (encoder.EncoderConfig.preset, {"name": "tiny"}),
    "Encoder": (encoder.Encoder, {"config": config()}),
    "SequenceClassifier": (encoder.SequenceClassifier, {"config": config(), "num_labels": 3}),
    "encoder packed": (LEARNED, {
        "inputs": IDS.flatten(), "cu_seqlens": ENDS, "max_seqlen": 6,
        "positions": torch.arange(10), "token_types": TYPES.flatten(),
    }),
    "encoder padded": (LEARNED, {
        "inputs": IDS, "lengths": LENGTHS, "positions": POSITIONS, "token_types": TYPES,
        "layout": "padded",
    }),
    "encoder with times": (TIMED, {"inputs": IDS, "lengths": LENGTHS, "positions": TIMES}),
    "encoder with values": (VALUED, {"inputs": IDS, "values": TIMES}),
    "masked model": (MASKED, {"input_ids": IDS, "labels": IDS, "lengths": LENGTHS}),
    "causal model": (CAUSAL, {"input_ids": IDS, "labels": IDS, "lengths": LENGTHS}),
    "classifier": (CLASSIFIER, {"inputs": IDS, "labels": LENGTHS - 3, "lengths": LENGTHS}),
    "classifier of shares": (CLASSIFIER, {"inputs": IDS, "labels": torch.rand(2, 3)}),
    "pretraining": (PRETRAINING, {
        "input_ids": IDS, "labels": IDS, "next_labels": TYPES[:, 0], "lengths": LENGTHS,
    }),
    "patches": (encoder.patches, {
        "signal": torch.randn(2, 10, 3), "size": 2, "lengths": LENGTHS + 4,
    }),
}  # fmt: skip

PARTS = [torch.randn(2, 3), torch.randn(3, 3)]
ANYWHERE = {
    "object": object(), "str": "yes", "bytes": b"x", "list": [1.0], "dict": {}, "tuple": (),
    "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "1e39": 1e39, "1e-50": 1e-50,
    "-1": -1, "2.5": 2.5, "complex": 1j, "numpy nan": np.float32("nan"), "numpy bool": np.bool_(1),
    "True": True, "None": None, "tensor": torch.tensor(2.5), "2^63": 2**63, "-2^70": -(2**70),
    "10^400": 10**400, "nested": torch.nested.nested_tensor(PARTS),
    "jagged": torch.nested.nested_tensor(PARTS, layout=torch.jagged),
}  # fmt: skip
FOR_TENSORS = {
    "sparse": lambda x: x.to_sparse(),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x.bool(),
    "int8": lambda x: x.to(torch.int8),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "numpy": lambda x: x.numpy(),
    "another dimension": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "a row less": lambda x: x[:-1],
    "empty": lambda x: x[:0],
    "a feature less": lambda x: x[..., :-1],
    "-200": lambda x: x * 0 - 200,
    "1000": lambda x: x * 0 + 1000,
    "huge": lambda x: x * 0 + 2**40,
    "nan": lambda x: x * float("nan"),
}
PAIRS = {
    "three": (1, 2, 3), "floats": (1.0, 2.0), "strs": ("a", "b"), "bools": (True, False),
    "large": (2**63, 2**70), "small": (-(2**70), -3), "nans": (float("nan"), 1),
}  # fmt: skip


def wrong_for(value):
    """(id, something to give for it), of which a call may take what makes sense."""
    yield from ANYWHERE.items()
    if isinstance(value, torch.Tensor):
        for name, change in FOR_TENSORS.items():
            if not (name == "sparse" and value.dtype == torch.bool):
                yield name, change(value)
    if isinstance(value, (tuple, list)):
        yield from PAIRS.items()
