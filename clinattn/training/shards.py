"""Checkpoints of a model in shards, by torch.distributed.checkpoint: any number of ranks reads one.

Beside step-<step>.pt, which has the whole model and all else but the moments, a folder
step-<step>.shards has a file of weights and moments from each rank, and the whole model as
model.safetensors. The .pt is written last and knows the checksum of every file: without it the
folder is nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from clinattn.encoder.tensor_files import safetensors_module
from clinattn.files.disk import file_sha256

from .checkpoint import shards_of
from .ranks import Ranks

WHOLE = "model.safetensors"


def save_shards(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    ranks: Ranks,
) -> dict[str, str]:
    """Writes the folder beside the checkpoint at `path`; returns the checksum of each file.

    All ranks call it. weights: of the whole model, on rank 0. Raises OSError on all ranks.
    """
    folder = shards_of(path)
    partial = folder.with_name(f".{folder.name}.partial")
    ranks.by_first(lambda: _made_anew(partial))
    of_model, of_optimiser = get_state_dict(model, optimiser)
    try:
        dcp.save({"model": of_model, "optimiser": of_optimiser}, checkpoint_id=partial)
    except dcp.CheckpointException as error:
        raise _first_of(error, partial) from None
    names = [x.name for x in partial.glob(f"__{ranks.rank}_*")]
    if ranks.rank == 0:
        names += [WHOLE, *(x.name for x in partial.glob(".metadata"))]
    ranks.by_first(lambda: _save_whole(partial / WHOLE, weights))
    own = {name: file_sha256(partial / name) for name in names}
    files = {name: digest for part in ranks.gather(own) for name, digest in part.items()}
    ranks.by_first(lambda: _take_place(partial, folder))
    return files


def load_shards(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Loads the folder beside the checkpoint at `path` into a model in shards, or a whole one."""
    of_model, of_optimiser = get_state_dict(model, optimiser)
    state: dict[str, Any] = {"model": of_model, "optimiser": of_optimiser}
    dcp.load(state, checkpoint_id=shards_of(path), no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimiser,
        model_state_dict=state["model"],
        optim_state_dict=state["optimiser"],
    )


def _made_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _save_whole(path: Path, weights: Mapping[str, Tensor]) -> None:
    save_file = safetensors_module("safetensors.torch").save_file
    # a weight of two names is there twice: the format knows no sharing
    save_file({name: x.contiguous().clone() for name, x in weights.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _take_place(partial: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def _first_of(error: dcp.CheckpointException, folder: Path) -> Exception:
    """The error of the first rank that failed."""
    found, _ = next(iter(error.failures.values()))
    if isinstance(found, OSError):
        return OSError(found.errno, found.strerror, found.filename or str(folder))
    return RuntimeError(f"{folder}: {found}")
