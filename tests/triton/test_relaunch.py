"""kernels/relaunch.py: what it launches without Triton's JIT is what the JIT launches.

Both run here on CPU tensors: the driver and the compiled kernels stand in, and note their launches.
"""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from places import ROOT

triton = pytest.importorskip("triton")

from clinattn.backends.call import TENSORS, Arguments  # noqa: E402
from clinattn.kernels import (  # noqa: E402
    backward,
    dbias,
    forward,
    forward_gluon,
    forward_gluon_kernel,
    launch,
    parameters,
    relaunch,
    rotary,
)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels that are interpreted do not run"
    ),
    pytest.mark.skipif(not relaunch.KNOWN, reason="this Triton is launched by its JIT alone"),
]

KERNELS = (
    forward._forward_kernel,
    forward_gluon_kernel.forward_kernel,
    backward.dq_kernel,
    backward.dkdv_kernel,
    dbias.mask_gradient_kernel,
    dbias.relative_gradient_kernel,
    rotary.rotary_kernel,
)


class Compiled:
    """Stands in for a compiled kernel, and records what it is launched with."""

    def __init__(self, launches, source):
        self.launches, self.source = launches, source
        self.function, self.packed_metadata = object(), (4, 1, 0)

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        self.launches.append((self, args))


@pytest.fixture
def launches(monkeypatch, bench_on_the_path):
    """The launches of a test, as (compiled kernel, arguments), with caches of its own."""
    from gpu import ahead

    found = []
    monkeypatch.setattr(
        triton.compiler, "compile", lambda source, **options: Compiled(found, source)
    )
    for kernel in KERNELS:
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    with ahead.stand_in():
        yield found


def numbers(launched):
    """(grid and stream, compiled kernel, arguments), with the addresses of tensors."""
    compiled, arguments = launched
    assert arguments[4:6] == (compiled.function, compiled.packed_metadata)
    return arguments[:4], compiled, [number(x) for x in arguments[9:]]


def number(x):
    if isinstance(x, tuple):
        return tuple(map(number, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else getattr(x, "value", x)


def plain(**words):
    q, k, v = torch.zeros(3, 2, 2, 20, 16, dtype=torch.bfloat16)
    return Arguments(q, k, v, **{"scale": 0.25, **words})


def packed():
    q, k, v = torch.zeros(3, 20, 2, 16)
    ends = torch.tensor([0, 7, 20], dtype=torch.int32)
    return Arguments(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, scale=0.25, window_left=4)


def with_terms():
    return plain(
        mask=torch.zeros(1, 1, 20, 20),
        slopes=torch.ones(1, 2),
        relative=torch.zeros(2, 5),
        softcap=3.0,
        seed=torch.zeros(1, dtype=torch.long),
        dropout_p=0.5,
    )


def both_passes(call, needs=0, dlse=None):
    o, lse, low = forward.attention_forward(call)
    backward.attention_backward(torch.zeros_like(o), dlse, o, lse, low, call, needs)


def turned(call):
    rotary.rotary(call.q, call.k, torch.zeros(20), torch.ones(8), False, False)


def by_gluon(causal):
    q, k, v = torch.zeros(3, 1, 2, 300, 128, dtype=torch.bfloat16)
    forward_gluon.attention_forward_gluon(
        Arguments(q, k, v, scale=0.25, window_right=0 if causal else -1)
    )


CALLS = {
    "plain": lambda: both_passes(plain()),
    "negative scale": lambda: both_passes(plain(scale=-0.25)),
    "dlse": lambda: both_passes(plain(), dlse=torch.zeros(2, 2, 20)),
    "packed": lambda: both_passes(packed()),
    "terms": lambda: both_passes(with_terms(), needs=backward.MASK | backward.RELATIVE),
    "Gluon": lambda: by_gluon(False),
    "Gluon, causal": lambda: by_gluon(True),
    "rotary": lambda: turned(plain()),
    "rotary, packed": lambda: turned(packed()),
}


def test_kernels_get_the_tensors_of_a_call_by_their_names():
    assert parameters.inputs_type(Arguments)._fields == TENSORS


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_plan_launches_what_the_jit_does(call, launches, monkeypatch):
    """Each launch of the second call is made by a plan and then, as if there were none, again."""
    call()
    first = len(launches)
    assert first > 0
    again, by_plan = relaunch.Plan.again, []

    def noted(plan, *args):
        if again(plan, *args):
            by_plan.append(launches.pop())
        return False

    monkeypatch.setattr(relaunch.Plan, "again", noted)
    call()
    assert len(by_plan) == first
    assert [numbers(x) for x in by_plan] == [numbers(x) for x in launches[first:]]


def test_what_is_launched_arrives_at_libcuda(tmp_path):
    """Tuples are flattened by Triton's launcher; see real_launcher.py, which compares."""
    command = [sys.executable, ROOT / "tests/lib/real_launcher.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    by_the_jit, by_a_plan = done.stdout.splitlines()
    assert by_the_jit == by_a_plan and int(by_a_plan.split()[0]) > 20


@pytest.fixture
def through_the_jit(monkeypatch):
    """The kernels that are launched through the JIT."""
    kernels = []
    run = triton.runtime.JITFunction.run

    def counted(self, *args, **keywords):
        kernels.append(self)
        return run(self, *args, **keywords)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", counted)
    monkeypatch.setattr(relaunch, "RUN", counted)
    return kernels


def test_another_alignment_is_another_kernel(launches, through_the_jit):
    """Both have a plan from their first launch on; results differ by a copy of q at most."""
    memory = torch.zeros(2, 2, 20, 16 + 1, dtype=torch.bfloat16).flatten()
    whole = plain()
    part = memory[4 : 4 + whole.q.numel()].view(whole.q.shape)
    assert whole.q.data_ptr() % 16 == 0 and part.data_ptr() % 16 == 8
    calls = [whole, whole._replace(q=part), whole._replace(k=part)]
    for _ in range(3):
        for call in calls:
            forward.attention_forward(call)
    assert len(through_the_jit) == 3
    kernels = [compiled for compiled, _ in launches]
    assert len(set(kernels)) == 3 and kernels == 3 * kernels[:3]
    aligned = [{k: v for k, v in x.source.attrs.items() if v} for x in kernels[:3]]
    assert aligned[0] != aligned[1] != aligned[2]


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_what_a_plan_was_not_made_for_comes_through_the_jit(pass_, launches, through_the_jit):
    call = plain()
    changes = [
        call._replace(scale=0.5),
        call._replace(window_right=0),
        call._replace(q=call.q.transpose(0, 1).contiguous().transpose(0, 1)),
        call._replace(q=call.q.half(), k=call.k.half(), v=call.v.half()),
        call._replace(q_lengths=torch.ones(2, dtype=torch.int32)),
        plain(),
    ]
    run = both_passes if pass_ == "backward" else forward.attention_forward
    run(call)
    for changed in changes:
        before = len(through_the_jit)
        run(changed)
        assert len(through_the_jit) - before == (
            0 if changed is changes[-1] else len({"forward": "f", "backward": "fqk"}[pass_])
        )


@pytest.mark.parametrize("n", [1, 16, 17, 32])
def test_a_number_that_varies_is_no_reason_to_compile(n, launches):
    """An integer in a tuple would be: Triton compiles anew where one is 1 or a multiple of 16."""

    def call(n):
        q, k, v = torch.zeros(3, 2, 2, 40 + n, 16, dtype=torch.bfloat16)
        return Arguments(
            q, k, v, scale=n / 8, softcap=n / 2, window_left=n, window_right=n, global_prefix=n,
            relative=torch.zeros(2, 2 * n + 1), seed=torch.zeros(1, dtype=torch.long),
            dropout_p=n / 2**24,
        )  # fmt: skip

    both_passes(call(5), needs=backward.RELATIVE)
    first = [compiled for compiled, _ in launches]
    both_passes(call(n), needs=backward.RELATIVE)
    assert [compiled for compiled, _ in launches] == first * 2


def test_a_gradient_that_comes_and_goes_keeps_both_plans(launches, through_the_jit):
    call = plain()
    o, lse, low = forward.attention_forward(call)
    for _ in range(3):
        for dlse in (None, torch.zeros_like(lse)):
            backward.attention_backward(torch.zeros_like(o), dlse, o, lse, low, call)
    names = [kernel.__name__ for kernel in through_the_jit]
    assert names == ["_forward_kernel", "dq_kernel", "dkdv_kernel", "dq_kernel"]


def test_hooks_of_profilers_are_called(launches, through_the_jit):
    seen = []
    call = plain()
    for _ in range(2):
        forward.attention_forward(call)
    assert len(through_the_jit) == 1
    enter = triton.knobs.runtime.launch_enter_hook
    enter.add(seen.append)
    try:
        forward.attention_forward(call)
    finally:
        enter.remove(seen.append)
    assert len(through_the_jit) == 2
    assert launches[-1][1][7] is enter  # Triton's launcher is what calls it
    assert launches[1][1][6:9] == (None, None, None)
    forward.attention_forward(call)
    assert len(through_the_jit) == 2


def test_what_replaces_the_jit_sees_every_launch(launches):
    from clinattn.tools.compiled.kernel_report import captured_launches

    call = plain()
    for _ in range(2):
        forward.attention_forward(call)
    with captured_launches(90) as captured:
        forward.attention_forward(call)
    assert len(captured) == 1 and len(launches) == 2


def test_another_driver_has_plans_of_its_own(launches, through_the_jit, bench_on_the_path):
    from gpu import ahead

    call = plain()
    forward.attention_forward(call)
    with ahead.stand_in():
        for _ in range(2):
            forward.attention_forward(call)
    assert len(through_the_jit) == 2


def test_plans_of_one_key_stay_few(launches, monkeypatch):
    """Each of these strides of o asks for a plan of its own."""
    call = plain()
    layout = launch.KernelProblem(call).layout
    for stride in range(3 * relaunch.MOST):
        strides = layout.o_strides._replace(b=stride)
        monkeypatch.setattr(layout, "o_strides", strides)
        forward.attention_forward(call)
        (plans,) = layout.plans.values()
        assert len(plans) <= relaunch.MOST
        assert number(strides) in numbers(launches[-1])[2]
