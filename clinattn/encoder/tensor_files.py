"""Files of named tensors: safetensors, and pickles of older models, read without running code."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class TensorFile(Protocol):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the file by name."""

    def tensor(self, name: str) -> Tensor: ...


def opened(path: Path) -> TensorFile:
    """Raises ValueError for a file that is not what its ending says, or not all of it."""
    return Safetensors(path) if path.suffix == ".safetensors" else Pickled(path)


class Safetensors:
    """Each tensor is read when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.module = safetensors_module("safetensors")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        with self._opened() as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    def tensor(self, name: str) -> Tensor:
        with self._opened() as file:
            return file.get_tensor(name)

    def _opened(self) -> Any:
        try:
            return self.module.safe_open(self.path, framework="pt")
        except self.module.SafetensorError as error:
            raise ValueError(f"{self.path} is damaged, or no safetensors: {error}") from None


class Pickled:
    """All tensors of a file of torch.save, by torch's loader of weights alone."""

    def __init__(self, path: Path):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # of pickle, zip and torch, as the damage may be
            raise ValueError(
                f"{path} is damaged, or holds more than tensors, which could run code and is not "
                "read"
            ) from None
        if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
            raise ValueError(f"{path}: expected tensors by name")
        self.tensors: dict[str, Tensor] = found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


def safetensors_module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(
            "checkpoints need safetensors: pip install 'clinattn[integrations]'"
        ) from None
