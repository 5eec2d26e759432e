"""Results as each benchmark writes them, made up."""

from __future__ import annotations

FACTS = {
    "date": "2026-01-02T03:04:05+00:00",
    "clinattn": "0.1.0",
    "commit": "abcdef123456",
    "python": "3.12.0",
    "torch": "2.13.0",
    "cpu": "some processor",
    "gpu": None,
    "threads": 2,
}
RATE = {"median": 12345.6, "q1": 11111.1, "q3": 13333.3}


def kernel_row(length: int, dtype: str = "fp32") -> dict:
    measured = {"ours_s": [0.5], "torch_s": [1.0], "ours_ms": 500.0, "torch_ms": 1000.0}
    shares = {"ratio": 2.0, "ours_of_peak": 0.612, "torch_of_peak": 0.306, "peak": 2e12}
    named = {"case": f"causal N{length} D64", "dtype": dtype, "passes": "forward"}
    return FACTS | measured | shares | named | {"peak_loop": "amx bf16"}


def speed(kind: str, way: str, longest: int) -> dict:
    extra = {
        "kind": kind,
        "way": way,
        "tokens_per_s": RATE,
        "ratio_to_peer": None if way == "sdpa" else 1.75,
        "of_peak": 0.5,
        "padding_share": 0.337,
        "dtype": "float32",
        "passes": "forward",
        "longest": longest,
        "window": None,
    }
    return {"group": f"{kind} {longest}", "name": way, "extra_info": extra}


def memory(way: str, power: int) -> dict:
    peaks = {str(n): n**power for n in (512, 1024, 2048)}
    extra = {"kind": "memory", "way": way, "passes": "forward", "peak_bytes": peaks}
    return {"group": "memory", "name": way, "extra_info": extra}


def startup() -> dict:
    seconds = {"import clinattn": {"median": 0.0421, "q1": 0.04, "q3": 0.05}}
    extra = {"kind": "startup", "way": "clinattn", "seconds": seconds}
    return {"group": "startup", "name": "start", "extra_info": extra}


# Tokens/s of an encoder's ways, over the first.
ENCODER_WAYS = {"sdpa_padded": 1, "sdpa_bucketed": 1.25, "clinattn_padded": 2, "clinattn_packed": 3}


def encoder_row(mode: str, variant: str) -> dict:
    rate = {name: ENCODER_WAYS[variant] * value for name, value in RATE.items()}
    named = {"mode": mode, "variant": variant, "label": variant}
    measured = {"tokens_per_s": rate, "rounds": 3, "padding_share": 0.2, "peak_memory_bytes": 9e7}
    beside = {"cpu_share": 0.66, "other_cpus": 0.9, "noted_from": 0.33, "disturbed": True}
    return FACTS | named | measured | beside | {"cpus": 2}


def engine_row(engine: str, batching: str, rate: dict | None) -> dict:
    named = {"load": "notes", "title": "notes to 4,096 tokens", "model": "ModernBERT base"}
    named |= {"kind": "16 bit", "engine": engine, "batching": batching}
    depth = {"layers": 3, "published_layers": 22}
    wrong = {"not_finite": 0 if rate else 2, "error": 6.1e-3 if rate else None}
    times = {"latency_s": 0.25 if rate else None, "compile_seconds": 1.5}
    alone = {"start_seconds": 4.5 if rate else None, "peak_memory_bytes": 3 << 30 if rate else None}
    sizes = {"padding_share": 0.41, "package_bytes": 250 << 20}
    return named | depth | wrong | times | alone | sizes | {"tokens_per_s": rate}


def parity_row(architecture: str, dtype: str, outputs: float) -> dict:
    named = {"architecture": architecture, "model": "Model", "dtype": dtype, "mode": "train"}
    counted = {"padding": "right", "replaced": 2, "attentions": 3, "calls": 2}
    measured = {"outputs": outputs, "gradients": 0.25, "worst": "hidden", "passed": outputs <= 1}
    return named | counted | measured


def pretrained_row(workload: str, mode: str) -> dict:
    named = {"workload": workload, "pass": mode, "sequences": 32, "tokens": 506}
    half = {name: rate / 2 for name, rate in RATE.items()}
    rates = {"eager": half, "sdpa": half, "clinattn": RATE}
    return named | {"padding": 0.25, "largest_difference": 1.6e-7, "tokens_per_s": rates}


ENCODER = {
    "schema": 1,
    "interrupted": False,
    "time_over": False,
    "environment": FACTS,
    "settings": {"profile": "note_discharge", "modes": ["train"], "rounds": None},
    "backend": "cpu",
    "encoder": {"vocab_size": 50, "windows": [None, 8]},
    "workload": {
        "source": "length profile",
        "sequences": 4,
        "available": 2000,
        "real_tokens": 5000,
        "vocab_size": 50,
        "mean_length": 12.5,
        "quantiles": {"p50": 12.0},
        "histogram": {"edges": [0, 10, 20], "counts": [3, 4]},
    },
    "agreement": {
        "sequences": 4,
        "tokens": 80,
        "errors": {"sdpa_padded": {"hidden": 1e-7}, "allowed": {"hidden": 2e-7}},
    },
    "rows": [encoder_row("train", name) for name in ENCODER_WAYS],
    "speedups": [{"mode": "train", "label": "torch SDPA, padded", "ratio": 2.0}],
}
RESULTS = {
    "kernels": {"interrupted": True, "rows": [kernel_row(1024), kernel_row(4096)]},
    "compare": {
        "kind": "compare",
        "interrupted": False,
        "base": FACTS | {"commit": "b45e"},
        "here": FACTS,
        "rows": [
            {"case": "full", "dtype": "bf16", "passes": "backward", "base_s": [3.0, 1.0, 2.0],
             "here_s": [1.0, 1.0, 1.0], "ratio": 2.0}
        ],
    },
    "encoders": {
        "kind": "against_transformers",
        "environment": FACTS,
        "rows": [
            {"preset": "clinicalbert", "dtype": "bf16", "inputs": "notes", "layers": 12,
             "longest": 4321, "padding": 0.25, "ratio": 3.14,
             "tokens_per_s": {"transformers": 1000.0, "clinattn": 3140.0}}
        ],
    },
    "engines": {
        "kind": "engines",
        "interrupted": False,
        "environment": FACTS | {"openvino": "2026.4.1", "peak_fp32_gflop_per_s": 275.5},
        "absent": ["openvino, 8 bit: no package nncf; pip install nncf"],
        "rows": [
            engine_row("torch", "padded", {"median": 4938.24, "q1": 4900.0, "q3": 5000.0}),
            engine_row("clinattn", "packed", RATE),
            engine_row("openvino", "sorted", None),
        ],
    },
    "parity": {
        "environment": FACTS,
        "left": {"some-model": "has no attention"},
        "rows": [parity_row("bert", "fp32", 0.5), parity_row("longformer", "bf16", 1.5)],
    },
    "pretrained": {
        "environment": FACTS,
        "rows": [pretrained_row("titles", mode) for mode in ("infer", "train")],
    },
    "suites": {
        "machine_info": {"clinattn": FACTS},
        "datetime": "2026-01-03T00:00:00.123456+00:00",
        "benchmarks": [
            *(speed("attention", way, n) for way in ("clinattn-cpu", "sdpa") for n in (128, 512)),
            speed("encoder", "clinattn_packed", 300),
            memory("clinattn", 2),
            memory("eager", 3),
            startup(),
        ],
    },
}  # fmt: skip
