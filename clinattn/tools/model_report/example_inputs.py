"""Batches for small models: sequences of different lengths, padded as the kind of model allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["none", "left", "right"]
FIRST_ID = 5  # the ids below are left to special tokens


class ExampleInputs(NamedTuple):
    """Keyword arguments of a model, and for each of its outputs that counts what is no padding.

    real: by the name of an output, bool over its first dimensions; None where all is real.
    """

    inputs: dict[str, Tensor]
    real: dict[str, Tensor | None]

    def to(self, dtype: torch.dtype, device: torch.device) -> ExampleInputs:
        """Returns the inputs on `device`, those of floating point in `dtype`."""
        inputs = {
            name: x.to(device, dtype if x.is_floating_point() else x.dtype)
            for name, x in self.inputs.items()
        }
        real = {name: None if x is None else x.to(device) for name, x in self.real.items()}
        return ExampleInputs(inputs, real)


MakeBatch = Callable[[Any, Sequence[int], Padding], ExampleInputs]


def padding_mask(lengths: Sequence[int], padding: Padding) -> Tensor:
    """(B, max(lengths)) bool, True at tokens; with "none" every row is as long as the longest."""
    longest = max(lengths)
    if padding == "none":
        return torch.ones(len(lengths), longest, dtype=torch.bool)
    at, sizes = torch.arange(longest), torch.tensor(lengths)[:, None]
    return at < sizes if padding == "right" else at >= longest - sizes


def token_ids(real: Tensor, vocabulary: int, pad_id: int | None) -> Tensor:
    ids = torch.randint(FIRST_ID, vocabulary, real.shape)
    return ids.masked_fill(~real, pad_id or 0)


def text(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """Token ids; without padding no mask is given, as is usual."""
    real = padding_mask(lengths, padding)
    inputs = {"input_ids": token_ids(real, config.vocab_size, config.pad_token_id)}
    if padding != "none":
        inputs["attention_mask"] = real.long()
    return ExampleInputs(inputs, {"last_hidden_state": real})


def text_with_global_token(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """The first token of each sequence sees all and is seen by all."""
    inputs, outputs = text(config, lengths, padding)
    real = padding_mask(lengths, padding)
    first = torch.zeros_like(real, dtype=torch.long)
    first[torch.arange(len(lengths)), real.int().argmax(1)] = 1
    inputs["global_attention_mask"] = first
    return ExampleInputs(inputs, outputs)


def text_to_text(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """Encoder and decoder get sequences of other lengths than each other."""
    inputs, _ = text(config, lengths, padding)
    encoded, decoded = padding_mask(lengths, padding), padding_mask(answers(lengths), padding)
    inputs["decoder_input_ids"] = token_ids(decoded, config.vocab_size, config.pad_token_id)
    if padding != "none":
        inputs["decoder_attention_mask"] = decoded.long()
    return ExampleInputs(
        inputs, {"last_hidden_state": decoded, "encoder_last_hidden_state": encoded}
    )


def answers(lengths: Sequence[int]) -> list[int]:
    """Lengths for a decoder: shorter, and longest where the encoder's are not."""
    return [1 + length // 2 for length in reversed(lengths)]


def image(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(len(lengths), config.num_channels, height, width)
    return ExampleInputs({"pixel_values": pixels}, {"last_hidden_state": None})


def waveform(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """Returns sound whose samples the convolutions turn into `lengths` frames."""
    real_frames, samples = padding_mask(lengths, padding), torch.tensor(lengths)
    if padding == "none":
        samples = samples.max().expand_as(samples)
    for kernel, stride in zip(
        reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
    ):
        samples = (samples - 1) * stride + kernel
    real = padding_mask(samples.tolist(), padding)
    inputs = {"input_values": torch.randn(real.shape) * real}
    if padding != "none":
        inputs["attention_mask"] = real.long()
    return ExampleInputs(inputs, {"last_hidden_state": real_frames})


def spectrogram_to_text(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """Spectrograms are of one length; what is decoded is not."""
    decoded = padding_mask(answers(lengths), padding)
    frames = 2 * config.max_source_positions
    inputs = {
        "input_features": torch.randn(len(lengths), config.num_mel_bins, frames),
        "decoder_input_ids": token_ids(decoded, config.vocab_size, config.pad_token_id),
    }
    if padding != "none":
        inputs["decoder_attention_mask"] = decoded.long()
    return ExampleInputs(inputs, {"last_hidden_state": decoded, "encoder_last_hidden_state": None})


def patched_series(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    shape = (len(lengths), config.context_length, config.num_input_channels)
    return ExampleInputs({"past_values": torch.randn(shape)}, {"last_hidden_state": None})


def observed_series(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """Some past values were not observed; attention sees them all the same."""
    past = config.context_length + max(config.lags_sequence)
    shape, features = (len(lengths), past), config.num_time_features
    future = (len(lengths), config.prediction_length)
    inputs = {
        "past_values": torch.randn(shape),
        "past_time_features": torch.randn(*shape, features),
        "past_observed_mask": (torch.rand(shape) < 0.8).float(),
        "future_values": torch.randn(future),
        "future_time_features": torch.randn(*future, features),
    }
    return ExampleInputs(inputs, {"last_hidden_state": None, "encoder_last_hidden_state": None})


def padded_series(config: Any, lengths: Sequence[int], padding: Padding) -> ExampleInputs:
    """`lengths` patches of a series; its model makes a floating mask of four dimensions."""
    real = padding_mask(lengths, padding)
    values = real.repeat_interleave(config.patch_length, 1)
    inputs = {
        "past_values": torch.randn(values.shape) * values,
        "past_values_padding": (~values).float(),
        "freq": torch.arange(len(lengths))[:, None] % config.freq_size,
    }
    return ExampleInputs(inputs, {"last_hidden_state": real})


def outputs_of(model_output: Mapping[str, Any], real: Mapping[str, Tensor | None]) -> list[Tensor]:
    """The outputs named in `real`, each (..., C) of what is no padding."""
    return [
        model_output[name] if mask is None else model_output[name][mask]
        for name, mask in real.items()
    ]
