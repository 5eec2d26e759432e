"""Models with and without their attention replaced, held against each other and fp64.

The truth is the model's own code in fp64; the replaced model may err, in its output and in every
gradient, at most twice as much as the model's own code in the dtype, plus two rounding units. Error
is the root of the mean square over a tensor, as the largest is luck where few values are rounded;
a single wrong number still shows, by more than rounding times the root of their count.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from support import rounding_unit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# Of one cotangent the error of a gradient can be one number's luck: what all keys have in common
# times the rounding of a sum that should be 0.
COTANGENTS = range(3, 7)


def randomized(model: nn.Module) -> nn.Module:
    """The model with weights that make scores of about one, and biases that are not zero."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for x in model.parameters():
            spread = x.shape[-1] ** -0.5 if x.dim() > 1 else 0.3
            x.add_(spread * torch.randn(x.shape, generator=random))
    return model


def adapt_all(model: nn.Module, adapt: Callable) -> list:
    """Returns the outcomes of adapt over all submodules, without the None of others."""
    return [x for x in (adapt(m) for m in list(model.modules())) if x is not None]


@contextmanager
def softmax_as_given() -> Iterator[None]:
    """Keeps the softmax of fp64 in fp64: a model that takes it in fp32 would be no truth."""
    softmax = F.softmax

    def in_own_dtype(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)

    with mock.patch.object(F, "softmax", in_own_dtype):
        yield


def evaluate(model: nn.Module, inputs: dict, valid: Tensor) -> dict[str, Tensor]:
    """Output where valid, and gradients of the parameters by module, those of every cotangent.

    Weight and bias of a module are one tensor: the gradient of a key's bias is zero but for
    rounding at the scale of its weight's.
    """
    o = model(**inputs)[0]
    o = torch.where(valid[..., None], o, 0)
    results = {"o": [o.detach()]}
    for seed in COTANGENTS:
        cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(seed)).to(o.dtype)
        model.zero_grad()
        (o * cotangent).sum().backward(retain_graph=True)
        for name, module in model.named_modules():
            own = module.parameters(recurse=False)
            grads = [x.grad.flatten() for x in own if x.grad is not None]
            if grads:
                results.setdefault(name, []).append(torch.cat(grads))
    return {name: torch.cat(parts) for name, parts in results.items()}


def torch_attention(q, k, v, mask=None, dropout_p=0.0, **more) -> Tensor:
    assert not more
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)


def assert_parity(
    model: nn.Module,
    adapt: Callable,
    inputs: dict,
    valid: Tensor,
    dtype: torch.dtype,
    peer: str | None = None,
) -> nn.Module:
    """Returns the replaced model, whose results and gradients were checked.

    peer: a name of fused_attention, in whose place torch's own attention gives a second evaluation
    of same-dtype maths: gradients from a rounded o, as in every such kernel, where keys that have
    much in common make their small differences matter.
    """
    model = model.to(dtype)
    with softmax_as_given():
        truth = evaluate(copy.deepcopy(model).double(), inputs, valid)
    assert all(x.isfinite().all() for x in truth.values())
    naive = [evaluate(model, inputs, valid)]
    replaced = copy.deepcopy(model)
    outcomes = adapt_all(replaced, adapt)
    assert outcomes and all(x.replaced for x in outcomes), outcomes
    if peer is not None:
        with mock.patch(peer, torch_attention):
            naive.append(evaluate(replaced, inputs, valid))
    assert_no_worse(evaluate(replaced, inputs, valid), truth, naive, dtype)
    return replaced


def assert_no_worse(
    actual: dict[str, Tensor],
    truth: dict[str, Tensor],
    naive: list[dict[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Checks results of evaluate: twice the largest error of naive ones, and two units."""
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        assert actual[name].shape == expected.shape, name
        plain = max(rms_error(x[name], expected) for x in naive)
        bound = 2 * plain + 2 * rounding_unit(expected, dtype)
        error = rms_error(actual[name], expected)
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"  # false for NaN


def rms_error(actual: Tensor, truth: Tensor) -> float:
    return (actual.double() - truth).square().mean().sqrt().item()


def assert_same_module(model: nn.Module, adapt: Callable, restore: Callable, run: Callable) -> None:
    """Checks that replacing keeps parameters and state, lasts in copies and pickles, and is undone.

    run(model) -> a tensor.
    """
    before = {name: type(m) for name, m in model.named_modules()}
    parameters, state = dict(model.named_parameters()), list(model.state_dict())
    expected = run(model)
    assert all(x.replaced for x in adapt_all(model, adapt))
    after = {name: type(m) for name, m in model.named_modules()}
    changed = {name for name in before if before[name] is not after[name]}
    assert changed
    assert all(before[name].__name__ == after[name].__name__ for name in changed)
    assert all(model.get_parameter(name) is x for name, x in parameters.items())
    assert list(model.state_dict()) == state
    replaced = run(model)
    torch.testing.assert_close(replaced, expected)
    assert all(x.replaced for x in adapt_all(model, adapt))  # twice is once
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {name: type(m) for name, m in other.named_modules()} == after
        assert torch.equal(run(other), replaced)
    for module in model.modules():
        restore(module)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert torch.equal(run(model), expected)


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        for x in tensors:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@contextmanager
def largest_tensor() -> Iterator[_Sizes]:
    """Measures tensors made inside, forward and backward: .largest is the most elements of one."""
    with _Sizes() as sizes:
        yield sizes
