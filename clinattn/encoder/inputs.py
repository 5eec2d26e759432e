"""What an encoder of a given shape may be given, checked before anything is computed."""

from __future__ import annotations

from torch import Tensor

from .config import EncoderConfig


def check_inputs(
    config: EncoderConfig,
    inputs: Tensor,
    positions: Tensor | None,
    token_types: Tensor | None,
    values: Tensor | None,
) -> Tensor:
    """The arguments of Encoder.encode; returns a tensor of the shape of the tokens."""
    tokens = _check_signal(config, inputs) if config.channels else _check_ids(inputs)
    for name, x in (("positions", positions), ("token_types", token_types), ("values", values)):
        if x is not None and x.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: expected that of the tokens, "
                f"{tuple(tokens.shape)}"
            )
    _check_positions(config, positions)
    if token_types is not None and not config.token_types:
        raise ValueError("token_types: got some, expected None in an encoder of token_types=0")
    if (values is not None) != config.numeric_values:
        raise ValueError(
            f"values: expected {'a tensor' if config.numeric_values else 'None'} in an encoder of "
            f"numeric_values={config.numeric_values}"
        )
    if values is not None and not values.is_floating_point():
        raise TypeError(f"values has dtype {values.dtype}: expected floating, NaN where absent")
    return tokens


def check_indices(config: EncoderConfig, max_seqlen: int) -> None:
    """Whether the learned positions go as far as the longest sequence."""
    most = config.max_positions - config.position_offset
    if config.positions == "learned" and max_seqlen > most:
        less = f" less position_offset={config.position_offset}" if config.position_offset else ""
        raise ValueError(
            f"a sequence of {max_seqlen} tokens: expected at most "
            f"max_positions={config.max_positions}{less} with learned positions"
        )


def _check_ids(inputs: Tensor) -> Tensor:
    if inputs.is_floating_point():
        raise TypeError(f"input_ids has dtype {inputs.dtype}: expected integer token ids")
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
    elif config.positions == "learned" and positions.is_floating_point():
        raise TypeError(
            f"positions has dtype {positions.dtype}: learned positions expect integers; "
            "real-valued ones need positions='rotary'"
        )
