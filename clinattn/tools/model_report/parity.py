"""Checks that a model computes the same after its attention was replaced.

Truth is the model with its own eager attention, all of it in fp64; the yardstick is the same in the
dtype that is tested, and the model with torch's attention where it has that: of two evaluations of
plain maths the larger error counts, as one alone may be lucky. Compared are outputs at real tokens
and the gradient of every parameter.

What is allowed. fused_attention promises at most twice the error of plain attention in its dtype
plus two rounding units of its result, forward and backward. A model hands errors on, the same ones
before and after, and those of its n calls of attention add up. So a quantity may have twice its
error in plain maths plus, at its scale, 2 n rounding units; a gradient 4 n, as both passes
are in it. Of an output the scale is its largest entry. A gradient is a sum, rounded at the size of
what is summed, which is larger than the result where that cancels. So it does in attention: the
gradient of a score is p (dp - delta), which for every algorithm that keeps no scores is a
difference of two rounded numbers of the size of what reaches the values; that of a key's bias is 0
altogether, as softmax takes no notice of it. So the scale of a gradient is the largest entry among
the parameters that stand together: those of queries, keys and values, say, weights and biases.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from clinattn.operator.functions import FORWARD
from clinattn.tools.model_report.example_inputs import ExampleInputs, outputs_of

Replace = Callable[[nn.Module], Any]
GRADIENT = "gradient of "


class InDouble(TorchFunctionMode):
    """Takes what code computes in fp32 whatever its inputs (norms, rotary angles) to fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple(map(_double, args))
        kwargs = {name: _double(x) for name, x in (kwargs or {}).items()}
        # not by way of fp32, where the lowest number of fp64 is -inf
        return Tensor.double(*args) if func is Tensor.float else func(*args, **kwargs)


def _double(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


class CountedAttention(TorchDispatchMode):
    """calls: how often clinattn computed attention since the mode was entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is FORWARD
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Parity:
    """Worst errors of outputs and gradients, as fractions of what is allowed.

    outputs, gradients: at most 1 where all is well; gradients is None where none were asked for.
    calls: how often the model called clinattn; 0 if its attention was not replaced at all.
    worst: the name of the worst quantity, its error, that of plain maths, and what is allowed.
    """

    outputs: float
    gradients: float | None
    calls: int
    worst: tuple[str, float, float, float]

    @property
    def passed(self) -> bool:
        return self.outputs <= 1 and (self.gradients is None or self.gradients <= 1)


def compare(
    model: PreTrainedModel,
    batch: ExampleInputs,
    replace: Replace,
    *,
    training: bool,
    gradients: bool,
) -> Parity:
    """`model` with eager attention against a copy of it on which `replace` was called.

    model: is left as it is. training: the mode it is in, without dropout if that is training.
    gradients: compares them, too; otherwise autograd is off.
    """
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    eager = copy.deepcopy(model)
    if getattr(eager.config, "_attn_implementation", "eager") != "eager":
        eager.set_attn_implementation("eager")
    exact = nn.Module.double(copy.deepcopy(eager))
    batch = batch.to(dtype, device)
    with InDouble():
        truth = quantities(exact.train(training), batch.to(torch.float64, device), dtype, gradients)
    naive = [quantities(eager.train(training), batch, dtype, gradients)]
    try:
        eager.set_attn_implementation("sdpa")
    except (ValueError, AttributeError):
        pass  # the model has no other than eager attention
    else:
        naive.append(quantities(eager, batch, dtype, gradients))
    replaced = copy.deepcopy(model)
    replace(replaced)
    with CountedAttention() as counted:
        actual = quantities(replaced.train(training), batch, dtype, gradients)
    return judge(actual, truth, naive, dtype, counted.calls)


def quantities(
    model: nn.Module, batch: ExampleInputs, dtype: torch.dtype, gradients: bool
) -> dict[str, Tensor]:
    """Outputs and, if wanted, gradients by name, in fp64.

    The gradients are those of outputs weighted by random numbers of `dtype`, the same in each call.
    """
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        outputs = outputs_of(model(**batch.inputs), batch.real)
        found = dict(zip(batch.real, outputs, strict=True))
        if gradients:
            weights = [torch.randn(x.shape, device=x.device).to(dtype).to(x.dtype) for x in outputs]
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(outputs, weights)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[GRADIENT + name] = parameter.grad
            model.zero_grad(set_to_none=True)
    return {name: x.detach().double() for name, x in found.items()}


def judge(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    naive: list[dict[str, Tensor]],
    dtype: torch.dtype,
    calls: int,
) -> Parity:
    """Judges errors by what is allowed; a quantity that one side lacks is off by infinity.

    naive: plain maths evaluated in several ways, since one alone may be lucky.
    """
    scales = scales_of(truth)
    outputs, gradients, worst = 0.0, None, ("", 0.0, 0.0, 0.0)
    for name in truth | actual:
        error = eager = allowed = share = math.inf
        is_gradient = name.startswith(GRADIENT)
        if name in truth and name in actual:
            error = max_error(actual[name], truth[name])
            errors = [max_error(x[name], truth[name]) for x in naive]
            eager = max((x for x in errors if not math.isnan(x)), default=math.nan)
            units = (4 if is_gradient else 2) * max(calls, 1)
            allowed = 2 * eager + units * rounding_unit(scales[name], dtype)
            share = error / allowed if math.isfinite(error) else math.inf
        if share >= max(outputs, gradients or 0.0):
            worst = (name, error, eager, allowed)
        if is_gradient:
            gradients = max(gradients or 0.0, share)
        else:
            outputs = max(outputs, share)
    return Parity(outputs, gradients, calls, worst)


def scales_of(truth: dict[str, Tensor]) -> dict[str, float]:
    """The largest entry of each quantity, of a gradient among all that stand together."""
    largest: dict[str, float] = {}
    for name, x in truth.items():
        owner = owner_of(name)
        largest[owner] = max(largest.get(owner, 0.0), float(x.abs().max()))
    return {name: largest[owner_of(name)] for name in truth}


def owner_of(name: str) -> str:
    """encoder.layer.0.attention.self for the weight and bias of its query, key and value."""
    return name.rsplit(".", 2)[0] if name.startswith(GRADIENT) else name


def max_error(actual: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN where any entry is NaN."""
    return float((actual - truth).abs().max())


def rounding_unit(scale: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `scale`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(scale, info.tiny)))
