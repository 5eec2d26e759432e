"""The one name of each way, pass and dtype, in tables, plots and pages.

A way is an attention and, where sequences are batched, a layout: "torch SDPA, padded". Rows keep
short identifiers: "sdpa_padded".
"""

from __future__ import annotations

ATTENTION = {
    "clinattn": "clinattn",
    "clinattn linear": "clinattn with linear layers",
    "clinattn-cpu": "clinattn, CPU kernels",
    "clinattn-cuda": "clinattn, CUDA C++ kernels",
    "clinattn-reference": "clinattn, reference",
    "clinattn-triton": "clinattn, Triton kernels",
    "eager": "eager attention",
    "flex": "flex_attention",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "sdpa": "torch SDPA",
    "sdpa-cudnn": "torch SDPA, cuDNN kernel",
    "sdpa-efficient": "torch SDPA, memory-efficient kernel",
    "sdpa-flash": "torch SDPA, flash kernel",
    "sdpa-math": "torch SDPA, math kernel",
    "torch": "torch SDPA",
    "torch autocast": "torch SDPA, autocast",
    "torch.compile": "torch.compile",
    "transformers": "transformers with torch SDPA",
    "transformers-flash": "transformers with flash-attn",
    "transformers-sdpa": "transformers with torch SDPA",
}
LAYOUTS = {
    "padded": "padded",
    "bucketed": "length-bucketed",
    "sorted": "length-bucketed",
    "packed": "packed",
}
PASSES = {
    "train": "training",
    "infer": "inference",
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward and backward",
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def way_name(attention: str, layout: str | None = None) -> str:
    """Returns the name of an attention, an encoder's way or an engine, and of the layout.

    "sdpa_padded" is an attention and a layout in one; after a comma an engine's name says more.
    What is unknown is its own name.
    """
    kernel, _, joined = attention.partition("_")
    if kernel in ATTENTION and joined in LAYOUTS:
        return way_name(kernel, joined)
    engine, comma, more = attention.partition(", ")
    found = ATTENTION.get(engine, engine) + comma + more
    return found if layout is None else f"{found}, {LAYOUTS.get(layout, layout)}"


def pass_name(name: str) -> str:
    """Returns "training" for "train"."""
    return PASSES.get(name, name)


def dtype_name(name: str) -> str:
    """Returns "fp32" for "float32"."""
    return DTYPES.get(name, name)
