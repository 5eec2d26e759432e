"""Report on a model before and after replace_attention: changes, agreement, costs."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from clinattn.integrations.replace import Replacement, replace_attention, several
from clinattn.tools.benchmark.measure import peak_memory, quartiles, synchronize
from clinattn.tools.environment import environment
from clinattn.tools.model_report.architectures import WITHOUT
from clinattn.tools.model_report.example_inputs import ExampleInputs, Padding, outputs_of
from clinattn.tools.model_report.heads import batch_for_class, real_tokens
from clinattn.tools.model_report.parity import Parity, compare
from clinattn.tools.model_report.settings import DTYPES, ReportSettings
from clinattn.tools.model_report.source import architecture_of, first_line_of_errors, load_model

DEFAULT_TOKENS = 256
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")

Progress = Callable[[str, int, int], None]


def report_model(settings: ReportSettings, progress: Progress) -> dict[str, Any]:
    """The facts that `clinattn report-model` prints.

    Raises ValueError for bad input before anything is computed.
    """
    steps = 4 + settings.rounds
    progress(f"load: {settings.source}", 0, steps)
    device, dtype = torch.device(settings.device), DTYPES[settings.dtype]
    loaded, origin = load_model(settings.source, settings.full_size)
    model = cast(loaded, device, dtype)
    architecture = architecture_of(model)
    lengths = lengths_for(model, settings)
    torch.manual_seed(0)
    paddings: list[Padding] = [p for p in architecture.paddings if p != "none"]
    examples = {
        padding: architecture.batch(model.config, lengths, padding).to(dtype, device)
        for padding in paddings or WITHOUT
    }
    fit = lambda example: first_line_of_errors(
        type(model).__name__, lambda: batch_for_class(model, example)
    )
    batches = {padding: fit(example) for padding, example in examples.items()}
    reports: list[Replacement] = []
    parities: dict[Padding, Parity] = {}
    for padding, batch in batches.items():
        progress(f"compare: padded {padding}", 1, steps)
        replace = lambda copied: reports.append(replace_attention(copied))
        parities[padding] = compare(model, batch, replace, training=False, gradients=True)
    report = reports[0]
    batch = list(batches.values())[-1]
    replaced = copy.deepcopy(model)
    replace_attention(replaced)
    before = getattr(model.config, "_attn_implementation", None) or "its own"
    works = {
        "before": lambda: step(model, batch, settings.train),
        "after": lambda: step(replaced, batch, settings.train),
    }
    seconds = in_turns(works, settings.rounds, device, progress, steps)
    peaks = {}
    for name, work in works.items():
        progress(f"memory: {name}", steps - 1, steps)
        peaks[name] = peak_memory(work, device)
    tokens = real_tokens(model, list(examples.values())[-1])
    passed = all(parity.passed and parity.calls > 0 for parity in parities.values())
    return {
        "settings": asdict(settings),
        "model": type(model).__name__,
        "model_type": model.config.model_type,
        "weights": origin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "lengths": list(lengths),
        "replaced": [entry._asdict() for entry in report.replaced],
        "kept": [entry._asdict() for entry in report.kept],
        "parity": {padding: asdict(parity) for padding, parity in parities.items()},
        "passed": passed and bool(report.replaced),
        "cost": {
            name: {
                "attention": before if name == "before" else "clinattn",
                "seconds": quartiles(times),
                "tokens_per_s": tokens / quartiles(times)["median"],
                "peak_memory_bytes": peaks[name],
            }
            for name, times in seconds.items()
        },
        "environment": environment(device),
    }


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    return model.to(device, dtype)


def lengths_for(model: PreTrainedModel, settings: ReportSettings) -> list[int]:
    """Lengths of a batch, from the longest down to a quarter of it."""
    limit = position_limit(model)
    longest = settings.tokens or min(DEFAULT_TOKENS, limit or DEFAULT_TOKENS)
    if limit is not None and longest > limit:
        raise ValueError(f"tokens: got {longest}, expected at most {limit}, the model's positions")
    rows = settings.batch_size
    return [max(1, longest - i * (longest - longest // 4) // max(1, rows - 1)) for i in range(rows)]


def position_limit(model: PreTrainedModel) -> int | None:
    """The most tokens that a model has positions for; None where its configuration has no limit."""
    counts = [getattr(model.config, name, None) for name in POSITIONS]
    # RoBERTa and its like count positions from behind the padding id
    first = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None) or -1
    limit = min((n for n in counts if isinstance(n, int) and n > 0), default=None)
    return None if limit is None else limit - first - 1


def step(model: nn.Module, batch: ExampleInputs, train: bool) -> None:
    """Runs one pass; the gradients are thrown away."""
    with torch.set_grad_enabled(train):
        outputs = outputs_of(model(**batch.inputs), batch.real)
        if train:
            torch.autograd.backward(outputs, list(map(torch.ones_like, outputs)))
            model.zero_grad(set_to_none=True)


def in_turns(
    works: dict[str, Callable[[], None]],
    rounds: int,
    device: torch.device,
    progress: Progress,
    steps: int,
) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for i in range(rounds + 1):
        progress(f"time: round {i} of {rounds}", 2 + i, steps)
        for name, work in works.items():
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def summary(result: dict[str, Any]) -> Sequence[str]:
    """Lines for people."""
    kinds: dict[str, int] = {}
    for entry in result["replaced"]:
        what = f"{entry['type']}: {entry['by']}"
        kinds[what] = kinds.get(what, 0) + 1
    lines = [
        f"{result['model']}, {result['parameters']:,} parameters, {result['weights']}",
        f"{several(len(result['replaced']), 'attention module')} replaced, "
        f"{len(result['kept'])} kept",
        *(f"  {count} x {what}" for what, count in kinds.items()),
        *(f"  {x['name']} ({x['type']}) kept: {x['reason']}" for x in result["kept"]),
    ]
    for padding, parity in result["parity"].items():
        name, error, eager, allowed = parity["worst"]
        lines.append(
            f"padded {padding}: outputs at {parity['outputs']:.2f} and gradients at "
            f"{parity['gradients']:.2f} of the error that is allowed; worst {name}: {error:.2g}, "
            f"plain attention {eager:.2g}, allowed {allowed:.2g}"
        )
    cost = result["cost"]
    for name, x in cost.items():
        peak = x["peak_memory_bytes"]
        memory = "" if peak is None else f", {peak / 2**20:,.1f} MiB"
        lines.append(
            f"{name} ({x['attention']}): {x['seconds']['median'] * 1e3:,.1f} ms, "
            f"{x['tokens_per_s']:,.0f} tokens/s{memory}"
        )
    ratio = cost["after"]["tokens_per_s"] / cost["before"]["tokens_per_s"]
    lines.append(f"{ratio:.2f}x the tokens/s")
    lines.append("passed" if result["passed"] else "failed" + why(result))
    return lines


def why(result: dict[str, Any]) -> str:
    if not result["replaced"]:
        return ": no attention was replaced"
    if not all(parity["calls"] for parity in result["parity"].values()):
        return ": the model never called what replaced its attention"
    return ": the error is larger than what is allowed"
