"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from engines.batches import Batch
from engines.engine import Engine, Run
from engines.exported import FINITE, hidden, quiet

HINTS = {"fp32": "f32", "16 bit": "bf16", "8 bit": "f32"}


class OpenVino(Engine):
    """A graph converted by openvino.convert_model; 16 bit by its precision hint.

    8 bit is NNCF's compression of weights with activations quantised on the way.
    """

    packages = ("openvino", "numpy")
    converts = ("torch", "transformers")

    def __init__(self, kind: str, finite: bool = False):
        super().__init__(kind)
        self.attention = FINITE if finite else "sdpa"
        self.name = "openvino, finite masks" if finite else "openvino"
        self.fallback = None if finite else OpenVino(kind, finite=True)

    def missing(self) -> str | None:
        if reason := super().missing():
            return reason
        if self.kind != "8 bit" or importlib.util.find_spec("nncf"):
            return None
        return f"{self}: no package nncf; pip install nncf"

    def file(self, folder: Path, masked: bool) -> Path:
        bits = "-int8" if self.kind == "8 bit" else ""
        return folder / f"openvino-{self.attention}-{'mask' if masked else 'full'}{bits}.xml"

    def convert(self, folder: Path, masked: bool) -> None:
        path = self.file(folder, masked)
        if path.exists():
            return
        import openvino

        module, example = hidden(folder, masked, self.attention)
        with quiet():
            graph = openvino.convert_model(module, example_input=example)
        if self.kind == "8 bit":
            import nncf

            feed = dict(zip((x.any_name for x in graph.inputs), example, strict=True))
            graph = nncf.quantize(
                graph,
                nncf.Dataset([{name: x.numpy() for name, x in feed.items()}]),
                model_type=nncf.ModelType.TRANSFORMER,
            )
        openvino.save_model(graph, path, compress_to_fp16=False)

    def open(self, folder: Path, masked: bool, threads: int) -> Run:
        import openvino

        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[self.kind],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }
        core = openvino.Core()
        model = core.compile_model(core.read_model(self.file(folder, masked)), "CPU", settings)
        request = model.create_infer_request()

        def run(batch: Batch) -> Any:
            inputs = [batch.ids, batch.mask()] if masked else [batch.ids]
            return request.infer(inputs, share_inputs=True, share_outputs=True)[0]

        return run
