"""The check before the clock: all four ways give the same hidden states, logits and gradients."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor

from .variants import VARIANTS, Runner, Variant
from .workload import MaskedExample

QUANTITIES = ("hidden", "logits", "loss", "gradients")


class Disagreement(AssertionError):
    """A variant computes something else; nothing is timed."""


def evaluate(
    runner: Runner, variant: Variant, examples: list[MaskedExample], batch_size: int
) -> dict[str, Tensor]:
    """Everything compared, in the order of `examples` whatever the batches."""
    lengths = [len(example.ids) for example in examples]
    labelled = [int((example.labels >= 0).sum()) for example in examples]
    hidden: dict[int, Tensor] = {}
    logits: dict[int, Tensor] = {}
    runner.model.eval()
    runner.model.zero_grad(set_to_none=True)
    loss = torch.zeros((), dtype=torch.float64, device=runner.device)
    for batch in variant.batches(lengths, batch_size):
        own = [examples[i] for i in batch]
        for i, states in zip(batch, runner.infer(variant, own), strict=True):
            hidden[i] = states
        batch_loss, batch_logits = runner.loss(variant, own)
        weighted = batch_loss * (sum(labelled[i] for i in batch) / sum(labelled))
        weighted.backward()
        loss += weighted.detach()
        parts = batch_logits.detach().split([labelled[i] for i in batch])
        logits.update(zip(batch, parts, strict=True))
    # each parameter's gradient in units of its largest entry, so that all weigh alike
    gradients = {name: p.grad for name, p in runner.model.named_parameters() if p.grad is not None}
    runner.model.zero_grad(set_to_none=True)
    return {
        "hidden": torch.cat([hidden[i] for i in sorted(hidden)]),
        "logits": torch.cat([logits[i] for i in sorted(logits)]),
        "loss": loss,
    } | {f"gradient of {name}": grad for name, grad in gradients.items()}


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each quantity, NaN if one is; of gradients relative to the largest entry."""
    largest = dict.fromkeys(QUANTITIES, 0.0)
    for name, expected in truth.items():
        error = (actual[name].double() - expected).abs().max()
        if name.startswith("gradient"):
            error = error / expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            name = "gradients"
        found = float(error)
        if math.isnan(found) or found > largest[name]:  # max(0.0, nan) would be 0.0
            largest[name] = found
    return largest


def check_agreement(
    runner: Runner, examples: list[MaskedExample], batch_size: int
) -> dict[str, dict[str, float]]:
    """The error of each variant, and what was allowed.

    Truth is torch's SDPA in fp64. Allowed is twice the larger error of the two SDPA variants in
    the same dtype, plus two rounding units of the largest entry; a loss is a mean of logits'
    log-likelihoods, each off by at most twice the largest logit error. Raises Disagreement.
    """
    exact = Runner(copy.deepcopy(runner.model).double(), runner.device, runner.until)
    with warnings.catch_warnings():  # on a GPU, fp64 has no other backend than the reference
        warnings.filterwarnings("ignore", "clinattn falls back", RuntimeWarning)
        truth = evaluate(exact, VARIANTS[0], examples, batch_size)
    unit = torch.finfo(next(runner.model.parameters()).dtype).eps
    found = {
        variant.name: errors(evaluate(runner, variant, examples, batch_size), truth)
        for variant in VARIANTS
    }
    naive = {
        name: max(found[v.name][name] for v in VARIANTS if v.attention == "sdpa")
        for name in QUANTITIES
    }
    size = {name: float(truth[name].abs().max()) for name in ("hidden", "logits", "loss")}
    size["gradients"] = 1.0
    allowed = {name: 2 * naive[name] + 2 * unit * size[name] for name in QUANTITIES}
    allowed["loss"] = 2 * allowed["logits"] + 2 * unit * size["loss"]
    for variant, error in found.items():
        for name in QUANTITIES:
            if not error[name] <= allowed[name]:
                raise Disagreement(
                    f"{variant}: {name} is off by {error[name]:.3g} from fp64, allowed "
                    f"{allowed[name]:.3g}; nothing was timed"
                )
    return found | {"allowed": allowed}
