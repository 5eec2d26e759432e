"""A model in shards over the ranks, by torch's FSDP2, a layer at a time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .checkpoint import check_weights
from .clock import Clock, Mark
from .engine import Engine
from .ranks import Ranks
from .shards import save_shards

WHOLE = StateDictOptions(full_state_dict=True)


class Sharded(Engine):
    """Weights, gradients and moments in as many shards as ranks, gathered layer by layer.

    Each batch's gradient is summed and sharded at once: a whole one is never kept. half: layers are
    gathered in bf16, and their gradients summed in fp32; the rest is left to autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: nn.ModuleList,
        device: torch.device,
        clock: Clock,
        ranks: Ranks,
        half: bool,
    ):
        self.model = self.trained = model
        self.clock, self.ranks = clock, ranks
        mesh = init_device_mesh(device.type, (ranks.world,))
        of_layers = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None,
            reduce_dtype=torch.float32 if half else None,
            cast_forward_inputs=False,  # the stream between layers is fp32 under autocast
        )
        of_root = MixedPrecisionPolicy(cast_forward_inputs=False)
        units = [fully_shard(layer, mesh=mesh, mp_policy=of_layers) for layer in layers]
        for unit in (*units, fully_shard(model, mesh=mesh, mp_policy=of_root)):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
        # our layers add to nothing in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")

    def computed(self) -> Mark | None:
        return None  # layers are gathered all the time: no rank is ahead of the others for long

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        norm = super()._norm(gradients)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def finite(self) -> bool:
        own = (cast(DTensor, weight).to_local() for weight in self.model.parameters())
        return all(bool(weight.isfinite().all()) for weight in own)

    def forwards(self, own: int, most: int) -> int:
        return most

    def weights(self) -> dict[str, Tensor]:
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return cast(dict[str, Tensor], get_model_state_dict(self.model, options=whole))

    def moments(
        self, path: Path, optimiser: torch.optim.Optimizer, weights: dict[str, Tensor]
    ) -> dict[str, Any]:
        return {"shards": save_shards(path, self.model, optimiser, weights, self.ranks)}

    def take(self, weights: Mapping[str, Tensor], where: str) -> None:
        check_weights(self.model, weights, where)
        set_model_state_dict(self.model, dict(weights), options=WHOLE)

    def _take_whole(self, state: dict[str, Any], optimiser: torch.optim.Optimizer) -> None:
        named = by_name(self.model, optimiser, state)
        set_optimizer_state_dict(self.model, optimiser, named, options=WHOLE)


def by_name(
    model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """The state_dict of an optimiser with names of parameters in place of their numbers."""
    names = {id(p): name for name, p in model.named_parameters()}
    order = [names[id(p)] for group in optimiser.param_groups for p in group["params"]]
    return {
        "state": {order[number]: moments for number, moments in state["state"].items()},
        "param_groups": [
            group | {"params": [order[number] for number in group["params"]]}
            for group in state["param_groups"]
        ],
    }
