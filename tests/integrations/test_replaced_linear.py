"""nn.Linear replaced by the compiled layers: what becomes of each layer, and how it goes on."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from support import dtype_id
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize

from clinattn.backends import cpu
from clinattn.encoder import linear
from clinattn.integrations.replace import replace_attention
from clinattn.integrations.torch.linear import Linear

pytestmark = pytest.mark.skipif(
    not linear.serves(), reason="needs the compiled linear layers"
)


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Held(torch.Tensor):
    """A tensor that a package of quantisation might put into a layer."""


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 50), nn.GELU(), nn.Linear(50, 11, bias=False)).to(dtype)


def replaced(model):
    report = replace_attention(model, linear=True)
    assert report.linear and not report.linear_kept
    return model


@pytest.fixture
def served(monkeypatch):
    """The rows that came to the compiled layers."""
    rows = []
    real = linear._computed

    def watched(form, layer, x, *more):
        rows.append(x.shape[:-1].numel())
        return real(form, layer, x, *more)

    monkeypatch.setattr(linear, "_computed", watched)
    return rows


def test_default_leaves_linear_layers():
    model = nn.Sequential(nn.MultiheadAttention(24, 3), nn.Linear(24, 24))
    report = replace_attention(model)
    assert report.linear is None and type(model[1]) is nn.Linear
    assert str(report) == (
        "1 attention module replaced, 0 kept\n"
        "  1 x MultiheadAttention: clinattn.fused_attention"
    )


def test_what_is_printed():
    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(24, 3), "first": nn.Linear(24, 24),
         "second": nn.Linear(24, 24), "own": Doubled(24, 24)}
    )  # fmt: skip
    assert str(replace_attention(model, linear=True)) == (
        "1 attention module and 2 linear layers replaced, 2 kept\n"
        "  1 x MultiheadAttention: clinattn.fused_attention\n"
        "  2 x Linear: compiled linear layer\n"
        "  attention.out_proj (NonDynamicallyQuantizableLinear) kept: nn.MultiheadAttention reads "
        "its weight and never calls it; the products of q, k, v and the output are torch's there\n"
        "  own (Doubled) kept: Doubled is a subclass with its own code"
    )


def test_linear_is_a_bool():
    with pytest.raises(TypeError, match="linear: got str, expected a bool"):
        replace_attention(mlp(), linear="all")


def test_nothing_to_replace_is_said():
    with pytest.warns(UserWarning, match="no attention and no linear layer was replaced in ReLU"):
        replace_attention(nn.ReLU(), linear=True)


def overridden():
    layer = nn.Linear(5, 6)
    layer.forward = lambda x: x
    return layer


def of_tensor():
    layer = nn.Linear(5, 6)
    layer.weight = nn.Parameter(torch.randn(6, 5).as_subclass(Held))
    return layer


KEPT = {
    "double": (lambda: nn.Linear(5, 6).double(), "its weight is torch.float64"),
    "half": (lambda: nn.Linear(5, 6).half(), "its weight is torch.float16"),
    "meta": (lambda: nn.Linear(5, 6, device="meta"), "its weight is on meta"),
    "subclass": (lambda: Doubled(5, 6), "subclass with its own code"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Linear(5, 6)), "ParametrizedLinear is a subclass"
    ),
    "overridden": (overridden, "its forward was overridden on the instance"),
    "another tensor": (of_tensor, "its weight is a Held"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_has_its_reason(name):
    make, reason = KEPT[name]
    model = nn.Sequential(make(), nn.Linear(3, 4))
    kind = type(model[0])
    report = replace_attention(model, linear=True)
    assert [x.name for x in report.linear] == ["1"] and type(model[0]) is kind
    ((where, _, why),) = report.linear_kept
    assert where == "0" and reason in why


def test_no_compiled_layers_is_a_reason(monkeypatch):
    monkeypatch.setattr(linear, "serves", lambda: False)
    model = mlp()
    with pytest.warns(UserWarning, match=r"this machine has no compiled linear layers"):
        replace_attention(model, linear=True)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_results_gradients_and_who_computes(dtype, served):
    model = mlp(dtype)
    x = torch.randn(3, 100, 37, dtype=dtype)
    mark = torch.randn(3, 100, 11, dtype=dtype)

    def results(model, x):
        x = x.clone().requires_grad_()
        y = model(x)
        return [y, *torch.autograd.grad(y, [x, *model.parameters()], mark.to(y.dtype))]

    truth = results(copy.deepcopy(model).double(), x.double())
    naive = results(model, x)
    assert not served
    ours = results(replaced(model), x)
    assert (cpu.instruction_set() == "amx") or served == [300, 300]
    unit = torch.finfo(dtype).eps / 2
    for a, n, t in zip(ours, naive, truth, strict=True):
        assert a.dtype == dtype
        error, plain = ((b.double() - t).square().mean().sqrt() for b in (a, n))
        assert error <= 2 * plain + 2 * unit * t.abs().max()


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_bits_do_not_depend_on_neighbours_or_threads(dtype, threads):
    model, x = replaced(mlp(dtype)), torch.randn(70, 37, dtype=dtype)
    threads(1)
    wanted = model(x)
    threads(3)
    assert torch.equal(model(x), wanted)
    for i in (0, 13, 69):
        assert torch.equal(model(x[i]), wanted[i])
        assert torch.equal(model(x[i:].reshape(1, -1, 37))[0, 0], wanted[i])


def test_the_layer_stays_itself():
    model, x = mlp(), torch.randn(9, 37)
    expected, state = model(x), list(model.state_dict())
    parameters = dict(model.named_parameters())
    report = replace_attention(model, linear=True)
    again = replace_attention(model, linear=True)
    assert str(again) == str(report)
    assert [type(m) for m in model] == [Linear, nn.GELU, Linear]
    assert repr(model[0]) == "Linear(in_features=37, out_features=50, bias=True)"
    assert list(model.state_dict()) == state
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):  # fmt: skip
        assert type(other[0]) is Linear and torch.equal(other(x), model(x))
    report.undo()
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(model(x), expected)


def test_hooks_run_around_the_compiled_layer(served):
    model, x = replaced(mlp()), torch.randn(300, 37)
    wanted, seen = model(x), []
    served.clear()
    model[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model[0].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    model[0].register_full_backward_hook(lambda module, dx, dy: seen.append(dy[0].shape))
    y = model(x)
    y.sum().backward()
    assert torch.equal(y, wanted) and served == [300, 300]
    assert seen == [(300, 37), (300, 50), (300, 50)]


def test_a_forward_of_ones_own_and_parametrizations_come_first():
    model, x = replaced(mlp()), torch.randn(300, 37)
    model[0].forward = lambda input: input.new_ones(len(input), 50)
    assert torch.equal(linear.linear(model[0], x), torch.ones(300, 50))
    del model[0].forward
    expected = torch.nn.functional.linear(x, 2 * model[0].weight, model[0].bias)

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[0], "weight", Twice())
    assert torch.equal(model[0](x), expected)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert type(model[0]) is Linear


def test_where_torch_serves(served):
    """Compilers, exporters, traces, torch.func and other numbers get torch's own calls."""
    model, x = mlp(), torch.randn(300, 37)
    expected = model(x)
    tangent = torch.randn_like(x)
    jvp = torch.func.jvp(model, (x,), (tangent,))[1]
    grads = torch.func.grad(lambda x: model(x).sum())(x)
    replaced(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), expected)
    assert torch.equal(torch.vmap(model)(x), torch.vmap(mlp())(x))
    assert torch.equal(torch.func.jvp(model, (x,), (tangent,))[1], jvp)
    assert torch.equal(torch.func.grad(lambda x: model(x).sum())(x), grads)
    assert copy.deepcopy(model).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (300, 11)
    assert not served
    with pytest.raises(RuntimeError, match="dtype"):
        model(x.double())


def test_sharded_layers_compute_as_before():
    """fully_shard makes subclasses of the layers' classes, whose weights are DTensors outside."""
    model, x = mlp(), torch.randn(9, 37)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    replaced(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        model(x).sum().backward()
        grads = [p.grad.full_tensor() for p in model.parameters()]
    finally:
        dist.destroy_process_group()
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives():
    model = replaced(mlp())
    x = torch.randn(5, 37, requires_grad=True)

    def twice(model, x):
        y = model(x).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *model.parameters()])

    exact = twice(copy.deepcopy(model).double(), x.double())
    for a, b in zip(twice(model, x), exact, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_unknown_attention_is_named_again_after_its_layers_are_replaced():
    class OddAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    model = OddAttention()
    first = replace_attention(model, linear=True)
    again = replace_attention(model, linear=True)
    assert [x.type for x in first.kept] == [x.type for x in again.kept] == ["OddAttention"]
    assert len(again.linear) == 3
