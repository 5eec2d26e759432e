"""Checks the inputs of an encoder, for its configuration, before anything is computed.

Values are looked at where that costs no wait, as in operator.words.checks: on the CPU, not traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clinattn.operator.packing import mask_from_lengths
from clinattn.operator.rotary import POSITION_DTYPES
from clinattn.operator.visibility import concrete
from clinattn.operator.words.checks import check_tensor

from .config import EncoderConfig

INDEX_DTYPES = (torch.int32, torch.int64)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, *INDEX_DTYPES)
IGNORE = -100  # a label that is not one, as in torch's cross_entropy


def check_inputs(
    config: EncoderConfig,
    inputs: Any,
    positions: Any,
    token_types: Any,
    values: Any,
) -> Tensor:
    """Checks the arguments of Encoder.encode; returns a tensor of the shape of the tokens."""
    check_tensor("a signal" if config.channels else "input_ids", inputs)
    tokens = _check_signal(config, inputs) if config.channels else _check_ids(inputs)
    for name, x in (("positions", positions), ("token_types", token_types), ("values", values)):
        if x is None:
            continue
        check_tensor(name, x)
        if x.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected that of the tokens, "
                f"{tuple(tokens.shape)}"
            )
        if x.device != tokens.device:
            raise ValueError(f"{name} is on {x.device}: expected that of inputs, {tokens.device}")
    _check_positions(config, positions)
    if token_types is not None and not config.token_types:
        raise ValueError("token_types: got some, expected None in an encoder of token_types=0")
    if token_types is not None and token_types.dtype not in INDEX_DTYPES:
        raise TypeError(f"token_types has dtype {token_types.dtype}: expected int32 or int64")
    if (values is not None) != config.numeric_values:
        raise ValueError(
            f"values: expected {'a tensor' if config.numeric_values else 'None'} in an encoder of "
            f"numeric_values={config.numeric_values}"
        )
    if values is not None and (not values.is_floating_point() or values.dtype.itemsize == 1):
        raise TypeError(f"values has dtype {values.dtype}: expected floating, NaN where absent")
    return tokens


def check_indices(config: EncoderConfig, max_seqlen: int) -> None:
    """Checks that the learned positions go as far as the longest sequence."""
    most = config.max_positions - config.position_offset
    if config.positions == "learned" and max_seqlen > most:
        less = f" less position_offset={config.position_offset}" if config.position_offset else ""
        raise ValueError(
            f"a sequence of {max_seqlen} tokens: expected at most "
            f"max_positions={config.max_positions}{less} with learned positions"
        )


def _check_ids(inputs: Tensor) -> Tensor:
    if inputs.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"input_ids has dtype {inputs.dtype}: expected integer token ids, int32 or int64"
        )
    if inputs.dim() not in (1, 2):
        raise ValueError(
            f"input_ids has shape {tuple(inputs.shape)}: expected (T,) with cu_seqlens, "
            "or (B, N) with lengths"
        )
    return inputs


def _check_signal(config: EncoderConfig, inputs: Tensor) -> Tensor:
    if not inputs.is_floating_point():
        raise TypeError(f"a signal of dtype {inputs.dtype}: expected a floating one")
    if inputs.dim() not in (2, 3) or inputs.shape[-1] != config.channels:
        raise ValueError(
            f"a signal of shape {tuple(inputs.shape)}: expected (T, {config.channels}) with "
            f"cu_seqlens, or (B, N, {config.channels}) with lengths"
        )
    return inputs[..., 0]


def _check_positions(config: EncoderConfig, positions: Tensor | None) -> None:
    if positions is None:
        if config.positions == "rotary_time":
            raise ValueError("positions: got None, expected the time of each token (rotary_time)")
    elif config.positions == "learned" and positions.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"positions has dtype {positions.dtype}: expected integers, int32 or int64, as learned "
            "positions are; real-valued ones need positions='rotary'"
        )
    elif config.rotary and positions.dtype not in POSITION_DTYPES:
        served = ", ".join(map(str, POSITION_DTYPES))
        raise TypeError(f"positions has dtype {positions.dtype}: expected one of {served}")
    elif positions.dtype.is_complex or positions.dtype == torch.bool:
        raise TypeError(f"positions has dtype {positions.dtype}: expected real numbers")


def check_rows(
    config: EncoderConfig, inputs: Tensor, positions: Tensor | None, token_types: Tensor | None
) -> None:
    """Checks that every index of a table has a row there, for tokens as the layout holds them."""
    if not config.channels:
        _check_range("input_ids", inputs, config.vocab_size, "vocab_size")
    if token_types is not None:
        _check_range("token_types", token_types, config.token_types, "token_types")
    if positions is not None and config.positions == "learned":
        most = config.max_positions - config.position_offset
        words = "max_positions less position_offset" if config.position_offset else "max_positions"
        _check_range("positions", positions, most, words)


def _check_range(name: str, x: Tensor, rows: int, words: str) -> None:
    if not concrete(x) or x.numel() == 0:
        return
    low, high = (y.item() for y in torch.aminmax(x))
    if low < 0 or high >= rows:
        raise ValueError(
            f"{name}: got values from {low} to {high}, expected 0 to {rows - 1} ({words}={rows})"
        )


def check_attention_mask(mask: Any, tokens: Tensor) -> None:
    """Checks a mask (B, N) like the tokens: 1 = a token, and all tokens of a row in one run."""
    check_tensor("attention_mask", mask)
    if mask.dtype not in MASK_DTYPES:
        raise TypeError(f"attention_mask has dtype {mask.dtype}: expected bool, or integer 0 and 1")
    if mask.shape != tokens.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: expected that of the tokens, "
            f"{tuple(tokens.shape)}"
        )
    if mask.device != tokens.device and mask.device.type != "cpu":
        raise ValueError(f"attention_mask is on {mask.device}: expected {tokens.device} or the CPU")
    if not concrete(mask) or mask.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(mask.int()))
    if low < 0 or high > 1:
        raise ValueError(f"attention_mask: got values from {low} to {high}, expected 0 and 1")
    begins = mask.int().diff(dim=1, prepend=mask.new_zeros(len(mask), 1).int()) == 1
    gaps = (begins.sum(1) > 1).nonzero()
    if len(gaps):
        raise ValueError(
            f"attention_mask: got zeros between the tokens of row {int(gaps[0])}, expected padding "
            "on the left or right"
        )


def check_token_labels(
    labels: Any, inputs: Any, lengths: Any, attention_mask: Any, classes: int
) -> None:
    """Checks labels like the ids: int64, a class or IGNORE for each token that is not padding.

    lengths, attention_mask: as the caller gave them; shapes and types are checked elsewhere.
    """
    check_tensor("labels", labels)
    check_tensor("input_ids", inputs)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype}: expected torch.int64")
    _check_like("labels", labels, tuple(inputs.shape), inputs)
    padding = []
    for name, x in (("lengths", lengths), ("attention_mask", attention_mask)):
        if x is not None:
            check_tensor(name, x)
            padding.append(x)
    if not all(map(concrete, (labels, *padding))):
        return
    for x in padding:
        if x.shape == labels.shape:
            labels = labels.where(x.ne(0), IGNORE)
        elif x.shape == labels.shape[:1] and x.dtype in INDEX_DTYPES and labels.dim() == 2:
            labels = labels.where(mask_from_lengths(x, labels.shape[1]), IGNORE)
    _check_classes("labels", labels, classes)


def check_sequence_labels(name: str, labels: Any, sequences: int, classes: int, x: Tensor) -> None:
    """(sequences,) int64, a class or IGNORE each; or floating (sequences, classes), from 0 to 1."""
    check_tensor(name, labels)
    if labels.is_floating_point() and labels.dtype.itemsize > 1:
        _check_like(name, labels, (sequences, classes), x)
        if concrete(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(f"{name}: got floating values beyond 0 to 1, expected shares")
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {labels.dtype}: expected torch.int64 or a floating one")
    _check_like(name, labels, (sequences,), x)
    _check_classes(name, labels, classes)


def _check_like(name: str, labels: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}: expected {shape}")
    if labels.device != x.device:
        raise ValueError(f"{name} is on {labels.device}: expected that of inputs, {x.device}")


def _check_classes(name: str, labels: Tensor, classes: int) -> None:
    if not concrete(labels):
        return
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(
            f"{name}: got {int(wrong[0])}, expected 0 to {classes - 1}, or {IGNORE} for none"
        )
