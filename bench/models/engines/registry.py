"""The engines that are compared, by class of precision: a new one is a line here."""

from __future__ import annotations

from engines.engine import Engine
from engines.onnxruntime_engine import OnnxRuntime
from engines.openvino_engine import OpenVino
from engines.torch_engines import Clinattn, ClinattnLinear, Torch, TorchAutocast, TorchCompile

ENGINES: tuple[Engine, ...] = (
    *(made(kind) for kind in ("fp32", "16 bit") for made in (Torch, TorchCompile)),
    TorchAutocast("16 bit"),
    *(OpenVino(kind) for kind in ("fp32", "16 bit", "8 bit")),
    *(OnnxRuntime(kind) for kind in ("fp32", "16 bit", "8 bit")),
    *(made(kind) for kind in ("fp32", "16 bit") for made in (Clinattn, ClinattnLinear)),
)


def named(name: str, kind: str) -> Engine:
    """The engine of a row, a fallback too."""
    every = [x for engine in ENGINES for x in (engine, engine.fallback) if x is not None]
    (found,) = (x for x in every if (x.name, x.kind) == (name, kind))
    return found
