"""The engine that the settings of a run ask for, and what they ask of each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clinattn.encoder import Encoder

from .clock import Clock
from .engine import Engine, Replicated
from .ranks import Ranks
from .settings import TrainingSettings


def engine_of(
    model: nn.Module, settings: TrainingSettings, ranks: Ranks, device: torch.device, clock: Clock
) -> Engine:
    """Returns the engine that the settings ask for, of a model whose weights are set.

    Raises ValueError for shards on one process, ImportError where a package for them is missing.
    """
    prepare_layers(layers_of(model), settings)
    if settings.shard:
        from .sharded import Sharded  # it takes seconds to import

        return Sharded(model, layers_of(model), device, clock, ranks, settings.dtype == "bfloat16")
    if ranks.world > 1:
        return Replicated(model, device, clock)
    return Engine(model, device, clock)


def layers_of(model: nn.Module) -> nn.ModuleList:
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    return encoder.layers


def prepare_layers(layers: nn.ModuleList, settings: TrainingSettings) -> None:
    """Compiles each layer, and recomputes it in the backward pass, as the settings ask.

    Only what a layer calls itself changes: the names of its weights stay, and hooks of FSDP2 are
    outside.
    """
    for layer in layers:
        forward: Callable[..., Tensor] = layer.forward
        if settings.compile:
            forward = torch.compile(forward, dynamic=True)
        if settings.recompute:
            forward = partial(checkpoint, forward, use_reentrant=False)
        if settings.compile or settings.recompute:
            layer.forward = forward
