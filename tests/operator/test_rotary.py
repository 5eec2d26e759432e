"""clinattn.rotary: numbers, bits, layouts, gradients and errors, on the backends of the CPU."""

import importlib.util

import pytest
import torch
from instruction_sets import BUILT, SETS, forced
from rotations import ROTATIONS, U32, Inputs, Rotation, angle_units
from support import BACKENDS, DTYPES, KERNELS, dtype_id

from clinattn import rotary

over_backends = pytest.mark.parametrize("backend", BACKENDS)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
over_kernels = pytest.mark.parametrize(
    "backend",
    KERNELS
    or [pytest.param("cpu", marks=pytest.mark.skip("the compiled backend is not built here"))],
)


@over_backends
@over_dtypes
@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_matches_truth(case, dtype, backend):
    inputs = Inputs(case, dtype)
    inputs.check(inputs.run(backend))


@over_backends
def test_any_angle(backend):
    """Sine and cosine stay exact to their rounding for angles beyond any position in use."""
    angles = torch.cat([torch.zeros(1), (60 * torch.rand(200_000) - 30).exp2()])
    q = torch.tensor([1.0, 0.0]).expand(1, 1, len(angles), 2)
    (cos, sin), _ = (x[0, 0].double().unbind(-1) for x in rotary(q, q, angles, backend=backend))
    for actual, truth in ((cos, angles.double().cos()), (sin, angles.double().sin())):
        assert ((actual - truth).abs() <= 2 * U32 * truth.abs()).all()


# The rotary positions of transformers, written after its modeling code.


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_pos_emb(q, k, positions, theta=10000.0):
    dtype = torch.promote_types(q.dtype, torch.float32)
    dim = q.shape[-1]
    inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).to(dtype) / dim))
    freqs = positions.to(dtype)[:, None] * inv_freq
    emb = torch.cat((freqs, freqs), -1)
    cos, sin = emb.cos(), emb.sin()
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def pair_size(x):
    return x.abs() + rotate_half(x).abs()


@over_backends
@pytest.mark.parametrize("start, n", [(0, 50), (0, 50_000), (-7, 50), (4096, 1), (100_000, 50)])
def test_equals_transformers(start, n, backend):
    """Equal up to the last bit of sine and cosine, which are each library's own."""
    q, k = torch.randn(1, 2, n, 64), torch.randn(1, 1, n, 64)
    positions = start + torch.arange(n)
    expected = apply_rotary_pos_emb(q, k, positions)
    for actual, x, y in zip(
        rotary(q, k, positions, backend=backend), (q, k), expected, strict=True
    ):
        assert ((actual - y).abs() <= 6 * U32 * pair_size(x)).all()


@over_backends
@pytest.mark.parametrize("start", [-7, 1000, 1_000_000])
def test_scores_equal_transformers_from_any_real_position(start, backend):
    q, k = torch.randn(2, 1, 2, 65, 32, dtype=torch.float64)
    positions = start + torch.arange(65, dtype=torch.float64)
    q1, k1 = rotary(q, k, positions, backend=backend)
    q2, k2 = apply_rotary_pos_emb(q, k, positions)
    # The angles of both, of which transformers rounds some as large as start; then the rest.
    units = 2 * angle_units(10000.0) * (abs(start) + 2 * 65) + 40
    size = q.norm(dim=-1)[..., None] * k.norm(dim=-1)[:, :, None]
    assert ((q1 @ k1.mT - q2 @ k2.mT).abs() <= units * 2.0**-53 * size).all()
    assert not torch.allclose(q1, q2)


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_the_formula_is_that_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    q, k, positions = torch.randn(1, 2, 50, 64), torch.randn(1, 1, 50, 64), torch.arange(50)
    config = LlamaConfig(hidden_size=128, num_attention_heads=2)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions[None])
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for actual, y in zip(apply_rotary_pos_emb(q, k, positions), expected, strict=True):
        assert torch.equal(actual, y)


@over_backends
@pytest.mark.parametrize(
    "origin, step",
    [
        (torch.tensor(5e7, dtype=torch.float64), 2.0**-10),
        (torch.tensor(1_700_000_000_000), 1),
        (torch.tensor(4096.0), 0.25),
    ],
    ids=["minutes", "milliseconds", "fp32"],
)
def test_an_origin_changes_no_bit(origin, step, backend):
    """Steps far below the spacing of fp32 at the origin are kept."""
    steps = torch.randint(0, 1000, (2, 70)).cumsum(1)
    steps -= steps[:, :1].clone()
    q, k = torch.randn(2, 2, 3, 70, 16)
    expected = rotary(q, k, steps.double() * step, backend=backend)
    positions = (steps * step).to(origin.dtype) + origin
    for actual, x in zip(rotary(q, k, positions, backend=backend), expected, strict=True):
        assert torch.equal(actual, x)


@over_backends
def test_scores_depend_on_differences_alone(backend):
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64).expand(-1, 1, 1, 40, 32)
    q, k = rotary(q, k, torch.arange(40), backend=backend)
    s = (q @ k.mT)[0, 0]
    torch.testing.assert_close(s[1:, 1:], s[:-1, :-1], rtol=0, atol=1e-12)


LENGTHS = (113, 1, 64, 33)


def sequences(dtype):
    """Yields q, k, dq, dk (H, n, D) and positions (n,) for each length."""
    for n in LENGTHS:
        q, dq = torch.randn(2, 3, n, 40).to(dtype)
        k, dk = torch.randn(2, 2, n, 40).to(dtype)
        yield q, k, dq, dk, torch.rand(n, dtype=torch.float64).cumsum(0) + 1e6


def evaluate(q, k, dq, dk, positions, **keywords):
    q, k = (x.detach().requires_grad_() for x in (q, k))
    out = rotary(q, k, positions, rotary_dim=30, **keywords)
    return [x.detach() for x in (*out, *torch.autograd.grad(out, (q, k), (dq, dk)))]


@over_kernels
@over_dtypes
def test_bits_alone_padded_and_packed(dtype, backend):
    members = list(sequences(dtype))
    alone = [
        evaluate(*(x[None] for x in member[:4]), member[4], backend=backend) for member in members
    ]
    n = max(LENGTHS) + 5
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, n - x.shape[1]), value=torch.nan)
    padded = [torch.stack([pad(member[i]) for member in members]) for i in range(4)]
    positions = torch.stack([pad(member[4][None, :, None])[0, :, 0] for member in members])
    results = evaluate(*padded, positions, backend=backend)
    for s, length in enumerate(LENGTHS):
        for actual, expected in zip(results, alone[s], strict=True):
            assert torch.equal(actual[s, :, :length], expected[0])

    packed = [torch.cat([m[i] for m in members], 1).transpose(0, 1) for i in range(4)]
    positions = torch.cat([member[4] for member in members])
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    for qkdd in (packed, [x.contiguous() for x in packed]):
        results = evaluate(*qkdd, positions, cu_seqlens=cu_seqlens, backend=backend)
        for actual, expected in zip(results, zip(*alone, strict=True), strict=True):
            for part, x in zip(actual.split(LENGTHS), expected, strict=True):
                assert torch.equal(part.transpose(0, 1), x[0])


@over_kernels
@over_dtypes
def test_bits_over_threads(dtype, backend, threads):
    inputs = Inputs(Rotation("threads", lengths=(700, 700), dim=64, positions="days"), dtype)
    threads(1)
    expected = inputs.run(backend)
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, inputs.run(backend), expected))


@BUILT
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
def test_every_instruction_set_has_the_same_bits(dtype):
    cases = [case for case in ROTATIONS if sum(case.lengths)]
    drawn = [Inputs(case, dtype) for case in cases]
    expected = [inputs.run("cpu") for inputs in drawn]
    for name in SETS:
        with forced(name):
            for inputs, x in zip(drawn, expected, strict=True):
                assert all(map(torch.equal, inputs.run("cpu"), x)), f"{name}, {inputs.case}"


@over_backends
def test_any_strides(backend):
    n, positions = 37, torch.rand(2, 37)
    q, k = torch.randn(2, 2, 4, n, 24)
    expected = rotary(q, k, positions, backend=backend)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat([x, x + 1], -1)[..., :24],
        lambda x: x.mT.contiguous().mT,
        lambda x: x.flip(0).contiguous().flip(0),
    ):
        actual = rotary(change(q), change(k), positions, backend=backend)
        assert all(map(torch.equal, actual, expected))
    shared = torch.randn(2, 1, n, 24)
    actual = rotary(shared.expand(2, 4, n, 24), shared.expand(2, 3, n, 24), positions)
    alone, _ = rotary(shared, shared, positions)
    assert all(torch.equal(x, alone.expand_as(x)) for x in actual)
    for positions in (torch.rand(n, 2).T, torch.rand(2, 1).expand(2, n)):
        actual = rotary(q, k, positions, backend=backend)
        expected = rotary(q, k, positions.contiguous(), backend=backend)
        assert all(map(torch.equal, actual, expected))


@over_backends
@pytest.mark.parametrize("interleaved", [False, True])
def test_first_and_second_derivatives(interleaved, backend):
    case = Rotation("grad", lengths=(3, 3), dim=6, rotary_dim=4, interleaved=interleaved)
    inputs = Inputs(case, torch.float64)
    call = lambda q, k: rotary(q, k, inputs.positions, backend=backend, **inputs.keywords)
    assert torch.autograd.gradcheck(call, (inputs.q, inputs.k))
    square = lambda q, k: [x.square() for x in call(q, k)]
    assert torch.autograd.gradgradcheck(square, (inputs.q, inputs.k))


@over_backends
def test_the_gradient_of_one_output(backend):
    q, k = torch.randn(2, 1, 2, 9, 8, requires_grad=True).unbind()
    (dq,) = torch.autograd.grad(rotary(q, k, torch.arange(9), backend=backend)[0].sum(), q)
    expected, _ = rotary(torch.ones_like(q), k, -torch.arange(9), backend=backend)
    assert torch.equal(dq, expected)


Q, K, T = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(5, 4, 8)
AT = torch.arange(5)
ints = lambda *values: torch.tensor(values, dtype=torch.int32)
ERRORS = [
    ("q-list", {"q": [1.0]}, TypeError, "q: got list"),
    ("q-dtype", {"q": Q.int(), "k": K.int()}, TypeError, "q: got torch.int32"),
    ("k-dtype", {"k": K.double()}, TypeError, "k: got torch.float64, expected that of q"),
    ("k-device", {"k": K.to("meta")}, ValueError, "k: got device meta"),
    ("q-rank", {"q": Q[0, 0], "k": K[0, 0]}, ValueError, r"q: got shape \(5, 8\), expected \(ba"),
    ("k-rank", {"k": T}, ValueError, r"k: got shape \(5, 4, 8\)"),
    ("k-tokens", {"k": K[:, :, 1:]}, ValueError, r"k: got shape \(2, 2, 4, 8\)"),
    ("k-dim", {"k": K[..., 1:]}, ValueError, r"k: got shape \(2, 2, 5, 7\)"),
    ("positions-list", {"positions": [0, 1]}, TypeError, "positions: got list"),
    ("positions-dtype", {"positions": AT.half()}, TypeError, "positions: got torch.float16"),
    ("positions-int32", {"positions": AT.int()}, TypeError, "positions: got torch.int32"),
    ("positions-device", {"positions": AT.to("meta")}, ValueError, "positions: got device meta"),
    ("positions-n", {"positions": AT[1:]}, ValueError, r"got shape \(4,\), expected \(5,\) or"),
    ("positions-b", {"positions": AT[None]}, ValueError, r"positions: got shape \(1, 5\)"),
    (
        "positions-packed",
        {"q": T, "k": T, "positions": AT[None]},
        ValueError,
        r"positions: got shape \(1, 5\), expected \(5,\)",
    ),
    (
        "positions-grad",
        {"positions": AT.float().requires_grad_()},
        NotImplementedError,
        "positions: no backend computes their gradient; pass positions.detach",
    ),
    ("theta", {"theta": 0.0}, ValueError, "theta: got 0.0, expected a positive"),
    ("rotary-odd", {"rotary_dim": 5}, ValueError, "rotary_dim: got 5, expected an even number"),
    ("rotary-zero", {"rotary_dim": 0}, ValueError, "rotary_dim: got 0"),
    ("rotary-large", {"rotary_dim": 10}, ValueError, "rotary_dim: got 10, .* to head_dim, 8"),
    ("head-dim-odd", {"q": Q[..., 1:], "k": K[..., 1:]}, ValueError, "rotary_dim: got 7"),
    ("cu-dense", {"cu_seqlens": ints(0, 5)}, ValueError, "cu_seqlens: got one for q .B, H, N, D"),
    ("backend", {"backend": "gpu"}, ValueError, "backend: got 'gpu'"),
]
for _name, _cu, _error, _match in (
    ("list", [0, 5], TypeError, "cu_seqlens: got list"),
    ("int64", ints(0, 5).long(), TypeError, "cu_seqlens: got torch.int64"),
    ("device", ints(0, 5).to("meta"), ValueError, "cu_seqlens: got device meta"),
    ("2d", ints(0, 5)[None], ValueError, r"cu_seqlens: got shape \(1, 2\)"),
    ("start", ints(1, 5), ValueError, "expected to start at 0"),
    ("decrease", ints(0, 4, 2, 5), ValueError, "never decrease"),
    ("overrun", ints(0, 6), ValueError, "end at most at the 5 tokens"),
):
    ERRORS.append((f"cu-{_name}", {"q": T, "k": T, "cu_seqlens": _cu}, _error, _match))


@pytest.mark.parametrize(
    "changed, error, match", [pytest.param(*row[1:], id=row[0]) for row in ERRORS]
)
def test_errors(changed, error, match, monkeypatch):
    module = importlib.import_module("clinattn.operator.rotary")
    monkeypatch.setattr(module, "ROTARY", None)  # nothing is computed before the checks
    with pytest.raises(error, match=match):
        rotary(**{"q": Q, "k": K, "positions": AT, **changed})


def test_without_gradients_positions_may_require_one():
    with torch.no_grad():
        rotary(Q, K, AT.float().requires_grad_())
