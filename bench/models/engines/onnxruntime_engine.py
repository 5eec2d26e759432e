"""ONNX Runtime on the CPU: fp32, and dynamic int8 of linear layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.batches import Batch
from engines.engine import Engine, Run
from engines.exported import FINITE, hidden, quiet

if TYPE_CHECKING:
    from engines.loads import Load

# Scores (B, H, N, N) that a run holds: at 8,192 tokens eight took more than 24 GB beside the rest.
COPIES = 8
MOST_OF_MEMORY = 0.7


class OnnxRuntime(Engine):
    """A graph of torch.onnx.export; 8 bit by quantize_dynamic, per channel."""

    packages = ("onnxruntime", "numpy")
    converts = ("onnx", "onnxscript", "torch", "transformers")

    def __init__(self, kind: str, finite: bool = False):
        super().__init__(kind)
        self.attention = FINITE if finite else "sdpa"
        self.name = "onnxruntime, finite masks" if finite else "onnxruntime"
        self.fallback = None if finite else OnnxRuntime(kind, finite=True)

    def missing(self) -> str | None:
        if self.kind == "16 bit":
            return f"{self}: it has no 16-bit products on CPUs"
        return super().missing()

    def too_large(self, load: Load) -> str | None:
        from engines.loads import config

        heads = config(load.model, None).num_attention_heads
        need = COPIES * 4 * load.batch * heads * load.cap**2
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if need <= MOST_OF_MEMORY * memory:
            return None
        return (
            f"{self}, {load.name}: the scores of all pairs take some {need / 2**30:,.0f} GiB, and "
            f"this machine has {memory / 2**30:,.0f}; --share N helps where batches are many"
        )

    def file(self, folder: Path, masked: bool, bits: str) -> Path:
        return folder / f"onnx-{self.attention}-{'mask' if masked else 'full'}-{bits}.onnx"

    def convert(self, folder: Path, masked: bool) -> None:
        path = self.file(folder, masked, "fp32")
        if not path.exists():
            self.export(folder, masked, path)
        int8 = self.file(folder, masked, "int8")
        if self.kind == "8 bit" and not int8.exists():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            with quiet():
                quantize_dynamic(path, int8, per_channel=True, weight_type=QuantType.QInt8)

    def export(self, folder: Path, masked: bool, path: Path) -> None:
        import torch
        from torch.export import Dim

        module, example = hidden(folder, masked, self.attention)
        shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        with quiet():
            program = torch.onnx.export(
                module, example, dynamo=True, verbose=False, dynamic_shapes=(shape,) * len(example)
            )
        assert program is not None
        program.save(path)

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        bits = "int8" if self.kind == "8 bit" else "fp32"
        path = self.file(folder, masked, bits)
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        names = [x.name for x in session.get_inputs()]

        def run(batch: Batch) -> Any:
            inputs = [batch.ids, batch.mask()] if masked else [batch.ids]
            return session.run(None, dict(zip(names, inputs, strict=True)))[0]

        return run
